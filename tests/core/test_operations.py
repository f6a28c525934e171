"""The table of routes against MLflow: every route of every version has a row, and no other has."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.operations import UNKNOWN, classify, rules
from mlflow_hokusai_auth.core.types import Access, Operation
from mlflow_hokusai_auth.server.upstream.routes import installed_routes, native_routes, template

from .rows import agree

VECTORS = Path(__file__).parent.parent / "vectors" / "mlflow_routes.txt"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
ROWS = {row.rule: row for row in rules()}


def names(text: str) -> list[str]:
    return text.split()


def table(text: str) -> set[str]:
    """Return every `METHOD PATH` of lines of methods and paths."""
    lines = [line.split() for line in text.strip().splitlines()]
    return {
        f"{method} {path}"
        for methods, *paths in lines
        for method, path in product(methods.split(","), paths)
    }


#: Routes without a key: health, the sign-in, one-time links, GitHub's reports of leaked keys, and
#: identity tokens.
PUBLIC = table("""
    GET /health /api/health/mlflow
    GET,POST /hokusai/login /hokusai/link
    POST /hokusai/logout /api/2.0/hokusai/keys/leaked /api/2.0/hokusai/token
    GET /hokusai/static/hokusai.css /hokusai/static/hokusai.svg /hokusai/static/login.js
    GET /hokusai/static/link.js
""")
#: Routes of our own, which no MLflow has.
OURS = (PUBLIC - {"GET /health"}) | table("""
    GET,POST /api/2.0/hokusai/keys /api/2.0/hokusai/trust
    PATCH,DELETE /api/2.0/hokusai/trust/{trust_id}
    GET,POST /api/2.0/hokusai/links
    DELETE /api/2.0/hokusai/links/{link_id}
    GET,PATCH,DELETE /api/2.0/hokusai/keys/{key_id}
    POST /api/v1/keys/validate
    POST /api/2.0/hokusai/keys/{key_id}/rotate /api/2.0/hokusai/keys/import
    POST /api/2.0/hokusai/keys/find /api/2.0/hokusai/keys/revoke
    GET /api/2.0/hokusai/whoami /api/2.0/hokusai/keys/export /api/2.0/hokusai/openapi.json
    GET /api/2.0/hokusai/owners /api/2.0/hokusai/owners/of /api/2.0/hokusai/owners/check
    POST /api/2.0/hokusai/owners/assign /api/2.0/hokusai/owners/release
    GET,POST /api/2.0/hokusai/grants
    DELETE /api/2.0/hokusai/grants/{grant_id}
    GET,POST,DELETE /api/2.0/hokusai/prefixes
    GET,POST /api/2.0/hokusai/isolation
    GET /api/2.0/hokusai/audit /api/2.0/hokusai/status
    GET /hokusai /hokusai/ /hokusai/models /hokusai/trusts /hokusai/links
    POST /hokusai/trusts/add /hokusai/trusts/remove /hokusai/links/revoke
    GET,POST /hokusai/trusts/{trust_id}/edit
    POST /hokusai/models/share /hokusai/models/unshare
    POST /hokusai/models/assign /hokusai/models/reserve /hokusai/models/unreserve
    GET,POST /hokusai/keys/new /hokusai/keys/find /hokusai/keys/{key_id}/edit
    GET,POST /hokusai/keys/{key_id}/revoke /hokusai/keys/{key_id}/rotate
    GET /hokusai/keys/{key_id}
    POST /hokusai/keys/selected
    GET /hokusai/keys /hokusai/metrics /api/health/mlflow/detailed /hokusai/static/keys.js
    GET /api/2.0/mlflow/users/current /ajax-api/2.0/mlflow/users/current
    PATCH /api/2.0/mlflow/users/update-password /ajax-api/2.0/mlflow/users/update-password
    GET /api/3.0/mlflow/users/current/permissions /ajax-api/3.0/mlflow/users/current/permissions
    GET /api/3.0/mlflow/users/roles/list /ajax-api/3.0/mlflow/users/roles/list
