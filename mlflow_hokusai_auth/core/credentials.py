"""Headers and query -> the one key of a request, none, or a refusal.

Every accepted place is looked at, and all of them must agree: a request that carries two different
keys is refused, because no order of precedence is the one that its sender had in mind. Blank values
are skipped (an empty `Authorization: Bearer` shadowed a good `X-API-Key` once), and so are schemes
that carry no API key, such as AWS4-HMAC-SHA256.

A value that begins with `hk_` is a key of ours. Where there is one, values that don't begin so belong
to another layer (a load balancer's JWT, a proxy's password, what ~/.netrc adds) and don't count.
Where there is none, they count: another authority's keys may have another form.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Sequence
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
#: Bytes of a value up to which it may hold a key of ours. Tokens of outer layers are longer, and to
#: take them apart costs time that nobody has paid for.
MAX_VALUE = 1024
_SCHEMES = ("bearer", "apikey")
#: For a request whose key could not be told: all headers that may hold it.
ANYWHERE = Credential("", ("X-API-Key", "Authorization", "X-MLflow-Authorization"))


def find(request: Request, *, outbound: bool, query_key: bool) -> Credential | Deny | None:
    """The key that `request` carries.

    `outbound` marks routes whose headers may also hold another provider's credential: there only
    what begins as our keys do is taken for one. `query_key` is whether `?api_key=` counts.
    """
    # Each text, and the places that hold it, in the order in which they were found.
    found: dict[str, dict[str, None]] = {}
    has_cookies = False
    too_long: str | None = None
    for name, value in request.headers:
        place = _PLACES.get(name)
        if place is None or (name == _GATEWAY and not outbound):
            continue
        if b"_" in name:
            # One of both could ride along unseen.
            return Deny("KEY_CONFLICT", f"Spell the header {place}, with hyphens.")
        if place is browser.PLACE:
            if not has_cookies:  # the first of several Cookie headers finds all
                has_cookies = True
                for token in browser.session_tokens(request):
                    found.setdefault(token, {})[place] = None
            continue
        if len(value) > MAX_VALUE:
            if not outbound and _has_our_scheme(name, value):
                too_long = place
            continue
        # A server that speaks WSGI joins repeated headers with a comma, which no key contains.
        for part in value.decode("latin-1").split(","):
            for key in _from_header(name, part):
                if not outbound or _is_ours(key):
                    found.setdefault(key, {})[place] = None
    if query_key and request.query:
        for key in _query_values(request.query):
            if len(key) > MAX_VALUE:
                too_long = QUERY_PLACE
            else:
                found.setdefault(key, {})[QUERY_PLACE] = None
    if len(found) > 1:
        found = {key: places for key, places in found.items() if _is_ours(key)} or found
    if len(found) > 1:
        return _conflict({place: None for places in found.values() for place in places})
    for key, places in found.items():
        session = [*places] == [browser.PLACE]
        if session != keys.is_session_token(key):
            return Deny("KEY_MALFORMED", f"{next(iter(places))} holds what does not belong there.")
        return Credential(key, tuple(places), session)
    if too_long is not None:
        return Deny(
            "KEY_MALFORMED",
            f"What {too_long} holds is longer than {MAX_VALUE} bytes, so it is no key of this server.",
        )
    return None


def _has_our_scheme(name: bytes, value: bytes) -> bool:
    """Whether a value is of a kind that holds an API key, by its first word."""
    scheme = value[:16].lstrip(b" \t").partition(b" ")[0].lower().decode("latin-1")
    return name == _API_KEY or scheme in (*_SCHEMES, "basic")


def _conflict(places: Collection[str]) -> Deny:
    """The refusal of a request whose `places` hold more than one key."""
    if browser.PLACE in places:
        return Deny(
            "KEY_CONFLICT",
            "Somebody is signed in here, in this browser, and the request holds a key as well "
            "or a second session. Sign out, or send no other key.",
        )
    if len(places) == 1:
        return Deny(
            "KEY_CONFLICT",
            f"{next(iter(places))} holds two different keys. Send one: two of MLflow's request "
            "header providers may set it (`hokusai-auth doctor` lists them), or two parts of the "
            "program.",
        )
    return Deny(
        "KEY_CONFLICT",
        f"{' and '.join(places)} hold different keys. Send one key: MLFLOW_TRACKING_TOKEN, "
        "MLFLOW_TRACKING_PASSWORD and HOKUSAI_API_KEY must agree where more than one is set.",
    )


def without_query_key(query: bytes) -> bytes:
    """`query` without its `api_key` fields, every other byte of it kept as it was.

    Done before anything else sees the query, whether or not the key counts: MLflow and the access
    log would print it.
    """
    if not _QUERY_FIELD.search(query):
        return query
    return b"&".join(field for field in query.split(b"&") if not _QUERY_FIELD.match(field))


def _is_ours(text: str) -> bool:
    """Whether `text` was meant as a key of ours: a word of it begins as all of them do."""
    return "hk_" in text and any(word.startswith("hk_") for word in text.split())


def _from_header(name: bytes, value: str) -> Sequence[str]:
    """The keys in `value`, a part between commas."""
    value = value.strip(" \t")
    if name == _API_KEY:
        return _words(value)
    scheme, _, rest = value.partition(" ")
    rest = rest.strip(" \t")
    scheme = scheme.lower()
    if scheme in _SCHEMES:
        return _words(rest)
    if scheme == "basic":
        try:
            decoded = base64.b64decode(rest, validate=True).decode("latin-1")
        except (binascii.Error, ValueError):
            return ()
        return _words(decoded.partition(":")[2].strip(" \t"))
    return ()


def _words(text: str) -> Sequence[str]:
    """`text` as a whole, or its words where each is a key.

    MLflow joins with a space what two request header providers set (`resolve_request_headers`), which
    for Authorization repeats the scheme.
    """
    if " " not in text:
        return (text,) if text else ()
    first, *others = text.split()
    words = [first, *(word for word in others if word.lower() not in _SCHEMES)]
    return words if all(map(_is_ours, words)) else (text,)


def _query_values(query: bytes) -> Iterator[str]:
    if not _QUERY_FIELD.search(query):
        return
    for field in query.split(b"&"):
        if _QUERY_FIELD.match(field):
            value = unquote_to_bytes(field.partition(b"=")[2].replace(b"+", b" "))
            if text := value.decode("latin-1").strip():
                yield text
