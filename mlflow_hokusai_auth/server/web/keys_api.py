"""`/api/2.0/hokusai/…`: key management and whoami, as a Flask blueprint beside MLflow's own routes.

The gate decides by `core/routes.py` who may call a route, before any of this runs. Only decisions that
depend on the key in the path are made here: a key without mlflow:admin may replace only itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flask

from mlflow_hokusai_auth.authorities.cache import MAX_UNCONFIRMED
from mlflow_hokusai_auth.core import policy, times
from mlflow_hokusai_auth.core.counts import whole_number
from mlflow_hokusai_auth.core.errors import (
    Forbidden,
    InvalidRequest,
    KeyConflict,
    KeyNotFound,
    NotFound,
    NotGenuine,
)
from mlflow_hokusai_auth.core.isolation import DEFAULT_PREFIX
from mlflow_hokusai_auth.core.keys import problem, redact
from mlflow_hokusai_auth.core.lifetimes import UNLIMITED, Lifetimes
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server.settings import MAX_KEY_LIFETIME
from mlflow_hokusai_auth.store import key_pages, usage
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.key_pages import KeyPage
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.links import Links
from mlflow_hokusai_auth.store.records import LAST, KeyFilter, KeyRecord
from mlflow_hokusai_auth.store.trusts import Trusts

from . import api, leak_reports, openapi, schemas
from .schemas import describe

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

    from mlflow_hokusai_auth.server.gate.gate import Gate

#: Seconds after which no server process takes a revoked key from its cache any more.
REVOKED_EVERYWHERE = MAX_UNCONFIRMED + 0.1
#: Seconds that a key with a rate limit must have lived to replace itself: the span of such limits.
MIN_LIMITED_AGE = 3600.0
#: Seconds.
DAY = 86400


def blueprint(
    store: LocalStore,
    gate: Gate,
    leak_keys: Mapping[str, EllipticCurvePublicKey],
    isolated: Callable[[], bool] = lambda: False,
    lifetimes: Lifetimes = UNLIMITED,
) -> flask.Blueprint:
    """Return the routes, on `store`. A leak report counts only if one of `leak_keys` signed it.

    `isolated` says whether isolation is enforced now. New keys live as `lifetimes` says.
    """
    routes = api.blueprint("hokusai")
    actions = KeyActions(store, gate, lifetimes)

    @routes.get("/whoami")
    def whoami() -> flask.Response:
        return flask.jsonify(whoami_of(store, gate, isolated))

    @routes.get("/openapi.json")
    def description() -> flask.Response:
        return flask.jsonify(openapi.document())

    @routes.get("/keys")
    def list_keys() -> flask.Response:
        found = page(store, flask.request.args)
        return flask.jsonify(
            keys=with_uses(store, found.records),
            next_page_token=found.next_page_token,
            total=found.total,
        )

    @routes.post("/keys")
    def create_key() -> tuple[flask.Response, int]:
        record, key = actions.create(api.body())
        return flask.jsonify(**describe(record), key=key), 201

    @routes.post("/keys/import")
    def import_existing_key() -> tuple[flask.Response, int]:
        return flask.jsonify(describe(actions.import_key(api.body()))), 201

    @routes.post("/keys/find")
    def find_keys() -> flask.Response:
        # The key stands in the body, because logs and histories keep URLs.
        body = schemas.parse(schemas.KeyToFind, api.body())
        return flask.jsonify(keys=described(find(store, body.key)))

    @routes.post("/keys/revoke")
    def revoke_keys() -> flask.Response:
        body = schemas.parse(schemas.Revocation, api.body())
        return flask.jsonify(revoke_owner(store, body, callers.actor()))

    @routes.get("/keys/export")
    def export_keys() -> flask.Response:
        lines = (json.dumps(describe(record)) + "\n" for record in store.each())
        response = flask.Response(_with_first_read(lines), mimetype="application/x-ndjson")
        response.headers["Content-Disposition"] = 'attachment; filename="hokusai-keys.ndjson"'
        return response

    @routes.get("/keys/<key_id>")
    def get_key(key_id: str) -> flask.Response:
        return flask.jsonify(with_uses(store, [store.get(key_id)])[0])

    @routes.patch("/keys/<key_id>")
    def edit_key(key_id: str) -> flask.Response:
        return flask.jsonify(describe(actions.edit(key_id, api.body())))

    @routes.post("/keys/<key_id>/rotate")
    def rotate_key(key_id: str) -> tuple[flask.Response, int]:
        # Read the body whatever its Content-Type: an ignored `overlap` of 0 would leave a leaked key
        # valid for a day.
        body = api.body() if flask.request.get_data() else {}
        new, key, old = actions.rotate(key_id, body)
        return flask.jsonify(**describe(new), key=key, replaces=describe(old)), 201

    @routes.delete("/keys/<key_id>")
    def revoke_key(key_id: str) -> flask.Response:
        wait, force = (api.flag(name) for name in ("wait", "force"))
        record = store.revoke(key_id, callers.actor(), force=force)
        if wait:
            time.sleep(REVOKED_EVERYWHERE)
        return flask.jsonify(describe(record))

    @routes.post("/keys/leaked")
    def leaked() -> flask.Response:
        headers, body = flask.request.headers, flask.request.get_data()
        signed_by = headers.get(leak_reports.IDENTIFIER_HEADER, "")
        if not leak_reports.is_genuine(
            body, signed_by, headers.get(leak_reports.SIGNATURE_HEADER, ""), leak_keys
        ):
            raise NotGenuine("The report is not signed by a key that this server trusts.")
        try:
            leaks = leak_reports.parse(body)
        except ValueError as error:
            raise InvalidRequest(str(error)) from None
        return flask.jsonify([reply for leak in leaks if (reply := _revoke_leaked(store, leak))])

    return routes


@dataclass(frozen=True)
class KeyActions:
    """The actions of the routes and of the pages' forms on keys of `store`, for the caller.

    `body` is that of the REST API. Each action raises InvalidRequest, or AuthorityUnavailable.
    """

    store: LocalStore
    gate: Gate
    lifetimes: Lifetimes

    def create(self, body: object) -> tuple[KeyRecord, str]:
        """Make the key that `body` describes. Return its record and the key itself."""
        fields = schemas.new_fields(schemas.parse(schemas.NewKey, body), self.lifetimes)
        return self.store.create(**fields, by=callers.actor())

    def import_key(self, body: object) -> KeyRecord:
        """Import the key in `body`."""
        new = schemas.parse(schemas.ExistingKey, body)
        return self.store.add(new.key.strip(), **schemas.fields(new), by=callers.actor())

    def edit(self, key_id: str, body: object) -> KeyRecord:
        """Change the fields of a key that are in `body`."""
        changes = schemas.changes(schemas.parse(schemas.KeyChanges, body), self.lifetimes)
        return self.store.edit(key_id, changes, callers.actor())

    def rotate(self, key_id: str, body: object) -> tuple[KeyRecord, str, KeyRecord]:
        """Replace a key. Return the new record, the new key, and the old record."""
        return self.store.rotate(key_id, **self._rotation([key_id], body))

    def rotate_several(
        self, key_ids: Sequence[str], body: object
    ) -> tuple[list[tuple[KeyRecord, str]], list[KeyConflict]]:
        """Replace all of these keys or none, as `LocalStore.rotate_several` does."""
        return self.store.rotate_several(key_ids, **self._rotation(key_ids, body))

    def _rotation(self, key_ids: Sequence[str], body: object) -> dict[str, Any]:
        """Return the options of the store for a rotation of these keys that the caller may do."""
        for key_id in key_ids:
            self.check_rotation(key_id)
        _check_rotation_limit(callers.principal(), self.store, self.gate)
        return {
            "overlap": schemas.parse(schemas.Rotation, body).overlap,
            "by": callers.actor(),
            "lifetimes": self.lifetimes,
            # No key but an administrator's puts off its own end.
            "renewed": policy.is_admin(callers.principal(), self.gate.policy),
        }

    def check_rotation(self, key_id: str) -> None:
        """Raise Forbidden unless the caller may rotate this key."""
        caller = callers.principal()
        if key_id != caller.key_id and not policy.is_admin(caller, self.gate.policy):
            raise Forbidden("A key may be rotated by itself, or by a key with mlflow:admin.")


def expiry_choices(lifetimes: Lifetimes) -> dict[str, Any]:
    """Return what a form offers for a key's expiry, by `lifetimes`.

    `days` are numbers of days and their names, `chosen` is the usual one of them or None for never,
    `never` says if keys may live for ever, and `most` is the largest number of days.
    """
    longest = MAX_KEY_LIFETIME if lifetimes.longest is None else lifetimes.longest
    usual = [] if lifetimes.usual is None else [lifetimes.usual]
    offered = sorted({*usual, *(days * DAY for days in (30, 90, 365))})
    return {
        "days": [(seconds / DAY, times.span(seconds)) for seconds in offered if seconds <= longest],
        "chosen": usual[0] / DAY if usual else None,
        "never": lifetimes.longest is None,
        "most": int(longest // DAY),
    }


def whoami_of(
    store: LocalStore, gate: Gate, isolated: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Return the caller's own key, as `schemas.Identity` describes it; `isolated` as in `blueprint`."""
    caller = callers.principal()
    try:
        name = store.get(caller.key_id).name
    except KeyNotFound:  # the key belongs to another authority
        name = ""
    left = None
    if (limit := caller.rate_limit_per_hour) is not None:
        remaining, reset = gate.limits.left(caller.key_id, limit)
        left = schemas.LimitLeft(limit=limit, remaining=remaining, reset=reset)
    return schemas.Identity(
        key_id=caller.key_id,
        owner=caller.owner,
        name=name,
        scopes=sorted(caller.scopes),
        can=policy.abilities(caller, gate.policy),
        expires_at=caller.expires_at,
        deprecated_at=caller.deprecated_at,
        networks=list(caller.networks),
        rate_limit=left,
        models=list(caller.models),
        no_delete=caller.no_delete,
        source=caller.source,
        contact=gate.contact or None,
        default_experiment=_default_experiment(caller, gate) if isolated() else None,
    ).model_dump()


