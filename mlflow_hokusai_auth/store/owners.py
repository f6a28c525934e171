"""Owners, grants and prefixes for people: what the REST API and the command line show and change.

A change waits for changes of models that are under way, and they wait for it. So no model that is made
in the same moment misses a new grant, or keeps one that was removed.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import sqlalchemy as sa

from mlflow_hokusai_auth.core import locations
from mlflow_hokusai_auth.core import ownership as rules
from mlflow_hokusai_auth.core.counts import whole_number
from mlflow_hokusai_auth.core.errors import (
    AuthorityUnavailable,
    Conflict,
    Forbidden,
    InvalidRequest,
    NotFound,
)
from mlflow_hokusai_auth.core.isolation import DEFAULT_EXPERIMENT

from . import ownership
from .database import BUSY_TIMEOUT, first_line
from .ownership import MLFLOW_EXPERIMENTS, MLFLOW_MODELS, MLFLOW_VERSIONS, SAME_EXPERIMENT
from .ownership_tables import EXPERIMENTS, GRANTS, MODEL_ACCESS, MODELS, PREFIXES, VERSIONS
from .suggestions import suggest

#: Rows on a page, and of each list in an answer, at most.
MAX_RESULTS = 1000
#: Grants that one owner may have given, at most; operators may give any number.
MAX_GRANTS = 1000
#: The maximum lifetime of a grant (20 years), in seconds.
MAX_LIFETIME = 20 * 365 * 86400
#: Names that one transaction of `assign_owner` changes, at most.
BATCH = 100
#: Grants that a list of models names for each of them, at most.
MOST_SHARES = 5

MLFLOW_RUNS = sa.table("runs", sa.column("run_uuid"), sa.column("experiment_id"))
_MLFLOW_LOGGED = sa.table("logged_models", sa.column("model_id"), sa.column("experiment_id"))

_BOUND = sa.select(sa.func.set_config("lock_timeout", f"{BUSY_TIMEOUT * 1000:.0f}", True))

#: Adds a row to the audit log: the event, and its detail.
Audit = Callable[[str, Mapping[str, Any]], None]
_Condition = Callable[[Any], sa.ColumnElement[bool]]


class Page(list[dict[str, Any]]):
    """A page of rows; `token` is the next page's, or None."""

    token: str | None = None


class Found(NamedTuple):
    """A part of a list for people: the rows from number `first` on (from 0), of `total` in all."""

    rows: list[dict[str, Any]]
    first: int
    total: int


class _Named(NamedTuple):
    """A name that is assigned: the row of `owners`, and whether MLflow has it."""

    row: dict[str, Any]
    exists: bool
    creation_time: int | None = None


class _Group(NamedTuple):
    """The names assigned to `owner`: a condition on them, and those that should exist."""

    kind: str
    owner: str
    condition: _Condition
    names: set[str]


