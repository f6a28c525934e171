"""`did_you_mean` names the word that is most like a misspelt one, and no far one."""

from __future__ import annotations

from mlflow_hokusai_auth.core.scopes import KNOWN
from mlflow_hokusai_auth.core.suggest import did_you_mean


def test_close_word_is_named_and_no_other() -> None:
    for text, meant in (
        ("models:write", "model:write"),
        ("Model:Write", "model:write"),
        ("model.read", "model:read"),
        ("mlflow:admim", "mlflow:admin"),
    ):
        assert did_you_mean(text, KNOWN) == f" Did you mean `{meant}`?", text
    for text in ("root", "predict", "", "x" * 10_000):
        assert did_you_mean(text, KNOWN) == "", text
