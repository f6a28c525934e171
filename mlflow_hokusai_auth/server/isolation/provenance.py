"""Provenance: who made an experiment, a run, a logged model, a registered model or a version.

When MLflow makes such a row for a caller with a key, the server stamps the row: with tags, and with the
owner as its user if MLflow has that column. MLflow's pages show both to people. No decision uses them,
because clients can set the same tags while the gate is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import inspect
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from mlflow_hokusai_auth.core.policy import Policy, is_confined
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.upstream import tables
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.server.upstream.tables import (
    SqlExperiment,
    SqlExperimentTag,
    SqlLoggedModel,
    SqlLoggedModelTag,
    SqlModelVersion,
    SqlModelVersionTag,
    SqlRegisteredModel,
    SqlRegisteredModelTag,
    SqlRun,
    SqlTag,
)

from .hooks import Hooks, Listener

#: Keys of tags that begin with this are the server's. `hokusai.` belongs to Hokusai's own pipeline.
RESERVED = "hokusai_auth."
OWNER = f"{RESERVED}owner"
KEY_ID = f"{RESERVED}key_id"
SOURCE = f"{RESERVED}source"


class _Tags(NamedTuple):
    """The names by which a row has its tags."""

    relationship: str
    model: Any
    key: str = "key"
    value: str = "value"


#: The rows that are stamped.
STAMPED: dict[Any, _Tags] = {
    SqlExperiment: _Tags("tags", SqlExperimentTag),
    SqlRun: _Tags("tags", SqlTag),
    SqlLoggedModel: _Tags("tags", SqlLoggedModelTag, "tag_key", "tag_value"),
    SqlRegisteredModel: _Tags("registered_model_tags", SqlRegisteredModelTag),
    SqlModelVersion: _Tags("model_version_tags", SqlModelVersionTag),
}
#: Rows with a user, which MLflow's pages show as "Created by".
_WITH_USER = (SqlRun, SqlModelVersion)

#: True while SQLAlchemy writes rows that `Provenance` has checked one by one.
_flushing: ContextVar[bool] = ContextVar("hokusai_flushing", default=False)
_USUAL = Policy()


@dataclass(frozen=True, slots=True)
class Provenance(Hooks):
    """Stamps MLflow's new rows if `stamps`, and keeps clients from changing stamps."""

    watch: Watch
    stamps: bool = True
    policy: Policy = _USUAL

    def listeners(self) -> Iterable[Listener]:
        """Return the listeners that stamp and check each row that this process makes."""
        return (
            Listener(Session, "transient_to_pending", self.stamp),
            Listener(Session, "before_flush", self.check),
            Listener(Session, "after_flush", _flushed),
            Listener(Session, "after_soft_rollback", _flushed),
            Listener(Engine, "before_cursor_execute", self.check_statement),
        )

    def stamp(self, _: Session, row: Any) -> None:
        """Stamp a row when MLflow adds it to a session: some answers show it before it is written."""
        tags = STAMPED.get(type(row))
        if tags is None:
            return
        # A client that copies a run or a version sends the stamps of the first one.
        kept = [one for one in getattr(row, tags.relationship) if not _is_reserved(_key(one))]
        caller = callers.current.get()
        if self.stamps and caller.principal is not None:
            for key, value in stamps_of(caller.principal):
                kept.append(_stamp(row, tags, key, value))
            if isinstance(row, _WITH_USER) and caller.principal.owner_id:
                row.user_id = caller.principal.owner_id
                if isinstance(row, SqlRun) and is_confined(caller.principal, self.policy):
                    _show_owner(kept, caller.principal.owner_id)
        setattr(row, tags.relationship, kept)
        if isinstance(row, SqlRun) and caller.named is not None:
            caller.named["run"] = str(row.run_uuid)

    def check(self, session: Session, *_: object) -> None:
        """Raise MlflowException if the caller sets, changes or deletes a stamp."""
        for row in list(session.new):
            if _is_reserved(_key(row)) and not getattr(row, "hokusai_stamp", False):
                if _belongs_to(row, session.new):
                    session.expunge(row)
                else:
                    self._refuse(_key(row))
        for row in session.dirty:
            if type(row) in tables.TAG_KEYS and (key := _changed(row)):
                self._refuse(key)
        for row in session.deleted:
            if _is_reserved(_key(row)) and not _belongs_to(row, session.deleted):
                self._refuse(_key(row))
        _flushing.set(True)

    def check_statement(
        self, _: object, _cursor: object, _text: str, _given: object, context: Any, _many: bool
    ) -> None:
        """Raise MlflowException if a statement that belongs to no flush writes or deletes a stamp."""
        if not (context.isinsert or context.isupdate or context.isdelete) or _flushing.get():
            return
        table = getattr(context.compiled and context.compiled.statement, "table", None)
        column = tables.TAG_COLUMNS.get(table) if table is not None else None
        if column is None:
            return
        for parameters in context.compiled_parameters:
            for name, value in parameters.items():
                # SQLAlchemy numbers the parameters for a column: key, key_1, key_m0.
                if name == column or name.startswith(f"{column}_"):
                    for key in filter(_is_reserved, value if isinstance(value, list) else [value]):
                        self._refuse(key)

    def _refuse(self, key: str) -> None:
        if not self.watch.looks:
            return
        self.watch.refuse(
            "TAG_RESERVED",
            "tag",
            None,
            f"The server itself sets the tag {key}, and nobody else may set, change or delete it: tags "
            f"that begin with {RESERVED} say who made something. Leave this tag out.",
            metrics.ISOLATION,
        )


