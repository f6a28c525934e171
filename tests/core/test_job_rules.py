"""The rules that the credential of MLflow's server-side jobs opens, and those that it must not."""

from __future__ import annotations

from mlflow_hokusai_auth.core import job_rules
from mlflow_hokusai_auth.core.operations import UNKNOWN, classify, rules
from mlflow_hokusai_auth.core.policy import Policy, settle
from mlflow_hokusai_auth.core.types import Credential, Deny, NeedKey


def test_jobs_may_do_their_work_and_nothing_else() -> None:
    for method, path, may in (
        ("POST", "/api/2.0/mlflow/runs/log-batch", True),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts/1/2/model.pkl", True),
        ("POST", "/gateway/anything/mlflow/invocations", True),
        ("POST", "/api/2.0/mlflow/runs/delete", False),
        ("DELETE", "/api/2.0/mlflow-artifacts/artifacts/1/2/model.pkl", False),
        ("POST", "/api/2.0/mlflow/registered-models/create", False),
        ("POST", "/ajax-api/3.0/jobs/search", False),
        ("GET", "/api/2.0/hokusai/keys", False),
        ("GET", "/health", False),
    ):
        operation = classify(method, path)
        assert operation is not UNKNOWN
        assert job_rules.allows(operation) is may, path
    assert not job_rules.allows(UNKNOWN)


def test_credential_opens_the_rules_of_jobs_only() -> None:
    sent = Credential("hk_jobs_" + "0" * 64, ("Authorization",))
    for path, code in (("runs/log-batch", None), ("runs/delete", "SCOPE_MISSING")):
        asked = NeedKey(sent, classify("POST", f"/api/2.0/mlflow/{path}"))
        verdict = settle(asked, job_rules.PRINCIPAL, 0.0, Policy())
        assert getattr(verdict, "code", None) == code
    verdict = settle(NeedKey(sent, UNKNOWN), job_rules.PRINCIPAL, 0.0, Policy())
    assert isinstance(verdict, Deny)
    assert verdict.message.startswith("A route that MLflow is not known to have is not among")


def test_each_rule_for_jobs_is_one_of_the_table() -> None:
    assert job_rules.RULES.issubset(operation.rule for operation in rules())
