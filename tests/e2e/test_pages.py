"""Every page of MLflow, in a real Chromium, with each scope and after the session has ended.

The list of pages is kept by hand. A test compares it with the routes in the installed MLflow's script,
so that a page of a new version is looked at.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow.server
import pytest

from mlflow_hokusai_auth.core.browser import LOGOUT_COOKIE, LOOPBACK_COOKIE
from mlflow_hokusai_auth.core.policy import SIGNED_OUT
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.sessions import Sessions
from tests.e2e.conftest import needs_chromium
from tests.e2e.parts import post
from tests.harness import Server, serve

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (it is in the extra `test`)"
)
expect = playwright_api.expect

SCRIPTS = Path(str(mlflow.server.__file__)).parent / "js" / "build" / "static" / "js"

pytestmark = [pytest.mark.servers, needs_chromium]

#: Route in MLflow's script -> the page's path, and a text that it shows with a supplier's key.
PAGES = {
    "/experiments": ("/experiments", "waves"),
    "/experiments/:experimentId/runs": ("/experiments/{e}/runs", "first-run"),
    "/experiments/:experimentId": ("/experiments/{e}", "waves"),
    "/experiments/:experimentId/overview/:overviewTab": (
        "/experiments/{e}/overview/usage",
        "waves",
    ),
    "/experiments/:experimentId/traces": ("/experiments/{e}/traces", "waves"),
    "/experiments/:experimentId/traces/:traceId": ("/experiments/{e}/traces/tr-1", "waves"),
    "/experiments/:experimentId/chat-sessions": ("/experiments/{e}/chat-sessions", "waves"),
    "/experiments/:experimentId/chat-sessions/:sessionId": (
        "/experiments/{e}/chat-sessions/s1",
        "waves",
    ),
    "/experiments/:experimentId/datasets": ("/experiments/{e}/datasets", "waves"),
    "/experiments/:experimentId/datasets/:datasetId": ("/experiments/{e}/datasets/d-1", "waves"),
    "/experiments/:experimentId/evaluation-runs": ("/experiments/{e}/evaluation-runs", "waves"),
    "/experiments/:experimentId/evaluation-runs/:runUuid": (
        "/experiments/{e}/evaluation-runs/{run}",
        "waves",
    ),
    "/experiments/:experimentId/judges": ("/experiments/{e}/judges", "waves"),
    "/experiments/:experimentId/models": ("/experiments/{e}/models", "logged-one"),
    "/experiments/:experimentId/models/:loggedModelId": (
        "/experiments/{e}/models/{lm}",
        "logged-one",
    ),
    "/experiments/:experimentId/models/:loggedModelId/:tabName": (
        "/experiments/{e}/models/{lm}/traces",
        "logged-one",
    ),
    "/experiments/:experimentId/playground": ("/experiments/{e}/playground", "waves"),
    "/experiments/:experimentId/prompts": ("/experiments/{e}/prompts", "waves"),
    "/experiments/:experimentId/prompts/:promptName": ("/experiments/{e}/prompts/none", ""),
    "/experiments/:experimentId/review-queue": ("/experiments/{e}/review-queue", "waves"),
    "/experiments/:experimentId/runs/:runUuid": ("/experiments/{e}/runs/{run}", "first-run"),
    "/experiments/:experimentId/runs/:runUuid/*": (
        "/experiments/{e}/runs/{run}/model-metrics",
        "first-run",
    ),
    "/experiments/:experimentId/runs/:runUuid/artifactPath/*": (
        "/experiments/{e}/runs/{run}/artifacts",
        "first-run",
    ),
    "/runs/:runUuid": ("/runs/{run}", "first-run"),
    "/models": ("/models", "great-wave"),
    "/models/:modelName": ("/models/great-wave", "great-wave"),
    "/models/:modelName/versions/:version": ("/models/great-wave/versions/1", "great-wave"),
    "/compare-model-versions": (
        '/compare-model-versions?name="great-wave"&runs={{"1":"{run}"}}',
        "great-wave",
    ),
    "/compare-runs": ('/compare-runs?runs=["{run}"]&experiments=["{e}"]', "first-run"),
    "/compare-experiments/:searchString": ('/compare-experiments/s?experiments=["{e}"]', ""),
    "/metric/*": (
        '/metric?runs=["{run}"]&metric="loss"&experiments=["{e}"]&plot_metric_keys=["loss"]'
        '&plot_layout={{"autosize":true,"xaxis":{{}},"yaxis":{{}}}}&x_axis=step&line_smoothness=1'
        "&y_axis_scale=linear&show_point=false&deselected_curves=[]&last_linear_y_axis_range=[]",
        "loss",
    ),
    "/prompts": ("/prompts", "Prompts"),
    "/prompts/:promptName": ("/prompts/none", ""),
    "/gateway": ("/gateway", ""),
    "/gateway/api-keys": ("/gateway/api-keys", ""),
    "/gateway/budgets": ("/gateway/budgets", ""),
    "/gateway/endpoints/create": ("/gateway/endpoints/create", ""),
    "/gateway/endpoints/:endpointId": ("/gateway/endpoints/e-1", ""),
    "/gateway/usage": ("/gateway/usage", ""),
    "/mcp-registry": ("/mcp-registry", ""),
    "/mcp-registry/:serverName": ("/mcp-registry/none", ""),
    "/settings": ("/settings", "Settings"),
    "/settings/:section": ("/settings/general", "Settings"),
    "/account": ("/account", ""),
    "/admin": ("/admin", ""),
}
#: Other strings in the script that look like routes -> the page that stands for them, or what they are.
ELSEWHERE = {
    "/admin/roles/:roleId": "/admin",
    "/admin/users/:username": "/admin",
    "/admin/ws": "/admin",
    "/compare-experiments": "/compare-experiments/:searchString",
    "/compare-experiments/*": "/compare-experiments/:searchString",
    "/createModel": "a path that leads to /models",
    "/experiments/:experimentId/*": "/experiments/:experimentId",
    "/experiments/:experimentId/:tabName": "/experiments/:experimentId/runs",
    "/experiments/:experimentId/evaluation-runs/:runUuid/*": "as without `/*`",
    "/experiments/:experimentId/s": "/experiments/:experimentId",
    "/gateway/*": "/gateway",
    "/gateway/endpoints/*": "/gateway/endpoints/create",
    "/mcp-registry/*": "/mcp-registry",
    "/models/*": "/models",
    "/models/:modelName/:subpage": "/models/:modelName",
    "/models/:modelName/:subpage/:name": "/models/:modelName",
    "/prompts/*": "/prompts",
    "/graphql": "no page",
    "/artifacts/": "a part of a path",
    "/path/to/skills": "an example",
    "/Users/me/projects/my-llm-project": "an example",
}
#: One page for each kind of resource.
OF_EACH_KIND = (
    "/experiments/:experimentId",
    "/experiments/:experimentId/runs/:runUuid",
    "/experiments/:experimentId/models/:loggedModelId",
    "/experiments/:experimentId/traces",
    "/models/:modelName/versions/:version",
    "/gateway",
)
#: Requests of MLflow's pages that a key may not send -> why that is right.
_REGISTRY = "the registry's scopes do not reach it; MLflow shows the rest of the page"
_ADMINS = "it shows where credentials go, or who may do what: for administrators"
REFUSED = {
    "model:": {
        "/mlflow/traces": _REGISTRY,
        "/mlflow/get-trace-artifact": _REGISTRY,
        "/mlflow/datasets": _REGISTRY,
        "/mlflow/scorers": _REGISTRY,
        "/mlflow/label-schemas": _REGISTRY,
        "/mlflow/review-queues": _REGISTRY,
        "/mlflow/issues": _REGISTRY,
        "/mlflow/mcp-servers": _REGISTRY,
        "/mlflow/gateway": _REGISTRY,
        "/mlflow/prompt-optimization": _REGISTRY,
        "/mlflow/workspaces": _REGISTRY,
        "/ajax-api/3.0/jobs": _REGISTRY,
        "/mlflow/experiments/search-datasets": _REGISTRY,
    },
    "mlflow:read": {"/mlflow/gateway-proxy": "its GET sends a request on, to another server"},
    "": {
        "/mlflow/assistant/": "the assistant is off unless the operator switches it on",
        "/mlflow/gateway/secrets": _ADMINS,
        "/mlflow/gateway/guardrails/list": _ADMINS,
        "/mlflow/users": _ADMINS,
        "/mlflow/roles": _ADMINS,
        "/mlflow/webhooks": _ADMINS,
    },
}
#: Lines that MLflow's pages write to the console with any key -> why.
NOISE = {
    "ResizeObserver loop": "MLflow's layout, also without this package",
    "ERR_NAME_NOT_RESOLVED": "news and telemetry of MLflow's makers, which the test keeps it from",
}


@dataclass
class Person:
    """Somebody with a browser of their own, and what went wrong in it."""

    server: Server
    page: Any
    scope: str
    #: Statuses that the server answers with by right, besides those of `REFUSED`.
    fine: tuple[int, ...] = (404,)
    wrong: list[str] = field(default_factory=list)
    _open: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("console", self._console)
        self.page.on("pageerror", self._page_error)
        self.page.on("request", self._begun)
        for ended in ("requestfinished", "requestfailed"):
            self.page.on(ended, lambda request: self._open.discard(request))
        self.page.on("response", self._response)

    def visit(self, path: str, text: str = "") -> None:
        """Open the page, wait for `text` and until it asks for nothing more; note what is wrong."""
        before = len(self.wrong)
        self.page.goto(f"{self.server.origin}/#{path}")
        if text:
            try:
                self.page.get_by_text(text).locator("visible=true").first.wait_for()
            except playwright_api.TimeoutError:
                self.wrong.append(f"does not show {text!r}: {self.page.inner_text('body')[:300]!r}")
        self.settle()
        if "Something went wrong" in self.page.inner_text("body"):
            self.wrong.append(f"crashed: {self.page.inner_text('body')[:300]!r}")
        self.wrong[before:] = [f"{self.scope} {path}: {what}" for what in self.wrong[before:]]

    def settle(self) -> None:
        """Wait until the page has been idle twice with no request under way."""
        idle = "() => new Promise(done => requestIdleCallback(() => setTimeout(done)))"
        quiet, deadline = 0, time.monotonic() + 60
        while quiet < 2 and time.monotonic() < deadline:
            self.page.evaluate(idle)
            quiet = 0 if self._open else quiet + 1
        if quiet < 2:
            self.wrong.append(f"has asked for a minute: {[one.url for one in self._open]}")

    def _page_error(self, error: Any) -> None:
        # MLflow leaves a request that is refused with 401 to the console, by a name of its script's.
        if 401 not in self.fine or "chunk" in str(error).lower():
            self.wrong.append(f"page error: {error}")

    def _begun(self, request: Any) -> None:
        # Playwright does not tell when a worker's script has come.
        ours = request.url.startswith(self.server.origin)
        if ours and not request.url.endswith(".worker.js"):
            self._open.add(request)

    def _expected(self, url: str) -> bool:
        return any(
            part in url
            for scope, parts in REFUSED.items()
            if self.scope.startswith(scope)
            for part in parts
        )

    def _console(self, message: Any) -> None:
        text = message.text
        if message.type != "error" or any(part in text for part in NOISE):
            return
        if text.startswith("Failed to load resource"):
            return  # told by `_response`
        # The second is what MLflow says of a refused request where it does not quote the message.
        ended = 401 in self.fine and (SIGNED_OUT in text or "A request error occurred" in text)
        if not ended and not self._expected(text):
            self.wrong.append(f"console: {text[:300]}")

    def _response(self, response: Any) -> None:
        if response.status < 400 or not response.url.startswith(self.server.origin):
            return
        static = "/static-files/" in response.url
        if static or not (response.status in self.fine or self._expected(response.url)):
            self.wrong.append(f"{response.status} {response.request.method} {response.url[-150:]}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of its own: a test ends sessions."""
    with serve(tmp_path_factory.mktemp("pages")) as running:
        yield running