def stamps_of(principal: Principal) -> Iterable[tuple[str, str]]:
    """Yield key and value of the tags on what `principal` makes."""
    if principal.owner_id:
        yield OWNER, principal.owner_id
    if principal.key_id:
        yield KEY_ID, principal.key_id
    if principal.source:
        yield SOURCE, principal.source


def _show_owner(tags: Iterable[Any], owner: str) -> None:
    """Put `owner` in the place of the user of the client's computer.

    MLflow's client sends that as a tag, often "root", and MLflow's pages show it rather than the run's
    user. The tag is not reserved: the run's owner may set it again.
    """
    for tag in tags:
        if tag.key == tables.CLIENT_USER:
            tag.value = owner


def _stamp(row: Any, tags: _Tags, key: str, value: str) -> Any:
    """Return a tag of `row`. SQLAlchemy alone would set only the columns of their relationship."""
    both = {column.key for column in inspect(tags.model).columns} & set(
        inspect(type(row)).columns.keys()
    )
    shared = {name: getattr(row, name) for name in both - {tags.key, tags.value}}
    made = tags.model(**shared, **{tags.key: key, tags.value: value})
    made.hokusai_stamp = True
    return made


def _flushed(*_: object) -> None:
    _flushing.set(False)


def _is_reserved(key: object) -> bool:
    return isinstance(key, str) and key.startswith(RESERVED)


def _key(row: Any) -> Any:
    """Return the key of a tag, None for any other row."""
    name = tables.TAG_KEYS.get(type(row))
    return getattr(row, name) if name else None


def _changed(row: Any) -> str | None:
    """Return the reserved key of a tag whose key or value changes. Its parent's name may change."""
    key = tables.TAG_KEYS[type(row)]
    before = inspect(row).committed_state.get(key)
    reserved = next(filter(_is_reserved, (before, getattr(row, key))), None)
    if reserved is None:
        return None
    attributes = inspect(row).attrs
    both = (attributes[name].history for name in (key, key.replace("key", "value")))
    return reserved if any(history.has_changes() for history in both) else None


def _belongs_to(tag: Any, rows: Iterable[Any]) -> bool:
    """Return whether one of `rows` is what `tag` belongs to."""
    for row in rows:
        tags = STAMPED.get(type(row))
        if tags is not None and tags.model is type(tag):
            names = [column.key for column in inspect(type(row)).primary_key]
            if all(getattr(tag, name) == getattr(row, name) for name in names):
                return True
    return False
