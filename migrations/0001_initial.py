"""The whole first schema: tables, indexes, views, guards."""

from typing import Any

TABLES = (
    """CREATE TABLE counter (
        name {text} NOT NULL PRIMARY KEY,
        value {integer} NOT NULL
    ) {strict}""",
    """CREATE TABLE project (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        name {text} NOT NULL,
        archived_at {integer}
    ) {strict}""",
    "CREATE UNIQUE INDEX project_name ON project (name)",
    """CREATE TABLE project_config (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        project_id {ulid} NOT NULL,
        version {integer} NOT NULL,
        source {text} NOT NULL,
        parsed {json} NOT NULL,
        digest {text} NOT NULL,
        author {text} NOT NULL,
        message {text} NOT NULL,
        FOREIGN KEY (project_id) REFERENCES project (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX project_config_project_id_version ON project_config (project_id, version)",
    """CREATE TABLE prompt (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        project_id {ulid} NOT NULL,
        name {text} NOT NULL,
        FOREIGN KEY (project_id) REFERENCES project (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX prompt_project_id_name ON prompt (project_id, name)",
    """CREATE TABLE prompt_version (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        prompt_id {ulid} NOT NULL,
        version {integer} NOT NULL,
        parent_id {ulid},
        body {text} NOT NULL,
        digest {text} NOT NULL,
        config {json},
        author {text} NOT NULL,
        message {text} NOT NULL,
        FOREIGN KEY (prompt_id) REFERENCES prompt (id),
        FOREIGN KEY (parent_id) REFERENCES prompt_version (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX prompt_version_prompt_id_version ON prompt_version (prompt_id, version)",
    """CREATE TABLE prompt_label (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        prompt_id {ulid} NOT NULL,
        name {text} NOT NULL,
        version_id {ulid} NOT NULL,
        revision {integer} NOT NULL,
        FOREIGN KEY (prompt_id) REFERENCES prompt (id),
        FOREIGN KEY (version_id) REFERENCES prompt_version (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX prompt_label_prompt_id_name ON prompt_label (prompt_id, name)",
    """CREATE TABLE prompt_label_move (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        label_id {ulid} NOT NULL,
        revision {integer} NOT NULL,
        from_version_id {ulid},
        to_version_id {ulid} NOT NULL,
        actor {text} NOT NULL,
        FOREIGN KEY (label_id) REFERENCES prompt_label (id),
        FOREIGN KEY (from_version_id) REFERENCES prompt_version (id),
        FOREIGN KEY (to_version_id) REFERENCES prompt_version (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX prompt_label_move_label_id_revision ON prompt_label_move (label_id, revision)",
    """CREATE TABLE plugin (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        project_id {ulid} NOT NULL,
        name {text} NOT NULL,
        version {text} NOT NULL,
        manifest {json} NOT NULL,
        enabled {boolean} NOT NULL,
        removed_at {integer},
        FOREIGN KEY (project_id) REFERENCES project (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX plugin_project_id_name ON plugin (project_id, name)",
    """CREATE TABLE plugin_state (
        plugin_id {ulid} NOT NULL,
        key {text} NOT NULL,
        revision {integer} NOT NULL,
        expires_at {integer},
        size {integer} NOT NULL,
        value {json} NOT NULL,
        PRIMARY KEY (plugin_id, key),
        FOREIGN KEY (plugin_id) REFERENCES plugin (id)
    ) {strict}""",
    "CREATE INDEX plugin_state_expires_at ON plugin_state (expires_at) WHERE (expires_at IS NOT NULL)",
    """CREATE TABLE session (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        project_id {ulid} NOT NULL,
        title {text} NOT NULL,
        state {text} NOT NULL,
        attached_at {integer},
        detached_at {integer},
        ended_at {integer},
        pinned {boolean} NOT NULL,
        metadata {json} NOT NULL,
        FOREIGN KEY (project_id) REFERENCES project (id)
    ) {strict}""",
    "CREATE INDEX session_project_id ON session (project_id)",
    """CREATE TABLE run (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        session_id {ulid} NOT NULL,
        parent_id {ulid},
        agent {text} NOT NULL,
        prompt_version_id {ulid},
        state {text} NOT NULL,
        exit_status {integer},
        error {text},
        started_at {integer} NOT NULL,
        finished_at {integer},
        pruned_at {integer},
        input {json} NOT NULL,
        output {json},
        FOREIGN KEY (session_id) REFERENCES session (id),
        FOREIGN KEY (parent_id) REFERENCES run (id),
        FOREIGN KEY (prompt_version_id) REFERENCES prompt_version (id)
    ) {strict}""",
    "CREATE INDEX run_session_id ON run (session_id)",
    "CREATE INDEX run_parent_id ON run (parent_id) WHERE (parent_id IS NOT NULL)",
    """CREATE TABLE blob (
        digest {blob} NOT NULL PRIMARY KEY,
        codec {text} NOT NULL,
        size {integer} NOT NULL,
        data {blob} NOT NULL
    ) {strict}""",
    """CREATE TABLE run_attachment (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        run_id {ulid} NOT NULL,
        name {text} NOT NULL,
        kind {text} NOT NULL,
        size {integer} NOT NULL,
        blob {blob} NOT NULL,
        FOREIGN KEY (run_id) REFERENCES run (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX run_attachment_run_id_name ON run_attachment (run_id, name)",
    """CREATE TABLE checkpoint (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        session_id {ulid} NOT NULL,
        run_id {ulid},
        parent_id {ulid},
        label {text},
        reason {text} NOT NULL,
        state {text} NOT NULL,
        pinned {boolean} NOT NULL,
        root {blob} NOT NULL,
        FOREIGN KEY (session_id) REFERENCES session (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX checkpoint_session_id_id ON checkpoint (session_id, id)",
    "CREATE INDEX checkpoint_parent_id ON checkpoint (parent_id) WHERE (run_id IS NULL)",
    """CREATE TABLE checkpoint_head (
        session_id {ulid} NOT NULL PRIMARY KEY,
        checkpoint_id {ulid} NOT NULL,
        newest_id {ulid} NOT NULL,
        moved_at {integer} NOT NULL,
        FOREIGN KEY (session_id) REFERENCES session (id),
        FOREIGN KEY (checkpoint_id) REFERENCES checkpoint (id)
    ) {strict}""",
    """CREATE TABLE audit_event (
        seq {integer} NOT NULL PRIMARY KEY,
        at {integer} NOT NULL,
        kind {text} NOT NULL,
        actor {text} NOT NULL,
        subject {text},
        project {ulid},
        salt {blob} NOT NULL,
        body {text} NOT NULL,
        body_hash {blob} NOT NULL,
        hash {blob} NOT NULL
    ) {strict}""",
    "CREATE INDEX audit_event_subject ON audit_event (subject)",
    """CREATE TABLE audit_seal (
        n {integer} NOT NULL PRIMARY KEY,
        first_seq {integer} NOT NULL,
        last_seq {integer} NOT NULL,
        head {blob} NOT NULL,
        at {integer} NOT NULL,
        mac {blob},
        pruned_at {integer}
    ) {strict}""",
    """CREATE TABLE transcript (
        id {ulid} NOT NULL PRIMARY KEY,
        created_at {integer} NOT NULL,
        session_id {ulid} NOT NULL,
        run_id {ulid},
        number {integer} NOT NULL,
        continues_id {ulid},
        columns {integer} NOT NULL,
        rows {integer} NOT NULL,
        closed_at {integer},
        FOREIGN KEY (session_id) REFERENCES session (id),
        FOREIGN KEY (run_id) REFERENCES run (id),
        FOREIGN KEY (continues_id) REFERENCES transcript (id)
    ) {strict}""",
    "CREATE INDEX transcript_session_id ON transcript (session_id)",
    "CREATE INDEX transcript_run_id ON transcript (run_id) WHERE (run_id IS NOT NULL)",
    "CREATE INDEX transcript_continues_id ON transcript (continues_id) WHERE (continues_id IS NOT NULL)",
    "CREATE UNIQUE INDEX transcript_number ON transcript (number)",
    """CREATE TABLE transcript_chunk (
        key {integer} NOT NULL PRIMARY KEY,
        at {integer} NOT NULL,
        place {integer} NOT NULL,
        size {integer} NOT NULL,
        data {blob} NOT NULL
    ) {strict}""",
    "INSERT INTO counter (name, value) VALUES ('owner_epoch', 0), ('transcript', 0)",
)

# Times have the names that they have in the tables and are text; names stand beside the ids that they belong to. What
# costs a look at other rows is a subquery, so that whoever does not ask for it does not pay for it.
VIEWS = {
    "v_project": """
        SELECT p.id, {utc[p.created_at]} AS created_at, p.name, {utc[p.archived_at]} AS archived_at,
            c.version AS config_version, {utc[c.created_at]} AS configured_at,
            (SELECT COUNT(*) FROM prompt x WHERE x.project_id = p.id) AS prompts,
            (SELECT COUNT(*) FROM plugin x WHERE x.project_id = p.id AND x.removed_at IS NULL) AS plugins,
            (SELECT COUNT(*) FROM session x WHERE x.project_id = p.id) AS sessions,
            (SELECT COUNT(*) FROM session x WHERE x.project_id = p.id AND x.state <> 'ended') AS open_sessions
        FROM project p
        LEFT JOIN project_config c ON c.project_id = p.id
            AND c.version = (SELECT MAX(x.version) FROM project_config x WHERE x.project_id = p.id)""",
    "v_config": """
        SELECT c.id, {utc[c.created_at]} AS created_at, p.name AS project, c.version, c.author, c.message,
            c.source, {as_text[c.parsed]} AS parsed, c.digest, c.project_id
        FROM project_config c
        JOIN project p ON p.id = c.project_id""",
    "v_prompt": """
        SELECT v.id, {utc[v.created_at]} AS created_at, p.name AS project, n.name AS prompt, v.version,
            (SELECT {listed[y.name]} FROM (SELECT x.name FROM prompt_label x
                WHERE x.prompt_id = v.prompt_id AND x.version_id = v.id ORDER BY x.name) y) AS labels,
            v.author, v.message, v.body, {as_text[v.config]} AS config, v.digest, b.version AS parent_version,
            v.parent_id, v.prompt_id, n.project_id
        FROM prompt_version v
        JOIN prompt n ON n.id = v.prompt_id
        JOIN project p ON p.id = n.project_id
        LEFT JOIN prompt_version b ON b.id = v.parent_id""",
    "v_label_move": """
        SELECT m.id, {utc[m.created_at]} AS created_at, p.name AS project, n.name AS prompt, l.name AS label,
            m.revision, f.version AS from_version, t.version AS to_version, m.actor, m.label_id, m.from_version_id,
            m.to_version_id, n.id AS prompt_id, n.project_id
        FROM prompt_label_move m
        JOIN prompt_label l ON l.id = m.label_id
        JOIN prompt n ON n.id = l.prompt_id
        JOIN project p ON p.id = n.project_id
        JOIN prompt_version t ON t.id = m.to_version_id
        LEFT JOIN prompt_version f ON f.id = m.from_version_id""",
    "v_plugin": """
        SELECT g.id, {utc[g.created_at]} AS created_at, p.name AS project, g.name, g.version,
            CASE WHEN g.enabled THEN 'yes' ELSE 'no' END AS enabled, {utc[g.removed_at]} AS removed_at,
            {as_text[g.manifest]} AS manifest,
            (SELECT COUNT(*) FROM plugin_state x WHERE x.plugin_id = g.id) AS keys,
            (SELECT CAST(COALESCE(SUM(x.size), 0) AS {integer}) FROM plugin_state x WHERE x.plugin_id = g.id) AS bytes,
            g.project_id
        FROM plugin g
        JOIN project p ON p.id = g.project_id""",
    "v_plugin_state": """
        SELECT p.name AS project, g.name AS plugin, k.key, k.revision, {utc[k.expires_at]} AS expires_at, k.size,
            {as_text[k.value]} AS value, k.plugin_id, g.project_id
        FROM plugin_state k
        JOIN plugin g ON g.id = k.plugin_id
        JOIN project p ON p.id = g.project_id""",
    "v_session": """
        SELECT s.id, {utc[s.created_at]} AS created_at, p.name AS project, s.title, s.state,
            CASE WHEN s.pinned THEN 'yes' ELSE 'no' END AS pinned, {utc[s.attached_at]} AS attached_at,
            {utc[s.detached_at]} AS detached_at, {utc[s.ended_at]} AS ended_at,
            (SELECT COUNT(*) FROM run x WHERE x.session_id = s.id) AS runs,
            (SELECT COUNT(*) FROM run x WHERE x.session_id = s.id AND x.finished_at IS NULL) AS open_runs,
            {utc[r.started_at]} AS last_run_at, {as_text[s.metadata]} AS metadata, r.id AS last_run_id, s.project_id
        FROM session s
        JOIN project p ON p.id = s.project_id
        LEFT JOIN run r ON r.id = (SELECT MAX(x.id) FROM run x WHERE x.session_id = s.id)""",
    "v_run": """
        SELECT r.id, {utc[r.started_at]} AS started_at, {utc[r.finished_at]} AS finished_at,
            CAST(r.finished_at - r.started_at AS {real}) / 1000 AS seconds, p.name AS project, s.title AS session,
            r.agent, r.state, r.exit_status, r.error, n.name AS prompt, v.version AS prompt_version,
            b.agent AS parent_agent, {as_text[r.input]} AS input, {as_text[r.output]} AS output,
            {utc[r.pruned_at]} AS pruned_at, r.parent_id, r.session_id, r.prompt_version_id, s.project_id
        FROM run r
        JOIN session s ON s.id = r.session_id
        JOIN project p ON p.id = s.project_id
        LEFT JOIN run b ON b.id = r.parent_id
        LEFT JOIN prompt_version v ON v.id = r.prompt_version_id
        LEFT JOIN prompt n ON n.id = v.prompt_id""",
    "v_attachment": """
        SELECT a.id, {utc[a.created_at]} AS created_at, p.name AS project, s.title AS session, r.agent, a.name,
            a.kind, a.size, {hex[a.blob]} AS blob, a.run_id, r.session_id, s.project_id
        FROM run_attachment a
        JOIN run r ON r.id = a.run_id
        JOIN session s ON s.id = r.session_id
        JOIN project p ON p.id = s.project_id""",
    "v_checkpoint": """
        SELECT c.id, {utc[c.created_at]} AS created_at, p.name AS project, s.title AS session, r.agent, c.label,
            c.reason, c.state, CASE WHEN c.pinned THEN 'yes' ELSE 'no' END AS pinned,
            CASE WHEN h.checkpoint_id = c.id THEN 'yes' ELSE 'no' END AS current, {hex[c.root]} AS root,
            c.parent_id, c.run_id, c.session_id, s.project_id
        FROM checkpoint c
        JOIN session s ON s.id = c.session_id
        JOIN project p ON p.id = s.project_id
        LEFT JOIN run r ON r.id = c.run_id
        LEFT JOIN checkpoint_head h ON h.session_id = c.session_id""",
    "v_transcript": """
        SELECT t.id, {utc[t.created_at]} AS created_at, {utc[t.closed_at]} AS closed_at, p.name AS project,
            s.title AS session, r.agent, t.number, t.columns, t.rows, {utc[f.at]} AS first_at, {utc[l.at]} AS last_at,
            (SELECT COUNT(*) FROM transcript_chunk x
                WHERE x.key BETWEEN t.number * 16777216 AND t.number * 16777216 + 16777215) AS chunks,
            (SELECT CAST(COALESCE(SUM(x.size), 0) AS {integer}) FROM transcript_chunk x
                WHERE x.key BETWEEN t.number * 16777216 AND t.number * 16777216 + 16777215) AS bytes,
            (SELECT CAST(COALESCE(SUM(length(x.data)), 0) AS {integer}) FROM transcript_chunk x
                WHERE x.key BETWEEN t.number * 16777216 AND t.number * 16777216 + 16777215) AS stored_bytes,
            t.continues_id, t.run_id, t.session_id, s.project_id
        FROM transcript t
        JOIN session s ON s.id = t.session_id
        JOIN project p ON p.id = s.project_id
        LEFT JOIN run r ON r.id = t.run_id
        LEFT JOIN transcript_chunk f ON f.key = (SELECT MIN(x.key) FROM transcript_chunk x
            WHERE x.key BETWEEN t.number * 16777216 AND t.number * 16777216 + 16777215)
        LEFT JOIN transcript_chunk l ON l.key = (SELECT MAX(x.key) FROM transcript_chunk x
            WHERE x.key BETWEEN t.number * 16777216 AND t.number * 16777216 + 16777215)""",
    "v_audit": """
        SELECT a.seq, {utc[a.at]} AS at, a.kind, a.actor, a.subject, p.name AS project, a.body, {hex[a.hash]} AS hash,
            a.project AS project_id
        FROM audit_event a
        LEFT JOIN project p ON p.id = a.project""",
}


def up(migrator: Any, db: Any) -> None:
    ddl = db.ddl
    ddl.run(*TABLES)
    ddl.views(VIEWS)

    ddl.keep_forever(
        "project_config", "a project config is never changed or removed", keys=[("id",), ("project_id", "version")]
    )
    ddl.keep_forever(
        "prompt_version", "a prompt version is never changed or removed", keys=[("id",), ("prompt_id", "version")]
    )
    ddl.keep_forever(
        "prompt_label_move", "the move of a label is never changed or removed", keys=[("id",), ("label_id", "revision")]
    )

    same_event = ddl.unchanged("seq", "at", "kind", "actor", "subject", "project", "body_hash", "hash")
    same_seal = ddl.unchanged("n", "first_seq", "last_seq", "head", "at", "mac")

    ddl.guard(
        "audit_event",
        "insert",
        "an audit event is appended with the next sequence number",
        unless="NEW.seq = (SELECT COALESCE(MAX(seq), 0) + 1 FROM audit_event)",
    )
    ddl.guard(
        "audit_event",
        "update",
        "an audit event is never changed; its body can be redacted after an audit.redacted event",
        unless=f"{same_event} AND NEW.body = '' AND length(NEW.salt) = 0"  # noqa: S608
        " AND EXISTS (SELECT 1 FROM audit_event WHERE subject = 'audit_event:' || OLD.seq AND kind = 'audit.redacted')",
    )
    ddl.guard(
        "audit_event",
        "delete",
        "an audit event is never removed; whole sealed ranges can be pruned",
        unless="EXISTS (SELECT 1 FROM audit_seal WHERE OLD.seq BETWEEN first_seq AND last_seq"
        " AND pruned_at IS NOT NULL)",
    )
    ddl.no_truncate("audit_event", "an audit event is never removed; whole sealed ranges can be pruned")

    ddl.guard(
        "audit_seal",
        "insert",
        "an audit seal is appended and begins where the last one ended",
        unless="NEW.n = (SELECT COALESCE(MAX(n), 0) + 1 FROM audit_seal) AND NEW.pruned_at IS NULL"
        " AND NEW.first_seq = (SELECT COALESCE(MAX(last_seq), 0) + 1 FROM audit_seal)"
        " AND NEW.last_seq >= NEW.first_seq",
    )
    ddl.guard(
        "audit_seal",
        "update",
        "an audit seal is never changed; it can be marked as pruned, once",
        unless=f"{same_seal} AND OLD.pruned_at IS NULL AND NEW.pruned_at IS NOT NULL",
    )
    ddl.guard("audit_seal", "delete", "an audit seal is never removed")
    ddl.no_truncate("audit_seal", "an audit seal is never removed")

    ddl.guard("transcript_chunk", "update", "a chunk of a transcript is never changed")