@pytest.fixture(scope="module")
def made(server: Server) -> dict[str, str]:
    """Make an experiment, a run, a logged model and a registered model for the pages to show."""
    admin, api = server.key("mlflow:admin"), "/api/2.0/mlflow/"
    e = post(server, f"{api}experiments/create", admin, {"name": "waves"})["experiment_id"]
    values = {"experiment_id": e, "run_name": "first-run"}
    run = post(server, f"{api}runs/create", admin, values)["run"]["info"]["run_id"]
    metric = {"key": "loss", "value": 1, "timestamp": 1}
    post(
        server,
        f"{api}runs/log-batch",
        admin,
        {"run_id": run, "metrics": [{**metric, "step": step} for step in range(3)]},
    )
    values = {"experiment_id": e, "name": "logged-one", "source_run_id": run}
    lm = post(server, f"{api}logged-models", admin, values)["model"]["info"]["model_id"]
    post(server, f"{api}registered-models/create", admin, {"name": "great-wave"})
    source = {
        "name": "great-wave",
        "source": f"mlflow-artifacts:/{e}/{run}/artifacts/model",
        "run_id": run,
    }
    post(server, f"{api}model-versions/create", admin, source)
    server.request(
        "PUT",
        f"/api/2.0/mlflow-artifacts/artifacts/{e}/{run}/artifacts/model/MLmodel",
        key=admin,
        body=b"artifact_path: model\nflavors: {}\n",
    )
    return {"e": e, "run": run, "lm": lm}


