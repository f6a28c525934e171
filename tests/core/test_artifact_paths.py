"""The kind of resource that an artifact's path belongs to, by the folders of experiments."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.artifact_paths import explain_kind, named, refine_artifact_listing
from mlflow_hokusai_auth.core.folders import BY_NUMBER, Folders
from mlflow_hokusai_auth.core.locations import Location, Roots
from mlflow_hokusai_auth.core.operations import classify, rules
from mlflow_hokusai_auth.core.types import Access, Operation

from .rows import agree

ROWS = {row.rule: row for row in rules()}
RUN = "0123456789abcdef" * 2
HEX = "f" * 32
SERVED = Location("file", "", ("srv", "artifacts"))
ROOTS = Roots((SERVED,), (), SERVED, SERVED)
#: Experiments in folders that users chose.
LOCATIONS = [
    *("mlflow-artifacts:/teamA/traces/exp1", "mlflow-artifacts:/Own", f"mlflow-artifacts:/{HEX}"),
    *("/srv/artifacts/written/%74races/x y", "mlflow-artifacts:/a%2520b", "mlflow-artifacts:/t?x"),
    *(f"mlflow-artifacts:/Own/{RUN}/artifacts/in", "mlflow-artifacts:/Own/traces/in/artifacts"),
    *("mlflow-artifacts:/77/traces/in", "s3://other/elsewhere", "mlflow-artifacts:/.."),
    f"http://host/api/2.0/mlflow-artifacts/artifacts/models/m-{RUN}/artifacts",
]
FOLDERS = Folders(SERVED, SERVED).adding(LOCATIONS, ROOTS)
BASE = "/api/2.0/mlflow-artifacts/artifacts/"
#: Kinds. A "?" means that the path is in no known folder.
ARTIFACTS, TRACES, EXPERIMENTS = "artifacts", "traces", "experiments"

#: Paths, with their kind for a read or write, and their kind for a deletion.
PATHS = {
    # These are in numbered folders, and in those that users chose.
    f"77/{RUN}/artifacts/traces/x": (ARTIFACTS, ARTIFACTS),
    f"77/{RUN}/artifacts/95%.png": (ARTIFACTS, ARTIFACTS),
    f"77/{RUN}/artifacts/what? %;#.txt": (ARTIFACTS, ARTIFACTS),
    f"77/{RUN}/artifacts/" + "x" * 3000: (ARTIFACTS, ARTIFACTS),
    f"77/{RUN}": (ARTIFACTS, ARTIFACTS),
    f"77/{RUN}/.": (ARTIFACTS, ARTIFACTS),
    f"77/models/m-{RUN}": (ARTIFACTS, ARTIFACTS),
    f"77/models/m-{RUN}/artifacts/traces/x": (ARTIFACTS, ARTIFACTS),
    f"workspaces/w/77/{RUN}/artifacts/traces": (ARTIFACTS, ARTIFACTS),
    f"teamA/traces/exp1/{RUN}/artifacts/model": (ARTIFACTS, ARTIFACTS),
    f"teamA/%2574races/exp1/{RUN}/artifacts/model": (ARTIFACTS, ARTIFACTS),
    f"teamA/traces/exp1/models/m-{RUN}/artifacts/x": (ARTIFACTS, ARTIFACTS),
    f"written/traces/x y/{RUN}/artifacts/x": (ARTIFACTS, ARTIFACTS),
    f"a b/{RUN}/artifacts/x": (ARTIFACTS, ARTIFACTS),
    f"{HEX}/{RUN}/artifacts/traces": (ARTIFACTS, ARTIFACTS),
    # These are right below an experiment's folder.
    "77/traces/tr-1/artifacts/traces.json": (TRACES, TRACES),
    "77/traces": (TRACES, TRACES),
    "77/./traces//tr-1": (TRACES, TRACES),
    "77/Traces/tr-1": (TRACES, TRACES),
    "77/%2574races/tr-1": (TRACES, TRACES),
    "file:77/%25252574races/tr-1": (TRACES, TRACES),
    f"77/traces/{RUN}/artifacts/x": (TRACES, TRACES),
    "workspaces/w/77/traces/tr-1": (TRACES, TRACES),
    "teamA/traces/exp1/traces/tr-1": (TRACES, TRACES),
    f"{HEX}/traces/tr-1/artifacts/attachments/{RUN}": (TRACES, TRACES),
    f"{HEX.upper()}/traces/tr-1": (TRACES, TRACES),
    f"models/m-{RUN}/artifacts/traces/tr-1": (TRACES, TRACES),
    # These belong to an experiment, although another one's folder is among its files.
    f"Own/{RUN}/artifacts/in/traces/tr-1": (TRACES, TRACES),
    f"Own/{RUN}/artifacts/in/{HEX}/artifacts/x": (ARTIFACTS, ARTIFACTS),
    f"Own/traces/in/artifacts/{HEX}/artifacts/x": (TRACES, TRACES),
    f"own/traces/in/artifacts/{HEX}/artifacts/x": (TRACES, TRACES),
    f"77/traces/in/{RUN}/artifacts/x": (TRACES, TRACES),
    # These contain more than one run's or model's files.
    f"Own/{RUN}": (ARTIFACTS, EXPERIMENTS),
    f"Own/{RUN}/artifacts": (ARTIFACTS, EXPERIMENTS),
    HEX: (ARTIFACTS, "experiments?"),
    f"models/m-{RUN}/artifacts": (ARTIFACTS, "experiments?"),
    "77": (ARTIFACTS, "experiments?"),
    "77/models": (ARTIFACTS, "experiments?"),
    "77/models?": (ARTIFACTS, "experiments?"),
    f"77/m-{RUN}": (ARTIFACTS, "experiments?"),
    f"77/{RUN}0": (ARTIFACTS, "experiments?"),
    f"77/{RUN[1:]}": (ARTIFACTS, "experiments?"),
    f"77/{RUN}/other": (ARTIFACTS, "experiments?"),
    "%2e/%2e": (ARTIFACTS, "experiments?"),
    # These are in no known folder.
    f"new/{RUN}/artifacts/x": (ARTIFACTS, "experiments?"),
    f"own/{RUN}/artifacts/x": (ARTIFACTS, "experiments?"),
    f"elsewhere/{RUN}/artifacts/x": (ARTIFACTS, "experiments?"),
    f"new/traces/exp/{RUN}/artifacts/x": ("traces?", "traces?"),
    f"new/{RUN}/artifacts/traces/x": ("traces?", "traces?"),
    f"{RUN}/traces/tr-1": ("traces?", "traces?"),
    "TRACES/x": ("traces?", "traces?"),
    "new/trace\u017f": ("traces?", "traces?"),
    # MLflow refuses these, or reads them in an unknown way.
    "77/..": (TRACES, TRACES),
    f"77/{RUN}/artifacts/%252e%252e/x": (TRACES, TRACES),
    "77/%" + "25" * 12 + "74races": (TRACES, TRACES),
    f"77/{RUN}/artifacts/%" + "x" * 3000: (TRACES, TRACES),
    "%2f%2f[/x": (TRACES, TRACES),
}
#: Queries, with the kind of the artifacts that they list.
LISTED = {
    b"": ARTIFACTS,
    b"path=": ARTIFACTS,
    b"path=77": ARTIFACTS,
    b"path=77/%s/artifacts/traces" % RUN.encode(): ARTIFACTS,
    b"path=teamA/traces/exp1/%s/artifacts" % RUN.encode(): ARTIFACTS,
    b"x=" + b"x" * 2038 + b"&path=77": ARTIFACTS,
    b"path=77/traces": TRACES,
    b"path=%s/traces" % HEX.encode(): TRACES,
    b"path=77%2Ftraces/tr-1": TRACES,
    b"path=77/%252574races": TRACES,
    b"p%61th=77/tr+aces&path=77/traces": TRACES,
    b"path=77/traces&path=77": TRACES,
    b"path=new/traces&path=77/traces": TRACES,
    b"path=new/traces&path=77": "traces?",
    "path=77/trace\u017f".encode(): TRACES,
    b"x=" + b"x" * 2039 + b"&path=77": TRACES,
}


def kind(operation: Operation) -> str:
    return operation.kind + "?" * operation.unsure


def test_path_has_the_kind_of_its_folder() -> None:
    for base, api in product(("artifacts", "presigned", "mpu/create"), ("api", "ajax-api")):
        method = "POST" if base.startswith("mpu") else "GET"
        start = f"/{api}/2.0/mlflow-artifacts/{base}/"
        row = ROWS[f"{method} {start}{{artifact_path:path}}"]
        rows = [
            (start + path, replace(row, kind=one.rstrip("?"), unsure=one.endswith("?")))
            for path, (one, _) in PATHS.items()
        ]
        agree(partial(classify, method, folders=FOLDERS), rows)


def test_deleting_more_than_one_run_or_model_is_a_change_of_the_experiment() -> None:
    def deleted(path: str) -> str:
        return kind(classify("DELETE", BASE + path, FOLDERS))

    agree(deleted, ((path, one) for path, (_, one) in PATHS.items()))


def test_listing_has_the_kind_of_the_artifacts_in_it() -> None:
    other = classify("GET", f"{BASE}77/x")
    for method, (query, expected) in product(("GET", "HEAD"), LISTED.items()):
        operation = classify(method, "/ajax-api/2.0/mlflow-artifacts/artifacts")
        assert kind(refine_artifact_listing(operation, query, False, FOLDERS)) == expected, query
        assert kind(refine_artifact_listing(operation, query, True, FOLDERS)) == TRACES, query
        assert refine_artifact_listing(other, query, True, FOLDERS) == other, query


_PARTS = ["traces", "Traces", "models", f"m-{RUN}", RUN, HEX, "artifacts", "77", "Own", "teamA"]
_PARTS += ["exp1", "in", "new", "tr-1", ".", "%2574races"]


@given(
    st.lists(st.sampled_from(_PARTS), min_size=1, max_size=8), st.sampled_from(["GET", "DELETE"])
)
def test_new_folders_open_no_path_that_was_closed_before(parts: list[str], method: str) -> None:
    """A path of a trace, or of more than a run, is closed before its folder is known as well."""
    path = BASE + "/".join(parts)
    before, after = classify(method, path), classify(method, path, FOLDERS)
    nested = "Own" in parts or "77" in parts  # a run's files are the run's, whatever lies in them
    if before.kind == "artifacts" and not nested:
        assert after.kind == "artifacts"
    if before.kind != after.kind and after.kind == "artifacts":
        assert before.unsure


def test_server_without_a_proxy_has_no_folders() -> None:
    folders = Folders(None, None).adding(LOCATIONS, Roots(()))
    assert kind(classify("DELETE", f"{BASE}77/{RUN}/artifacts", folders)) == "experiments?"
    assert kind(classify("GET", f"{BASE}77/traces", folders)) == "traces?"


def test_default_root_may_differ_from_the_served_place() -> None:
    """The default root may be a folder of the served place, or elsewhere."""
    below = Location("file", "", ("srv", "artifacts", "mlflow"))
    elsewhere = Location("s3", "bucket", ())
    rows = [
        (below, f"mlflow/77/{RUN}/artifacts", ARTIFACTS),
        (below, f"77/{RUN}/artifacts", "experiments?"),
        (elsewhere, f"77/{RUN}/artifacts", "experiments?"),
    ]
    agree(lambda base, path: kind(classify("DELETE", BASE + path, Folders(SERVED, base))), rows)


def test_log_names_the_run_or_model_of_an_artifact() -> None:
    run, model = {"run": RUN}, {"logged_model": f"m-{RUN}"}
    rows: list[tuple[str, dict[str, str]]] = [
        (f"77/{RUN}/artifacts/x", run),
        (f"teamA/traces/exp1/{RUN}/artifacts/x", run),
        (f"{HEX}/{RUN}/artifacts/x", run),
        (f"new/{RUN}/artifacts/{HEX}/artifacts/x", run),
        (f"77/models/m-{RUN}/artifacts", model),
        (f"new/traces/exp/models/m-{RUN}/artifacts", model),
        (f"{HEX}/traces/tr-1/artifacts/x", {}),
        (f"77/traces/{RUN}/artifacts/x", {}),
        (f"new/traces/{RUN}/artifacts/x", {}),
        ("77", {}),
        ("%2f%2f[/x", {}),
    ]
    for path, expected in rows:
        operation = classify("PUT", BASE + path, FOLDERS)
        assert named(operation, BASE + path, b"", FOLDERS) == {**expected, "path": path}, path
    upload = classify("POST", "/ajax-api/2.0/mlflow/upload-artifact")
    queries = {
        f"run_uuid={RUN}&path=a%20b": {"run": RUN, "path": "a b"},
        "run_uuid=secret&path=x": {"path": "x"},
        "": {"path": ""},
    }
    for query, found in queries.items():
        assert named(upload, "", query.encode(), FOLDERS) == found
    assert named(classify("GET", "/version"), "/version", b"path=x", FOLDERS) == {}


def test_refusal_explains_the_kind_of_a_path() -> None:
    says = {
        classify("GET", f"{BASE}77/traces/x"): "to a trace",
        classify("DELETE", f"{BASE}77"): "one run or logged model",
        classify("PUT", f"{BASE}77/{RUN}/artifacts/x"): "",
        classify("GET", "/api/3.0/mlflow/traces/tr-1"): "",
        Operation(Access.ADMIN, "unknown", ""): "",
    }
    for operation, words in says.items():
        assert words in explain_kind(operation) and bool(words) == bool(explain_kind(operation))


def test_cost_of_a_path_is_linear_in_its_segments() -> None:
    assert classify("GET", BASE + "a/" * 100_000 + "x", FOLDERS).kind == "artifacts"
    assert BY_NUMBER.exact == frozenset()
