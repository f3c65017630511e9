"""Nothing in the audit log can be changed or removed through the database, on either engine, by any route tried."""

from __future__ import annotations

import peewee
import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audit_attacks import fill
from kagedb.errors import ImmutableError, InvalidValue, KagedError
from kagedb.models import AuditEvent, AuditSeal
from kagedb.operations.audit_verify import verify
from kagedb.storage import Storage

ROUTES = {
    "update": lambda: AuditEvent.update(kind="other").where(AuditEvent.seq == 2).execute(),
    "update of everything": lambda: AuditEvent.update(at=0).execute(),
    "update to nothing new": lambda: AuditEvent.update(kind=AuditEvent.kind).execute(),
    "an empty body without a redaction": lambda: (
        AuditEvent.update(body="", salt=b"").where(AuditEvent.seq == 2).execute()
    ),
    "delete": lambda: AuditEvent.delete().where(AuditEvent.seq == 2).execute(),
    "delete of the newest": lambda: AuditEvent.delete().where(AuditEvent.seq == 5).execute(),
    "save": lambda: AuditEvent.by_id(2).save(),
    "delete_instance": lambda: AuditEvent.by_id(2).delete_instance(),
    "insert with a number that is taken": lambda: AuditEvent.insert(copy_of(3)).execute(),
    "insert with a gap": lambda: AuditEvent.insert({**copy_of(3), "seq": 9}).execute(),
    "insert before the first": lambda: AuditEvent.insert({**copy_of(3), "seq": 0}).execute(),
    "upsert": lambda: (
        AuditEvent.insert({**copy_of(3), "kind": "x"})
        .on_conflict(conflict_target=[AuditEvent.seq], update={AuditEvent.kind: "x"})
        .execute()
    ),
    "seal: update": lambda: AuditSeal.update(last_seq=9).execute(),
    "seal: delete": lambda: AuditSeal.delete().execute(),
    "seal: insert out of order": lambda: AuditSeal.insert({**seal_copy(), "n": 5}).execute(),
    "seal: insert of a marked one": lambda: AuditSeal.insert({**seal_copy(), "n": 2, "pruned_at": 1}).execute(),
}


def copy_of(seq: int) -> dict[str, object]:
    return dict(AuditEvent.by_id(seq).__data__)


def seal_copy() -> dict[str, object]:
    return dict(AuditSeal.by_id(1).__data__)


@pytest.fixture
def log(storage: Storage) -> Storage:
    fill(storage, 5, seal_every=5)
    return storage


def contents() -> list[tuple[object, ...]]:
    return [*AuditEvent.select().order_by(AuditEvent.seq).tuples(), *AuditSeal.select().tuples()]


@pytest.mark.parametrize("route", ROUTES)
def test_is_refused_and_says_why(log: Storage, route: str) -> None:
    before = contents()
    with pytest.raises(ImmutableError) as refused:
        ROUTES[route]()
    assert refused.value.message.startswith(("an audit event is ", "an audit seal is "))
    assert contents() == before
    assert verify(log).result == "holds"


@pytest.mark.sqlite_only
@pytest.mark.parametrize("route", ["replace", "on_conflict_replace", "insert or replace", "update or replace"])
def test_replace_is_refused(log: Storage, route: str) -> None:
    """REPLACE is SQLite's alone: it deletes rows without firing their triggers."""
    before = contents()
    with pytest.raises(ImmutableError):
        if route == "replace":
            AuditEvent.replace({**copy_of(3), "kind": "x"}).execute()
        elif route == "on_conflict_replace":
            AuditEvent.insert({**copy_of(3), "kind": "x"}).on_conflict_replace().execute()
        elif route == "insert or replace":
            log.database.execute_sql("INSERT OR REPLACE INTO audit_event SELECT * FROM audit_event WHERE seq = 3")
        else:
            log.database.execute_sql("UPDATE OR REPLACE audit_event SET seq = 2 WHERE seq = 3")
    assert contents() == before


@pytest.mark.postgres_only
@pytest.mark.parametrize("table", ["audit_event", "audit_seal"])
@pytest.mark.parametrize("as_replica", [False, True])
def test_truncate_and_the_replica_role_are_refused(
    log: Storage, postgres_server: object, migrated_url: str, table: str, as_replica: bool
) -> None:
    """TRUNCATE and session_replication_role are PostgreSQL's alone; the second needs a superuser."""
    name = psycopg2.extensions.parse_dsn(migrated_url)["dbname"]
    connection = psycopg2.connect(postgres_server.admin_url(name))  # type: ignore[attr-defined]
    connection.autocommit = True
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET search_path = kaged")
            if as_replica:
                cursor.execute("SET session_replication_role = replica")
            for statement in (f"TRUNCATE {table}", f"DELETE FROM {table}", f"UPDATE {table} SET at = 0"):
                with pytest.raises(psycopg2.IntegrityError, match="kagedb: an audit"):
                    cursor.execute(statement)
            # A path of the attacker's own, with a seal of their own that says everything is pruned.
            cursor.execute("CREATE SCHEMA fake; CREATE TABLE fake.audit_seal AS SELECT * FROM kaged.audit_seal;")
            cursor.execute("UPDATE fake.audit_seal SET pruned_at = 1; SET search_path = fake, kaged")
            with pytest.raises(psycopg2.IntegrityError, match="kagedb: an audit"):
                cursor.execute("DELETE FROM kaged.audit_event")
    finally:
        connection.close()
    assert verify(log).result == "holds"


@pytest.mark.parametrize("kind", ["audit.pruned", "audit.redacted", "store.created", "audit.", "store.x"])
def test_events_that_open_the_log_cannot_be_recorded_by_others(storage: Storage, kind: str) -> None:
    with pytest.raises(InvalidValue, match="reserved"):
        AuditEvent.record(kind, actor="plugin:evil", subject="audit_event:1")


@pytest.mark.parametrize("kind", ["", "Policy", "policy..x", ".x", "policy decision", "x" * 101, "policy\n", 5, None])
def test_a_kind_that_is_not_dotted_words_is_refused(storage: Storage, kind: object) -> None:
    with pytest.raises(InvalidValue):
        AuditEvent.record(kind, actor="agent:planner")  # type: ignore[arg-type]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    body=st.dictionaries(
        st.text(max_size=20),
        st.recursive(st.none() | st.booleans() | st.text() | st.integers(), st.lists, max_leaves=5),
    ),
    actor=st.text(max_size=40).map(lambda text: f"agent:{text}"),
    subject=st.none() | st.text(max_size=40).map(lambda text: f"run:{text}"),
)
def test_whatever_is_recorded_is_read_back_and_verifies(
    storage: Storage, body: dict[str, object], actor: str, subject: str | None
) -> None:
    try:
        event = AuditEvent.record("policy.decision", actor=actor, subject=subject, body=body)
    except (InvalidValue, KagedError) as error:
        assert isinstance(error, InvalidValue)
        return
    assert dict(AuditEvent.by_id(event.seq).__data__) == dict(event.__data__)
    assert verify(storage).result == "holds"


def test_a_rolled_back_event_leaves_no_gap(storage: Storage) -> None:
    with pytest.raises(ZeroDivisionError), storage.transaction():
        AuditEvent.record("policy.decision", actor="agent:planner")
        raise ZeroDivisionError
    assert AuditEvent.record("policy.decision", actor="agent:planner").seq == 2
    assert verify(storage).result == "holds"


def test_an_integrity_error_of_another_kind_stays_one(storage: Storage) -> None:
    with pytest.raises(peewee.IntegrityError):
        AuditEvent.insert({"seq": 2, "at": 1, "kind": "x"}).execute()
