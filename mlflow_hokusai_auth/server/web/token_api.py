"""`POST /api/2.0/hokusai/token`: the exchange of an identity token for a key (RFC 8693).

The route is public, because the token is the credential. Errors have the fields of RFC 6749 beside
MLflow's, so that OAuth clients and MLflow's client both understand them. The token itself gets into no
answer, log or exception.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import flask

from mlflow_hokusai_auth.authorities.identity_tokens import Verifier
from mlflow_hokusai_auth.core import times
from mlflow_hokusai_auth.core.denials import CODES, full_message, retry_after
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.trust import Refused
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.store.records import KeyRecord
from mlflow_hokusai_auth.store.trusts import Trusts

from . import api
from .trust_schemas import GRANT_TYPE, ISSUED_TYPE, TOKEN_TYPES, ExchangedKey

if TYPE_CHECKING:
    from mlflow_hokusai_auth.server.gate.gate import Gate

RULE = "POST /api/2.0/hokusai/token"
#: Fields of a form, at most.
MAX_FIELDS = 32
_log = logging.getLogger("mlflow_hokusai_auth.trust")
#: Codes of refusals -> RFC 6749's words for them (RFC 8693, 2.2.2), "invalid_request" for all others.
_ERRORS = {
    "GRANT_UNSUPPORTED": "unsupported_grant_type",
    "AUTHORITY_UNAVAILABLE": "temporarily_unavailable",
    "ISSUER_UNAVAILABLE": "temporarily_unavailable",
    "RATE_LIMITED": "temporarily_unavailable",
    "MISCONFIGURED": "temporarily_unavailable",
}
_MISCONFIGURED = Refused(
    "MISCONFIGURED",
    "HOKUSAI_AUTH_PUBLIC_URLS is not set, so this server does not know which tokens are for it. Its "
    "operator sets it to the URL at which clients reach the server.",
)


def blueprint(trusts: Trusts, gate: Gate, verifier: Verifier | None) -> flask.Blueprint:
    """Return the route. Without a `verifier` (no public URL is set) it answers 503."""
    routes = api.blueprint("hokusai_token")

    @routes.post("/token")
    def exchange() -> flask.Response:
        caller = callers.current.get()
        try:
            answer = _exchange(trusts, gate, verifier)
        except AuthorityUnavailable as error:
            _log.error("An exchange failed: %s", error)
            answer = Refused(
                "AUTHORITY_UNAVAILABLE",
                "Trusts can't be read, or keys can't be made, at the moment. Try again.",
                retry_after=error.retry_after,
            )
        if isinstance(answer, Refused):
            metrics.EXCHANGES.labels(answer.code).inc()
            fields = {
                "code": answer.code,
                "claim": answer.claim,
                "expected": answer.expected,
                "came": answer.came,
                "address": caller.address,
                "request_id": caller.request_id,
            }
            _log.warning("An identity token was refused: %s", json.dumps(fields))
            return _refusal(answer)
        metrics.EXCHANGES.labels("exchanged").inc()
        return _success(*answer)

    return routes


def _exchange(
    trusts: Trusts, gate: Gate, verifier: Verifier | None
) -> tuple[KeyRecord, str] | Refused:
    if verifier is None:
        return _MISCONFIGURED
    if (wait := gate.limits.exchange(callers.current.get().address)) is not None:
        return Refused(
            "RATE_LIMITED",
            f"Too many tokens came from your address. Try again in {times.wait(wait)}.",
            retry_after=wait,
        )
    token = _subject_token()
    if isinstance(token, Refused):
        return token
    judged = verifier.judge(token, trusts.of_issuer, time.time())
    if isinstance(judged, Refused):
        return judged
    return trusts.exchange(
        judged.accepted.trust.trust_id,
        judged.claims,
        jwks=judged.accepted.trust.jwks,
        digest=judged.digest,
        token_id=judged.token_id,
        ends_at=judged.ends_at,
        by=callers.actor(),
    )


def _subject_token() -> str | Refused:
    """Return the token of the current request, a form or a JSON object."""
    data = flask.request.get_data()
    given: dict[str, object]
    if flask.request.mimetype == "application/x-www-form-urlencoded":
        try:
            pairs = parse_qsl(data.decode("ascii"), max_num_fields=MAX_FIELDS)
        except ValueError:
            return _malformed("The form can't be read.")
        given = dict(pairs)
        if len(given) < len(pairs):
            return _malformed("The form has a field twice.")
    else:
        body = api.body()
        if not isinstance(body, dict):
            return _malformed("Send a form (application/x-www-form-urlencoded) or a JSON object.")
        given = body
    if given.get("grant_type") != GRANT_TYPE:
        return Refused("GRANT_UNSUPPORTED", f"grant_type must be {GRANT_TYPE}.")
    if given.get("subject_token_type") not in TOKEN_TYPES:
        return _malformed(f"subject_token_type must be {' or '.join(TOKEN_TYPES)}.")
    if given.get("requested_token_type") not in (None, ISSUED_TYPE):
        return _malformed(f"requested_token_type must be {ISSUED_TYPE}, or left out.")
    if "actor_token" in given:
        return _malformed("This server supports no delegation: leave actor_token out.")
    token = given.get("subject_token")
    if not isinstance(token, str) or not token:
        return _malformed("subject_token must be the identity token.")
    return token


def _malformed(why: str) -> Refused:
    return Refused("EXCHANGE_MALFORMED", why)


def _success(record: KeyRecord, key: str) -> flask.Response:
    assert record.expires_at is not None
    answer = ExchangedKey(
        access_token=key,
        issued_token_type=ISSUED_TYPE,
        token_type="Bearer",  # noqa: S106
        expires_in=max(int(record.expires_at - time.time()), 1),
        scope=" ".join(record.scopes),
        key_id=record.key_id,
        owner=record.owner,
        source=record.source,
    )
    response = flask.jsonify(answer.model_dump())
    response.headers["Pragma"] = "no-cache"
    return response


def _refusal(refused: Refused) -> flask.Response:
    code = CODES[refused.code]
    message = full_message(refused.code, refused.message)
    response = flask.jsonify(
        error_code=code.error_code,
        message=message,
        detail=code.detail,
        error=_ERRORS.get(refused.code, "invalid_request"),
        error_description=_plain(message),
    )
    response.status_code = code.status
    if code.status in (429, 503):
        response.headers["Retry-After"] = retry_after(refused.retry_after)
    return response


def _plain(text: str) -> str:
    """Return `text` with the characters that RFC 6749 allows in a description."""
    text = text.replace('"', "'").replace("\\", "/")
    return "".join(c if " " <= c <= "~" else "?" for c in text)
