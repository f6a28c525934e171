"""Which headers MLflow sees, and who it is told the caller is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.forwarding import dropped, identity
from mlflow_hokusai_auth.core.operations import UNKNOWN
from mlflow_hokusai_auth.core.types import Access, Allow, Credential, Operation, Principal

PRINCIPAL = Principal("key_1", "somebody", frozenset())
ALL_PLACES = ("X-API-Key", "Authorization", "X-MLflow-Authorization", "?api_key=")


def allow(*places: str, outbound: bool = False) -> Allow:
    operation = Operation(Access.WRITE, "gateway", "POST /x", outbound)
    return Allow(operation, PRINCIPAL, Credential("hk_live_x", places))


PUBLIC = Allow(Operation(Access.PUBLIC, "server", "GET /health"))
SPELLINGS = [
    b"x-hokusai-user-id",
    b"x_hokusai_user_id",
    b"x-hokusai_user",
    b"x_hokusai-",
    b"x-hokusai-",
]


@pytest.mark.parametrize("name", SPELLINGS)
def test_identity_headers_are_dropped_everywhere(name: bytes) -> None:
    for verdict in (PUBLIC, allow("X-API-Key"), allow("X-API-Key", outbound=True)):
        assert dropped(name, verdict)


@given(st.one_of(st.binary(), st.sampled_from([b"x-hokusai", b"hokusai-user", b"x-hokusais-user"])))
def test_nothing_else_is_dropped_where_nothing_leaves_the_server(name: bytes) -> None:
    if not name.replace(b"_", b"-").startswith(b"x-hokusai-"):
        assert not dropped(name, allow(*ALL_PLACES))
        assert not dropped(name, PUBLIC)


@pytest.mark.parametrize("place", ALL_PLACES[:3])
def test_a_request_that_calls_out_loses_the_header_that_held_the_key(place: str) -> None:
    verdict = allow(place, outbound=True)
    for other in ALL_PLACES[:3]:
        name = other.lower().encode()
        assert dropped(name, verdict) == (other == place)
        assert dropped(name.replace(b"-", b"_"), verdict) == (other == place)
    assert not dropped(b"accept", verdict)


def test_identity() -> None:
    assert identity(allow("X-API-Key")) == (
        (b"x-hokusai-api-key-id", b"key_1"),
        (b"x-hokusai-user-id", b"somebody"),
    )
    assert identity(allow("X-API-Key", outbound=True)) == ()
    assert identity(PUBLIC) == ()


@given(st.text())
def test_an_owner_is_one_line_of_ascii(owner: str) -> None:
    try:
        owner.encode()
    except UnicodeEncodeError:
        return
    verdict = Allow(Operation(Access.READ, "", "GET /x"), Principal("key_1", owner, frozenset()))
    value = dict(identity(verdict))[b"x-hokusai-user-id"].decode("ascii")
    assert value.isprintable() or not value


def test_a_route_that_nobody_knows_is_not_trusted_with_the_key() -> None:
    verdict = Allow(UNKNOWN, Principal("key_1", "me", frozenset()), Credential("k", ("X-API-Key",)))
    assert dropped(b"x-api-key", verdict)
    assert not dropped(b"authorization", verdict)
    assert identity(verdict) == ()
