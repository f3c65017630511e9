"""What all models share: the base class, statements rendered once, who acts on what, and the store they are bound to.

The models know of the open store only what `BoundStore` says; `kagedb.connect` fills it in.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, Self

import peewee

from ..errors import InvalidValue, NotFound, StorageClosed
from ..fields import IntegerField, Limits, MillisField, NameField, UlidField, check_text
from ..identity import new_ulid, now_ms

if TYPE_CHECKING:
    from ..settings import Settings

# Neither lets through what a terminal that shows it would obey.
_ACTOR = re.compile(r"[a-z][a-z0-9_-]{0,30}:(?!\s)[^\x00-\x1f\x7f-\x9f\u2028\u2029]{1,200}(?<!\s)")
_SUBJECT = re.compile(r"[a-z][a-z0-9_]{0,60}:[^\s\x00-\x1f\x7f-\x9f]{1,200}")


class BoundStore(Protocol):
    """What the verbs need of an open store."""

    def transaction(self, durability: str = "full") -> AbstractContextManager[Any]: ...

    def notify(self, kind: str, subject: str, project: str | None) -> None: ...

    def subscribe(self, callback: Callable[[Any], Any]) -> Callable[[], None]: ...

    def before_close(self, callback: Callable[[], None]) -> None: ...

    def seal_mac(self, n: int, message: bytes) -> bytes | None: ...

    @property
    def seal_key_place(self) -> str: ...

    @property
    def database(self) -> Any: ...

    @property
    def settings(self) -> Settings: ...


_bound: BoundStore | None = None
_refusal: Callable[[], Exception] | None = None


def bind(store: BoundStore | None, refusal: Callable[[], Exception] | None = None) -> None:
    """Make `store` the one that the verbs work on; with `refusal`, every verb raises what it gives."""
    global _bound, _refusal
    _bound, _refusal = store, refusal
    database = store.database if store is not None and refusal is None else NO_DATABASE
    for model in Model.all():
        model._meta.set_database(database)


def bound_store() -> BoundStore:
    """The open store. Raises StorageClosed where there is none, SchemaTooOld where its schema does not fit."""
    if _refusal is not None:
        raise _refusal()
    if _bound is None:
        raise StorageClosed("no store is open", "open one with kagedb.connect()")
    return _bound


class _NoDatabase(peewee.Proxy):  # type: ignore[misc]
    """What the models have for a database while no store is open: a query says so in the words of the verbs.

    One that was made then, at a module's top perhaps, runs on the store that is open when it is run.
    """

    limits = Limits()

    def __getattr__(self, name: str) -> Any:
        return getattr(bound_store().database, name)


NO_DATABASE = _NoDatabase()


class TableMaker(peewee.SchemaManager):  # type: ignore[misc]
    """Peewee writes STRICT on every engine; here the database says whether it knows the word."""

    def _create_table(self, safe: bool = True, **options: Any) -> Any:
        context = super()._create_table(safe, **options)
        return context.literal(" STRICT") if self.database.strict_tables else context


class Parameter(peewee.Node):  # type: ignore[misc]
    """A value of a hot statement, named, to be checked by `field` each time."""

    def __init__(self, name: str, field: Any) -> None:
        self.name = name
        self.field = field

    def convert(self, value: Any) -> Any:
        """`value` as the driver takes it. Raises InvalidValue, for None where the column takes no NULL too."""
        converted = self.field.db_value(value)
        if converted is None and not self.field.null:
            raise InvalidValue(
                f"{self.field.model._meta.table_name}.{self.field.name} takes no None", "give it a value"
            )
        return converted

    def __sql__(self, context: Any) -> Any:
        context._values.append(self)
        return context.literal(context.state.param or "?")


class Hot:
    """A statement that is rendered once for a store: rendering is four fifths of the cost of Peewee's own way.

    `build` gives a Peewee query in which `Parameter` nodes stand for the values.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build

    def run(self, **values: Any) -> Any:
        """Run it with a value for each parameter; gives the cursor."""
        database, sql, slots = self._rendered()
        return database.execute_sql(sql, [slot.convert(values[slot.name]) for slot in slots])

    def run_checked(self, values: dict[str, Any]) -> Any:
        """`run` for values that the caller has checked already, as the driver takes them: text, integers, bytes."""
        database, sql, slots = self._rendered()
        return database.execute_sql(sql, [values[slot.name] for slot in slots])

    def _rendered(self) -> tuple[Any, str, list[Parameter]]:
        database = bound_store().database
        rendered = database.rendered.get(self)
        if rendered is None:
            rendered = database.rendered[self] = self._render(database)
        return database, *rendered

    def one(self, **values: Any) -> Any:
        """The first row as a tuple, or None."""
        return self.run(**values).fetchone()

    def _render(self, database: Any) -> tuple[str, list[Parameter]]:
        context = database.get_sql_context()
        # Constants as literals: SQLite prepares a statement anew at each run where LIMIT is a parameter.
        with context(value_literals=True):
            return context.sql(self._build()).query()  # type: ignore[no-any-return]


