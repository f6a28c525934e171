"""The one key of a request. The places and forms are in vectors/requests.toml; here, properties."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from itertools import product
from urllib.parse import parse_qsl, quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import credentials
from mlflow_hokusai_auth.core.browser import PLACE
from mlflow_hokusai_auth.core.credentials import find, quoted, without_query_key
from mlflow_hokusai_auth.core.types import Credential, Deny, Request

from .rows import each

FIRST, SECOND = "hk_live_first", "hk_live_second"
SESSION = "hk_session_first"


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"user:{key}".encode()).decode()


#: Each place for a key: its name, the header or query field, and the form of the value.
PLACES = {
    "X-API-Key": lambda key: ("x-api-key", key),
    "Authorization": lambda key: ("authorization", f"Bearer {key}"),
    "X-MLflow-Authorization": lambda key: ("x-mlflow-authorization", basic(key)),
    "?api_key=": lambda key: ("?", f"api_key={key}"),
}


def request(*fields: tuple[str, str]) -> Request:
    headers = tuple((n.encode(), v.encode("latin-1")) for n, v in fields if n != "?")
    query = "&".join(value for name, value in fields if name == "?")
    return Request("GET", "/version", query.encode("latin-1"), headers)


def look(*fields: tuple[str, str], outbound: bool = False, query_key: bool = True) -> object:
    return find(request(*fields), outbound=outbound, query_key=query_key)


def refusal(*fields: tuple[str, str]) -> Deny:
    """Return the refusal of an outbound request; fail if there is none, or if it shows a key."""
    refused = look(*fields, outbound=True)
    assert isinstance(refused, Deny)
    assert FIRST not in refused.message and SESSION not in refused.message
    return refused


def test_value_above_a_kilobyte_is_not_read() -> None:
    long = "x" * credentials.MAX_VALUE
    token, key = ("authorization", f"Bearer {long}"), ("x-api-key", FIRST)
    # Beside a key, the long value belongs to another layer.
    assert look(token, key) == look(key, token) == Credential(FIRST, ("X-API-Key",))
    for only, place in (
        (("x-api-key", f"{FIRST},{long}"), "X-API-Key"),
        (("x-api-key", "," * len(long) + ","), "X-API-Key"),
        (token, "Authorization"),
        (("authorization", f"  basic {long}"), "Authorization"),
        (("?", f"api_key={long}x"), "?api_key="),
    ):
        found = look(only)
        assert isinstance(found, Deny) and found.code == "KEY_MALFORMED", only[0]
        assert place in found.message
    # An unknown scheme holds no API key, and on an outbound route the value is the provider's.
    assert look(("authorization", f"Negotiate {long}")) is None
    assert look(token, outbound=True) is None
    assert look(("x-mlflow-authorization", f"Bearer {long}")) is None


def test_credential_names_its_place() -> None:
    for place, written in PLACES.items():
        assert look(written(FIRST), outbound=True) == Credential(FIRST, (place,))


def test_two_places_must_agree() -> None:
    for one, two in product(PLACES, repeat=2):
        refused = refusal(PLACES[one](FIRST), PLACES[two](SECOND))
        assert refused.code == "KEY_CONFLICT", (one, two)
        assert one in refused.message and two in refused.message, (one, two)
        same = look(PLACES[one](FIRST), PLACES[two](FIRST), outbound=True)
        assert isinstance(same, Credential), (one, two)
        assert sorted(same.places) == sorted({one, two}), (one, two)


def test_value_without_the_prefix_of_keys_counts_only_if_no_key_is_there() -> None:
    # These are a load balancer's JWT, a proxy's password and an entry of ~/.netrc.
    others = ("eyJ.eyJ.c2ln", "password", "HK_LIVE_FIRST", "khk_live_x")

    def check(place: str, other: str, foreign: str) -> None:
        fields = [PLACES[place](FIRST), PLACES[other](foreign)]
        for sent in (fields, fields[::-1]):
            assert look(*sent, outbound=True) == Credential(FIRST, (place,)), "beside a key"
        if other not in (place, "X-MLflow-Authorization") and "X-ML" not in place:
            refused = look(PLACES[place]("nonsense"), PLACES[other](foreign))
            assert isinstance(refused, Deny), "two of no key's form"
            assert refused.code == "KEY_CONFLICT", "two of no key's form"

    each(check, product(PLACES, PLACES, others))


def test_other_layer_s_credential_does_not_count_beside_a_session() -> None:
    found = look(cookie(SESSION), PLACES["Authorization"]("eyJ.eyJ.c2ln"))
    assert found == Credential(SESSION, (PLACE,), session=True)


def test_key_joined_to_a_provider_s_does_not_go_out_with_it() -> None:
    # A gate that read it as the provider's alone would pass our key on.
    for value in (f"sk-provider {FIRST}", f"{FIRST} sk-provider"):
        refused = refusal(("x-api-key", value), PLACES["Authorization"](FIRST))
        assert refused.code == "KEY_CONFLICT", value
    found = look(("x-api-key", f"sk-provider,{FIRST}"), outbound=True)
    assert found == Credential(FIRST, ("X-API-Key",))


def test_no_other_scheme_is_read_as_basic() -> None:
    assert look(("authorization", basic(FIRST).replace("Basic", "Negotiate"))) is None


def test_mlflow_s_header_counts_on_outbound_routes_only() -> None:
    header = PLACES["X-MLflow-Authorization"](FIRST)
    assert look(header) is None
    assert look(header, PLACES["X-API-Key"](SECOND)) == Credential(SECOND, ("X-API-Key",))


def test_provider_s_key_does_not_count_on_outbound_routes() -> None:
    for place in ("X-API-Key", "Authorization", "X-MLflow-Authorization"):
        assert look(PLACES[place]("sk-provider"), outbound=True) is None
    assert look(PLACES["X-API-Key"]("sk-provider")) == Credential("sk-provider", ("X-API-Key",))


def test_query_s_key_can_be_excluded() -> None:
    field = PLACES["?api_key="](FIRST)
    assert look(field, query_key=False) is None
    assert look(field, PLACES["X-API-Key"](SECOND), query_key=False) == Credential(
        SECOND, ("X-API-Key",)
    )


def test_header_with_an_underscore_is_refused() -> None:
    for name in ("x_api_key", "x-api_key", "x_api-key", "x_mlflow-authorization"):
        for value in ("", FIRST):
            found = look((name, value), PLACES["X-API-Key"](FIRST))
            assert isinstance(found, Deny) and found.code == "KEY_CONFLICT", (name, value)


def test_other_headers_may_have_underscores() -> None:
    assert look(("x_other", FIRST), ("_", "x")) is None


def test_a_credential_does_not_show_its_key() -> None:
    assert FIRST not in repr(Credential(FIRST, ("X-API-Key",)))


@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from(["x-api-key", "authorization", "cookie"]).map(str.encode),
                st.binary(),
            ),
            st.one_of(st.binary(), st.sampled_from([b"Basic ====", b"Basic \xff", b"Bearer \0"])),
        )
    ),
    st.binary(),
    st.booleans(),
)
def test_any_bytes_have_a_verdict(
    headers: list[tuple[bytes, bytes]], query: bytes, outbound: bool
) -> None:
    found = find(Request("GET", "/", query, tuple(headers)), outbound=outbound, query_key=True)
    assert found is None or isinstance(found, (Deny, Credential))


# A browser's session


def cookie(token: str) -> tuple[str, str]:
    return ("cookie", f"x=1; __Host-hokusai_session={token}")


def test_a_session_is_found_and_named() -> None:
    session = Credential(SESSION, (PLACE,), session=True)
    for outbound in (False, True):
        assert look(cookie(SESSION), outbound=outbound) == session


def test_regression_20_session_and_key_together_are_refused() -> None:
    for written in PLACES.values():
        fields = [cookie(SESSION), written(FIRST)]
        for refused in (refusal(*fields), refusal(*reversed(fields))):
            assert refused.code == "KEY_CONFLICT"
            assert "signed in" in refused.message


def test_two_sessions_are_refused() -> None:
    for second in ("hk_session_second", FIRST):
        refused = look(cookie(SESSION), cookie(second))
        assert isinstance(refused, Deny) and refused.code == "KEY_CONFLICT"


def test_a_session_counts_in_its_cookie_only() -> None:
    # In another place, the checks against other sites' pages would not run.
    for written in PLACES.values():
        there, too = written(SESSION), cookie(SESSION)
        for fields in ([there], [there, too], [too, there]):
            assert refusal(*fields).code == "KEY_MALFORMED", fields


def test_a_key_does_not_count_in_the_cookie() -> None:
    refused = look(cookie(FIRST))
    assert isinstance(refused, Deny) and refused.code == "KEY_MALFORMED"


def test_the_order_of_headers_does_not_matter() -> None:
    # WSGI servers change the order.
    for written, key in product(PLACES.values(), (FIRST, SESSION)):
        fields = [written(key), cookie(key)]
        one, other = look(*fields, outbound=True), look(*reversed(fields), outbound=True)
        assert type(one) is type(other)
        assert getattr(one, "code", None) == getattr(other, "code", None)


def test_a_cookie_that_comes_twice_is_one_session() -> None:
    assert look(cookie(SESSION), cookie(SESSION)) == Credential(SESSION, (PLACE,), session=True)


class Counted(tuple[tuple[bytes, bytes], ...]):
    """Headers that count how often a loop over them begins."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        Counted.times += 1
        return super().__iter__()