def _default_experiment(caller: Principal, gate: Gate) -> str | None:
    """Return the experiment for runs of `caller` that name none, or None for MLflow's Default."""
    # A key whose owner is unknown owns nothing, so it can't make an experiment either.
    confined = caller.owner_id and policy.is_confined(caller, gate.policy)
    return DEFAULT_PREFIX + caller.owner_id if confined else None


def page(store: LocalStore, query: Mapping[str, str]) -> KeyPage:
    """Return the page of keys for `query`. Raises InvalidRequest."""
    values = {name: value for name, value in query.items() if value}
    for name, value in values.items():
        longest = key_pages.MAX_TOKEN if name == "page_token" else 255
        if not value.isprintable() or len(value) > longest:
            raise InvalidRequest(
                f"{redact(name)[:40]!r} must be printable text of at most {longest} characters."
            )
    order = values.get("order_by")
    return store.page(
        key_filter(values),
        order=key_pages.NEWEST_FIRST if order is None else key_pages.order(order),
        max_results=api.max_results(values),
        page_token=values.get("page_token"),
    )


def key_filter(values: Mapping[str, str]) -> KeyFilter:
    """Return the filter in the parameters `values`. Raises InvalidRequest."""
    return KeyFilter(
        owner=values.get("owner"),
        environment=values.get("environment"),
        state=values.get("state"),
        query=values.get("query"),
        scope=values.get("scope"),
        expires_within=_seconds(values, "expires_within"),
        unused_for=_seconds(values, "unused_for"),
    )


