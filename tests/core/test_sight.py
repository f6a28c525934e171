"""The rule by which isolation shows a thing to a key, or hides it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.sight import Shared, Thing, judge
from mlflow_hokusai_auth.core.types import Principal

NOW = 1_800_000_000.0
ACME = Principal("key_a", "ACME", frozenset({"model:write"}), owner_id="ACME")
NOBODY = replace(ACME, owner_id="")
STAFF = replace(ACME, scopes=frozenset({"mlflow:write"}))
MODEL = Thing("model", "scorer", True, "GLOBEX")
RUN = Thing("run", "f" * 32, True, "GLOBEX", experiment=7)
EXPERIMENT = replace(RUN, kind="experiment", name="7")
FOR_EVER = Shared("grant_1", "GLOBEX", "contribute", None)
FOR_NOW = Shared("grant_2", "", "read", NOW + 60)
ENDED = Shared("grant_3", "GLOBEX", "read", NOW)


@pytest.mark.parametrize(
    ("thing", "principal", "verdict"),
    [
        (replace(MODEL, owner="ACME"), ACME, "shown: ACME owns the model"),
        (MODEL, ACME, "hidden: the model's owner is GLOBEX, and no grant shares it with ACME"),
        (
            replace(MODEL, shared=(ENDED, FOR_NOW)),
            ACME,
            "shown: grant grant_2 of an operator (read, until 2027-01-15 08:01Z)",
        ),
        (
            replace(MODEL, shared=(FOR_NOW, FOR_EVER)),
            ACME,
            "shown: grant grant_1 of GLOBEX (contribute, without end)",
        ),
        (
            replace(MODEL, shared=(ENDED,)),
            ACME,
            "hidden: the model's owner is GLOBEX, and no grant shares it with ACME; grant grant_3 "
            "ended at 2027-01-15 08:00Z",
        ),
        (
            replace(MODEL, owner=None),
            ACME,
            "hidden: nobody owns the model, and no grant shares it with ACME",
        ),
        (
            replace(MODEL, owner="ACME", gone=True),
            ACME,
            "hidden: the earlier model of ACME is gone, and this one was made without the gate, and "
            "no grant shares it with ACME",
        ),
        (
            replace(MODEL, exists=False, owner="ACME", gone=True),
            ACME,
            "missing: MLflow has no such model; its name stays ACME's",
        ),
        (
            replace(MODEL, owner=""),
            NOBODY,
            "hidden: the key's authority names no owner, so nothing",
        ),
        (replace(RUN, owner="ACME"), ACME, "shown: ACME owns the run's experiment 7"),
        (RUN, ACME, "hidden: GLOBEX owns the run's experiment 7, and runs can't be shared"),
        (replace(RUN, owner=None), ACME, "hidden: nobody owns the run's experiment 7"),
        (replace(RUN, owner=""), NOBODY, "hidden: the key's authority names no owner, so nothing"),
        (
            replace(RUN, owner=None, experiment=0),
            ACME,
            "hidden: nobody owns the run's experiment 0",
        ),
        (replace(RUN, exists=False), ACME, "missing: MLflow has no such run"),
        (EXPERIMENT, ACME, "hidden: GLOBEX owns the experiment, and experiments can't be shared"),
        (replace(EXPERIMENT, owner="ACME"), ACME, "shown: ACME owns the experiment"),
        (replace(EXPERIMENT, owner=None, experiment=0), ACME, "shown: every key sees MLflow's"),
        (RUN, STAFF, "shown: the key is staff's, and staff sees everything"),
        (RUN, replace(STAFF, no_delete=True), "hidden: GLOBEX owns the run's experiment 7"),
        (RUN, replace(STAFF, revoked_at=NOW - 60), "refused: the key is revoked"),
        (RUN, replace(STAFF, expires_at=NOW), "refused: the key ended at 2027-01-15 08:00Z"),
    ],
)
def test_full_shows_what_is_the_key_s_own_and_what_was_shared(
    thing: Thing, principal: Principal, verdict: str
) -> None:
    found = judge(thing, principal, Policy(), mode="enforce", level="full", now=NOW)
    assert found.verdict.startswith(verdict)
    assert found.allowed == verdict.startswith("shown: ")


def test_whatever_is_less_than_full_shows_everything() -> None:
    def verdict(mode: str, level: str) -> tuple[bool, str]:
        return judge(RUN, ACME, Policy(), mode=mode, level=level, now=NOW)

    for level in ("off", "observe", "writes"):
        assert verdict("enforce", level) == (
            True,
            f"shown: isolation is {level}, which hides nothing",
        )
    for mode in ("observe", "off"):
        assert verdict(mode, "full") == (
            True,
            f"shown: the mode is {mode}, so isolation is off",
        )
