"""What a place of artifacts names, and the decision on changes there."""

from __future__ import annotations

from functools import partial

from mlflow_hokusai_auth.core import artifact_places
from mlflow_hokusai_auth.core.artifact_places import holder, named_in, numbered, spellings
from mlflow_hokusai_auth.core.isolation import artifact_problem
from mlflow_hokusai_auth.core.locations import Location, Roots, read

from .rows import agree

RUN, OTHER = "0123456789abcdef" * 2, "f" * 32
MODEL = f"m-{RUN}"
BASE = Location("file", "", ("srv", "artifacts"))
ROOTS = Roots((BASE,), ((read("mlflow-artifacts:/"), BASE), (read("/linked"), BASE)), BASE, BASE)


def place(path: str) -> Location:
    return read(f"/srv/artifacts/{path}")


def test_every_id_in_a_place_counts() -> None:
    rows = [
        ("2/x", []),
        (f"2/{RUN}", [("run", RUN)]),
        (f"2/{RUN}/artifacts/{OTHER}/x", [("run", RUN), ("run", OTHER)]),
        (f"2/{RUN}/artifacts/{RUN}", [("run", RUN)]),
        (f"2/models/{MODEL}/artifacts/{OTHER}", [("logged model", MODEL), ("run", OTHER)]),
        (f"2/{RUN.upper()}/a{RUN}", []),
    ]
    agree(lambda path: named_in(place(path)), rows)


def test_who_holds_a_path_below_an_experiment() -> None:
    rows = [
        ((), None),
        ((RUN,), ("run", RUN)),
        ((RUN, "artifacts", OTHER), ("run", RUN)),
        (("x", RUN), None),
        (("models",), None),
        (("models", MODEL, "artifacts"), ("logged model", MODEL)),
        (("models", RUN), None),
        ((MODEL,), None),
    ]
    agree(holder, rows)


def test_only_mlflow_s_own_numbers_are_experiments() -> None:
    rows = [
        ("2/x/y", (2, ("x", "y"))),
        ("0", (0, ())),
        ("12", (12, ())),
        *((path, None) for path in ("02/x", "٣/x", "²/x", "-1/x", "+1/x", "1_0/x", "x/2", "2x")),
        (f"{'9' * 19}/x", None),
    ]
    agree(lambda path: numbered(place(path), BASE), rows)
    assert numbered(BASE, BASE) is None
    assert numbered(read("/srv/2/x"), BASE) is None
    assert numbered(read("/2/x"), None) is None


def test_a_place_has_all_spellings_that_may_be_stored() -> None:
    found = set(spellings(place("2/a b"), ROOTS))
    wanted = {
        "/srv/artifacts/2/a b",
        "file:/srv/artifacts/2/a b",
        "file:///srv/artifacts/2/a b",
        "file:///srv/artifacts/2/a%20b",
        "mlflow-artifacts:/2/a b",
        "mlflow-artifacts:///2/a b",
        "/linked/2/a b",
    }
    assert wanted <= found, wanted - found
    assert set(spellings(read("s3://bucket/2"), ROOTS)) == {"s3://bucket/2"}
    # Whatever a client may have had stored is read as the place itself.
    assert {ROOTS.place(read(uri)) for uri in found if "%" not in uri} == {place("2/a b")}


def test_places_above_are_few_and_short() -> None:
    deep = place("/".join("a" * 9 for _ in range(5000)))
    found = list(artifact_places.at_or_above(deep, 3))
    assert found[0] == place("a" * 9)
    assert len(found) < 100


def test_who_changes_artifacts() -> None:
    mine, theirs = {2: "ACME"}, {2: "ACME", 3: "GLOBEX"}
    known = [("run", RUN), ("logged model", MODEL)]
    file, folder = True, False
    rows = [
        (mine, [(RUN, "artifacts", "x")], file, None),
        (mine, [(RUN,)], folder, None),
        (mine, [("models", MODEL, "artifacts")], folder, None),
        (mine, [("own", "x")], file, None),
        (mine, [("own",)], folder, None),
        (mine, [], file, "NOT_OWNER"),
        (mine, [("x",)], file, "NOT_OWNER"),
        (mine, [()], folder, "NOT_OWNER"),
        (mine, [("models",)], folder, "NOT_OWNER"),
        (mine, [("models", "x")], file, "NOT_OWNER"),
        (mine, [(OTHER, "artifacts", "x")], file, "NOT_OWNER"),
        (mine, [("traces", "tr-1", "x")], file, "ISOLATED"),
        (mine, [("Traces",)], folder, "ISOLATED"),
        (mine, [(RUN, "x"), ()], folder, "NOT_OWNER"),
        (theirs, [(RUN, "artifacts", "x")], file, "NOT_OWNER"),
        ({2: None}, [(RUN, "artifacts", "x")], file, "NOT_OWNER"),
        ({0: None}, [(RUN, "artifacts", "x")], file, "EXPERIMENT_REFUSED"),
    ]

    def decide(me: str, owners: object, rests: object, file: bool) -> str | None:
        problem = artifact_problem(me, owners, rests, known, file=file)  # type: ignore[arg-type]
        return problem and problem.code

    agree(partial(decide, "ACME"), rows)
    assert decide("", {2: ""}, [(RUN, "x")], file) == "NOT_OWNER"
