"""Keys with scopes for the registry, and artifacts that are none of theirs, in spellings of any kind.

MLflow decodes a path of artifacts again and again, so that what the gate sees is not what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import pytest

from tests.adversarial.test_spelling import NAMES
from tests.harness import Server

ARTIFACTS = "/api/mlflow/api/2.0/mlflow-artifacts/artifacts"
RUN = "0123456789abcdef" * 2
THEIRS = [f"902/{RUN}/artifacts/95%.png", f"902/models/m-{RUN}/artifacts/MLmodel"]
TRACES = ["901/traces/tr-1/artifacts/traces.json", "team/traces/tr-2/artifacts/traces.json"]
OTHERS = [*TRACES, f"team/{RUN}/artifacts/model"]


@pytest.fixture(params=NAMES)
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Iterator[Server]:
    """With artifacts of all kinds, which are gone afterwards."""
    found = servers[request.param]
    key = found.key("mlflow:write")
    for path in (*THEIRS, *OTHERS):
        assert found.request("PUT", url(path), key=key, body=path.encode())[0] == 200
    yield found
    for folder in {path.partition("/")[0] for path in (*THEIRS, *OTHERS)}:
        assert found.request("DELETE", url(folder), key=key)[0] == 200


def url(path: str) -> str:
    return f"{ARTIFACTS}/{quote(path)}"


@pytest.mark.parametrize(
    "path",
    [
        "901",
        "901/traces",
        "901/%2574races",
        "901/%252574races",
        "901/tra%09ces",
        "901/traces%3F",
        "901/traces%3B",
        "%20file:901/traces",
        "file:901/%252574races",
        "901/%252e",
        "%252e/%252e",
        "%252e",
        "902/models",
        "902/models%3F",
        "team",
        "team/traces",
        f"team/{RUN}/artifacts/%252e%252e/%252e%252e",
    ],
)
def test_what_is_not_of_the_registry_is_not_deleted_with_its_scope(
    server: Server, path: str
) -> None:
    server.request("DELETE", f"{ARTIFACTS}/{path}", key=server.key("model:write"))
    for one in (*THEIRS, *OTHERS):
        status, _, body = server.request("GET", url(one), key=server.key("mlflow:read"))
        assert (status, body) == (200, one.encode()), path


@pytest.mark.parametrize("trace", TRACES)
def test_a_trace_is_not_read_or_written_with_a_scope_for_the_registry(
    server: Server, trace: str
) -> None:
    folder = trace.rpartition("/traces/")[0]
    rest = trace.removeprefix(f"{folder}/traces/")
    for name in (
        "traces",
        "%74races",
        "%2574races",
        "tra%09ces",
        "%20/traces",
        "./traces",
        "/traces",
    ):
        path = f"{ARTIFACTS}/{folder}/{name}/{rest}"
        status, _, body = server.request("GET", path, key=server.key("model:read"))
        assert trace.encode() not in body and status >= 400, path
        server.request("PUT", path, key=server.key("model:write"), body=b"forged")
        path = f"{ARTIFACTS}?path={folder}/{name}"
        status, _, body = server.request("GET", path, key=server.key("model:read"))
        assert b"tr-" not in body and status >= 400, path
    assert server.request("GET", url(trace), key=server.key("mlflow:read"))[2] == trace.encode()


@pytest.mark.parametrize("path", THEIRS)
def test_what_is_of_the_registry_is_read_written_listed_and_deleted(
    server: Server, path: str
) -> None:
    key = server.key("model:write")
    assert server.request("GET", url(path), key=server.key("model:read"))[2] == path.encode()
    folder = quote(path.rpartition("/")[0])
    status, _, listed = server.request("GET", f"{ARTIFACTS}?path={folder}", key=key)
    assert status == 200 and path.rpartition("/")[2].encode() in listed
    assert server.request("DELETE", url(path), key=key)[0] == 200
    assert server.request("PUT", url(path), key=key, body=b"anew")[0] == 200