@pytest.fixture
def person(browser: Any, server: Server) -> Iterator[Any]:
    contexts: list[Any] = []

    def new(scope: str) -> Person:
        """Somebody who is signed in with a key of this scope."""
        key, store = server.key(scope), server.store
        record = store.find(key)
        assert record is not None
        context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
        contexts.append(context)
        context.set_default_timeout(60_000)
        token = Sessions(store.database).begin(key, 3600, Actor(record.owner, record.key_id))
        cookie = {"url": server.origin, "sameSite": "Strict"}
        context.add_cookies(
            [
                {**cookie, "name": LOGOUT_COOKIE, "value": "signed-in"},
                {**cookie, "name": LOOPBACK_COOKIE, "value": token, "httpOnly": True},
            ]
        )
        return Person(server, context.new_page(), scope)

    yield new
    for context in contexts:
        context.close()


def test_every_route_of_mlflow_s_script_has_a_page() -> None:
    (main,) = SCRIPTS.glob("main.*.js")
    found = set(re.findall(r'"(/[a-zA-Z][a-zA-Z0-9/:*_-]*)"', main.read_text("utf-8")))
    # Ids of messages, and addresses of documentation.
    found = {one for one in found if len(one) != 6 or re.fullmatch(r"/[a-z]+", one)}
    found = {one for one in found if not re.match(r"/(genai|generative-ai|CaNq)/", one)}
    assert found == {*PAGES, *ELSEWHERE}


