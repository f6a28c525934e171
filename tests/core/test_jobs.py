"""What the credential of MLflow's server-side jobs opens, beside what it must never open."""

from __future__ import annotations

import pytest

from mlflow_hokusai_auth.core import jobs
from mlflow_hokusai_auth.core.operations import UNKNOWN, classify, rules
from mlflow_hokusai_auth.core.policy import Policy, settle
from mlflow_hokusai_auth.core.types import Credential, Deny, NeedKey


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/2.0/mlflow/runs/log-batch"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/1/2/model.pkl"),
        ("POST", "/gateway/anything/mlflow/invocations"),
    ],
)
def test_jobs_may_do_their_work(method: str, path: str) -> None:
    assert jobs.allows(classify(method, path))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/2.0/mlflow/runs/delete"),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1/2/model.pkl"),
        ("POST", "/api/2.0/mlflow/registered-models/create"),
        ("POST", "/ajax-api/3.0/jobs/search"),
        ("GET", "/api/2.0/hokusai/keys"),
        ("GET", "/health"),
    ],
)
def test_jobs_may_do_nothing_else(method: str, path: str) -> None:
    operation = classify(method, path)
    assert operation is not UNKNOWN
    assert not jobs.allows(operation)
    assert not jobs.allows(UNKNOWN)


def test_the_credential_opens_that_and_nothing_else() -> None:
    sent = Credential("hk_jobs_" + "0" * 64, ("Authorization",))
    for path, code in (("runs/log-batch", None), ("runs/delete", "SCOPE_MISSING")):
        asked = NeedKey(sent, classify("POST", f"/api/2.0/mlflow/{path}"))
        verdict = settle(asked, jobs.PRINCIPAL, 0.0, Policy())
        assert getattr(verdict, "code", None) == code
    verdict = settle(NeedKey(sent, UNKNOWN), jobs.PRINCIPAL, 0.0, Policy())
    assert isinstance(verdict, Deny)
    assert verdict.message.startswith("A route that MLflow is not known to have is nothing")


def test_each_rule_for_jobs_is_one_of_the_table() -> None:
    assert jobs.RULES.issubset(operation.rule for operation in rules())
