"""Keys with scopes for the registry, and artifacts that are none of theirs, in spellings of any kind.

MLflow decodes a path of artifacts again and again, so that what the gate sees is not what it reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from urllib.parse import quote

import pytest

from tests.adversarial.test_spelling import NAMES
from tests.harness import Server

ARTIFACTS = "/api/mlflow/api/2.0/mlflow-artifacts/artifacts"
RUN = "0123456789abcdef" * 2
# Of this process alone, as another may use the same server at the same time.
TRACED, TRAINED, TEAM = (f"{name}{os.getpid()}" for name in (901, 902, "team"))
THEIRS = [f"{TRAINED}/{RUN}/artifacts/95%.png", f"{TRAINED}/models/m-{RUN}/artifacts/MLmodel"]
TRACES = [f"{where}/traces/tr-{where}/artifacts/traces.json" for where in (TRACED, TEAM)]
OTHERS = [*TRACES, f"{TEAM}/{RUN}/artifacts/model"]


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


DELETED = [
    f"{TRACED}",
    f"{TRACED}/traces",
    f"{TRACED}/%2574races",
    f"{TRACED}/%252574races",
    f"{TRACED}/tra%09ces",
    f"{TRACED}/traces%3F",
    f"{TRACED}/traces%3B",
    f"%20file:{TRACED}/traces",
    f"file:{TRACED}/%252574races",
    f"{TRACED}/%252e",
    "%252e/%252e",
    "%252e",
    f"{TRAINED}/models",
    f"{TRAINED}/models%3F",
    f"{TEAM}",
    f"{TEAM}/traces",
    f"{TEAM}/{RUN}/artifacts/%252e%252e/%252e%252e",
]


def test_registry_scope_deletes_only_the_registry_s_artifacts(server: Server) -> None:
    for path in DELETED:
        server.request("DELETE", f"{ARTIFACTS}/{path}", key=server.key("model:write"))
        for one in (*THEIRS, *OTHERS):
            status, _, body = server.request("GET", url(one), key=server.key("mlflow:read"))
            assert (status, body) == (200, one.encode()), path


def test_registry_scope_neither_reads_nor_writes_traces(server: Server) -> None:
    names = ("traces", "%74races", "%2574races", "tra%09ces", "%20/traces", "./traces", "/traces")
    for trace, name in product(TRACES, names):
        folder, _, rest = trace.partition("/traces/")
        path = f"{ARTIFACTS}/{folder}/{name}/{rest}"
        status, _, body = server.request("GET", path, key=server.key("model:read"))
        assert trace.encode() not in body and status >= 400, path
        server.request("PUT", path, key=server.key("model:write"), body=b"forged")
        path = f"{ARTIFACTS}?path={folder}/{name}"
        status, _, body = server.request("GET", path, key=server.key("model:read"))
        assert b"tr-" not in body and status >= 400, path
        found = server.request("GET", url(trace), key=server.key("mlflow:read"))[2]
        assert found == trace.encode(), path


def test_registry_scope_reads_writes_lists_and_deletes_its_artifacts(server: Server) -> None:
    key = server.key("model:write")
    for path in THEIRS:
        assert server.request("GET", url(path), key=server.key("model:read"))[2] == path.encode()
        folder = quote(path.rpartition("/")[0])
        status, _, listed = server.request("GET", f"{ARTIFACTS}?path={folder}", key=key)
        assert status == 200 and path.rpartition("/")[2].encode() in listed
        assert server.request("DELETE", url(path), key=key)[0] == 200
        assert server.request("PUT", url(path), key=key, body=b"anew")[0] == 200
