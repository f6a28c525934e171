"""The parts of MLflow that this package uses exist, in the form that it needs.

MLflow promises few of them, so these tests run on every supported version (`make test-matrix`). A
failure names the file of ours that breaks. A new import from MLflow, or a new environment variable of
MLflow's, needs a row here.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import flask
import mlflow
import mlflow.cli
import mlflow.environment_variables
import pytest
import requests
from graphql import get_named_type
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository
from mlflow.tracking.request_header import registry as header_registry
from mlflow.utils import request_utils, rest_utils
from mlflow.utils.uri import validate_path_is_safe

import mlflow_hokusai_auth
from mlflow_hokusai_auth.client.artifacts import HokusaiArtifactRepository
from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.operations import classify
from mlflow_hokusai_auth.core.routes import QUERY_FIELDS
from mlflow_hokusai_auth.server.upstream import trailers
from tests.core.rows import each

SOURCE = Path(mlflow_hokusai_auth.__file__).parent
VERSION = tuple(int(part) for part in mlflow.__version__.split(".")[:2])
URI = "http://127.0.0.1:9/api/mlflow"

_STORE = "mlflow.tracking._tracking_service.utils"
_REPOSITORIES = "mlflow.store.artifact.artifact_repository_registry"
#: File of ours -> module or class of MLflow's -> the names in it that the file imports or reads.
IMPORTS: dict[str, dict[str, str]] = {
    "client/admin.py": {
        "mlflow.exceptions.MlflowException": "invalid_parameter_value",
        "mlflow.store.entities": "PagedList",
        _STORE: "_get_store",
        "mlflow.utils.rest_utils": "http_request verify_rest_response",
    },
    "cli/store.py": {
        "mlflow": "get_tracking_uri set_tracking_uri",
        "mlflow.exceptions": "MlflowException RestException",
    },
    "client/diagnose/identity.py": {
        "mlflow": "set_tracking_uri",
        "mlflow.exceptions": "MlflowException",
    },
    "client/artifacts.py": {
        "mlflow.store.artifact.mlflow_artifacts_repo": "MlflowArtifactsRepository"
    },
    "client/auth_provider.py": {
        "mlflow.tracking.request_auth.abstract_request_auth_provider": "RequestAuthProvider"
    },
    "client/default_experiment.py": {
        "mlflow": "MlflowClient",
        "mlflow.exceptions": "MlflowException",
    },
    "client/diagnose/doctor.py": {
        "mlflow": "__version__",
        "mlflow.exceptions": "MlflowException",
        _REPOSITORIES: "get_artifact_repository",
        _STORE: "_get_store",
        "mlflow.tracking.request_header.registry": "_request_header_provider_registry",
        "mlflow.utils.rest_utils": "http_request",
    },
    "client/diagnose/smoke.py": {"mlflow.exceptions": "MlflowException"},
    "client/diagnose/smoke_gate.py": {
        "mlflow": "MlflowClient set_registry_uri set_tracking_uri",
        "mlflow.exceptions": "MlflowException",
        _STORE: "_get_store",
    },
    "client/diagnose/smoke_job.py": {
        "mlflow": "MlflowClient",
        "mlflow.artifacts": "download_artifacts",
        "mlflow.exceptions": "MlflowException",
        _REPOSITORIES: "get_artifact_repository",
    },
    "client/header_provider.py": {
        "mlflow.tracking.request_header.abstract_request_header_provider": "RequestHeaderProvider"
    },
    "client/profile.py": {"mlflow": "get_registry_uri get_tracking_uri"},
    "server/isolation/preparation.py": {"mlflow": "__version__"},
    "server/metrics.py": {"mlflow": "__version__"},
    "server/upstream/apps.py": {
        "mlflow.server": "app",
        "mlflow.server.fastapi_app": "create_fastapi_app",
    },
    "server/upstream/artifact_roots.py": {
        "mlflow.exceptions": "MlflowException",
        "mlflow.protos.databricks_pb2": "PERMISSION_DENIED",
        "mlflow.utils.file_utils": "local_file_uri_to_path",
        "mlflow.utils.uri": "get_uri_scheme",
    },
    "server/upstream/job_roots.py": {_REPOSITORIES: "_artifact_repository_registry"},
    "server/upstream/origins.py": {
        "mlflow.environment_variables": "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE",
        "mlflow.server.security_utils": "LOCALHOST_ORIGIN_PATTERNS get_allowed_origins_from_env",
    },
    "server/upstream/repositories.py": {
        "mlflow.exceptions": "MlflowException",
        "mlflow.protos.databricks_pb2": "ErrorCode",
        "mlflow.server.handlers": "_get_artifact_repo",
        "mlflow.store.artifact.artifact_repo": "ArtifactRepository __name__",
        _REPOSITORIES: "_artifact_repository_registry",
        "mlflow.store.artifact.local_artifact_repo": "LocalArtifactRepository",
        "mlflow.utils.uri": "get_uri_scheme",
    },
    "server/upstream/routes.py": {"mlflow": "__version__"},
    "server/upstream/static_files.py": {"mlflow": "__file__"},
    "server/upstream/stores.py": {
        "mlflow.environment_variables": "MLFLOW_ENABLE_WORKSPACES",
        "mlflow.server.handlers": (
            "_get_artifact_repo_mlflow_artifacts _get_model_registry_store _get_tracking_store "
            "_is_serving_proxied_artifacts"
        ),
        "mlflow.exceptions": "MlflowException",
        "mlflow.protos.databricks_pb2": "INVALID_PARAMETER_VALUE TEMPORARILY_UNAVAILABLE",
        "mlflow.store.artifact.artifact_repo": "ArtifactRepository",
        "mlflow.store.artifact.local_artifact_repo": "LocalArtifactRepository",
        "mlflow.store.model_registry.sqlalchemy_store": "SqlAlchemyStore",
        "mlflow.store.tracking.sqlalchemy_store": "SqlAlchemyStore",
        "mlflow.utils.workspace_context": "set_server_request_workspace",
    },
    "server/upstream/tables.py": {
        "mlflow.entities.logged_model_status.LoggedModelStatus": "READY",
        "mlflow.store.db.base_sql_model.Base": "metadata registry",
        "mlflow.store.db.db_types": "DATABASE_ENGINES",
        "mlflow.store.db.utils": "create_sqlalchemy_engine",
        "mlflow.store.model_registry.dbmodels.models": "SqlModelVersionTag SqlRegisteredModelTag",
        "mlflow.store.model_registry.dbmodels.models.SqlModelVersion": (
            "current_stage name run_id source storage_location version"
        ),
        "mlflow.store.model_registry.dbmodels.models.SqlRegisteredModel": "name",
        "mlflow.store.model_registry.dbmodels.models.SqlRegisteredModelAlias": (
            "alias name version"
        ),
        "mlflow.store.tracking.dbmodels.models": (
            "SqlExperimentTag SqlLoggedModelTag SqlTag SqlTraceTag"
        ),
        "mlflow.store.tracking.dbmodels.models.SqlDataset": "dataset_uuid experiment_id",
        "mlflow.store.tracking.dbmodels.models.SqlExperiment": (
            "artifact_location experiment_id name"
        ),
        "mlflow.store.tracking.dbmodels.models.SqlInput": (
            "destination_id destination_type input_uuid source_id source_type"
        ),
        "mlflow.store.tracking.dbmodels.models.SqlLoggedModel": (
            "artifact_location experiment_id model_id name source_run_id status"
        ),
        "mlflow.store.tracking.dbmodels.models.SqlRun": "artifact_uri experiment_id run_uuid",
        "mlflow.store.tracking.dbmodels.models.SqlTraceInfo": "experiment_id request_id",
        "mlflow.utils.mlflow_tags": "MLFLOW_ARTIFACT_LOCATION MLFLOW_USER",
        "mlflow.utils.uri": "append_to_uri_path resolve_uri_if_local",
    },
}
#: MLflow's public API. Only `server/upstream/` may import anything else from MLflow on the server.
PUBLIC = re.compile(
    r"mlflow\.(__version__|[A-Za-z]\w*|(exceptions|entities|environment_variables)\.[\w.]+)"
)
#: Names that older versions of MLflow lack, and the version that added them.
SINCE = {
    "mlflow.server.security_utils": (3, 5),
    "mlflow.environment_variables.MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": (3, 5),
    "mlflow.utils.workspace_context": (3, 10),
    "mlflow.environment_variables.MLFLOW_ENABLE_WORKSPACES": (3, 10),
    "_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN": (3, 11),
    "MLFLOW_SERVER_PID": (3, 5),
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": (3, 5),
}
#: Environment variables of MLflow's that our code names -> the place and purpose.
VARIABLES = {
    "_MLFLOW_SERVER_ARTIFACT_DESTINATION": "server/upstream/artifact_roots.py: --artifacts-destination",
    "_MLFLOW_SERVER_ARTIFACT_ROOT": "server/upstream/artifact_roots.py: --default-artifact-root",
    "_MLFLOW_SERVER_SERVE_ARTIFACTS": "upstream/artifact_roots.py: whether MLflow's proxy serves",
    "_MLFLOW_SERVER_FILE_STORE": "upstream/artifact_roots.py: the database of experiments",
    "_MLFLOW_SERVER_REGISTRY_STORE": "upstream/artifact_roots.py: the database of versions",
    "_MLFLOW_SGI_NAME": "server/app.py: ASGI or WSGI",
    "_MLFLOW_STATIC_PREFIX": "server/app.py: refuses --static-prefix",
    "_MLFLOW_INTERNAL_GATEWAY_AUTH_TOKEN": "core/job_rules.py: jobs started with Basic",
    "MLFLOW_SERVER_PID": "core/job_rules.py: the processes of jobs",
    "MLFLOW_TRACKING_USERNAME": "authorities/server_jobs.py: the jobs' credential",
    "MLFLOW_TRACKING_PASSWORD": "authorities/server_jobs.py: the jobs' credential; doctor",
    "MLFLOW_TRACKING_TOKEN": "doctor: other credentials",
    "MLFLOW_TRACKING_AUTH": "client/header_provider.py: whether the other provider is active",
    "MLFLOW_TRACKING_URI": "cli/demo.py",
    "MLFLOW_TRACKING_INSECURE_TLS": "client/ci_key.py: the exchange trusts what MLflow trusts",
    "MLFLOW_TRACKING_SERVER_CERT_PATH": "client/ci_key.py: the exchange trusts what MLflow trusts",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "client/diagnose/smoke.py: its deadline",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "client/diagnose/smoke.py: its deadline",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "client/diagnose/smoke.py: its output",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "cli/demo.py",
    "MLFLOW_DISABLE_TELEMETRY": "cli/demo.py",
    "MLFLOW_BACKEND_STORE_URI": "cli/ownership.py, cli/server.py: MLflow's database",
    "MLFLOW_REGISTRY_STORE_URI": "cli/server.py: whether the registry is in the same database",
}


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield str(path.relative_to(SOURCE)), ast.parse(path.read_text())


def imported(tree: ast.Module) -> dict[str, str]:
    """Return name in a module -> MLflow's name for it. (`import mlflow.x` binds `mlflow`.)"""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "mlflow":
                    names[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mlflow":
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def absent(name: str) -> bool:
    """Return whether the installed MLflow is too old for `name`."""
    return any(at > VERSION for start, at in SINCE.items() if name.startswith(start))


def is_open(dotted: str) -> bool:
    """Return whether this is a module or a class, whose attributes count like imports."""
    return not absent(dotted) and isinstance(pkgutil.resolve_name(dotted), (ModuleType, type))


def taken(tree: ast.Module) -> set[str]:
    """Return the names that a module imports from MLflow, or the attributes that it reads of them."""
    names = imported(tree)
    attributes: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            base = names.get(node.value.id)
            if base and is_open(base):
                attributes.setdefault(base, set()).add(f"{base}.{node.attr}")
    return set().union(*attributes.values(), set(names.values()) - set(attributes))


def rows() -> list[tuple[str, str]]:
    """IMPORTS as pairs of a file and a name, without those that the installed MLflow is too old for."""
    found = [
        (file, f"{module}.{name}")
        for file, modules in IMPORTS.items()
        for module, names in modules.items()
        for name in names.split()
    ]
    return [(file, name) for file, name in found if not absent(name)]


def test_every_import_of_ours_has_a_row_and_every_row_an_import() -> None:
    used = {(f, name) for f, tree in trees() for name in taken(tree) if not absent(name)}
    assert not used - set(rows()), "add these to IMPORTS"
    assert not set(rows()) - used, "nothing imports these any more"


def test_server_imports_private_modules_of_mlflow_in_upstream_only() -> None:
    private = {
        (file, name)
        for file, tree in trees()
        if not file.startswith(("server/upstream/", "client/"))
        for name in {*imported(tree).values(), *taken(tree)}
        if name != "mlflow" and not PUBLIC.fullmatch(name)
    }
    assert not private, "move these imports into server/upstream/"


def test_every_variable_of_mlflow_s_has_a_row() -> None:
    pattern = re.compile(r"_?MLFLOW_[A-Z_]+")
    named = {
        node.value
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and pattern.fullmatch(node.value)
        and not node.value.endswith("_")  # the start of several names
    }
    assert named == set(VARIABLES)


def test_every_import_of_ours_exists_in_mlflow() -> None:
    def check(file: str, name: str) -> None:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            pytest.fail(f"MLflow {mlflow.__version__} has no {name}, which {file} needs: {error}")

    each(check, rows())


def test_mlflow_still_knows_these_variables() -> None:
    known = {getattr(one, "name", "") for one in vars(mlflow.environment_variables).values()}
    handlers = importlib.import_module("mlflow.server.handlers")
    known.add(handlers.STATIC_PREFIX_ENV_VAR)
    known |= {value for key, value in vars(mlflow.server).items() if key.endswith("_ENV_VAR")}
    known |= {str(option.envvar) for option in mlflow.cli.server.params if option.envvar}
    # It has no constant: MLflow sets it where it starts the jobs.
    if not absent("MLFLOW_SERVER_PID"):
        jobs = Path(str(mlflow.__file__)).parent / "server" / "jobs" / "utils.py"
        known |= set(re.findall(r'"(MLFLOW_SERVER_PID)":', jobs.read_text()))
    gone = {name: what for name, what in VARIABLES.items() if name not in known}
    assert not {name: what for name, what in gone.items() if not absent(name)}


# What the server relies on


@pytest.mark.parametrize("sgi", ["uvicorn", "gunicorn", "waitress"])
def test_mlflow_server_starts_our_app_and_says_how(
    sgi: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """server/app.py makes the kind of application that MLflow says; waitress takes an object."""

    class Started(Exception):
        pass

    def exec_cmd(command: list[str], extra_env: dict[str, str], **_: Any) -> None:
        raise Started(command, extra_env)

    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setattr(mlflow.server, "_exec_cmd", exec_cmd)
    name = "hokusai-auth-wsgi" if sgi == "waitress" else "hokusai-auth"
    given = {
        "host": "127.0.0.1",
        "port": 5000,
        "app_name": name,
        "workers": 1,
        "file_store_path": "sqlite://",
        "registry_store_uri": "sqlite://",
        "default_artifact_root": "mlflow-artifacts:/",
        "static_prefix": "/prefix",
        **({} if sgi == "uvicorn" else {f"{sgi}_opts": "--threads=4"}),
    }
    wanted = inspect.signature(mlflow.server._run_server).parameters.values()
    rest = {one.name: None for one in wanted if one.default is inspect.Parameter.empty}
    with pytest.raises(Started) as caught:
        mlflow.server._run_server(**{**rest, **given})
    command, environ = caught.value.args
    target = "wsgi_app:app" if sgi == "waitress" else "app:create_app"
    called = f"mlflow_hokusai_auth.server.{target}{'()' if sgi == 'gunicorn' else ''}"
    assert called in " ".join(command).split(), command
    assert environ["_MLFLOW_SGI_NAME"] == sgi
    assert environ["_MLFLOW_STATIC_PREFIX"] == "/prefix"


def test_applications_have_the_form_that_we_wrap() -> None:
    """server/upstream/apps.py makes both; server/upstream/routes.py walks their routes."""
    app = pkgutil.resolve_name("mlflow.server.app")
    create = pkgutil.resolve_name("mlflow.server.fastapi_app.create_fastapi_app")
    assert isinstance(app, flask.Flask)
    made = create(flask_app=app)
    assert inspect.iscoroutinefunction(type(made).__call__) and made.router.routes


def test_handlers_need_no_arguments() -> None:
    """server/upstream/stores.py calls them, also from threads that serve no request."""
    for file, name in rows():
        if file == "server/upstream/stores.py" and name.startswith("mlflow.server.handlers."):
            parameters = inspect.signature(pkgutil.resolve_name(name)).parameters.values()
            assert all(one.default is not one.empty for one in parameters), name


@pytest.mark.skipif(VERSION < (3, 5), reason="no security middleware before 3.5")
def test_origins_have_the_form_that_we_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """server/upstream/origins.py: lists of texts; the second has patterns for re.fullmatch."""
    utils = importlib.import_module("mlflow.server.security_utils")
    monkeypatch.delenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", raising=False)
    assert not utils.get_allowed_origins_from_env()
    monkeypatch.setenv("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS", "https://a.example,https://b.example")
    assert utils.get_allowed_origins_from_env() == ["https://a.example", "https://b.example"]
    pattern = "|".join(utils.LOCALHOST_ORIGIN_PATTERNS)
    assert re.fullmatch(pattern, "http://localhost:5000")
    assert not re.fullmatch(pattern, "http://evil.example")
    switch = mlflow.environment_variables.MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE
    assert switch.get() == "false"


@pytest.mark.skipif(VERSION < (3, 15), reason="read by MLflow itself since then")
def test_mlflow_reads_the_user_where_we_put_it() -> None:
    """server/caller.py sets `g.mlflow_authenticated_user`; jobs are recorded as that user's."""
    jobs = importlib.import_module("mlflow.server.jobs")
    assert "mlflow_authenticated_user" in inspect.getsource(jobs)


# What the client relies on


#: Group of our entry points -> the module of MLflow that reads it.
GROUPS = {
    "mlflow.app": "mlflow.server",
    "mlflow.app.client": "mlflow.server",
    "mlflow.artifact_repository": "mlflow.store.artifact.artifact_repository_registry",
    "mlflow.default_experiment_provider": "mlflow.tracking.default_experiment.registry",
    "mlflow.request_header_provider": "mlflow.tracking.request_header.registry",
    "mlflow.request_auth_provider": "mlflow.tracking.request_auth.registry",
}


def test_mlflow_reads_the_groups_of_our_entry_points() -> None:
    ours = {point.group for point in distribution("mlflow-hokusai-auth").entry_points}
    assert ours - {"console_scripts"} == set(GROUPS)
    for group, module in GROUPS.items():
        source = inspect.getsource(importlib.import_module(module))
        assert f'"{group}"' in source, f"{module} does not load {group}"


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    fresh = header_registry.RequestHeaderProviderRegistry()
    monkeypatch.setattr(header_registry, "_request_header_provider_registry", fresh)
    return fresh


def provider(answer: Any) -> type:
    class Provider:
        def in_context(self) -> bool:
            return True

        def request_headers(self) -> dict[str, str]:
            if isinstance(answer, Exception):
                raise answer
            return answer

    return Provider


def test_header_providers_are_joined_and_their_errors_logged(
    registry: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """header_provider.py gives the key once, however often it is registered, and never raises."""
    for answer in ({"X": "1"}, {"X": "2"}, ValueError("the text")):
        registry.register(provider(answer))
    assert header_registry.resolve_request_headers() == {"X": "1 2"}
    assert len(list(registry)) == 3


def test_provider_can_see_its_request(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """header_provider.py reads the URL from the frame of `http_request`, and adds a hook there."""
    call: dict[str, Any] = {}

    class Looks:
        def in_context(self) -> bool:
            frame = inspect.currentframe()
            while frame and frame.f_code.co_name != "http_request":
                frame = frame.f_back
            assert frame is not None and frame.f_globals["__name__"] == "mlflow.utils.rest_utils"
            call.update(frame.f_locals)
            frame.f_locals["kwargs"]["hooks"] = {"response": [call.setdefault]}
            return False

        def request_headers(self) -> dict[str, str]:
            raise AssertionError

    sent: dict[str, Any] = {}
    monkeypatch.setattr(
        rest_utils, "_get_http_response_with_retries", lambda *_, **options: sent.update(options)
    )
    registry.register(Looks)
    credentials = rest_utils.MlflowHostCreds(f"{URI}/")
    rest_utils.http_request(credentials, "/x", "GET", extra_headers={"A": "b"}, timeout=5)
    assert call["url"] == f"{URI}/x" and call["extra_headers"] == {"A": "b"}
    assert call["host_creds"] is credentials and hasattr(credentials, "use_databricks_sdk")
    assert sent["hooks"] == {"response": [call.setdefault]} and sent["timeout"] == 5


def test_requests_accept_our_options() -> None:
    """client/admin.py and doctor make one attempt, and read the answer whatever its status is."""
    parameters = inspect.signature(rest_utils.http_request).parameters
    assert {"timeout", "max_retries", "raise_on_status", "extra_headers"} <= set(parameters)
    credentials = pkgutil.resolve_name("mlflow.tracking._tracking_service.utils._get_store")(URI)
    found = credentials.get_host_creds()
    assert found.host == URI and {"verify", "client_cert_path"} <= set(dir(found))


def test_mlflow_s_client_retries_these_statuses() -> None:
    """core/denials.py sets `Retry-After` on 429 and 503. No other refusal but 408 may be retried."""
    retried = {408, 429, 500, 502, 503, 504}
    assert set(request_utils._TRANSIENT_FAILURE_RESPONSE_CODES) == retried
    # A body that took too long may be sent again at once: 408 has no `Retry-After`.
    assert {code.status for code in CODES.values()} & retried == {408, 429, 503}
    default = mlflow.environment_variables.MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER
    assert default.get() is True, "core/denials.py: RETRY_AFTER would count for nothing"


def test_refusal_is_a_rest_exception() -> None:
    """core/denials.py writes MLflow's form; doctor reads our code from the exception's `json`."""
    response = requests.Response()
    response.status_code = 401
    body = {"error_code": "UNAUTHENTICATED", "message": "Do this.", "error": "KEY_MISSING"}
    response._content = json.dumps(body).encode()
    with pytest.raises(RestException, match=r"UNAUTHENTICATED: Do this\.") as caught:
        rest_utils.verify_rest_response(response, "/x")
    assert isinstance(caught.value, MlflowException)
    assert caught.value.error_code == "UNAUTHENTICATED" and caught.value.json == body


def test_mlflow_knows_our_error_codes() -> None:
    """MLflow's client warns of other codes, and treats them as internal errors: see core/denials.py."""
    assert {code.error_code for code in CODES.values()} <= set(dict(ErrorCode.items()))


def test_artifacts_still_lose_the_prefix_and_ours_keep_it() -> None:
    """If the first assertion fails, MLflow keeps the prefix itself, and client/artifacts.py can go."""
    service = "/api/2.0/mlflow-artifacts/artifacts"
    resolve = MlflowArtifactsRepository.resolve_uri
    assert list(inspect.signature(resolve).parameters) == ["artifact_uri", "tracking_uri"]
    assert resolve("mlflow-artifacts:/", URI) == f"http://127.0.0.1:9{service}"
    assert issubclass(HokusaiArtifactRepository, MlflowArtifactsRepository)
    assert issubclass(MlflowArtifactsRepository, HttpArtifactRepository)


def test_artifact_repository_has_the_methods_that_we_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """doctor asks at `artifact_uri` with `_host_creds`; smoke lists and deletes."""
    repository = MlflowArtifactsRepository("mlflow-artifacts:/", URI)
    assert repository.artifact_uri.endswith("/api/2.0/mlflow-artifacts/artifacts")
    assert repository._host_creds.host == repository.artifact_uri
    for method in (repository.list_artifacts, repository.delete_artifacts):
        assert all(
            one.default is not one.empty for one in inspect.signature(method).parameters.values()
        )


def test_the_client_has_the_methods_of_smoke() -> None:
    """client/diagnose/smoke_job.py and smoke_gate.py call these, with these arguments."""
    called = {"get_experiment": set()}
    for node in ast.walk(ast.parse((SOURCE / "client/diagnose/smoke_job.py").read_text())):
        if _is_of_client(node):
            called.setdefault(node.func.attr, set()).update(one.arg for one in node.keywords)
    assert len(called) > 15
    for name, parameters in called.items():
        method = getattr(mlflow.MlflowClient, name)
        assert parameters <= set(inspect.signature(method).parameters), name


def _is_of_client(node: ast.AST) -> bool:
    """Return whether this is `client.x(…)` or `job.client().x(…)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    of = node.func.value
    return (isinstance(of, ast.Name) and of.id == "client") or (
        isinstance(of, ast.Call) and isinstance(of.func, ast.Attribute) and of.func.attr == "client"
    )


_RUN = "0123456789abcdef" * 2
_PARTS = ["traces", "Traces", "models", f"m-{_RUN}", _RUN, "artifacts", "1", "tr", "aces", "file"]
_PARTS += ["/", "//", ".", "..", "%2e", "%2f", "%252e", "%74", "%2574", "%252574", "\t", "%09", " "]
_PARTS += ["?", "#", ";", ":", "%", "%3f", "%23", "%3b", "%25", "\\", "[", "@", "\u017f", "\x00"]


@given(
    st.sampled_from(["GET artifacts", "DELETE artifacts", "PUT artifacts", "GET presigned"]),
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=12).map("".join),
)
@example("GET artifacts", "1/%2574races/tr-1/artifacts/traces.json")
@example("DELETE artifacts", "%252e/%252e")
@example("GET artifacts", "traces%3f/")
def test_a_path_of_artifacts_is_judged_as_mlflow_reads_it(what: str, path: str) -> None:
    method, _, base = what.partition(" ")
    start = f"/api/2.0/mlflow-artifacts/{base}/"
    found = classify(method, start + path)
    try:
        read = validate_path_is_safe(path)
    except (MlflowException, ValueError):
        return
    # MLflow opens this place as it is. Without its last slash, `traces?/` would be read once more, as
    # `traces`, so characters that mean something in a path but not to a file system are replaced.
    parts = [re.sub(r"[%?#;:]", "_", part) for part in read.split("/") if part not in ("", ".")]
    if found.kind == "artifacts" and parts:
        assert classify(method, start + "/".join(parts)).kind == "artifacts"
    elif found.kind == "artifacts":
        assert method != "DELETE"


def test_every_graphql_field_has_a_row() -> None:
    """A new field needs the scope for everything until it has a row. A new resolver may read more."""
    from mlflow.server.graphql import autogenerated_graphql_schema as generated
    from mlflow.server.graphql import graphql_schema_extensions as extended

    queries = extended.schema.graphql_schema.query_type
    assert queries is not None
    assert {*queries.fields, "__typename"} == {*QUERY_FIELDS, "test"}
    resolvers = {
        f"{one.__name__}.{name}"
        for module in (generated, extended)
        for one in vars(module).values()
        if inspect.isclass(one) and one.__name__ not in ("Query", "QueryType", "Mutation")
        for name in vars(one)
        if name.startswith("resolve_") and one.__name__ != "MutationType"
    }
    # The first two resolve the "experiments" and "model-versions" of a run.
    assert resolvers == {
        "MlflowRunExtension.resolve_experiment",
        "MlflowRunExtension.resolve_model_versions",
        "MlflowMetricExtension.resolve_value",
    }
    holds_runs = {
        name
        for name, field in queries.fields.items()
        if "MlflowRunExtension" in _types(field.type, set())
    }
    assert holds_runs == {name for name, kinds in QUERY_FIELDS.items() if len(kinds) > 1}


def _types(one: Any, found: set[str]) -> set[str]:
    """Return the names of the GraphQL type and of all types that its fields lead to."""
    named = get_named_type(one)
    if named.name not in found:
        found.add(named.name)
        for field in getattr(named, "fields", {}).values():
            _types(field.type, found)
    return found


def test_uvicorn_s_protocol_for_httptools_drops_trailers() -> None:
    """upstream/trailers.py changes `on_headers_complete`; without it servers fall back to h11."""
    pytest.importorskip("httptools")
    assert trailers.ignore()