class Ownership:
    """Ownership in the database of `engine`, for one caller.

    `owner` is the caller's, or None for an operator, who sees and changes everything. `key_owners`
    returns the owners of keys. Each method raises AuthorityUnavailable if the database can't be used,
    and StoreError if it has no tables of MLflow, or ours can't be made there. Rows are dictionaries, as
    in the REST API; times are in seconds since the epoch.
    """

    def __init__(
        self,
        engine: sa.Engine,
        audit: Audit,
        owner: str | None = None,
        key_id: str = "",
        key_owners: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._engine = engine
        self._audit = audit
        self._owner = owner
        self._key_id = key_id
        self._key_owners = key_owners

    def list_owners(
        self,
        *,
        kind: str = "model",
        owner: str | None = None,
        unowned: bool = False,
        max_results: int = 100,
        page_token: str | None = None,
    ) -> Page:
        """Return a page of the models or experiments that MLflow has, each with its owner or None.

        `kind` is "model" or "experiment". `suggested` are names that MLflow's tables have, if an
        operator asks for what is unowned. Raises InvalidRequest.
        """
        _check_kind(kind)
        if owner is not None and unowned:
            raise InvalidRequest("Ask for an owner or for unowned, not both.")
        query = _models() if kind == "model" else _experiments()
        owned_by = MODELS.c.owner if kind == "model" else EXPERIMENTS.c.owner
        if owner is not None:
            query = query.where(_is_owned(kind, owner))
        if unowned:
            query = query.where(owned_by.is_(None))
            if kind == "experiment":
                query = query.where(MLFLOW_EXPERIMENTS.c.experiment_id != DEFAULT_EXPERIMENT)
        if kind == "model":
            column, name = MLFLOW_MODELS.c.name, "name"
        else:
            column, name = MLFLOW_EXPERIMENTS.c.experiment_id, "experiment_id"
        page = self._page(query, column, name, max_results, page_token)
        suggested: dict[Any, list[str]] = {}
        if unowned and self._owner is None:
            with self._reading() as connection:
                suggested = suggest(connection, kind, [row[name] for row in page])
        for row in page:
            row["suggested"] = suggested.get(row[name], [])
        return page

    def find_models(
        self,
        *,
        text: str = "",
        owner: str | None = None,
        unowned: bool = False,
        shared: bool = False,
        first: int = 0,
        most: int = 50,
    ) -> Found:
        """Return a part of the models that MLflow has, with the grants on each of them.

        `text` is a part of their names in any case, and `owner` (None for any) whose they are. With
        `shared`, they are those that the caller has by a grant. `first` is lowered if there are fewer.

        A row is one of `list_owners` that also has `shares`: the first `MOST_SHARES` grants of those
        that the caller may list and that have not ended, and `shares_in_all`, their number. Raises
        InvalidRequest.
        """
        if owner is not None and unowned:
            raise InvalidRequest("Ask for an owner or for unowned, not both.")
        query = _models()
        if text:
            query = query.where(_has_part(text, MLFLOW_MODELS.c.name))
        if owner is not None:
            query = query.where(_is_owned("model", owner))
        if unowned:
            query = query.where(MODELS.c.owner.is_(None))
        now = time.time()
        if shared:
            mine = sa.and_(MODEL_ACCESS.c.grantee == self._owner, _lasts(MODEL_ACCESS, now))
            query = query.where(
                MLFLOW_MODELS.c.name.in_(sa.select(MODEL_ACCESS.c.name).where(mine)),
                MODELS.c.owner.is_distinct_from(self._owner),
            )
        with self._reading() as connection:
            found = _part(connection, query, (MLFLOW_MODELS.c.name,), first, most)
            names = [row["name"] for row in found.rows]
            shares = self._shares(connection, names, now)
            suggested: dict[Any, list[str]] = {}
            if unowned and self._owner is None:
                suggested = suggest(connection, "model", names)
        rows = []
        for row in found.rows:
            listed = shares.get(row["name"], [])
            rows.append(
                {
                    **self._redacted(row),
                    "suggested": suggested.get(row["name"], []),
                    "shares": listed,
                    "shares_in_all": listed[0]["in_all"] if listed else 0,
                }
            )
        return found._replace(rows=rows)

    def find_grants(self, *, text: str = "", first: int = 0, most: int = 50) -> Found:
        """Return a part of the grants that the caller may list, those given last first.

        `text` is a part of the pattern or of an owner, in any case. `first` is lowered if there are
        fewer. Raises InvalidRequest.
        """
        query = self._grants()
        if text:
            columns = (GRANTS.c.pattern, GRANTS.c.grantee, GRANTS.c.granted_by)
            query = query.where(_has_part(text, *columns))
        order = (GRANTS.c.created_at.desc(), GRANTS.c.id)
        with self._reading() as connection:
            found = _part(connection, query, order, first, most)
        return found._replace(rows=[self._redacted_grant(row) for row in found.rows])

    def grants_to(self, grantee: str) -> list[dict[str, Any]]:
        """Return the grants that `grantee` has still, of those that the caller may list."""
        lasting = (GRANTS.c.grantee == grantee, _lasts(GRANTS, time.time()))
        query = self._grants().where(*lasting).order_by(GRANTS.c.pattern, GRANTS.c.id)
        with self._reading() as connection:
            found = connection.execute(query).mappings()
            return [self._redacted_grant(dict(row)) for row in found]

    def find_prefixes(self, *, text: str = "", first: int = 0, most: int = 50) -> Found:
        """Return a part of the prefixes, in their order.

        `text` is a part of the prefix or of its owner, in any case. `first` is lowered if there are
        fewer. Raises InvalidRequest.
        """
        query = sa.select(PREFIXES)
        if text:
            query = query.where(_has_part(text, PREFIXES.c.prefix, PREFIXES.c.owner))
        with self._reading() as connection:
            return _part(connection, query, (PREFIXES.c.prefix, PREFIXES.c.kind), first, most)

    def _shares(
        self, connection: sa.Connection, names: list[str], now: float
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the grants on each of these models that `find_models` names."""
        each = MODEL_ACCESS.c.name
        order = (GRANTS.c.grantee, GRANTS.c.id)
        numbered = (
            sa.select(
                MODEL_ACCESS.c.name,
                *(GRANTS.c[name] for name in ("id", "grantee", "granted_by", "level")),
                GRANTS.c.expires_at,
                sa.func.count().over(partition_by=each).label("in_all"),
                sa.func.row_number().over(partition_by=each, order_by=order).label("number"),
            )
            .join(GRANTS, GRANTS.c.id == MODEL_ACCESS.c.grant_id)
            .where(MODEL_ACCESS.c.name.in_(names), _lasts(GRANTS, now), *self._may_list())
            .subquery()
        )
        query = sa.select(numbered).where(numbered.c.number <= MOST_SHARES)
        found: dict[str, list[dict[str, Any]]] = {}
        ordered = query.order_by(numbered.c.name, numbered.c.number)
        for row in connection.execute(ordered).mappings():
            found.setdefault(row["name"], []).append(dict(row))
        return found

    def owners_of(self, name: str) -> list[dict[str, Any]]:
        """Return whose the model and the experiment with this name are. Raises NotFound.

        The name of a model that is gone, whose row has `gone_at`, is shown to its owner and to
        operators.
        """
        rows: list[dict[str, Any]] = []
        if rules.name_problem(name, longest=1000) is None:
            with self._reading() as connection:
                for found in _named(connection, "model", lambda column: column == name):
                    if found.exists or self._owner in (None, found.row["owner"]):
                        rows.append(found.row)
                for found in _named(connection, "experiment", lambda column: column == name):
                    rows.append(found.row)
        if not rows:
            raise NotFound("There is no registered model and no experiment with this name.")
        return [self._redacted(row) for row in rows]

    def assign_owner(
        self,
        *,
        owner: str | None = None,
        models: str | None = None,
        experiments: str | None = None,
        names: Sequence[Mapping[str, str]] = (),
        from_owner: str | None = None,
        apply: bool = False,
        keep_grants: bool = False,
    ) -> dict[str, Any]:
        """Give models or experiments to `owner`; unless `apply`, only say what would change.

        They are given by one pattern, or as `names` with `kind` and `name` each, and perhaps `owner`,
        or they are all that `from_owner` owns, prefixes included. A model that is gone keeps its name
        under the new owner. The grants of a former owner end, or become the new owner's with
        `keep_grants`. Changes are made in batches: if one fails, those before it stay.

        The answer has `changes` (rows with `before`), `changed` and `unchanged` (numbers), `missing`
        (names), and `foreign_sources`: versions of these models whose files are not the owner's. Each
        list has at most `MAX_RESULTS` items. Raises InvalidRequest and Conflict.
        """
        given = [one is not None for one in (models, experiments, from_owner)]
        if sum([*given, bool(names)]) != 1:
            raise InvalidRequest("Give models, experiments, names or from_owner: one of them.")
        answer: dict[str, Any] = {"applied": apply, "changed": 0, "unchanged": 0}
        answer |= {"changes": [], "missing": [], "foreign_sources": []}
        # Experiments come first, so that the sources of models are judged by their new owners.
        if from_owner is None:
            groups = list(_wanted(owner, models, experiments, names))
        else:
            groups = list(_all_of(from_owner, owner))
        with self._reading() as connection:
            _refuse_look_alikes(connection, {group.owner for group in groups})
        for kind, new_owner, condition, wanted in groups:
            with self._reading() as connection:
                found = _named(connection, kind, condition)
            found = [item for item in found if item.row["experiment_id"] != DEFAULT_EXPERIMENT]
            answer["missing"] += sorted(wanted - {item.row["name"] for item in found})
            changed = [item for item in found if item.row["owner"] != new_owner]
            answer["unchanged"] += len(found) - len(changed)
            answer["changed"] += len(changed)
            answer["changes"] += [
                {**item.row, "before": item.row["owner"], "owner": new_owner} for item in changed
            ]
            if apply:
                for batch in _batches(changed, BATCH):
                    self._assign(kind, batch, new_owner, keep_grants)
            if kind == "model":
                names_found = [item.row["name"] for item in found if item.exists]
                with self._reading() as connection:
                    # All that is `from_owner`'s goes along, though perhaps not yet.
                    own = {new_owner, from_owner or new_owner}
                    answer["foreign_sources"] += _foreign(connection, names_found, own)
        if from_owner is not None:
            moved = self._assign_prefixes(from_owner, groups[0].owner, apply=apply)
            answer["changed"] += len(moved)
            answer["changes"] += moved
        for name in ("changes", "missing", "foreign_sources"):
            del answer[name][MAX_RESULTS:]
        return answer

    def _assign_prefixes(self, before: str, owner: str, *, apply: bool) -> list[dict[str, Any]]:
        """Reserve for `owner` what is reserved for `before`, if `apply`. Return the changes.

        No prefix of either lies in one of anybody else, so none can be in the way.
        """
        whose = PREFIXES.c.owner == before
        if apply:
            with self._changing() as connection:
                rows = _prefixes(connection, whose)
                connection.execute(sa.update(PREFIXES).where(whose).values(owner=owner))
        else:
            with self._reading() as connection:
                rows = _prefixes(connection, whose)
        if apply and rows:
            names = [[row["prefix"], before] for row in rows]
            self._audit("owners.assigned", {"owner": owner, "kind": "prefix", "names": names})
        nothing = {"experiment_id": None, "key_id": None, "gone_at": None}
        return [
            {
                "kind": f"{row['kind']} prefix",
                "name": row["prefix"],
                "owner": owner,
                "before": before,
            }
            | nothing
            for row in rows
        ]

    def release_name(self, name: str) -> dict[str, Any]:
        """Make the name of a model nobody's, and return its row. Raises NotFound.

        The name of a model that is gone is free then; a model that exists has no owner.
        """
        with self._changing() as connection:
            row = None
            if rules.name_problem(name) is None:
                where = MODELS.c.name == name
                row = connection.execute(sa.select(MODELS).where(where)).mappings().one_or_none()
            if row is None:
                raise NotFound("No owner has a registered model of this name.")
            connection.execute(sa.delete(MODELS).where(where))
            _end_access(connection, [name])
        self._audit("owners.released", {"name": name, "owner": row["owner"]})
        return {"kind": "model", **_columns(dict(row))}

    def check_owners(self) -> list[dict[str, Any]]:
        """Return what is wrong with the tables, such as after plain MLflow ran on the database.

        Rows of versions that differ from MLflow's are mended, too. Each problem has `problem`, `kind`,
        `name` and `advice`; there are at most `MAX_RESULTS` of a sort. Owners are compared with each
        other, and with those of `key_owners`.
        """
        with self._reading() as connection:
            problems = [
                {"problem": code, "kind": kind, "name": str(name), "advice": advice}
                for code, kind, advice, query in _CHECKS
                for name in connection.execute(query.limit(MAX_RESULTS)).scalars()
            ]
            alike = rules.look_alikes({*self._key_owners(), *_owners(connection)})
        ownership.catch_up(self._engine)
        return problems + [
            {
                "problem": "LOOK_ALIKES",
                "kind": "owner",
                "name": ", ".join(group),
                "advice": "These owners are equal but for case. Give one of them what the others "
                "have: owners assign, and keys edit --owner.",
            }
            for group in alike[:MAX_RESULTS]
        ]

    def add_grant(
        self,
        *,
        grantee: str,
        pattern: str,
        level: str = rules.LEVELS[0],
        expires_in: float | None = None,
    ) -> dict[str, Any]:
        """Let `grantee` read or contribute to the models that `pattern` names, now and later.

        An owner's grant covers models of that owner, and an operator's those of any. `expires_in` is in
        seconds, None for ever. The answer's `models` is the number of models that it covers now. Raises
        InvalidRequest, Forbidden and Conflict.
        """
        by = self._granter()
        _checked(grantee, "grantee", rules.MAX_OWNER)
        if problem := rules.problem(pattern):
            raise InvalidRequest(f"pattern: {problem}.")
        if level not in rules.LEVELS:
            raise InvalidRequest(f"level must be one of {', '.join(rules.LEVELS)}.")
        if expires_in is not None and not 0 < expires_in <= MAX_LIFETIME:
            raise InvalidRequest("expires_in must be more than 0 seconds, and at most 20 years.")
        if grantee == by:
            raise InvalidRequest("The grantee owns these models already.")
        now = time.time()
        row: dict[str, Any] = {
            "id": f"grant_{secrets.token_hex(8)}",
            "grantee": grantee,
            "granted_by": by,
            "pattern": pattern,
            "level": level,
            "expires_at": None if expires_in is None else now + expires_in,
            "key_id": self._key_id,
            "created_at": now,
        }
        with self._changing() as connection:
            if self._owner is None:
                # To an owner, the refusal would say that there is another one, and how it is spelt.
                _refuse_look_alikes(connection, {grantee})
            given = sa.select(sa.func.count()).where(GRANTS.c.granted_by == by)
            if by and connection.execute(given).scalar_one() >= MAX_GRANTS:
                raise Conflict(
                    f"{by} has given {MAX_GRANTS} grants, and can't give more: remove some, or give "
                    "one for several models, such as acme-*."
                )
            connection.execute(sa.insert(GRANTS).values(row))
            covered = ownership.expand_grant(connection, row)
        self._audit("grants.added", _told(row))
        return {**row, "models": covered}

    def list_grants(self, *, max_results: int = 100, page_token: str | None = None) -> Page:
        """Return a page of the grants that the caller gave, or has still; an operator gets all.

        `models` is the number of models that a grant covers now. Raises InvalidRequest.
        """
        page = self._page(self._grants(), GRANTS.c.id, "id", max_results, page_token)
        page[:] = [self._redacted_grant(row) for row in page]
        return page

    def remove_grant(self, grant_id: str, patterns: Collection[str] = ()) -> dict[str, Any]:
        """End a grant that the caller gave, and return it; an operator may end any.

        Unless `patterns` is empty, its pattern must be within these. Raises NotFound and Forbidden.
        """
        with self._changing() as connection:
            row = None
            where = GRANTS.c.id == grant_id
            if grant_id.isascii() and grant_id.isprintable():
                row = connection.execute(sa.select(GRANTS).where(where)).mappings().one_or_none()
            if row is None or not self._gave(row):
                raise NotFound(
                    "You gave no grant with this id; `hokusai-auth grants list` has them."
                )
            if patterns and not rules.within(row["pattern"], patterns):
                raise Forbidden(
                    f"This key ends only grants of models named {' or '.join(sorted(patterns))}."
                )
            connection.execute(sa.delete(GRANTS).where(where))
            covered = sa.delete(MODEL_ACCESS).where(MODEL_ACCESS.c.grant_id == grant_id)
            models = connection.execute(covered).rowcount
        self._audit("grants.removed", _told(row))
        return {**row, "models": models}

    def add_prefix(self, *, prefix: str, owner: str, kind: str = "model") -> dict[str, Any]:
        """Reserve new names that begin with `prefix` for `owner`. Raises InvalidRequest and Conflict.

        Names that exist stay whose they are.
        """
        _check_kind(kind)
        _checked(owner, "owner", rules.MAX_OWNER)
        _checked(prefix, "prefix")
        if "*" in prefix:
            raise InvalidRequest("prefix: it is a beginning as it is, without `*`.")
        row = {"prefix": prefix, "kind": kind, "owner": owner}
        with self._changing() as connection:
            _refuse_look_alikes(connection, {owner})
            for other in _prefixes(connection, PREFIXES.c.kind == kind):
                if other["owner"] != owner and rules.overlaps(prefix, other["prefix"]):
                    raise Conflict(
                        f"{other['prefix']!r} is reserved for {other['owner']}, and names could begin "
                        "with both prefixes."
                    )
                if other == row:
                    return row
            connection.execute(sa.insert(PREFIXES).values(row))
        self._audit("prefixes.added", row)
        return row

    def list_prefixes(self) -> list[dict[str, Any]]:
        """Return all prefixes: `prefix`, `kind` and `owner`."""
        with self._reading() as connection:
            return _prefixes(connection)

    def remove_prefix(self, *, prefix: str, kind: str = "model") -> dict[str, Any]:
        """End the reservation of `prefix`, and return it. Raises InvalidRequest and NotFound."""
        _check_kind(kind)
        with self._changing() as connection:
            rows: list[dict[str, Any]] = []
            if rules.name_problem(prefix) is None:
                where = sa.and_(PREFIXES.c.prefix == prefix, PREFIXES.c.kind == kind)
                rows = _prefixes(connection, where)
            if not rows:
                raise NotFound(f"No names of {kind}s are reserved by this prefix.")
            connection.execute(sa.delete(PREFIXES).where(where))
        self._audit("prefixes.removed", rows[0])
        return rows[0]

    def _granter(self) -> str:
        """Return `granted_by` of the caller's grants. Raises Forbidden."""
        if self._owner == "":
            raise Forbidden("This key has no owner, so it has no models to share.")
        return self._owner or ""

    def _grants(self) -> sa.Select[Any]:
        """Select the grants that the caller may list, each with the number of its models."""
        covered = sa.select(sa.func.count()).where(MODEL_ACCESS.c.grant_id == GRANTS.c.id)
        counted = covered.scalar_subquery().label("models")
        return sa.select(GRANTS, counted).where(*self._may_list())

    def _may_list(self) -> list[sa.ColumnElement[bool]]:
        """Return the conditions on a grant that the caller may list: it gave it, or has it still.

        The pattern of a grant follows a model that is renamed, and its number of models those that are
        made, so one that has ended would show what is hidden.
        """
        if self._owner is None:
            return []
        if not self._owner:
            # An operator's grants have "" for their giver, who is not a caller without an owner.
            return [sa.false()]
        has = sa.and_(GRANTS.c.grantee == self._owner, _lasts(GRANTS, time.time()))
        return [sa.or_(GRANTS.c.granted_by == self._owner, has)]

    def _redacted_grant(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return a grant as the caller may see it: only its giver and operators see the key's id."""
        return row if self._gave(row) else {**row, "key_id": None}

    def _gave(self, grant: Mapping[Any, Any]) -> bool:
        """Return whether the caller gave `grant`, or is an operator."""
        return self._owner is None or (self._owner != "" and self._owner == grant["granted_by"])

    def _redacted(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row of an owner as the caller may see it: keys of others have no id."""
        return row if self._owner in (None, row["owner"]) else {**row, "key_id": None}

    def _page(
        self,
        query: sa.Select[Any],
        column: Any,
        name: str,
        max_results: int,
        page_token: str | None,
    ) -> Page:
        """Return the rows of `query` behind `page_token` in the order of `column`."""
        if not 1 <= max_results <= MAX_RESULTS:
            raise InvalidRequest(f"max_results must be from 1 to {MAX_RESULTS}.")
        if page_token is not None:
            query = query.where(column > _token(page_token, column))
        with self._reading() as connection:
            found = connection.execute(query.order_by(column).limit(max_results + 1)).mappings()
            rows = [dict(row) for row in found]
        if "owner" in query.selected_columns:
            rows = [self._redacted(row) for row in rows]
        page = Page(rows[:max_results])
        if len(rows) > max_results:
            page.token = str(page[-1][name])
        return page

    def _assign(self, kind: str, batch: list[_Named], owner: str, keep_grants: bool) -> None:
        with self._changing() as connection:
            if kind == "model":
                self._assign_models(connection, batch, owner, keep_grants)
            else:
                for item in batch:
                    ownership.record_experiment(
                        connection,
                        item.row["experiment_id"],
                        owner=owner,
                        key_id=self._key_id,
                        created_at=item.creation_time,
                    )
        names = [[item.row["name"], item.row["owner"]] for item in batch]
        self._audit("owners.assigned", {"owner": owner, "kind": kind, "names": names})

    def _assign_models(
        self, connection: sa.Connection, batch: list[_Named], owner: str, keep_grants: bool
    ) -> None:
        names = [item.row["name"] for item in batch]
        now = time.time()
        former = sa.select(MODELS.c.name, MODELS.c.owner).where(MODELS.c.name.in_(names))
        before = {row.name: row.owner for row in connection.execute(former)}
        kept = _grants_of_others(connection, names, owner) if keep_grants else []
        _end_access(connection, names, owner)
        for name, last in before.items():
            if last != owner:
                exact = sa.and_(GRANTS.c.pattern == name, GRANTS.c.granted_by == last)
                connection.execute(sa.delete(GRANTS).where(exact))
        for item in batch:
            gone_at = None if item.exists else item.row["gone_at"] or now
            ownership.give_model(
                connection,
                item.row["name"],
                owner=owner,
                key_id=self._key_id,
                now=now,
                gone_at=gone_at,
            )
            if item.exists:
                ownership.expand_model(connection, item.row["name"], owner)
        for row in kept:
            # As a pattern, a name that ends in `*` would cover other models.
            if row["grantee"] == owner or row["pattern"].endswith("*"):
                continue
            new = {**row, "id": f"grant_{secrets.token_hex(8)}", "granted_by": owner}
            new |= {"key_id": self._key_id, "created_at": now}
            connection.execute(sa.insert(GRANTS).values(new))
            ownership.expand_grant(connection, new)

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        ownership.prepare(self._engine)
        with usable(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def _changing(self) -> Iterator[sa.Connection]:
        """Yield a transaction that waits for those that change models, and lets none begin."""
        ownership.prepare(self._engine)
        with usable(), self._engine.connect() as connection:
            if self._engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                # The hooks' writes conflict with this lock, and their reads do not.
                tables = ", ".join(table.name for table in (MODELS, MODEL_ACCESS, PREFIXES))
                connection.execute(_BOUND)
                connection.exec_driver_sql(f"LOCK TABLE {tables} IN SHARE ROW EXCLUSIVE MODE")
            yield connection
            connection.commit()


@contextmanager
def usable() -> Iterator[None]:
    """Raise AuthorityUnavailable for errors of MLflow's database in this block."""
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise AuthorityUnavailable(
            f"MLflow's database can't be used: {first_line(error)}"
        ) from None
    except sa.exc.TimeoutError:
        raise AuthorityUnavailable("MLflow's database has no free connection") from None


def _has_part(text: str, *columns: Any) -> sa.ColumnElement[bool]:
    """Return the condition that a column has `text` in it, in any case. Raises InvalidRequest."""
    _checked(text, "query")
    return sa.or_(*(column.icontains(text, autoescape=True) for column in columns))


def _lasts(table: sa.Table, now: float) -> sa.ColumnElement[bool]:
    """Return the condition that a row of grants, or of access by them, has not ended at `now`."""
    return sa.or_(table.c.expires_at.is_(None), table.c.expires_at > now)


def _part(
    connection: sa.Connection, query: sa.Select[Any], order: tuple[Any, ...], first: int, most: int
) -> Found:
    """Return the rows of `query` from number `first` on, or of the last part that has any."""
    counted = query.with_only_columns(sa.func.count(), maintain_column_froms=True)
    total = connection.execute(counted).scalar_one()
    first = max(0, min(first, (total - 1) // most * most))
    part = connection.execute(query.order_by(*order).offset(first).limit(most))
    return Found([dict(row) for row in part.mappings()], first, total)


def _models() -> sa.Select[Any]:
    """Select the registered models that exist, in the form of a row of `owners`."""
    return sa.select(
        sa.literal("model").label("kind"),
        MLFLOW_MODELS.c.name,
        sa.null().label("experiment_id"),
        MODELS.c.owner,
        MODELS.c.key_id,
        MODELS.c.gone_at,
    ).select_from(MLFLOW_MODELS.outerjoin(MODELS, MODELS.c.name == MLFLOW_MODELS.c.name))


def _is_owned(kind: str, owner: str) -> sa.ColumnElement[bool]:
    """Return the condition that a row of `_models` or `_experiments` is `owner`'s.

    With the owner's column alone, SQLite would begin with the owner's models, and look for each one
    through all of MLflow's, which have no index for it. Raises InvalidRequest.
    """
    _checked(owner, "owner", rules.MAX_OWNER)
    if kind != "model":
        return EXPERIMENTS.c.owner == owner
    return MLFLOW_MODELS.c.name.in_(sa.select(MODELS.c.name).where(MODELS.c.owner == owner))


def _experiments() -> sa.Select[Any]:
    """Select the experiments that exist, in the form of a row of `owners`."""
    return sa.select(
        sa.literal("experiment").label("kind"),
        MLFLOW_EXPERIMENTS.c.name,
        MLFLOW_EXPERIMENTS.c.experiment_id,
        EXPERIMENTS.c.owner,
        EXPERIMENTS.c.key_id,
        sa.null().label("gone_at"),
    ).select_from(MLFLOW_EXPERIMENTS.outerjoin(EXPERIMENTS, SAME_EXPERIMENT))


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("name", "owner", "key_id", "gone_at")
    return {"experiment_id": None, **{name: row[name] for name in names}}


def _named(connection: sa.Connection, kind: str, condition: _Condition) -> list[_Named]:
    """Return what has a name that meets `condition`, and the names of models that are gone."""
    if kind == "experiment":
        query = _experiments().add_columns(MLFLOW_EXPERIMENTS.c.creation_time)
        rows = connection.execute(query.where(condition(MLFLOW_EXPERIMENTS.c.name))).mappings()
        return [
            _Named(
                {name: row[name] for name in row if name != "creation_time"},
                True,
                row["creation_time"],
            )
            for row in rows
        ]
    rows = connection.execute(_models().where(condition(MLFLOW_MODELS.c.name))).mappings()
    found = [_Named(dict(row), True) for row in rows]
    gone = _without_model(sa.select(MODELS), MODELS).where(condition(MODELS.c.name))
    rows = connection.execute(gone).mappings()
    return found + [_Named({"kind": "model", **_columns(dict(row))}, False) for row in rows]


def _without_model(query: sa.Select[Any], table: sa.Table) -> sa.Select[Any]:
    """Return `query` on `table` without rows whose name is that of a model that MLflow has.

    MLflow has no index by which SQLite could look up each name, but it makes one for a join.
    """
    same = MLFLOW_MODELS.c.name == table.c.name
    return query.select_from(table.outerjoin(MLFLOW_MODELS, same)).where(
        MLFLOW_MODELS.c.name.is_(None)
    )


def _wanted(
    owner: str | None,
    models: str | None,
    experiments: str | None,
    names: Sequence[Mapping[str, str]],
) -> Iterator[_Group]:
    """Yield what to assign. Raises InvalidRequest."""
    pattern = experiments if models is None else models
    if pattern is not None:
        if problem := rules.problem(pattern):
            raise InvalidRequest(f"The pattern can't be used: {problem}.")
        kind = "experiment" if models is None else "model"
        exact = {pattern} if rules.beginning(pattern) is None else set()
        new_owner = _checked(owner or "", "owner", rules.MAX_OWNER)
        yield _Group(kind, new_owner, partial(_matches, pattern=pattern), exact)
        return
    groups: dict[tuple[str, str], set[str]] = {}
    for number, row in enumerate(names, 1):
        _check_kind(row["kind"])
        _checked(row["name"], f"name of row {number}", longest=1000)
        new_owner = _checked(
            row.get("owner") or owner or "", f"owner of row {number}", rules.MAX_OWNER
        )
        groups.setdefault((row["kind"], new_owner), set()).add(row["name"])
    for (kind, new_owner), wanted in sorted(groups.items()):
        for batch in _batches(sorted(wanted), 500):
            yield _Group(kind, new_owner, partial(_is_in, names=batch), set(batch))


def _all_of(before: str, owner: str | None) -> Iterator[_Group]:
    """Yield all that `before` owns, to be `owner`'s. Raises InvalidRequest."""
    _checked(before, "from_owner", rules.MAX_OWNER)
    new_owner = _checked(owner or "", "owner", rules.MAX_OWNER)
    if new_owner == before:
        raise InvalidRequest("from_owner and owner are the same.")
    yield _Group("experiment", new_owner, partial(_has_owner, owner=before), set())
    yield _Group("model", new_owner, partial(_has_owner, owner=before), set())


def _has_owner(column: Any, owner: str) -> sa.ColumnElement[bool]:
    """Return the condition that a name, of a model or of an experiment, is `owner`'s."""
    names = sa.select(MODELS.c.name).where(MODELS.c.owner == owner)
    if column.table is MLFLOW_EXPERIMENTS:
        joined = MLFLOW_EXPERIMENTS.join(EXPERIMENTS, SAME_EXPERIMENT)
        names = sa.select(MLFLOW_EXPERIMENTS.c.name).select_from(joined)
        names = names.where(EXPERIMENTS.c.owner == owner)
    condition: sa.ColumnElement[bool] = column.in_(names.correlate(None))
    return condition


def _matches(column: Any, pattern: str) -> sa.ColumnElement[bool]:
    start = rules.beginning(pattern)
    text: sa.ColumnElement[str] = column
    if start is None:
        return text == pattern
    return sa.func.substr(text, 1, len(start), type_=sa.String) == start


def _is_in(column: Any, names: list[str]) -> sa.ColumnElement[bool]:
    condition: sa.ColumnElement[bool] = column.in_(names)
    return condition


def _batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def _end_access(connection: sa.Connection, names: list[str], owner: str = "") -> None:
    """End what owners other than `owner` granted on these models; operators' grants stay."""
    others = sa.select(GRANTS.c.id).where(GRANTS.c.granted_by.not_in(["", owner]))
    connection.execute(
        sa.delete(MODEL_ACCESS).where(
            MODEL_ACCESS.c.name.in_(names), MODEL_ACCESS.c.grant_id.in_(others)
        )
    )


def _grants_of_others(
    connection: sa.Connection, names: list[str], owner: str
) -> list[dict[str, Any]]:
    """Return what owners other than `owner` granted on these models, as a grant for each model."""
    query = (
        sa.select(
            MODEL_ACCESS.c.name.label("pattern"),
            GRANTS.c.grantee,
            GRANTS.c.level,
            GRANTS.c.expires_at,
        )
        .join(GRANTS, GRANTS.c.id == MODEL_ACCESS.c.grant_id)
        .where(MODEL_ACCESS.c.name.in_(names), GRANTS.c.granted_by.not_in(["", owner]))
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def _foreign(connection: sa.Connection, names: list[str], own: set[str]) -> list[dict[str, Any]]:
    """Return the versions of these models whose files are of no owner in `own`, with whose they are.

    `source_owner` is None if it isn't known: the source names no run, logged model or version that has
    an owner.
    """
    found: list[dict[str, Any]] = []
    for batch in _batches(names, 500):
        query = sa.select(MLFLOW_VERSIONS).where(
            MLFLOW_VERSIONS.c.name.in_(batch),
            MLFLOW_VERSIONS.c.current_stage != ownership.DELETED,
        )
        order = query.order_by(MLFLOW_VERSIONS.c.name, MLFLOW_VERSIONS.c.version)
        rows = [dict(row) for row in connection.execute(order).mappings()]
        owners = _owners_of_sources(connection, [row["source"] or "" for row in rows])
        for row in rows:
            source = row["source"] or ""
            if owners.get(source) not in own:
                version = {"name": row["name"], "version": row["version"], "source": source}
                found.append({**version, "source_owner": owners.get(source)})
        if len(found) > MAX_RESULTS:
            break
    return found


def _owners_of_sources(connection: sa.Connection, sources: Iterable[str]) -> dict[str, str | None]:
    """Return the owner of each source whose run, logged model or registered model has one."""
    ids: dict[str, list[str]] = {}
    models: dict[str, str] = {}
    for source in set(sources):
        location = locations.read(source)
        named = locations.reference(location)
        if named is None:
            ids[source] = locations.owners_named(location)
        elif named.kind == "version":
            models[source] = named.name.partition("@")[0]
        else:
            ids[source] = [named.name]
    wanted = sorted({id for many in ids.values() for id in many if rules.is_storable(id)})
    owner_of: dict[str, str] = {}
    for batch in _batches(wanted, 500):
        for key, table in (
            (MLFLOW_RUNS.c.run_uuid, MLFLOW_RUNS),
            (_MLFLOW_LOGGED.c.model_id, _MLFLOW_LOGGED),
        ):
            same = MLFLOW_EXPERIMENTS.c.experiment_id == table.c.experiment_id
            joined = table.join(MLFLOW_EXPERIMENTS, same).join(EXPERIMENTS, SAME_EXPERIMENT)
            query = sa.select(key, EXPERIMENTS.c.owner).select_from(joined).where(key.in_(batch))
            owner_of |= {id: whose for id, whose in connection.execute(query)}
    found: dict[str, str | None] = {}
    for source, many in ids.items():
        whose = {owner_of[id] for id in many if id in owner_of}
        found[source] = whose.pop() if len(whose) == 1 else None
    for source, name in models.items():
        if rules.is_storable(name):
            found[source] = ownership.model_owner(connection, name)
    return found


def _told(grant: Mapping[Any, Any]) -> dict[str, Any]:
    """Return what the audit log tells of a grant; the key and the time stand in its own columns."""
    return {name: grant[name] for name in grant if name not in ("key_id", "created_at")}


def _owners(connection: sa.Connection, *, invented: bool = True) -> set[str]:
    """Return all owners in the tables; without `invented`, not those to whom suppliers share."""
    columns = (
        MODELS.c.owner,
        EXPERIMENTS.c.owner,
        VERSIONS.c.owner,
        PREFIXES.c.owner,
        GRANTS.c.granted_by,
    )
    grantees = sa.select(GRANTS.c.grantee)
    if not invented:
        grantees = grantees.where(GRANTS.c.granted_by == "")
    query = sa.union(*(sa.select(column) for column in columns), grantees)
    return {owner for owner in connection.execute(query).scalars() if owner}


def _refuse_look_alikes(connection: sa.Connection, owners: set[str]) -> None:
    """Raise Conflict if one of `owners` is new, and equal to another owner but for case."""
    known = _owners(connection, invented=False)
    for group in rules.look_alikes(known | owners):
        if not known.issuperset(group):
            raise Conflict(f"These owners are equal but for case: {', '.join(group)}.")


def _prefixes(
    connection: sa.Connection, *conditions: sa.ColumnElement[bool]
) -> list[dict[str, Any]]:
    query = sa.select(PREFIXES).where(*conditions).order_by(PREFIXES.c.kind, PREFIXES.c.prefix)
    return [dict(row) for row in connection.execute(query).mappings()]


def _checked(text: str, name: str, longest: int = rules.MAX_NAME) -> str:
    """Return `text`. Raises InvalidRequest, which calls it `name`, if it can't be a name."""
    if problem := rules.name_problem(text, longest):
        raise InvalidRequest(f"{name}: {problem}.")
    return text


def _check_kind(kind: str) -> None:
    if kind not in rules.KINDS:
        raise InvalidRequest(f"kind must be one of {', '.join(rules.KINDS)}.")


def _token(text: str, column: Any) -> str | int:
    """Return `page_token` as a value of `column`. Raises InvalidRequest."""
    if isinstance(column.type, sa.Integer):
        if (number := whole_number(text)) is not None:
            return number
    elif rules.name_problem(text) is None:
        return text
    raise InvalidRequest("page_token is not one that this list gave.")


def _as_version(query: sa.Select[Any]) -> sa.Select[Any]:
    """Return `query`, of names and numbers, with one column for both."""
    name, number = query.selected_columns
    return query.with_only_columns(name + "/" + sa.cast(number, sa.String))


#: Code, kind, advice, and the query for the names.
_CHECKS: tuple[tuple[str, str, str, sa.Select[Any]], ...] = (
    (
        "MODEL_MISSING",
        "model",
        "MLflow has no such model: plain MLflow may have deleted or renamed it. The name stays its "
        "owner's until `owners release`.",
        _without_model(sa.select(MODELS.c.name), MODELS).where(MODELS.c.gone_at.is_(None)),
    ),
    (
        "MODEL_CAME_BACK",
        "model",
        "The model was deleted, and plain MLflow made one of the same name. Say whose it is: "
        "`owners assign`.",
        sa.select(MODELS.c.name)
        .join(MLFLOW_MODELS, MLFLOW_MODELS.c.name == MODELS.c.name)
        .where(MODELS.c.gone_at.is_not(None)),
    ),
    (
        "EXPERIMENT_MISSING",
        "experiment",
        "MLflow has no such experiment any more, so the row counts for nothing.",
        sa.select(EXPERIMENTS.c.experiment_id).where(
            ~sa.exists().where(SAME_EXPERIMENT).correlate(EXPERIMENTS)
        ),
    ),
    (
        "VERSION_MISSING",
        "version",
        "MLflow has no such version: plain MLflow may have deleted it. Its row is gone now.",
        _as_version(ownership.LEFT_OVER),
    ),
    (
        "VERSION_UNRECORDED",
        "version",
        "Plain MLflow made this version. Its files are read-only from now on.",
        _as_version(ownership.UNRECORDED),
    ),
    (
        "ACCESS_LEFT_OVER",
        "model",
        "A grant that was removed left its access.",
        sa.select(MODEL_ACCESS.c.name)
        .distinct()
        .where(~sa.exists().where(GRANTS.c.id == MODEL_ACCESS.c.grant_id)),
    ),
    (
        "ACCESS_LEFT_OVER",
        "model",
        "A model that is gone left its access.",
        _without_model(sa.select(MODEL_ACCESS.c.name).distinct(), MODEL_ACCESS),
    ),
)
