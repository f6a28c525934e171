"""The client's address behind proxies, and the networks of a key."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import addresses
from mlflow_hokusai_auth.core.addresses import client_address, inside, networks

from .rows import agree

PROXIES = networks(["10.0.0.0/8", "fd00::1"])


def test_regression_30_the_right_most_hop_that_is_no_proxy() -> None:
    rows = [
        ("203.0.113.7", [], "203.0.113.7"),
        # The peer is no trusted proxy, so it is the client.
        ("203.0.113.7", [b"198.51.100.1"], "203.0.113.7"),
        ("10.0.0.1", [b"198.51.100.1"], "198.51.100.1"),
        # The client may have written the hops further left itself.
        ("10.0.0.1", [b"1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [b"1.1.1.1", b"198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", [b"198.51.100.1, 10.2.0.1"], "198.51.100.1"),
        ("10.0.0.1", [b"10.3.0.1,10.2.0.1"], "10.3.0.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", [b""], "10.0.0.1"),
        ("10.0.0.1", [b"198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", [b"198.51.100.1, \xff\x00"], "10.0.0.1"),
        ("fd00::1", [b"2001:db8::5"], "2001:db8::5"),
        ("::ffff:203.0.113.7", [], "203.0.113.7"),
        ("::ffff:10.0.0.1", [b"198.51.100.1"], "198.51.100.1"),
        ("", [b"198.51.100.1"], ""),
        ("unix:", [b"198.51.100.1"], ""),
    ]
    agree(lambda peer, forwarded: client_address(peer, forwarded, PROXIES), rows)


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_regression_31_no_header_counts_without_a_trusted_proxy(forwarded: list[bytes]) -> None:
    assert client_address("203.0.113.7", forwarded, ()) == "203.0.113.7"
    assert client_address("10.0.0.1", forwarded, ()) == "10.0.0.1"


@given(st.lists(st.binary(max_size=40), max_size=4))
def test_any_header_gives_an_address(forwarded: list[bytes]) -> None:
    assert client_address("10.0.0.1", forwarded, PROXIES) != ""


def test_address_is_compared_with_networks() -> None:
    rows = [
        ("192.0.2.7", ("192.0.2.7",), True),
        ("192.0.2.8", ("192.0.2.7",), False),
        ("192.0.2.7", ("10.0.0.0/8", "192.0.2.0/24"), True),
        ("192.0.3.7", ("10.0.0.0/8", "192.0.2.0/24"), False),
        ("192.0.2.7", ("192.0.2.9/24",), True),
        ("2001:db8::1", ("2001:db8::/32",), True),
        ("2001:db9::1", ("2001:db8::/32",), False),
        ("::ffff:192.0.2.7", ("192.0.2.0/24",), True),
        # An IPv4 address is never in an IPv6 network, and the other way round.
        ("192.0.2.7", ("::/0",), False),
        ("2001:db8::1", ("0.0.0.0/0",), False),
        ("192.0.2.7", (), False),
        # An unknown address is in no network, not even in one of all addresses.
        ("", ("0.0.0.0/0", "::/0"), False),
        ("unknown", ("0.0.0.0/0", "::/0"), False),
    ]
    agree(inside, rows)


def test_invalid_network_is_refused() -> None:
    for text in ("", "x", "192.0.2", "192.0.2.0/33", "192.0.2.0/-1", "1.2.3.4:80"):
        with pytest.raises(
            ValueError, match=f"^{re.escape(text or repr(text))} is no network: give "
        ):
            networks([text])
    with pytest.raises(ValueError, match=r"^hk_live_\*\*\* is no network"):
        networks(["hk_live_" + "a1B2" * 8])


def test_overlong_address_is_not_cached() -> None:
    before = addresses._inside.cache_info()
    assert not inside("1" * 65, ("0.0.0.0/0",))
    assert addresses._inside.cache_info() == before
    assert inside("fe80::1%" + "z" * 56, ("fe80::/10",))
    proxy, hop = "192.0.2.1", b"fe80::1%" + b"z" * 57
    assert client_address(proxy, [hop], networks(["192.0.2.0/24"])) == proxy
