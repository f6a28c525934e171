"""The client's address behind proxies, for rate limits, networks of keys and the audit log."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache

from .keys import redact

#: Characters of an address with its zone, at most.
_MAX_LENGTH = 64

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Parse addresses and CIDR networks; raise ValueError, with advice, for anything else."""
    return tuple(_network(text) for text in texts)


def inside(address: str, texts: tuple[str, ...]) -> bool:
    """Return whether `address` is in one of the networks `texts`; an unknown one ("") is in none."""
    # A client may have written the address, so a text of any length must not fill the cache.
    return len(address) <= _MAX_LENGTH and _inside(address, texts)


@lru_cache(maxsize=4096)
def _inside(address: str, texts: tuple[str, ...]) -> bool:
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in networks(texts))


def client_address(peer: str, forwarded_for: Iterable[bytes], trusted: Sequence[Network]) -> str:
    """Return the client's address, or "" if `peer`, the socket's address, is unknown.

    `forwarded_for` are the values of X-Forwarded-For, in order. Each proxy appends the address that
    called it. So the hops are read from the right, up to the first that is no trusted proxy: a client
    may have written everything to the left of it.
    """
    address = _parsed(peer)
    if address is None:
        return ""
    hops = b",".join(forwarded_for).decode("latin-1").split(",")
    while hops and any(address in network for network in trusted):
        hop = _parsed(hops.pop().strip())
        if hop is None:
            # A trusted proxy has sent something else than an address, so its own is the last known.
            break
        address = hop
    return str(address)


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        shown = redact(text if text and text.isprintable() else ascii(text))[:_MAX_LENGTH]
        raise ValueError(
            f"{shown} is no network: give an address, such as 192.0.2.7, or a network, such as "
            "192.0.2.0/24"
        ) from None


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    # A client may have written a zone, of any length.
    if len(text) > _MAX_LENGTH:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # A dual-stack socket shows an IPv4 client as ::ffff:a.b.c.d, which is the same client.
    return getattr(address, "ipv4_mapped", None) or address
