"""The whole first schema: tables, indexes, guards."""

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
        input {json} NOT NULL,
        output {json},
        state {text} NOT NULL,
        exit_status {integer},
        error {text},
        started_at {integer} NOT NULL,
        finished_at {integer},
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
        FOREIGN KEY (session_id) REFERENCES session (id),
        FOREIGN KEY (run_id) REFERENCES run (id)
    ) {strict}""",
    "CREATE UNIQUE INDEX checkpoint_session_id_id ON checkpoint (session_id, id)",
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


def up(migrator: Any, db: Any) -> None:
    ddl = db.ddl
    ddl.run(*TABLES)

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