def _seconds(values: Mapping[str, str], name: str) -> float | None:
    text = values.get(name)
    if text is None:
        return None
    if (number := whole_number(text)) is None:
        raise InvalidRequest(f"{name} must be a whole number of seconds.")
    return float(number)


def find(store: LocalStore, text: str) -> list[KeyRecord]:
    """Return the keys that `text` names: a whole key, or the last four characters of some.

    Raises InvalidRequest if it can't be either.
    """
    text = text.strip().lstrip("….")
    if len(text) == LAST and text.isascii() and text.isalnum():
        return store.ending_in(text)
    if reason := problem(text):
        raise InvalidRequest(f"That can't be a key: {reason}. Copy it again, whole.")
    found = store.find(text)
    return [] if found is None else [found]


def revoke_owner(store: LocalStore, body: schemas.Revocation, by: Actor) -> dict[str, Any]:
    """Revoke all keys and links of an owner, and remove its trusts, or say which.

    Return it as `schemas.Revoked`. Raises NotFound if the store has never had a key, and has no trust
    or waiting link, of this owner.
    """
    trusts = trusts_of(store, body.owner)
    ended, kept = store.valid_of(body.owner), list[KeyConflict]()
    links = [one.link_id for one in Links(store.database).waiting_of(body.owner)]
    if not ended and not trusts and not links and body.owner not in store.owners():
        raise NotFound(
            "No key of this store has this owner, whose spelling counts: `hokusai-auth keys list` "
            "shows owners."
        )
    if body.apply:
        ended, kept, links, trusts = store.revoke_owner(body.owner, by, force=body.force)
        if body.wait:
            time.sleep(REVOKED_EVERYWHERE)
    return schemas.Revoked(
        applied=body.apply,
        keys=[schemas.Key(**one) for one in described(ended)],
        kept=[str(one) for one in kept],
        links=links,
        trusts=trusts,
    ).model_dump()