""")
#: MLflow serves it with `--expose-prometheus` only, which needs another package.
OPTIONAL = {"GET /metrics"}

#: The POSTs that change nothing, without `/api/2.0/` or its like.
POSTS_THAT_READ = names("""
    mlflow/artifacts/presigned-download-url mlflow/datasets/search
    mlflow/experiments/search mlflow/experiments/search-datasets
    mlflow/issues/search mlflow/logged-models/search mlflow/prompt-optimization/jobs/search
    mlflow/registered-models/get-latest-versions mlflow/runs/search
    mlflow/traces/batchGetInfos mlflow/traces/calculate-filter-correlation
    mlflow/traces/metrics mlflow/traces/search jobs/search
""")
#: The GETs that need more than READ: they call a provider, or show credentials or other users.
GETS_THAT_DO_MORE = table("""
    WRITE /graphql mlflow/gateway-proxy
    ADMIN /metrics hokusai/keys /hokusai/metrics hokusai/keys/export hokusai/keys/{key_id}
    ADMIN hokusai/owners/check hokusai/prefixes hokusai/isolation hokusai/audit hokusai/trust
    ADMIN hokusai/links
    ADMIN /hokusai/keys/new /hokusai/keys/find /hokusai/keys/{key_id} /hokusai/keys/{key_id}/edit
    ADMIN /hokusai/keys/{key_id}/revoke
    ADMIN hokusai/status /hokusai/trusts /hokusai/trusts/{trust_id}/edit /hokusai/links
    ADMIN mlflow/webhooks mlflow/webhooks/{webhook_id}
    ADMIN mlflow/gateway/guardrails/get mlflow/gateway/guardrails/list
    ADMIN mlflow/gateway/secrets/config mlflow/gateway/secrets/get mlflow/gateway/secrets/list
    ADMIN mlflow/assistant/config mlflow/assistant/providers
    ADMIN mlflow/assistant/providers/{provider}/health mlflow/assistant/providers/{provider}/models
    ADMIN mlflow/assistant/sessions/{session_id}/stream
""")
#: Routes that call a provider: the gateway, except for its list of models, and the assistant.
CALLS_OUT = re.compile(
    r"/gateway/(?!mlflow/v1/models)|/ajax-api/(2.0/mlflow/gateway-proxy|3.0/mlflow/assistant/)"
)

#: Routes that need ADMIN, with methods other than GET.
ADMINISTRATION = re.compile(
    r"hokusai/keys(?!/leaked|/\{key_id\}/rotate)|hokusai/(owners/|prefixes|isolation|trust|links)"
    r"|/hokusai/(trusts|links)|/hokusai/models/(assign|reserve|unreserve)|/hokusai/keys/(new|find|selected|\{key_id\}/(edit|revoke))"
    r"|mlflow/(webhooks|workspaces|assistant/|demo/delete"
    r"|gateway/(secrets|endpoints|model-definitions|budgets|guardrails)/)"
)


def vectors() -> dict[str, list[str]]:
    """Return each route of the supported versions (`METHOD /path`) with the versions that have it."""
    found = {}
    for line in VECTORS.read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            versions, _, rule = line.partition(" ")
            found[rule] = versions.split(",")
    return found


#: The form of a run's id.
RUN = "0123456789abcdef" * 2


def fill(path: str, segment: str = "x-1", rest: str = "a/b c/d") -> str:
    return re.sub(r"\{\w+\}", segment, re.sub(r"\{\w+:path\}", rest, path))


def bare(rule: str) -> str:
    """Return the path of `rule` without `/api/2.0/` or its like, and without the typo of its twin."""
    path = rule.partition(" ")[2]
    return re.sub(r"^/(ajax-)?api/[23]\.0/?", "", path)


# Coverage


def test_table_has_exactly_the_routes_of_supported_versions():
    assert set(ROWS) == set(vectors()) | OURS | OPTIONAL
    assert len(ROWS) == len(list(rules())), "a row stands twice"


def test_rule_matches_a_path_made_from_it():
    def made(rule):
        method, _, path = rule.partition(" ")
        return classify(method, fill(path, rest=f"77/{RUN}/artifacts/c/d"))

    agree(made, ROWS.items())


def test_the_installed_mlflow_has_no_route_without_a_row():
    routes = {f"{method} {template(rule)}" for method, rule, _ in installed_routes()}
    assert len(routes) > 200
    assert routes <= set(ROWS)


def test_vectors_have_the_routes_of_the_installed_version():
    from mlflow.version import VERSION

    listed = {rule for rule, versions in vectors().items() if VERSION in versions}
    if not listed:
        pytest.skip(f"no vectors for MLflow {VERSION}")
    assert {f"{method} {template(rule)}" for method, rule, _ in installed_routes()} == listed


# Agreement with MLflow's routers


@lru_cache(maxsize=1)
def routers():
    """Return the installed MLflow's routers: FastAPI's patterns in their order, and werkzeug's map."""
    from mlflow.server import app
    from mlflow.server.fastapi_app import create_fastapi_app
    from starlette.routing import compile_path

    native = [
        (method, compile_path(rule)[0], rule)
        for method, rule, _ in native_routes(create_fastapi_app(app))
    ]
    return native, app.url_map.bind("")


