"""Find the credential of a request: one key in its headers and query, none, or a refusal.

Every accepted place is read, and all of them must agree. A request with two different keys is refused,
because any order of precedence would surprise some sender. Blank values are skipped (an empty
`Authorization: Bearer` once hid a good `X-API-Key`), and so are schemes that carry no API key, such as
AWS4-HMAC-SHA256.

A value that begins with `hk_` is a key of ours. If a request has one, other values belong to another
layer (a load balancer's JWT, a proxy's password, an entry of ~/.netrc) and don't count. If it has none,
they count, because another authority's keys may have another form.
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
#: Header, in every spelling that WSGI servers treat as the same -> its name as a place.
_PLACES = {
    b"cookie": browser.PLACE,
    **{
        "".join(spelling).encode(): header
        for header in ("X-API-Key", "Authorization", "X-MLflow-Authorization")
        for spelling in product(*("-_" if letter == "-" else letter for letter in header.lower()))
    },
}
#: `api_key` in every percent-encoding of it. A pattern is used, because decoding every name would take
#: long: anybody may send a query with thousands of names.
_QUERY_NAME = b"".join(b"(?:%c|%%%02x|%%%02X)" % (letter, letter, letter) for letter in b"api_key")
_QUERY_FIELD = re.compile(rb"(?:^|&)" + _QUERY_NAME + rb"(?:[=&]|\Z)")
_NOT_ASCII = re.compile(rb"[\x80-\xff]")
QUERY_PLACE = "?api_key="
#: A longer value (bytes) can't hold a key of ours. Other layers' tokens are longer, and a caller
#: without a key must not make the server parse them.
MAX_VALUE = 1024
_SCHEMES = ("bearer", "apikey")
#: The credential of a request whose key is not known: it names all headers that may hold one.
ANYWHERE = Credential("", ("X-API-Key", "Authorization", "X-MLflow-Authorization"))


def find(request: Request, *, outbound: bool, query_key: bool) -> Credential | Deny | None:
    """Return the credential of `request`, None if it carries no key, or the refusal of a bad one.

    `outbound` marks routes whose headers may hold a provider's credential: there, only a value that
    begins with `hk_` counts. `query_key` says whether `?api_key=` counts.
    """
    # Key -> the places that hold it, in the order of the request.
    places_by_key: dict[str, dict[str, None]] = {}
    has_cookies = False
    too_long: str | None = None
    for name, value in request.headers:
        if name not in _PLACES or (name == _GATEWAY and not outbound):
            continue
        place = _PLACES[name]
        if name.find(b"_") >= 0:  # `in` takes twice as long for bytes
            # WSGI servers merge both spellings, so one of two values could pass unchecked.
            return Deny("KEY_CONFLICT", f"Spell the header {place}, with hyphens.")
        if place is browser.PLACE:
            if not has_cookies:  # session_tokens reads all Cookie headers at once
                has_cookies = True
                for token in browser.session_tokens(request):
                    places_by_key.setdefault(token, {})[place] = None
            continue
        if len(value) > MAX_VALUE:
            if not outbound and _has_our_scheme(name, value):
                too_long = place
            continue
        # WSGI servers join repeated headers with a comma, which no key contains.
        for part in value.decode("latin-1").split(","):
            for key in _from_header(name, part):
                if not outbound or _is_ours(key):
                    places_by_key.setdefault(key, {})[place] = None
    if query_key and _QUERY_FIELD.search(request.query):
        for key in _query_values(request.query):
            if len(key) > MAX_VALUE:
                too_long = QUERY_PLACE
            else:
                places_by_key.setdefault(key, {})[QUERY_PLACE] = None
    if len(places_by_key) > 1:
        ours = {key: places for key, places in places_by_key.items() if _is_ours(key)}
        places_by_key = ours or places_by_key
    if len(places_by_key) > 1:
        return _conflict({place: None for places in places_by_key.values() for place in places})
    for key, places in places_by_key.items():
        session = [*places] == [browser.PLACE]
        if session != keys.is_session_token(key):
            return Deny(
                "KEY_MALFORMED",
                f"{next(iter(places))} holds the wrong kind of credential: a session's token belongs "
                "in its cookie, and a key in a header.",
            )
        return Credential(key, tuple(places), session)
    if too_long is not None:
        return Deny(
            "KEY_MALFORMED",
            f"{too_long} holds more than {MAX_VALUE} bytes, and no key of this server is that long.",
        )
    return None


def _has_our_scheme(name: bytes, value: bytes) -> bool:
    """Return whether the header `name` or the scheme of `value` is one for API keys."""
    scheme = value[:16].lstrip(b" \t").partition(b" ")[0].lower().decode("latin-1")
    return name == _API_KEY or scheme in (*_SCHEMES, "basic")


def _conflict(places: Collection[str]) -> Deny:
    """Return the refusal of a request whose `places` hold more than one key."""
    if browser.PLACE in places:
        return Deny(
            "KEY_CONFLICT",
            "This browser is signed in, and the request carries a key as well, or a second session. "
            "Sign out, or send no other key.",
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
    """Return `query` without its `api_key` fields, and every other byte unchanged.

    The gate calls this before any other code sees the query, even if the key doesn't count: MLflow and
    the access log would print it.
    """
    if not _QUERY_FIELD.search(query):
        return query
    return b"&".join(field for field in query.split(b"&") if not _QUERY_FIELD.match(field))


def quoted(query: bytes) -> bytes:
    """Return `query` with each non-ASCII byte percent-encoded.

    The meaning stays the same (RFC 3986, 2.1). gunicorn and waitress let any byte pass, and werkzeug
    fails on bytes that aren't UTF-8, whatever the route.
    """
    if query.isascii():
        return query
    return _NOT_ASCII.sub(lambda found: b"%%%02X" % ord(found[0]), query)


def _is_ours(text: str) -> bool:
    """Return whether a word of `text` begins as our keys do."""
    return "hk_" in text and any(word.startswith("hk_") for word in text.split())


def _from_header(name: bytes, value: str) -> Sequence[str]:
    """Return the keys in `value`, a part between commas of the header `name`."""
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
    """Return the words of `text` if each is a key of ours, and otherwise `text` as a whole.

    MLflow joins the values of two request header providers with a space (`resolve_request_headers`),
    which repeats the scheme of Authorization.
    """
    if " " not in text:
        return (text,) if text else ()
    first, *others = text.split()
    words = [first, *(word for word in others if word.lower() not in _SCHEMES)]
    return words if all(map(_is_ours, words)) else (text,)


def _query_values(query: bytes) -> Iterator[str]:
    for field in query.split(b"&"):
        if _QUERY_FIELD.match(field):
            value = unquote_to_bytes(field.partition(b"=")[2].replace(b"+", b" "))
            if text := value.decode("latin-1").strip():
                yield text
