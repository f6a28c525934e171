"""Hooks in SQLAlchemy, through which MLflow reads and writes everything in its database.

SQLAlchemy's events hold for the whole process. So only the last hooks of a class that were installed
work: those of the last application that was put together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import event


class Listener(NamedTuple):
    """A function that SQLAlchemy calls at an event, as `sqlalchemy.event.listen` takes it."""

    target: Any
    name: str
    function: Callable[..., Any]
    #: True if SQLAlchemy uses what the function returns instead of its arguments.
    returns: bool = False


class Hooks(ABC):
    """A part of isolation that works by listeners."""

    __slots__ = ()

    @abstractmethod
    def listeners(self) -> Iterable[Listener]:
        """Return the listeners, in the order in which they are called."""

    def install(self) -> None:
        """Listen from now on, instead of the hooks of the same class that were installed before."""
        if (before := _installed.get(type(self))) is not None:
            before.remove()
        for target, name, function, returns in self.listeners():
            event.listen(target, name, function, **({"retval": True} if returns else {}))
        _installed[type(self)] = self

    def remove(self) -> None:
        """Stop listening."""
        del _installed[type(self)]
        for target, name, function, _ in self.listeners():
            event.remove(target, name, function)


_installed: dict[type[Hooks], Hooks] = {}
_Kind = TypeVar("_Kind", bound=Hooks)


def installed(kind: type[_Kind]) -> _Kind | None:
    """Return the hooks of class `kind` that are installed in this process; None if none are."""
    found = _installed.get(kind)
    return found if isinstance(found, kind) else None