Counted.times = 0


def test_number_of_passes_over_headers_does_not_depend_on_their_number() -> None:
    for count, name in product((1, 1000), (b"hokusai_session", b"hokusai_sessions")):
        cookies = [(b"cookie", b"%s=%d" % (name, number)) for number in range(count)]
        headers = Counted([(b"host", b"localhost"), *cookies])
        Counted.times = 0
        asked = Request("GET", "/version", b"", headers)
        found = find(asked, outbound=False, query_key=True)
        assert not isinstance(found, Credential), (count, name)
        assert Counted.times <= 4, (count, name)


def test_a_provider_s_key_goes_out_beside_a_session() -> None:
    provider = PLACES["Authorization"]("sk-provider")
    found = look(provider, cookie(SESSION), outbound=True)
    assert found == Credential(SESSION, (PLACE,), session=True)


# The query without the key

FIELDS = st.one_of(
    st.binary(max_size=8).map(lambda field: field.replace(b"&", b"")),
    st.sampled_from([b"", b"=", b"x=1", b"api_keys=1", b"API_KEY=1", b"x=api_key", b"api_key[]=1"]),
    st.sampled_from([b"%", b"%zz=%", b"api_key;x=1", b"api_ke%79s=1", b"a+b=c+d"]),
)
KEY_FIELDS = st.sampled_from(
    [b"api_key=k", b"api_key", b"api_key=", b"api%5Fkey=k", b"%61pi_key=k=k", b"api_key=%26"]
)


