"""What a fork does to open stores: the engines are told before, after in the parent, and after in the child.

A child must never close or collect a connection that it inherited: on SQLite that damages the parent's store, on
PostgreSQL it ends the parent's session.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine

_engines: weakref.WeakSet[Engine] = weakref.WeakSet()
_inherited: list[Any] = []


def watch(engine: Engine) -> None:
    """Tell `engine` of forks from now on."""
    _engines.add(engine)


def keep_for_ever(connections: list[Any]) -> None:
    """Never let these be closed or collected, not at the end of the interpreter either."""
    import ctypes

    _inherited.extend(connections)
    for connection in connections:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _before() -> None:
    for engine in list(_engines):
        engine.before_fork()


def _in_parent() -> None:
    for engine in list(_engines):
        engine.after_fork_in_parent()


def _in_child() -> None:
    for engine in list(_engines):
        engine.after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
