"""The headers that reach MLflow, and the identity headers of the caller."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.forwarding import HeaderPolicy, dropped, identity_headers
from mlflow_hokusai_auth.core.operations import UNKNOWN
from mlflow_hokusai_auth.core.types import Access, Allow, Credential, Operation, Principal

from .rows import agree

PRINCIPAL = Principal("key_1", "somebody", frozenset())
ALL_PLACES = ("X-API-Key", "Authorization", "X-MLflow-Authorization", "?api_key=")


def allow(*places: str, outbound: bool = False) -> Allow:
    operation = Operation(Access.WRITE, "gateway", "POST /x", outbound)
    return Allow(operation, PRINCIPAL, Credential("hk_live_x", places))


PUBLIC = Allow(Operation(Access.PUBLIC, "server", "GET /health"))


def test_identity_headers_are_dropped_everywhere() -> None:
    names = [b"x-hokusai-user-id", b"x_hokusai_user_id", b"x-hokusai_user", b"x_hokusai-"]
    for name in (*names, b"x-hokusai-"):
        for verdict in (PUBLIC, allow("X-API-Key"), allow("X-API-Key", outbound=True)):
            assert dropped([name], verdict) == {name}


@given(st.one_of(st.binary(), st.sampled_from([b"x-hokusai", b"hokusai-user", b"x-hokusais-user"])))
def test_other_headers_are_kept_if_the_request_stays_here(name: bytes) -> None:
    if not name.replace(b"_", b"-").startswith(b"x-hokusai-"):
        assert not dropped([name], allow(*ALL_PLACES))


def test_public_request_keeps_listed_headers_only() -> None:
    kept = (b"host", b"origin", b"cookie", b"content-type", b"access-control-request-method")
    assert not dropped(kept, PUBLIC)
    gone = {b"x-mlflow-workspace", b"x_mlflow_workspace", b"x-forwarded-host", b"authorization"}
    gone |= {b"content_type", b"x-", b"\xff", b"", b"range"}
    assert dropped(gone, PUBLIC) == gone
    # Other routes keep them all, even if the mode asks for no key.
    unchecked = Allow(Operation(Access.READ, "server", "GET /version"))
    assert not dropped(gone, unchecked)


def test_outbound_request_loses_the_header_with_the_key() -> None:
    for place, other in product(ALL_PLACES[:3], repeat=2):
        verdict = allow(place, outbound=True)
        name = other.lower().encode()
        assert bool(dropped([name], verdict)) == (other == place)
        assert bool(dropped([name.replace(b"-", b"_")], verdict)) == (other == place)
        assert not dropped([b"accept"], verdict)


def test_identity() -> None:
    assert identity_headers(allow("X-API-Key")) == (
        (b"x-hokusai-api-key-id", b"key_1"),
        (b"x-hokusai-user-id", b"somebody"),
    )
    assert identity_headers(allow("X-API-Key", outbound=True)) == ()
    assert identity_headers(PUBLIC) == ()


@given(st.text())
def test_an_owner_is_one_line_of_ascii(owner: str) -> None:
    try:
        owner.encode()
    except UnicodeEncodeError:
        return
    verdict = Allow(Operation(Access.READ, "", "GET /x"), Principal("key_1", owner, frozenset()))
    value = dict(identity_headers(verdict))[b"x-hokusai-user-id"].decode("ascii")
    assert value.isprintable() or not value


def test_unknown_route_loses_the_header_with_the_key() -> None:
    verdict = Allow(UNKNOWN, Principal("key_1", "me", frozenset()), Credential("k", ("X-API-Key",)))
    assert dropped([b"x-api-key"], verdict)
    assert not dropped([b"authorization"], verdict)
    assert identity_headers(verdict) == ()


def test_outbound_request_without_a_key_loses_cookies() -> None:
    assert dropped([b"cookie", b"accept"], Allow(UNKNOWN)) == {b"cookie"}


# The operator's policy


def test_policy_decides_which_headers_reach_mlflow() -> None:
    rows = [
        (HeaderPolicy(), b"x-tenant", True),
        (HeaderPolicy(remove=("x-tenant",)), b"x-tenant", False),
        (HeaderPolicy(remove=("x-tenant",)), b"x_tenant", False),
        (HeaderPolicy(remove=("x_tenant",)), b"x-tenant", False),
        (HeaderPolicy(remove=("x_tenant*",)), b"x-tenant-id", False),
        (HeaderPolicy(remove=("x-tenant",)), b"x-tenants", True),
        (HeaderPolicy(remove=("x-forwarded-*",)), b"x-forwarded-for", False),
        (HeaderPolicy(remove=("x-forwarded-*",)), b"x-forwarded", True),
        (HeaderPolicy(forward=("accept*",)), b"accept-encoding", True),
        (HeaderPolicy(forward=("accept*",)), b"user-agent", False),
        (HeaderPolicy(forward=("x-*",), remove=("x-api-key",)), b"x-api-key", False),
        (HeaderPolicy(forward=("x-*",), remove=("x-api-key",)), b"x-tenant", True),
        (HeaderPolicy(forward=("*",)), b"x-hokusai-user-id", False),
        (HeaderPolicy(forward=()), b"authorization", False),
        (HeaderPolicy(forward=("a.b",)), b"axb", False),
        (HeaderPolicy(forward=("accept",)), b"\xff", False),
    ]
    agree(lambda policy, name: not dropped([name], allow("Authorization"), policy), rows)
    public = [(policy, name, kept and name == b"accept-encoding") for policy, name, kept in rows]
    agree(lambda policy, name: not dropped([name], PUBLIC, policy), public)


NEEDED = ("host", "content-length", "content-type", "content-encoding", "transfer-encoding")


def test_headers_that_http_needs_reach_mlflow_under_any_policy() -> None:
    for name in NEEDED:
        for policy in HeaderPolicy(()), HeaderPolicy(("x",), (name,)), HeaderPolicy(remove=("*",)):
            assert not dropped([name.encode()], PUBLIC, policy), name


def test_no_policy_gives_a_key_to_a_provider() -> None:
    policy = HeaderPolicy(forward=("x-api-key", "cookie"))
    verdict = allow("X-API-Key", outbound=True)
    assert dropped([b"x-api-key"], verdict, policy) and dropped([b"cookie"], verdict, policy)


def test_invalid_policy_is_explained() -> None:
    for policy, says in (
        (HeaderPolicy(), None),
        (HeaderPolicy((), ()), None),
        (HeaderPolicy(("accept", "x-*", "x_y"), ("x-forwarded-*", "cookie")), None),
        (HeaderPolicy(("x-*-y",)), "not a header name"),
        (HeaderPolicy(("X-Tenant",)), "not a header name"),
        (HeaderPolicy(("x tenant",)), "not a header name"),
        (HeaderPolicy(remove=("x-é",)), "not a header name"),
        (HeaderPolicy(remove=("x\n",)), "not a header name"),
        (HeaderPolicy(remove=("host",)), "host can't be removed"),
        (HeaderPolicy(remove=("content_type",)), "content-type can't be removed"),
        (HeaderPolicy(remove=("content-*",)), "content-encoding, content-length, content-type"),
        (HeaderPolicy(remove=("*",)), "can't be removed"),
        (HeaderPolicy(("x-hokusai-user-id",)), "can't be forwarded"),
        (HeaderPolicy(("x_hokusai_*",)), "can't be forwarded"),
    ):
        problem = policy.problem()
        assert problem is None if says is None else says in str(problem), policy
