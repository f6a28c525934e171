"""A browser's request with a session cookie, and the locations before and after a sign-in."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urljoin, urlsplit

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import browser, keys
from mlflow_hokusai_auth.core.browser import cross_site, forged, local_path, session_tokens
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.types import Request

from .rows import agree, each

SECURE, LOOPBACK = "__Host-hokusai_session", "hokusai_session"
TOKEN = "hk_session_token"
LINES = (Path(__file__).parent.parent / "vectors/open_redirects.txt").read_text().splitlines()
REDIRECTS = [json.loads(line) for line in LINES if line.startswith('"')]


def request(
    method: str = "GET",
    path: str = "/",
    *fields: tuple[str, str],
    query: bytes = b"",
    host: str | None = "mlflow.example",
) -> Request:
    named = [*fields] if host is None else [("Host", host), *fields]
    headers = tuple((n.lower().encode(), v.encode("latin-1")) for n, v in named)
    return Request(method, path, query, headers)


# The cookie


NEAR = ["localhost", "LocalHost:5000", "127.0.0.1", "127.0.0.1:5000", "127.1.2.3", "[::1]:5000"]
FAR = [
    *("mlflow.example", "mlflow.example:443", "", "localhost.evil.example", "evil-localhost"),
    *("127.0.0.1.evil.example", "1127.0.0.1", "127.0.0", "[::1", "::1", "[::2]", "localhost:"),
    *("localhost:123456", "localhost:x", "localhost\n", "127.0.0.1@evil.example", "10.0.0.1"),
]


def test_cookie_needs_https_except_on_the_same_machine() -> None:
    rows = [*((host, LOOPBACK) for host in NEAR), *((host, SECURE) for host in FAR)]
    agree(browser.cookie_name, rows)


def found(*cookies: str, host: str | None = "mlflow.example") -> list[str]:
    """Return the sessions in these headers."""
    return session_tokens(request("GET", "/", *(("Cookie", one) for one in cookies), host=host))


def test_all_sessions_of_a_request_are_read() -> None:
    agree(
        lambda cookies: found(*cookies),
        [
            ([f"{SECURE}=a"], ["a"]),
            ([f"x=1; {SECURE}=a; y=2"], ["a"]),
            ([f"x=1;\t{SECURE}=a;y=2"], ["a"]),
            (["x=1", f"{SECURE}=a"], ["a"]),
            # An attacker who may set cookies for the path or the host has added one.
            ([f"{SECURE}=a; {SECURE}=b"], ["a", "b"]),
            ([f"{SECURE}=a", f"{SECURE}=b"], ["a", "b"]),
            ([f"{SECURE}=a; {SECURE}=a"], ["a"]),
            ([f"{SECURE}=a=b"], ["a=b"]),
            ([f"{SECURE}="], []),
            ([SECURE], []),
            ([f"{SECURE}x=a; x{SECURE}=a; {SECURE.lower()}=a"], []),
            ([f"x={SECURE}=a"], []),
            # Without the prefix, browsers don't check which host has set the cookie.
            ([f"{LOOPBACK}=a"], []),
            ([], []),
        ],
    )
    assert session_tokens(request("GET", "/", ("X-Cookie", f"{SECURE}=a"))) == []


def test_number_of_sessions_read_is_bounded() -> None:
    many = [f"{SECURE}={i}" for i in range(1000)]
    for cookies in (many, ["; ".join(many)]):
        assert found(*cookies) == [str(i) for i in range(browser.MAX_SESSIONS)]


def test_host_has_its_own_cookie_only() -> None:
    both = f"{SECURE}=far; {LOOPBACK}=near"
    for host, session in (("mlflow.example", "far"), (None, "far"), ("localhost:5000", "near")):
        assert found(both, host=host) == [session]


@given(st.binary(max_size=60))
def test_any_cookie_can_be_read(value: bytes) -> None:
    headers = ((b"cookie", b"hokusai_session" + value), (b"cookie", value))
    for token in session_tokens(Request("GET", "/", b"", headers)):
        assert token.encode("latin-1") in value


def test_csrf_token_belongs_to_one_session_and_does_not_reveal_it() -> None:
    token = browser.csrf_token(TOKEN)
    assert token == browser.csrf_token(TOKEN) != browser.csrf_token(TOKEN + "x")
    assert re.fullmatch("[0-9a-f]{64}", token)


# The page that sends the request

NOTHING: list[tuple[str, str]] = []
OWN = ("Origin", "https://mlflow.example")
OTHER = ("Origin", "https://evil.example")


def site(value: str) -> tuple[str, str]:
    return ("Sec-Fetch-Site", value)


#: Origins with the page's own host, and others.
OWN_ORIGINS = ["https://mlflow.example", "http://mlflow.example", "HTTPS://MLflow.Example"]
OTHER_ORIGINS = [
    *("https://evil.example", "https://mlflow.example:8443", "https://sub.mlflow.example"),
    *("https://mlflow.example.evil.example", "https://mlflow.example@evil.example"),
    *("https://evil.example#mlflow.example", "null", "mlflow.example", "http://["),
    *("http://[::1", "\xff"),
]


def test_request_of_another_site_is_recognised() -> None:
    rows = [
        ([site("same-origin")], False),
        ([site("none")], False),
        ([site("same-site")], True),
        ([site("cross-site")], True),
        ([site("Same-Origin")], True),
        ([site("new-in-some-version")], True),
        # If Sec-Fetch-Site is there, Origin doesn't count.
        ([site("same-origin"), OTHER], False),
        ([site("cross-site"), OWN], True),
        *(([("Origin", origin)], False) for origin in OWN_ORIGINS),
        *(([("Origin", origin)], True) for origin in OTHER_ORIGINS),
    ]
    for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
        agree(lambda fields, method=method: cross_site(request(method, "/", *fields)), rows)


def test_origin_is_compared_with_the_host() -> None:
    agree(
        lambda host, origin: cross_site(request("POST", "/", ("Origin", origin), host=host)),
        [
            ("mlflow.example:5000", "http://mlflow.example:5000", False),
            ("mlflow.example:5000", "http://mlflow.example", True),
            ("mlflow.example:5000", "http://mlflow.example:5001", True),
            ("MLflow.Example:5000", "http://mlflow.example:5000", False),
            ("[::1]:5000", "http://[::1]:5000", False),
            ("[::1]:5000", "http://[::2]:5000", True),
            ("", "null", True),
            (None, "null", True),
            (None, "http://evil.example", True),
            ("null", "null", True),
        ],
    )


def test_request_without_origin_headers_may_only_read() -> None:
    for fields in ([], [site(""), ("Origin", "")]):
        for method in ("GET", "HEAD", "OPTIONS"):
            assert not cross_site(request(method, "/", *fields)), method
        for unsafe in ("POST", "PUT", "DELETE", "get", ""):
            assert cross_site(request(unsafe, "/", *fields)), unsafe


def with_token(value: str) -> tuple[str, str]:
    return ("X-CSRF-Token", value)


KEYS = "/api/2.0/hokusai/keys"
RUNS = "/api/2.0/mlflow/runs/create"
HERE = site("same-origin")
GOOD = with_token(browser.csrf_token(TOKEN))
LINK = [site("cross-site"), ("Sec-Fetch-Mode", "navigate"), ("Sec-Fetch-Dest", "document")]


def test_regression_42_page_of_another_site_may_only_open_a_page() -> None:
    def refused(method: str, path: str, fields: list[tuple[str, str]]) -> bool:
        return forged(request(method, path, *fields), classify(method, path), TOKEN)

    rows = [
        # Requests that manage keys need a token that only our pages know.
        ("POST", KEYS, [HERE], True),
        ("POST", KEYS, [HERE, GOOD], False),
        ("POST", KEYS, [OWN, GOOD], False),
        ("POST", KEYS, [HERE, with_token("")], True),
        ("POST", KEYS, [HERE, with_token(browser.csrf_token("another"))], True),
        ("POST", KEYS, [HERE, with_token(browser.csrf_token(TOKEN).upper())], True),
        ("POST", KEYS, [HERE, with_token("\xff")], True),
        ("DELETE", f"{KEYS}/key_1", [HERE], True),
        ("DELETE", f"{KEYS}/key_1", [HERE, GOOD], False),
        ("PATCH", f"{KEYS}/key_1", [HERE], True),
        ("post", KEYS, [HERE], True),
        # A form carries it in its body, which the pages check.
        ("POST", "/hokusai/models/share", [HERE], False),
        ("POST", "/hokusai/models/share", [OTHER], True),
        ("POST", "/hokusai/models/share", NOTHING, True),
        ("POST", "/hokusai/models/unknown", [HERE], True),
        # The token alone is not enough.
        ("POST", KEYS, [GOOD], True),
        ("POST", KEYS, [OTHER, GOOD], True),
        ("POST", KEYS, [site("same-site"), GOOD], True),
        ("GET", KEYS, [HERE], False),
        # MLflow's own pages send no token.
        ("POST", RUNS, [HERE], False),
        ("POST", RUNS, [OWN], False),
        ("POST", RUNS, NOTHING, True),
        ("POST", RUNS, [OTHER], True),
        ("POST", RUNS, [site("cross-site")], True),
        ("GET", RUNS, NOTHING, False),
        ("GET", RUNS, [OTHER], True),
        # A link on another site may lead here, but its pages may send nothing else.
        ("GET", "/", LINK, False),
        ("GET", KEYS, LINK, False),
        ("HEAD", "/", LINK, True),
        ("POST", "/", LINK, True),
        ("GET", "/", [*LINK[:2], ("Sec-Fetch-Dest", "iframe")], True),
        ("GET", "/", [*LINK[:2]], True),
        ("GET", "/", [LINK[0], ("Sec-Fetch-Mode", "no-cors"), LINK[2]], True),
        ("GET", "/", [LINK[0]], True),
    ]
    agree(refused, rows)


@given(st.lists(st.tuples(st.sampled_from(["origin", "host", "sec-fetch-site"]), st.binary())))
def test_any_headers_are_classified(fields: list[tuple[str, bytes]]) -> None:
    headers = tuple((name.encode(), value) for name, value in fields)
    cross_site(Request("POST", "/", b"", headers))


def test_only_browsers_get_pages() -> None:
    agree(
        lambda line, accept: browser.wants_page(
            request(*(f"{line} /".split()[:2]), ("Accept", accept))
        ),
        [
            ("GET", "text/html,application/xhtml+xml,*/*;q=0.8", True),
            ("HEAD", "text/html", True),
            ("POST", "text/html", False),
            ("POST /hokusai/models/share", "text/html", True),
            ("POST /hokusai/models/share", "*/*", False),
            ("POST /api/2.0/hokusai/keys", "text/html", False),
            ("GET", "application/json", False),
            ("GET", "*/*", False),
            ("GET", "", False),
        ],
    )


# The locations of the sign-in


def follow(base: str, reference: str) -> str:
    """Resolve a location as browsers do, by the URL standard (https://url.spec.whatwg.org/).

    It differs from RFC 3986 (`urljoin`) in backslashes, control characters and empty segments.
    """
    reference = re.sub("[\t\n\r]", "", reference.strip("".join(map(chr, range(33)))))
    if re.match("[A-Za-z][A-Za-z0-9+.-]*:", reference):
        return reference
    path, rest = re.fullmatch(r"([^?#]*)(.*)", reference, re.DOTALL).groups()  # type: ignore[union-attr]
    path = path.replace("\\", "/")
    parts = urlsplit(base)
    if path.startswith("//"):
        return f"{parts.scheme}:{path}{rest}"
    whole = path if path.startswith("/") else parts.path[: parts.path.rindex("/") + 1] + path
    segments: list[str] = []
    *folders, last = whole.split("/")[1:]
    for segment in [*folders, last]:
        dots = segment.lower().replace("%2e", ".")
        if dots == "..":
            segments = segments[:-1]
        if dots not in (".", ".."):
            segments.append(segment)
    if last.lower().replace("%2e", ".") in (".", ".."):
        segments.append("")
    return f"{parts.scheme}://{parts.netloc}/{'/'.join(segments)}{rest}"


def test_browser_of_these_tests_follows_the_url_standard() -> None:
    rows = [
        ("../x", "http://h/x"),
        ("../../../x", "http://h/x"),
        ("..//x", "http://h//x"),
        ("/\\evil", "http://evil"),
        ("\t/\n/evil", "http://evil"),
        ("java\nscript:x", "javascript:x"),
        ("%2E%2e/x/.", "http://h/x/"),
        ("?../x", "http://h/a/?../x"),
    ]
    agree(partial(follow, "http://h/a/b"), rows)


PREFIXES = ["", "/mlflow", "/api/mlflow"]
SEGMENT = st.text(max_size=6).filter(
    lambda text: "/" not in text and text not in (".", "..") and text.isprintable()
)
QUERY = st.text("abc=&%?/:+.~-_<>\"'", max_size=12).map(str.encode)


@given(st.sampled_from(PREFIXES), st.lists(SEGMENT, min_size=1, max_size=6), QUERY)
def test_sign_in_is_below_the_prefix_and_leads_back(
    prefix: str, segments: list[str], query: bytes
) -> None:
    path = "/" + "/".join(segments)
    location = browser.login_location(request("GET", path, query=query))
    url = f"http://host{prefix}{quote(path)}" + (f"?{query.decode()}" if query else "")
    there = urlsplit(follow(url, location))
    assert (there.netloc, there.path) == ("host", f"{prefix}/hokusai/login")
    if "" not in segments[:-1]:
        assert urljoin(url, location) == there.geturl()
    assert location.isascii() and location.isprintable() and " " not in location
    (target,) = parse_qs(there.query)["next"]
    back, _, asked = target.partition("?")
    assert (unquote(back), asked.encode(), "?" in target) == (path, query, bool(query))
    if not path.startswith("//"):
        assert local_path(target) == target
        assert returned(f"http://host{prefix}", target) == f"http://host{prefix}{target}"


@given(st.sampled_from(PREFIXES), st.lists(SEGMENT, min_size=1, max_size=6), QUERY)
def test_page_location_is_the_page_itself_or_the_root(
    prefix: str, segments: list[str], query: bytes
) -> None:
    path = "/" + "/".join(segments)
    location = browser.page_location(request("GET", path, query=query))
    url = f"http://host{prefix}{quote(path)}" + (f"?{query.decode()}" if query else "")
    if "" not in segments[:-1]:
        there = urlsplit(follow(url, location))
        assert (there.netloc, unquote(there.path)) == ("host", f"{prefix}{path}")
        assert there.query.encode() == query
    assert location.isascii() and location.isprintable() and " " not in location


def test_page_location() -> None:
    key = keys.generate()
    rows = [
        ("GET", "/javascript:alert(1)", b"", "./javascript:alert(1)"),
        ("GET", "/", b"a=b", "./?a=b"),
        ("GET", "/a/b", f"token={key}".encode(), "../a/b?token=hk_live_***"),
        # A form leads to the page that shows it.
        ("POST", "/hokusai/models/share", b"x=y", "../../hokusai/models"),
        ("POST", "/hokusai/keys/selected", b"", "../../hokusai/keys"),
        ("POST", "/hokusai/login", b"", "../hokusai/login"),
        ("POST", "/hokusai/link", b"", "../hokusai/link"),
    ]
    agree(
        lambda method, path, query: browser.page_location(request(method, path, query=query)), rows
    )
    assert browser.login_location(request("POST", "/hokusai/link")).endswith("?next=/hokusai/link")


def test_sign_in_location_is_a_valid_header_value() -> None:
    location = browser.login_location(request("GET", "/x\r\ny: z", query=b"\xff\r\n\"' &x=1"))
    assert location.isascii() and not re.search(r"""[\s"']""", location)
    assert location.count("?") == 1 and "&" not in location


def returned(root: str, target: str) -> str:
    """Return the page after a sign-in at `root`, with the location that `sign_in` builds."""
    location = "../" + local_path(target)[1:]
    url = follow(f"{root}/hokusai/login", location)
    # Other clients resolve it by RFC 3986.
    assert urljoin(f"{root}/hokusai/login", location).startswith(f"{root}/")
    return url


def test_regression_46_sign_in_leads_to_no_other_site() -> None:
    assert len(REDIRECTS) == len(set(REDIRECTS)) >= 100

    def check(target: str) -> None:
        assert local_path(target) == "/"
        for prefix in PREFIXES:
            root = f"http://host{prefix}"
            assert returned(root, target) == f"{root}/"
            assert returned(root, unquote(target)).startswith(f"{root}/")

    each(check, ((target,) for target in REDIRECTS))


@given(st.text("/\\.:@?#%2eE \t\n\rahtps;", max_size=14), st.sampled_from(PREFIXES))
def test_any_next_stays_below_the_prefix(target: str, prefix: str) -> None:
    assert returned(f"http://host{prefix}", target).startswith(f"http://host{prefix}/")
    for again in (f"/{target}", f"/x{target}"):
        assert returned(f"http://host{prefix}", again).startswith(f"http://host{prefix}/")


LOCAL = [
    *("/", "/x", "/#/experiments/1/runs/2", "/hokusai/keys", "/graphql", "/x?y=http://z", "/a//b"),
    *("/hokusai/keys?state=active&query=a", "/get-artifact?path=a/../b", "/x?next=//evil.example"),
    *("/x#//y", "/x#/../y", "/...", "/..a/b", "/a../b", "/.a", "/a/b.c", "/%20", "/a%2Fb", "/?"),
    *("/~a;b=1,c!$&'()*+", "/x:y@z", "/x/[1]", '/x?filter="a"', "/?x", "/" + "x" * 2047),
]


def test_path_of_this_server_is_kept() -> None:
    for target in LOCAL:
        assert local_path(target) == target
        assert returned("http://host/mlflow", target) == f"http://host/mlflow{target}"


def test_origin_of_a_url_is_spelt_as_browsers_send_it() -> None:
    for url, origin in (
        ("https://Registry.example.com/mlflow", "https://registry.example.com"),
        ("https://registry.example.com:443", "https://registry.example.com"),
        ("http://localhost:80/a", "http://localhost"),
        ("http://localhost:443", "http://localhost:443"),
        ("https://registry.example.com:8443/", "https://registry.example.com:8443"),
        ("http://[::1]:5000", "http://[::1]:5000"),
        ("http://[::1]", "http://[::1]"),
    ):
        assert browser.origin_of(url) == origin, url
