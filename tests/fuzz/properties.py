"""What holds of any bytes at all: for hypothesis in `make test`, and for atheris in `make fuzz`.

Each property takes bytes, laid out so that a corpus can be read: see its docstring.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from urllib.parse import parse_qsl, unquote

from mlflow_hokusai_auth.core import browser, credentials, keys, operations
from mlflow_hokusai_auth.core.policy import Policy, plan
from mlflow_hokusai_auth.core.prefixes import Prefixes, raw_without
from mlflow_hokusai_auth.core.types import Access, Allow, Credential, Deny, NeedKey, Request

#: What needs no key, written out once more.
PUBLIC = {
    ("GET", "/health"),
    ("GET", "/api/health/mlflow"),
    ("POST", "/api/2.0/hokusai/keys/leaked"),
    ("POST", "/api/2.0/hokusai/token"),
    ("GET", "/hokusai/login"),
    ("POST", "/hokusai/login"),
    ("POST", "/hokusai/logout"),
    ("GET", "/hokusai/link"),
    ("POST", "/hokusai/link"),
    *(
        ("GET", f"/hokusai/static/{name}")
        for name in ("hokusai.css", "hokusai.svg", "login.js", "link.js")
    ),
}
#: As a request's own bytes have it; `keys` has a looser one.
_KEY = re.compile(
    r"hk_(?:live|test|dev|ci|jobs|link|session)_[A-Za-z0-9_-]{4,}", re.ASCII | re.IGNORECASE
)
_PLACES = {"X-API-Key", "Authorization", "X-MLflow-Authorization", "?api_key=", browser.PLACE}


def of_credentials(data: bytes) -> None:
    """The query in the first line, and a header in each other one."""
    query, *lines = data.split(b"\n")
    headers = tuple((name.lower(), value) for name, _, value in (x.partition(b":") for x in lines))
    request = Request("GET", "/version", query, headers)
    for outbound in (False, True):
        found = credentials.find(request, outbound=outbound, query_key=True)
        if isinstance(found, Credential):
            assert found.key and any(found.key in text for text in _texts(request))
            assert set(found.places) <= _PLACES
            assert found.session == (found.places == (browser.PLACE,))
        elif isinstance(found, Deny):
            assert keys.redact(found.message) == found.message
        turned = Request("GET", "/version", query, headers[::-1])
        if sum(name == b"host" for name, _ in headers) < 2:
            again = credentials.find(turned, outbound=outbound, query_key=True)
            assert _gist(again) == _gist(found), "no order of headers is better than another"
    _of_plan(plan(request, Policy()))
    _of_query(query)


def _of_plan(step: Allow | Deny | NeedKey) -> None:
    assert not isinstance(step, Allow), "/version is not public"
    if isinstance(step, NeedKey):
        assert re.fullmatch("[A-Za-z0-9_-]{1,256}", step.credential.key)


def _of_query(query: bytes) -> None:
    scrubbed = credentials.without_query_key(query)
    assert credentials.without_query_key(scrubbed) == scrubbed
    fields = parse_qsl(scrubbed.decode("latin-1"), keep_blank_values=True, encoding="latin-1")
    assert "api_key" not in dict(fields)
    kept = iter(query.split(b"&"))
    assert not scrubbed or all(field in kept for field in scrubbed.split(b"&"))


def _gist(found: Credential | Deny | None) -> object:
    return found.code if isinstance(found, Deny) else found and found.key


def _texts(request: Request) -> list[str]:
    """The request's texts that may hold a key, and what is in them in base64."""
    texts = [value.decode("latin-1") for _, value in request.headers]
    for word in re.split(r"[ \t,]+", " ".join(texts)):
        try:
            texts.append(base64.b64decode(word, validate=True).decode("latin-1"))
        except ValueError:
            continue
    query = request.query.decode("latin-1").replace("+", " ")
    return [*texts, unquote(query, encoding="latin-1")]


def of_operations(data: bytes) -> None:
    """Method and path in the first line, with a space between, and a prefix in each other one."""
    line, *prefixes = data.decode("utf-8", "replace").split("\n")
    method, _, path = line.partition(" ")
    operation = operations.classify(method, path)
    assert operation == operations.classify(method.upper(), path)
    if method == "HEAD":
        assert operation == operations.classify("GET", path)
    if operation.access is Access.PUBLIC:
        asked = {"HEAD": "GET"}.get(method.upper(), method.upper())
        assert (asked, path) in PUBLIC or (
            asked == "OPTIONS" and path in {public for _, public in PUBLIC}
        )
    if operation.rule:
        template = operation.rule.partition(" ")[2]
        literal = re.split(r"\{\w+(?::path)?\}", template)
        assert path.startswith(literal[0]) and path.endswith(literal[-1])
        assert all(part in path for part in literal)
    _of_prefixes(path, [prefix for prefix in prefixes if re.fullmatch(r"(/[!-.0-~]+)+", prefix)])


def _of_prefixes(path: str, prefixes: list[str]) -> None:
    prefix, rest = Prefixes(prefixes).split(path)
    assert prefix + rest == path
    under = [one for one in prefixes if path == one or path.startswith(f"{one}/")]
    assert prefix == max(under, key=len, default="")
    if prefix:
        assert rest == "" or rest.startswith("/")
        raw = path.encode("utf-8", "replace")
        assert raw_without(prefix, rest, raw) == raw[len(prefix) :]
        assert unquote(raw_without(prefix, rest, None).decode(), errors="surrogatepass") == rest


def of_keys(data: bytes) -> None:
    """A text that may be a key, or have some in it."""
    text = data.decode("utf-8", "surrogateescape")
    problem = keys.problem(text)
    assert (problem is None) <= bool(re.fullmatch("[A-Za-z0-9_-]{1,256}", text))
    assert problem is None or text == "" or text not in problem or len(text) < 8
    assert len(keys.digest(text)) == 64
    if keys.importable(text):
        assert problem is None and not keys.is_session_token(text)
        assert keys.environment(text) in keys.ENVIRONMENTS
        assert text[8:] not in keys.redact(f"({text})")
    redacted = keys.redact(text)
    assert keys.redact(redacted) == redacted
    assert not _KEY.search(redacted), redacted
    assert not _KEY.search(unquote(redacted)) or not _KEY.search(unquote(text)), redacted


PROPERTIES: dict[str, Callable[[bytes], None]] = {
    "credentials": of_credentials,
    "operations": of_operations,
    "keys": of_keys,
}