def routed(method: str, path: str) -> str | None:
    """Return the rule that the installed MLflow routes to, or None if it answers 404, 405 or 308."""
    from werkzeug.exceptions import HTTPException

    native, adapter = routers()
    for its_method, pattern, rule in native:
        if method == its_method and pattern.match(path):
            return f"{method} {rule}"
    try:
        rule, _ = adapter.match(path, method, return_rule=True)
    except HTTPException:
        return None
    return f"{method} {template(rule.rule)}"


def what(operation: Operation) -> tuple[Access, str, bool]:
    return operation.access, operation.kind, operation.outbound


def words() -> Iterator[str]:
    for rule in ROWS:
        yield from (word for word in rule.split("/")[1:] if word and "{" not in word)


SEGMENTS = st.one_of(
    st.sampled_from(sorted(set(words()))),
    st.text(st.characters(exclude_characters="/", exclude_categories=["Cc", "Cs"]), min_size=1),
)
RESTS = st.lists(SEGMENTS, min_size=1, max_size=5).map("/".join)


@st.composite
def paths(draw: st.DrawFn) -> str:
    rule = draw(st.sampled_from(sorted(vectors())))
    path = rule.partition(" ")[2]
    path = re.sub(r"\{\w+:path\}", lambda _: draw(RESTS), path)
    return re.sub(r"\{\w+\}", lambda _: draw(SEGMENTS), path)


@settings(max_examples=600, deadline=None)
@given(method=st.sampled_from(METHODS), path=paths())
def test_path_gets_the_rule_of_the_route_that_mlflow_picks(method, path):
    rule = routed(method, path)
    if rule is not None:
        assert fits(classify(method, path), ROWS[rule])
    elif is_newest():
        assert is_unknown(classify(method, path))


def fits(operation: Operation, row: Operation) -> bool:
    """Return whether `operation` agrees with `row`; an artifact's kind depends on its path."""
    by_path = row.kind == "artifacts" and operation.kind in ("traces", "experiments")
    return what(operation) == what(replace(row, kind=operation.kind) if by_path else row)


def is_unknown(operation: Operation) -> bool:
    return (operation.access, operation.rule, operation.outbound) == (Access.ADMIN, "", False)


def is_newest() -> bool:
    from mlflow.version import VERSION

    return all(VERSION in versions for versions in vectors().values())