def trusts_of(store: LocalStore, owner: str) -> list[str]:
    """Return the ids of the trusts of `owner`, which `LocalStore.revoke_owner` removes."""
    found = (one.trust for one in Trusts(store.database).each())
    return [trust.trust_id for trust in found if trust.owner == owner]


def with_uses(store: LocalStore, records: list[KeyRecord]) -> list[dict[str, Any]]:
    """Return `records` as the REST API shows them, each with its uses in the last 24 hours."""
    counts = usage.by_hour(store.database, [record.key_id for record in records])
    return [{**one, "uses_by_hour": counts[one["key_id"]]} for one in described(records)]


def described(records: list[KeyRecord]) -> list[dict[str, Any]]:
    """Return `records` as the REST API shows them."""
    return [describe(record) for record in records]


def _check_rotation_limit(caller: Principal, store: LocalStore, gate: Gate) -> None:
    """Raise KeyConflict if `caller` would evade its rate limit, which starts anew for a new key."""
    if caller.rate_limit_per_hour is None or policy.is_admin(caller, gate.policy):
        return
    young = time.time() - store.get(caller.key_id).created_at < MIN_LIMITED_AGE
    if young or store.predecessor_lives(caller.key_id):
        raise KeyConflict(
            f"Key {caller.key_id} has a rate limit. It may replace itself once it is an hour old and "
            "the key that it replaced has ended."
        )


def _revoke_leaked(store: LocalStore, leak: leak_reports.Leak) -> dict[str, str] | None:
    """Revoke the key in `leak`. Return the reply to GitHub, or None for another authority's."""
    record = store.find(leak.token)
    if record is not None:
        where = {"found_at": leak.url, "source": leak.source}
        store.revoke(record.key_id, callers.actor(), force=True, event="key.leaked", **where)
    elif problem(leak.token) is None:
        return None  # another authority may know it
    return leak_reports.feedback(leak, record is not None)


def _with_first_read(lines: Iterator[str]) -> Iterator[str]:
    """Return `lines`, with the first already read, so that a failing store gives an error status."""
    first = next(lines, "")

    def chain() -> Iterator[str]:
        yield first
        yield from lines

    return chain()
