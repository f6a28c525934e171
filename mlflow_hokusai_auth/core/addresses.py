"""Whose request it is, when proxies stand between: the address that limits and audits may rely on."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from functools import lru_cache

#: Characters of an address, with a zone.
_MAX_LENGTH = 64

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Addresses and CIDR networks as networks; raises ValueError for anything else."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def inside(address: str, texts: tuple[str, ...]) -> bool:
    """Whether `address` is in one of the networks `texts`; never, if it is not known ("")."""
    # Whoever asks may have written it, and what is as long is no address.
    return len(address) <= _MAX_LENGTH and _inside(address, texts)


@lru_cache(maxsize=4096)
def _inside(address: str, texts: tuple[str, ...]) -> bool:
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in networks(texts))


def client_address(peer: str, forwarded_for: Iterable[bytes], trusted: Sequence[Network]) -> str:
    """The client's address: the socket's `peer`, or, behind trusted proxies, whom they name.

    `forwarded_for` are the values of X-Forwarded-For, in order. Each proxy appends whom it was called
    by, so they are read from the right, up to the first hop that is not a trusted proxy; what stands to
    the left of it, a client may have written itself. "" if the peer is not known.
    """
    address = _parsed(peer)
    if address is None:
        return ""
    hops = b",".join(forwarded_for).decode("latin-1").split(",")
    while hops and any(address in network for network in trusted):
        hop = _parsed(hops.pop().strip())
        if hop is None:
            # Whatever a trusted proxy meant by this, it is not an address; itself is the last known.
            break
        address = hop
    return str(address)


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    # A zone may be of any length, and written by anybody.
    if len(text) > _MAX_LENGTH:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # An IPv4 client of a dual-stack socket is one and the same client.
    return getattr(address, "ipv4_mapped", None) or address