@settings(max_examples=600, deadline=None)
@given(
    method=st.sampled_from(METHODS),
    path=paths(),
    extra=st.sampled_from(
        ["/", "//", ";x=1", "%20", " ", "\n", "\0", "/.", "/../", "?a", "é", "X"]
    ),
    data=st.data(),
)
def test_odd_spelling_never_needs_less_than_the_route_that_mlflow_picks(method, path, extra, data):
    place = data.draw(st.sampled_from([0, len(path)]) | st.integers(0, len(path)))
    odd = path[:place] + extra + path[place:]
    rule = routed(method, odd)
    operation = classify(method, odd)
    if rule in ROWS:
        assert is_unknown(operation) or fits(operation, ROWS[rule])
    elif rule is None and is_newest():
        assert is_unknown(operation)


# Spelling


OTHER_SPELLINGS = [
    *names("""
    //api/2.0/mlflow/runs/get /api//2.0/mlflow/runs/get /api/2.0/mlflow/runs/get/
    /API/2.0/mlflow/runs/get /api/2.0/mlflow/Runs/get /api/2.0/mlflow/runs/get;x=1
    /./api/2.0/mlflow/runs/get /api/2.0/mlflow/../mlflow/runs/get api/2.0/mlflow/runs/get
    /api/2.0/mlflow/runs/%67et /api/3.0/mlflow/runs/get /mlflow/api/2.0/mlflow/runs/get
    /api/3.0/mlflow/traces/ /api/3.0/mlflow/traces// /api/3.0/mlflow/traces/a/b
    /api/2.0/mlflow-artifacts/artifacts/ /api/2.0/mlflow-artifacts/artifacts//x
    /api/3.0/mlflow/mcp-servers/ /static-files/ /static-filesX /ajax-api/3.0/jobs
    /ajax-api/3.0/jobs//search /gateway//mlflow/invocations
    """),
    *("", "*", "/api/2.0/mlflow/runs/get ", "/api/2.0/mlflow/runs/get\n"),
    "/api/3.0/mlflow/traces/tr-1\n",
]
#: Paths of closed kinds in spellings that no route has.
CLOSED = {
    "hokusai": names("//api/2.0/hokusai/keys ///api/2.0/hokusai/keys/key_1 //hokusai/metrics"),
    "assistant": [
        "/ajax-api/3.0/mlflow/assistant/config\n",
        "//ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/mlflow/assistant/of-a-version-to-come",
    ],
}


def test_another_spelling_is_unknown():
    rows = product((*METHODS, "HEAD", "OPTIONS"), OTHER_SPELLINGS)
    agree(classify, ((*row, UNKNOWN) for row in rows))


def test_closed_kinds_are_closed_in_any_spelling():
    for kind, closed in CLOSED.items():
        rows = product((*METHODS, "HEAD", "OPTIONS"), closed)
        agree(classify, ((*row, replace(UNKNOWN, kind=kind)) for row in rows))


def test_methods_in_any_case_and_head_count_as_get():
    path = "/api/2.0/mlflow/experiments/get"
    for method in ("get", "Get", "gEt", "HEAD", "head"):
        assert classify(method, path) == ROWS[f"GET {path}"]
        assert classify(method, "/ajax-api/2.0/mlflow/gateway-proxy").access == Access.WRITE
    assert classify("pOsT", "/api/2.0/mlflow/runs/create").access == Access.WRITE


def test_a_method_that_no_rule_has_is_unknown():
    for method in ("FOO", "TRACE", "CONNECT", "PROPFIND", "", "GET ", "G"):
        for rule in ROWS:
            assert is_unknown(classify(method, fill(rule.partition(" ")[2]))), (method, rule)
    assert is_unknown(classify("POST", "/api/2.0/mlflow/runs/get"))
    assert is_unknown(classify("DELETE", "/api/3.0/mlflow/traces/tr-1"))


def test_options_reads_and_is_public_where_another_method_is():
    def asked(rule):
        operation = classify("options", fill(rule.partition(" ")[2]))
        assert operation.rule.startswith("OPTIONS /")
        return what(operation)

    def access(rule):
        public = any(row.partition(" ")[2] == rule.partition(" ")[2] for row in PUBLIC)
        return Access.PUBLIC if public else Access.READ

    agree(asked, ((rule, (access(rule), row.kind, False)) for rule, row in ROWS.items()))


