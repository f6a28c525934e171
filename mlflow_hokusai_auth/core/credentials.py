"""Headers and query -> the one key of a request, none, or a refusal.

Every accepted place is looked at, and all of them must agree: a request that carries two different
keys is refused, because no order of precedence is the one that its sender had in mind. Blank values
are skipped (an empty `Authorization: Bearer` shadowed a good `X-API-Key` once), and so are schemes
that carry no API key, such as AWS4-HMAC-SHA256.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from itertools import product
from urllib.parse import unquote_to_bytes

from . import browser, keys
from .types import Credential, Deny, Request

_API_KEY = b"x-api-key"
#: MLflow's own header for gateway routes, where Authorization may belong to the provider
#: (mlflow/server/auth, `X-MLflow-Authorization`).
_GATEWAY = b"x-mlflow-authorization"
#: Header in any spelling that WSGI makes one of -> the place that it is.
_PLACES = {
    b"cookie": browser.PLACE,
    **{
        "".join(spelling).encode(): header
        for header in ("X-API-Key", "Authorization", "X-MLflow-Authorization")
        for spelling in product(*("-_" if letter == "-" else letter for letter in header.lower()))
    },
}
#: It in every spelling, as anything that decodes has it. By one pattern, and not by decoding: a query
#: of anybody's may have thousands of names.
_QUERY_NAME = b"".join(b"(?:%c|%%%02x|%%%02X)" % (letter, letter, letter) for letter in b"api_key")
_QUERY_FIELD = re.compile(rb"(?:^|&)" + _QUERY_NAME + rb"(?:[=&]|\Z)")
QUERY_PLACE = "?api_key="
#: For a request whose key could not be told: all headers that may hold it.
ANYWHERE = Credential("", ("X-API-Key", "Authorization", "X-MLflow-Authorization"))


def find(request: Request, *, outbound: bool, query_key: bool) -> Credential | Deny | None:
    """The key that `request` carries.

    `outbound` marks routes whose headers may also hold another provider's credential: there only
    what begins as our keys do is taken for one. `query_key` is whether `?api_key=` counts.
    """
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    for name, value in request.headers:
        place = _PLACES.get(name)
        if place is None or (name == _GATEWAY and not outbound):
            continue
        if b"_" in name:
            # One of both could ride along unseen.
            return Deny("KEY_CONFLICT", f"Spell the header {place}, with hyphens.")
        if place is browser.PLACE:
            if place not in seen:  # the first of several Cookie headers finds all
                seen.add(place)
                for token in browser.session_tokens(request):
                    found.setdefault(token, []).append(place)
            continue
        # A server that speaks WSGI joins repeated headers with a comma, which no key contains.
        for part in value.decode("latin-1").split(","):
            key = _from_header(name, part)
            if not key or (outbound and not key.startswith("hk_")):
                continue
            if place in seen:
                return Deny("KEY_CONFLICT", f"{place} was sent more than once. Send it once.")
            seen.add(place)
            found.setdefault(key, []).append(place)
    if query_key and request.query:
        for key in _query_values(request.query):
            if QUERY_PLACE in seen:
                return Deny("KEY_CONFLICT", "?api_key= was sent more than once. Send it once.")
            seen.add(QUERY_PLACE)
            found.setdefault(key, []).append(QUERY_PLACE)
    if len(found) > 1:
        if any(browser.PLACE in places for places in found.values()):
            return Deny(
                "KEY_CONFLICT",
                "Somebody is signed in here, in this browser, and the request holds a key as well "
                "or a second session. Sign out, or send no other key.",
            )
        places = " and ".join(places[0] for places in found.values())
        return Deny(
            "KEY_CONFLICT",
            f"{places} hold different keys. Send one key: MLFLOW_TRACKING_TOKEN, "
            "MLFLOW_TRACKING_PASSWORD and HOKUSAI_API_KEY must agree where more than one is set.",
        )
    for key, named in found.items():
        session = named == [browser.PLACE]
        if session != keys.is_session_token(key):
            return Deny("KEY_MALFORMED", f"{named[0]} holds what does not belong there.")
        return Credential(key, tuple(named), session)
    return None


def without_query_key(query: bytes) -> bytes:
    """`query` without its `api_key` fields, every other byte of it kept as it was.

    Done before anything else sees the query, whether or not the key counts: MLflow and the access
    log would print it.
    """
    if not _QUERY_FIELD.search(query):
        return query
    return b"&".join(field for field in query.split(b"&") if not _QUERY_FIELD.match(field))


def _from_header(name: bytes, value: str) -> str:
    value = value.strip(" \t")
    if name == _API_KEY:
        return value
    scheme, _, rest = value.partition(" ")
    rest = rest.strip(" \t")
    scheme = scheme.lower()
    if scheme in ("bearer", "apikey"):
        return rest
    if scheme == "basic":
        try:
            decoded = base64.b64decode(rest, validate=True).decode("latin-1")
        except (binascii.Error, ValueError):
            return ""
        return decoded.partition(":")[2].strip(" \t")
    return ""


def _query_values(query: bytes) -> Iterator[str]:
    if not _QUERY_FIELD.search(query):
        return
    for field in query.split(b"&"):
        if _QUERY_FIELD.match(field):
            value = unquote_to_bytes(field.partition(b"=")[2].replace(b"+", b" "))
            if text := value.decode("latin-1").strip():
                yield text