class Model(peewee.Model):  # type: ignore[misc]
    """The base of everything that is stored.

    Rows made by verbs come from statements rendered once; `select`, `where` and the rest of Peewee work as ever.
    """

    _by_id: Hot
    _insert: Hot

    class Meta:
        database = NO_DATABASE
        legacy_table_names = False
        schema_manager_class = TableMaker

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Each model has statements of its own; they are rendered when first used.
        cls._by_id = Hot(lambda: cls.select().where(cls.key_field() == Parameter("key", cls.key_field())))
        cls._insert = Hot(
            lambda: peewee.ModelInsert(cls, {field: Parameter(field.name, field) for field in cls._meta.sorted_fields})
        )

    @classmethod
    def all(cls) -> list[type[Model]]:
        """Every model of the schema, in an order in which the tables can be made."""
        found: list[type[Model]] = peewee.sort_models([model for model in _leaves(Model) if model._meta.table_name])
        return found

    @classmethod
    def key_field(cls) -> Any:
        return cls._meta.primary_key

    @classmethod
    def put(cls, **values: Any) -> Self:
        """Insert one row; fields that are not named take their default, or NULL. Gives the row as a model.

        The model holds the values as they were given: a tuple in JSON is an array when it is read again.
        """
        meta = cls._meta
        row = {
            field.name: values.pop(field.name, None) if field.name in values else _default(field)
            for field in meta.sorted_fields
        }
        if values:
            raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(values))}")
        cls._insert.run(**row)
        return cls._from_data(row)

    @classmethod
    def by_id(cls, key: Any) -> Self:
        """The row with that key. Raises NotFound."""
        row = cls._by_id.one(key=key)
        if row is None:
            command, _, _ = cls._meta.table_name.partition("_")
            raise NotFound(
                f"there is no {cls._meta.table_name.replace('_', ' ')} {key}",
                f"see what there is with: kaged {command} list",
            )
        return cls.from_row(row)

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> Self:
        """A model from a row of all its columns, in their order; a tenth of the cost of Peewee's own way."""
        model: Self = cls._reader()(row)
        return model

    @classmethod
    @functools.cache
    def _reader(cls) -> Callable[[tuple[Any, ...]], Any]:
        """`from_row` with all that does not depend on the row already done."""
        names, decoded = [], []
        for field in cls._meta.sorted_fields:
            names.append(field.name)
            name = field.name
            while isinstance(field, peewee.ForeignKeyField):
                field = field.rel_field
            if field.stored is not None:
                decoded.append((name, field.stored, field.python_value))
        new = cls.__new__

        def read(row: tuple[Any, ...]) -> Any:
            data = dict(zip(names, row))  # noqa: B905 (a tenth of the time; the queries have all columns)
            for name, stored, decode in decoded:
                if type(data[name]) is stored:
                    data[name] = decode(data[name])
            model = new(cls)  # as _from_data does: its call would be a tenth of the whole
            model.__data__ = data
            model.__rel__ = {}
            model._dirty = set()
            return model

        return read

    @classmethod
    def _from_data(cls, data: dict[str, Any]) -> Self:
        model = cls.__new__(cls)
        model.__data__ = data
        model.__rel__ = {}
        model._dirty = set()
        return model

    @classmethod
    def rows(cls, query: Any) -> Iterator[Self]:
        """The models of a query over all columns of this model, made one by one as they are read."""
        # The driver's cursor: Peewee's own would convert the values, JSON among them, a first time.
        cursor = bound_store().database.execute(query)
        if len(cursor.description) != len(cls._meta.sorted_fields):
            raise TypeError(f"the query does not have all columns of {cls.__name__}")
        yield from map(cls._reader(), cursor)

    def save(self, force_insert: bool = False, only: Any = None) -> Any:
        """Peewee's save, which with a key made by the client is an UPDATE that may change nothing: that is an error."""
        changed = super().save(force_insert=force_insert, only=only)
        if not changed and not force_insert:
            raise NotFound(f"{self.ref} is not in the store", "make new rows with create()")
        return changed

    @property
    def ref(self) -> str:
        """How audit events and notifications name this: "table:id"."""
        return f"{self._meta.table_name}:{self._pk}"

    @property
    def audited_project(self) -> str | None:
        """The id of the project that an audit event about this belongs to."""
        return None


class Identified(Model):
    """A row with a ULID and the time it was made."""

    id = UlidField(primary_key=True, default=new_ulid)
    created_at = MillisField(default=now_ms)


def set_pinned(row: Any, pinned: bool) -> None:
    """Pin a row that can be pinned, or unpin it. Raises NotFound."""
    store, model = bound_store(), type(row)
    with store.transaction():
        current = model.by_id(row.id)
        model.update(pinned=pinned).where(model.id == row.id).execute()
        kind = f"{model._meta.table_name}.{'pinned' if pinned else 'unpinned'}"
        store.notify(kind, row.ref, current.audited_project)
    row.__data__["pinned"] = pinned


class Counter(Model):
    """Numbers that only go up: transcript numbers, the epoch of the owner."""

    name = NameField(primary_key=True)
    value = IntegerField()


def _default(field: Any) -> Any:
    return field.default() if callable(field.default) else field.default


def _leaves(model: type[Model]) -> Iterator[type[Model]]:
    for child in model.__subclasses__():
        if child.__subclasses__():
            yield from _leaves(child)
        else:
            yield child


def check_actor(actor: Any) -> str:
    """`actor` if it is of the form `kind:name`, like `operator:ana` or `agent:planner`. Raises InvalidValue."""
    if not isinstance(actor, str) or not _ACTOR.fullmatch(actor):
        raise InvalidValue(
            f"the actor {str(actor)[:60]!r} is not of the form kind:name",
            "write operator:ana, agent:planner or daemon:kaged",
        )
    check_text(actor, "the actor")
    return actor


def subject_ref(subject: Any) -> str | None:
    """The text that names a subject: a model as its `ref`, or text of the form `table:id`. Raises InvalidValue."""
    if subject is None:
        return None
    if isinstance(subject, Model):
        return subject.ref
    if not isinstance(subject, str) or not _SUBJECT.fullmatch(subject):
        raise InvalidValue(f"the subject {str(subject)[:60]!r} is not of the form table:id", "pass a model, or its ref")
    check_text(subject, "the subject")
    return subject