# Public routes


def test_public_routes_are_public():
    assert {row.rule for row in ROWS.values() if row.access == Access.PUBLIC} == PUBLIC
    assert classify("GET", "/health").access == Access.PUBLIC
    for path in ("/health/", "/healthz", "/health/x", "//health", "/health;x=1", "/Health"):
        assert classify("GET", path).access == Access.ADMIN


@given(
    method=st.sampled_from([*METHODS, "HEAD", "OPTIONS", "FOO", "get"]) | st.text(),
    path=st.text()
    | st.from_regex(r"/?health.*|.*/health", fullmatch=True)
    | st.text().map("/health".__add__),
)
def test_nothing_else_is_public(method, path):
    if classify(method, path).access == Access.PUBLIC:
        assert path == "/health"
        assert method.upper() in ("GET", "HEAD", "OPTIONS")


# Routes whose access differs from their method


def test_posts_that_read_need_read():
    found = {
        (rule.split()[0], bare(rule))
        for rule, row in ROWS.items()
        if row.access == Access.READ and not rule.startswith("GET ")
    }
    assert found == {("POST", path) for path in POSTS_THAT_READ}


def test_gets_that_do_more_need_more_than_read():
    found = {
        f"{row.access.name} {bare(rule)}"
        for rule, row in ROWS.items()
        if row.access > Access.READ and rule.startswith("GET ")
    }
    assert found == GETS_THAT_DO_MORE


def test_administrators_routes_need_admin():
    for rule, row in ROWS.items():
        if not rule.startswith("GET "):
            assert (row.access == Access.ADMIN) == bool(ADMINISTRATION.match(bare(rule))), rule


def test_routes_that_call_a_provider_are_outbound():
    for rule, row in ROWS.items():
        assert row.outbound == bool(CALLS_OUT.match(rule.partition(" ")[2])), rule


def test_kinds_are_mlflow_s_own():
    assert {row.kind for row in ROWS.values()} == set(
        names("""
        artifacts assistant datasets demo experiments gateway genai graphql hokusai issues jobs
        label-schemas logged-models mcp-servers model-versions prompt-optimization
        registered-models review-queues runs scorers server traces ui webhooks workspaces
        """)
    )


# Cost


LONG = [
    "a/versions/" * 1250,
    "a/versions/b/tags/" * 750 + "/",
    "a/versions//tags/" * 750,
    "a/versions/b/tags//" * 2000,
    "a/endpoints/" * 1250,
    "a/aliases/" * 1250,
    "/" * 15000,
    "x" * 15000,
]


def cost(rest: str) -> float:
    """Return the CPU seconds of this thread to classify a path, independent of the machine's load."""

    def once() -> float:
        start = time.thread_time()
        for method in METHODS:
            classify(method, f"/api/3.0/mlflow/mcp-servers/{rest}")
            classify(method, f"/gateway/proxy/{rest}")
        return time.thread_time() - start

    return min(once() for _ in range(3))


def test_cost_of_a_path_is_linear_in_its_length():
    # A careless pattern takes 16 times as long or more for four times the length, up to minutes.
    for rest in LONG:
        assert cost(rest * 4) < 10 * cost(rest) + 0.001, rest[:40]


def write_vectors(lines: list[str]) -> None:
    """Rewrite the rules in `VECTORS` from `VERSION METHOD RULE` lines, oldest version first."""
    header = [line for line in VECTORS.read_text("utf-8").splitlines() if line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in lines:
        version, _, rule = line.strip().partition(" ")
        found.setdefault(rule, []).append(version)
    order = sorted(found, key=lambda rule: (rule.partition(" ")[2], rule))
    body = [f"{','.join(found[rule])} {rule}" for rule in order]
    VECTORS.write_text("\n".join([*header, "", *body, ""]), "utf-8")


if __name__ == "__main__":
    write_vectors(sys.stdin.readlines())
