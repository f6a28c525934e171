"""The broken state, kept as a record: what these servers and clients do without the package's parts.

Each test was seen first, on stock MLflow, as the failure that the gate and the client now mend.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness import Server, serve

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory):
    with serve(tmp_path_factory.mktemp("stock"), app=None) as server:
        yield server


def test_stock_mlflow_lets_anybody_in(stock: Server) -> None:
    body = b'{"name": "made without a key"}'
    headers = {"Content-Type": "application/json"}
    path = "/api/2.0/mlflow/experiments/create"
    status, _, _ = stock.request("POST", path, body=body, headers=headers)
    assert status == 200


def test_stock_mlflow_does_not_answer_under_the_prefix(stock: Server) -> None:
    for prefix in ("/mlflow", "/api/mlflow"):
        path = f"{prefix}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert stock.request("GET", path)[0] == 404


def test_a_client_without_a_key_is_told_so(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import RestException

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.origin}/api/mlflow")
    with pytest.raises(RestException, match=r"API key required \(401 KEY_MISSING\). Set HOKUSAI"):
        MlflowClient().create_registered_model("refused")