@pytest.mark.parametrize("scope", ["model:read", "model:write"])
def test_a_supplier_sees_every_page(scope: str, person: Any, made: dict[str, str]) -> None:
    one = person(scope)
    for path, text in PAGES.values():
        one.visit(path.format(**made), text)
    assert not one.wrong, "\n".join(one.wrong)


def test_other_scopes_see_a_page_of_each_kind(person: Any, made: dict[str, str]) -> None:
    wrong = []
    for scope in ("mlflow:read", "mlflow:write", "mlflow:admin"):
        one = person(scope)
        for route in OF_EACH_KIND:
            path, text = PAGES[route]
            one.visit(path.format(**made), text)
        wrong += one.wrong
    assert not wrong, "\n".join(wrong)


def test_an_open_page_outlives_its_session(
    person: Any, server: Server, made: dict[str, str]
) -> None:
    """It says that one is signed out, it does not crash, and reloaded leads back to where one was."""
    one = person("model:write")
    one.visit("/models", "great-wave")
    assert not one.wrong
    for cookie in one.page.context.cookies():
        Sessions(server.store.database).end(cookie["value"], address="", request_id="")
    answered: list[Any] = []
    one.page.on("response", lambda got: answered.append(got) if got.status == 401 else None)
    one.fine = (401, 404, 429)
    for path, _ in PAGES.values():
        one.visit(path.format(**made))
    # The cookie has lapsed, so the browser does not send it.
    one.page.context.clear_cookies()
    path = f"/experiments/{made['e']}/runs/{made['run']}/model-metrics"
    one.visit(path)
    assert answered
    told = {json.loads(got.body())["message"] for got in (answered[0], answered[-1])}
    assert all(text.endswith(SIGNED_OUT) for text in told) and len(told) == 2, told
    assert not one.wrong, "\n".join(one.wrong)
    one.page.reload()
    expect(one.page).to_have_title("Sign in · MLflow")
    one.page.get_by_label("API key").fill(server.key("model:write"))
    one.page.keyboard.press("Enter")
    one.page.wait_for_url(f"{server.origin}/#{path}**")
    expect(one.page.get_by_text("first-run").first).to_be_visible(timeout=60_000)
