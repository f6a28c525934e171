# ruff: noqa: E501 - lists read best filled
"""Requests of every kind, to be sent by the thousand, and what each may get at most.

What a request may get is told by whose keys went into it and by MLflow's own list of routes, without
any code of the gate's.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.core.types import Access
from tests.core.test_operations import (
    ADMINISTRATION,
    GETS_THAT_DO_MORE,
    METHODS,
    OPTIONAL,
    OURS,
    POSTS_THAT_READ,
    PUBLIC,
    bare,
    fill,
    vectors,
)
from tests.server import sentinel
from tests.server.sentinel import PREFIXES, UI, Memory, Wire, principal

KEYS = {**sentinel.KEYS, "session": keys.session_token()}
#: The most that a key of each kind opens; one that is not listed opens nothing.
GRANTS = {
    **dict.fromkeys(["read", "other", "legacy", "expiring"], Access.READ),
    "scopeless": Access.KEY,
    "write": Access.WRITE,
    "admin": Access.ADMIN,
    "session": Access.ADMIN,
}


def authority() -> Memory:
    """Knows the keys of `KEYS`."""
    memory = Memory()
    memory.known[KEYS["session"]] = principal("session", "mlflow:admin")
    return memory


# What MLflow's routes take

_MORE = {path: Access[word] for word, path in map(str.split, GETS_THAT_DO_MORE)}


def _access(rule: str) -> Access:
    method, path = rule.split(" ")[0], bare(rule)
    if rule in PUBLIC:
        return Access.PUBLIC
    if method == "GET":
        return _MORE.get(path, Access.KEY if rule in OURS else Access.READ)
    if ADMINISTRATION.match(path):
        return Access.ADMIN
    if method == "POST" and path in POSTS_THAT_READ:
        return Access.READ
    return Access.KEY if rule in OURS else Access.WRITE


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+(?::path)?\})", template)
    return re.compile(
        "".join(
            (".+" if part.endswith(":path}") else "[^/]+")
            if part.startswith("{")
            else re.escape(part)
            for part in parts
        ),
        re.DOTALL,
    )


RULES = {rule: _access(rule) for rule in sorted({*vectors(), *OURS, *OPTIONAL})}
_PATTERNS = [
    (rule.partition(" ")[0], _pattern(rule.partition(" ")[2]), access)
    for rule, access in RULES.items()
]


@lru_cache(maxsize=4096)
def takes(method: str, path: str) -> Access:
    """What `method` on `path`, without its prefix, takes: of the routes that fit, the least."""
    method = {"HEAD": "GET"}.get(method.upper(), method.upper())
    fitting = [
        access
        for its_method, pattern, access in _PATTERNS
        if method in (its_method, "OPTIONS") and pattern.fullmatch(path)
    ]
    if method == "OPTIONS" and fitting:
        return Access.PUBLIC if Access.PUBLIC in fitting else Access.READ
    return min(fitting, default=Access.ADMIN)


# Requests


@dataclass(frozen=True)
class Attack(Wire):
    body: bytes = b""
    #: Whose keys stand where a key counts, or may count.
    kinds: frozenset[str] = frozenset()

    @property
    def grants(self) -> Access:
        """The most that its keys open."""
        return max((GRANTS.get(kind, Access.PUBLIC) for kind in self.kinds), default=Access.PUBLIC)

    @property
    def is_preflight(self) -> bool:
        headers = {name.lower(): value for name, value in self.headers}
        return bool(
            self.method == "OPTIONS"
            and headers.get("origin")
            and headers.get("access-control-request-method")
            and headers.get("content-length", "0") == "0"
            and "transfer-encoding" not in headers
        )

    @property
    def is_same_in_wsgi(self) -> bool:
        """Whether nothing of its headers is lost or merged on the way through WSGI.

        An underscore is; and all but one of a header that is not for keys.
        """
        names = [name.lower() for name, _ in self.headers]
        others = [name for name in names if name not in _KEY_HEADERS]
        return (
            len(set(others)) == len(others)
            and not any("_" in name for name in names)
            # WSGI does not tell where such a body ends, so it is not read there.
            and "transfer-encoding" not in names
        )


_KEY_HEADERS = ("x-api-key", "authorization", "x-mlflow-authorization")
_INVENTED = [
    "FOO",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "WEBSOCKET",
    "QUERY",
    "GETX",
    "\u00ff",
    "\u00b5",
]
_INVENTED += ["GET\0", "G\tET", "GET ", "", "-", "get,post", "P\u00d6ST"]
_OWN: list[Callable[[str], str]] = [
    *[str] * 30, str.lower, str.title, str.swapcase, "{}X".format, lambda _: "HEAD", lambda _: "head",
    *[lambda _, method=method: method for method in (*METHODS, *["OPTIONS"] * 6, "options")],
    *[lambda _, method=method: method for method in _INVENTED],
]  # fmt: skip

_SEGMENTS = [
    "x-1",
    "health",
    "..",
    "a;b",
    "a:generateContent",
    "tags",
    "versions",
    "%2e%2e",
    "\u00ff",
]
_ROUTES = [
    (rule.partition(" ")[0], fill(rule.partition(" ")[2], segment, rest))
    for rule in RULES
    for segment, rest in zip(_SEGMENTS, ["a/b", "../health", "%2Fx", "x/versions/1/tags", "//", "x"] * 2, strict=False)
    if "{" in rule or segment == "x-1"
]  # fmt: skip
_ROUTES += [("GET", path) for path in ("", "*", "x", "/x", "/nowhere", "/health/x", "/healthz")]
# What needs no key, and what lies next to it, as often as all the rest.
_NEAR_PUBLIC = [(method, path) for method, _, path in (rule.partition(" ") for rule in PUBLIC)]
_NEAR_PUBLIC += [("POST", "/graphql"), ("GET", "/"), ("GET", "/version"), ("GET", "/hokusai/keys")]

_INSERTED = [
    "/", "//", "/./", "/../", "/..;/", ";", ";x=1", "\\", "%5c", "%2F", "%252F", "%2f%2e%2e%2f",
    "%2e", "%00", "%0a", "%0d%0a", "%09", "%20", " ", "\t", "\0", "\x0b", "\x7f", "?", "#", "%23",
    "%3f", "%3F", "%253f", "%", "%zz", "%c1%a8", "%ff", "\u00ff", "\u00c3\u00a9", "%e2%81%84", ":", "@",
    "&", "*", ",", "a",
]  # fmt: skip
_AHEAD = [
    "/", "//", "///", "x", "http://localhost", "http://localhost:80", "https://a:b@localhost", "http:",
    "//localhost", "/health/..", "/health;", "/health%2f..", "/static-files/..", "/static-files/%2e%2e",
    "/.", "/%2e", "/x/..", "/version?", "/%2F", "\\", "%2F", "/mlflow", "/api/mlflow", "/api", "/ajax-api",
]  # fmt: skip
_BEHIND = [
    "/", "//", "/.", "/..", ";", ";/health", "#/health", "/health", "/../health", "/%2e%2e/health",
    "%00", "%0a", ".json", "%20", "/x", "?/health", "%3f/health", "%23", "\\", "x", "/{key}",
]  # fmt: skip


def _encoded(text: str, at: int, times: int) -> str:
    if not text:
        return text
    at %= len(text)
    return f"{text[:at]}%{'25' * (times - 1)}{ord(text[at]):02x}{text[at + 1 :]}"


_Twist = Callable[[str, int], str]


def _inserted(what: str) -> _Twist:
    return lambda path, at: path[: at % (len(path) + 1)] + what + path[at % (len(path) + 1) :]


_TWISTS: list[_Twist] = [
    *[lambda path, at, times=times: _encoded(path, at, times) for times in (1, 1, 1, 2, 2, 3)],
    lambda path, at: path.replace("/", "%2F"),
    lambda path, at: path.replace("/", "%252F"),
    lambda path, at: path.replace("/", "//"),
    lambda path, at: path.replace("/", "\\"),
    lambda path, at: path.replace("/", "/./"),
    lambda path, at: "".join(f"%{ord(character):02X}" for character in path),
    lambda path, at: "".join(f"%25{ord(character):02X}" for character in path),
    lambda path, at: path.replace("/api/", "/ajax-api/"),
    lambda path, at: path.replace("2.0", "3.0"),
    lambda path, at: path.replace("2.0/", "2.0"),
    lambda path, at: path.upper() if path.isascii() else path,
    lambda path, at: path.title() if path.isascii() else path,
    lambda path, at: path[1:],
    lambda path, at: path[: at % (len(path) + 1)],
    lambda path, at: path[: at % (len(path) + 1)] + path[at % (len(path) + 1) + 1 :],
    *[_inserted(what) for what in _INSERTED],
    *[lambda path, at, ahead=ahead: ahead + path for ahead in _AHEAD],
    *[lambda path, at, behind=behind: path + behind for behind in _BEHIND],
]

#: Header lines with a place for a key where one counts, or comes so near that it might.
_WITH_KEY = [
    *[(name, "{key}") for name in ("x-api-key", "X-Api-KEY")],
    *[(name, "{key}") for name in ("X_API_Key", "X-API_Key", "x_api-key", "X_API_KEY")],
    *[("X-API-Key", value) for value in ("{key},{key}", "{key}, {other}", ",{key}", "{key} ,", " {key}\t")],
    *[("X-API-Key", value) for value in ("{key}\0", "{key} x", "Bearer {key}", '"{key}"', "{key}\u00e9")],
    *[("Authorization", f"{scheme}{{key}}") for scheme in (
        "Bearer ", "bearer ", "BEARER   ", "ApiKey ", "Bearer\t", "Bearer:", "Token ", "", "Basic ",
    )],
    ("Authorization", "Bearer {key}, Bearer {other}"), ("Authorization", "Bearer {key} {other}"),
    ("authorization", "Basic {u:key}"), ("Authorization", "basic {:key}"), ("Authorization", "Basic {key:}"),
    ("Authorization", "Basic {u:key},Basic {u:other}"), ("authorization_", "Bearer {key}"),
    ("X-MLflow-Authorization", "Bearer {key}"), ("x-mlflow-authorization", "Basic {u:key}"),
    ("X_MLflow_Authorization", "Bearer {key}"),
    *[("Cookie", f"{before}{name}={{key}}") for before in ("", "x=1; ", "x=1;;", "hokusai_session=; ") for name in (
        "hokusai_session", "__Host-hokusai_session", "Hokusai_Session",
    )],
    ("Cookie", "hokusai_session={key}; hokusai_session={other}"),
]  # fmt: skip
_PLAIN = [
    ("X-API-Key", "{key}"),
    ("Authorization", "Bearer {key}"),
    ("Cookie", "hokusai_session={key}"),
]
#: Header lines without a key that counts; those with one must be as good as those without.
_WITHOUT = [
    *[(name, "{key}") for name in (
        "API-Key", "X-API-Key-", "X-Auth-Token", "Proxy-Authorization", "X-Hokusai-API-Key-Id", "X-Request-Id",
        "Referer", "User-Agent", "X-Forwarded-Access-Token", "X-CSRF-Token",
    )],
    ("Cookie", "api_key={key}; X-API-Key={key}"), ("X-Request-Id", "a-{key}"), ("Origin", "https://{key}"),
    ("X-API-Key", ""), ("X-API-Key", " , "), ("Authorization", "Bearer"), ("Authorization", "Bearer sk-x"),
    ("X-API-Key", "sk-provider"), ("Authorization", "AWS4-HMAC-SHA256 Credential=a/b, Signature=c"),
    ("Authorization", "Basic !!!"), ("Authorization", "Basic =="), ("X-API-Key", "\u00ff" * 9),
    *[(name, "root") for name in (
        "X-Hokusai-User-Id", "X-Hokusai-API-Key-Id", "X_Hokusai_User_Id", "x-hokusai_scopes", "Remote-User",
        "X-Forwarded-User", "X-Remote-User",
    )],
    *[(name, value) for name in (
        "X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Uri", "X-Forwarded-Path", "X-Forwarded-Prefix",
        "X-Script-Name", "X-HTTP-Method-Override",
    ) for value in ("/health", "GET")],
    *[("X-Forwarded-For", value) for value in ("127.0.0.1", "::1, x", ",", "\u00ff")],
    ("Forwarded", "for=127.0.0.1"), ("X-Real-IP", "127.0.0.1"),
    *[("Host", host) for host in ("localhost", "localhost", "a.example", "a/health?", "a/health#", "", "\u00ff")],
    *[("Origin", origin) for origin in (UI, "http://localhost", "https://evil.example", "null", "\u00ff")],
    *[("Access-Control-Request-Method", method) for method in ("POST", "GET")],
    ("Accept", "text/html"), ("Accept", "text/html"), ("Accept", "*/*"), ("Expect", "100-continue"),
    ("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "same-origin"), ("Sec-Fetch-Mode", "navigate"),
    ("Sec-Fetch-Dest", "document"), ("Upgrade", "websocket"), ("Transfer-Encoding", "chunked"),
    ("Content-Type", "application/json"), ("X-MLflow-Workspace", "x"),
]  # fmt: skip
_PREFLIGHT = [("Origin", "https://evil.example"), ("Access-Control-Request-Method", "POST")]
_PREFLIGHT = [("Origin", "https://evil.example"), ("Access-Control-Request-Method", "POST")]
_QUERIES = [("", False)] * 20 + [
    *[(f"?{query}", True) for query in (
        "api_key={key}", "x=1&api_key={key}&y=2", "api%5Fkey={key}", "%61pi_key=+{key}%20", "api+key={key}",
        "api_key={key}&api_key={other}", "api_key={key}%00", "&&api_key={key}&", "api_key=&api_key={key}",
    )],
    *[(f"?{query}", False) for query in (
        "API_KEY={key}", "api%255Fkey={key}", "x=api_key={key}", "{key}", "api_key[]={key}", "x;api_key={key}",
        "api_key=", "api_key=%ff", "/health", "x=/health", "?", "#", "\u00ff", "%", "_method=GET", "a=%0d%0ax",
    )],
]  # fmt: skip
#: A key that may read everything may send this to /graphql, where all else takes WRITE.
GRAPHQL_READ = json.dumps({"query": "{ a }"}).encode()
GRAPHQL_WRITE = json.dumps({"query": "mutation { a }"}).encode()
GRAPHQL_LARGE = json.dumps({"query": "{ a }", "x": "x" * 2**18}).encode()
_BODIES = [b""] * 8 + [
    b"key=x&next=/", b"x" * 4096, b"x" * 4097, b"x" * (2**20 + 1), b"\0\xff",
    GRAPHQL_READ, GRAPHQL_WRITE, GRAPHQL_LARGE,
]  # fmt: skip
_PREFIX_SEGMENTS = ["mlflow", "api", "x", "2.0", "hokusai", "health", "gateway", "a"]
_KINDS = [*sorted(KEYS), *["read"] * 6, *["write"] * 4, *["scopeless", "unknown", "session"] * 2]


def _filled(template: str, kind: str, other: str) -> str:
    if "{" not in template:
        return template
    for place, text in {
        "{u:key}": _basic(f"u:{KEYS[kind]}"), "{:key}": _basic(f":{KEYS[kind]}"),
        "{key:}": _basic(f"{KEYS[kind]}:"), "{u:other}": _basic(f"u:{KEYS[other]}"),
        "{key}": KEYS[kind], "{other}": KEYS[other],
    }.items():  # fmt: skip
        template = template.replace(place, text)
    return template


@lru_cache(maxsize=256)
def _basic(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _path(random: Random, path: str, prefixes: Sequence[str]) -> str:
    if prefixes and random.random() < 0.5:
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            path = random.choice(prefixes) + path
    for _ in range(random.choice([0, 0, 0, 1, 1, 2, 3])):
        path = random.choice(_TWISTS)(path, random.randrange(len(path) + 1))
    return path


def _headers(random: Random) -> list[tuple[str, str, bool]]:
    """Name, value, and whether a key counts there, or may count."""
    lines: list[tuple[str, str, bool]] = []
    if random.random() < 0.4:
        lines.append((*random.choice(_PLAIN), True))
    lines += [(*random.choice(_WITH_KEY), True) for _ in range(random.choice([0, 0, 0, 1, 2]))]
    lines += [(*random.choice(_WITHOUT), False) for _ in range(random.choice([0, 0, 1, 2, 3]))]
    if random.random() < 0.1:
        lines += [(*line, False) for line in _PREFLIGHT]
    random.shuffle(lines)
    return lines


def _attack(random: Random, prefixes: Sequence[str]) -> Attack:
    method, path = random.choice(random.choice([_ROUTES, _NEAR_PUBLIC]))
    query, counts = random.choice(_QUERIES)
    headers, body = _headers(random), random.choice(_BODIES)
    kind, other = random.choice(_KINDS), random.choice(_KINDS)
    counting = query * counts + " ".join(value for _, value, counts in headers if counts)
    kinds = {"key}": kind, "key:}": kind, "other}": other}
    sent = [(name, _filled(value, kind, other)) for name, value, _ in headers]
    if body:
        sent.append(("Content-Length", str(len(body))))
    return Attack(
        random.choice(_OWN)(method),
        _filled(_path(random, path, prefixes) + query, kind, other),
        tuple(sent),
        body,
        frozenset(kind for place, kind in kinds.items() if place in counting),
    )


def prefixes(random: Random) -> tuple[str, ...]:
    """The prefixes of a server, some of which its settings would refuse."""
    if random.random() < 0.5:
        return PREFIXES
    made = {
        "".join(
            f"/{segment}"
            for segment in random.choices(_PREFIX_SEGMENTS, k=random.choice([1, 1, 2, 3]))
        )
        for _ in range(random.randrange(5))
    }
    return tuple(sorted(made))


def attacks(random: Random, count: int, prefixes: Sequence[str] = PREFIXES) -> list[Attack]:
    """`count` requests to a server with `prefixes`."""
    return [_attack(random, prefixes) for _ in range(count)]