def read(query: bytes) -> dict[str, str]:
    """Return `query` as another reader understands it."""
    text = query.decode("latin-1")
    return dict(parse_qsl(text, keep_blank_values=True, encoding="latin-1"))


def is_key(field: bytes) -> bool:
    return "api_key" in read(field)


@given(st.lists(st.one_of(FIELDS, KEY_FIELDS)))
@example([b"api_key=k"])
@example([b"", b"api_key=k", b""])
def test_only_the_key_is_taken_out_of_a_query(fields: list[bytes]) -> None:
    kept = [field for field in fields if not is_key(field)]
    assert without_query_key(b"&".join(fields)) == b"&".join(kept)


@given(st.text("apikey_%5Ff=&+ .", max_size=30).map(str.encode))
def test_the_scrubbed_query_holds_no_key_for_any_reader(query: bytes) -> None:
    scrubbed = without_query_key(query)
    assert "api_key" not in read(scrubbed)
    assert look(("?", scrubbed.decode("latin-1"))) is None
    assert without_query_key(scrubbed) == scrubbed


def test_large_query_is_read_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may send one. Decoding each name with a percent sign blocked the event loop for 90 ms."""
    monkeypatch.setattr(credentials, "unquote_to_bytes", pytest.fail)
    for field in (b"%", b"%%%%%%%", b"a%70i_ke", b"%61", b"x=%"):
        query = b"&".join([field] * 9000)
        assert without_query_key(query) == query
        assert list(credentials._query_values(query)) == []
    assert without_query_key(b"&".join([b"api_key"] * 9000)) == b""


@given(st.text("abcXYZ019_-", min_size=1))
def test_a_key_is_found_however_it_is_encoded(key: str) -> None:
    everything = "".join(f"%{ord(character):02x}" for character in key)
    for spelling in (key, quote(key), everything):
        assert look(("?", f"x=1&api_key={spelling}")) == Credential(key, ("?api_key=",))


def test_query_is_quoted_to_mean_the_same() -> None:
    assert quoted(b"a=%ff&b") == b"a=%ff&b"
    assert quoted(b"a=\xc3\xbc&\xff\x80") == b"a=%C3%BC&%FF%80"
