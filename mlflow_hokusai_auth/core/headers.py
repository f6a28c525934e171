"""Limits on the size and form of a request's headers. They hold without a key as well."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv6Address
from urllib.parse import urlsplit

from .types import Request

MAX_HEADERS = 100
#: Bytes of all names and values together.
MAX_BYTES = 32 * 1024
#: Bytes of a Host or an Origin. A DNS name has at most 255.
_MAX_ORIGIN = 300

#: RFC 3986, 3.2.2: a name or an IPv4 address, or an IPv6 address in brackets; then a port. A comma is
#: excluded, because WSGI servers join two Host headers with one.
_HOST = re.compile(
    r"(?:[\w.~!$&'()*+;=%-]*|\[([0-9a-fA-F:.]+(?:%[\w.~%-]+)?)\])(?::(\d{0,5}))?", re.A
)


def too_many(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    """Return whether `headers` exceed `MAX_HEADERS` or `MAX_BYTES`, which no MLflow client needs."""
    if len(headers) > MAX_HEADERS:
        return True
    size = 0
    for name, value in headers:  # twice as fast as `sum` for this few headers
        size += len(name) + len(value)
    return size > MAX_BYTES


def malformed(request: Request) -> str | None:
    """Return the first of "Host" and "Origin" that is repeated or can't be read, or None.

    On every route, MLflow and Starlette fail on such a value, and if there are two, each picks a
    different one.
    """
    if request.repeats:
        for name in (b"host", b"origin"):
            if sum(one == name for one, _ in request.headers) > 1:
                return name.decode().title()
    host, origin = request.header(b"host"), request.header(b"origin")
    if host is not None and (len(host) > _MAX_ORIGIN or not _is_host(host)):
        return "Host"
    if origin is not None and (len(origin) > _MAX_ORIGIN or not _is_origin(origin)):
        return "Origin"
    return None


@lru_cache(maxsize=1024)
def _is_host(value: bytes) -> bool:
    match = _HOST.fullmatch(value.decode("latin-1"))
    if match is None:
        return False
    address, port = match.groups()
    try:
        if address is not None:
            IPv6Address(address)
    except ValueError:
        return False
    return int(port or 0) <= 65535


@lru_cache(maxsize=1024)
def _is_origin(value: bytes) -> bool:
    """Return whether `value` is printable ASCII and splits as a URL. Any scheme will do."""
    text = value.decode("latin-1")
    try:
        # urlsplit checks the port only when it is read.
        _ = urlsplit(text).port
    except ValueError:
        return False
    # WSGI servers join two Origin headers with a comma.
    return text.isascii() and text.isprintable() and "," not in text
