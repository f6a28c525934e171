"""Locations of files, and the ones that clients may have MLflow store."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote, urlsplit

from hypothesis import example, given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core.folders import Folders
from mlflow_hokusai_auth.core.locations import (
    Location,
    Reference,
    Roots,
    inside,
    leads_out,
    location_problem,
    opening_problem,
    outside,
    overlap,
    read,
    read_root,
    reference,
    source_problem,
)

DESTINATION = Location("file", "", ("srv", "artifacts"))
BUCKET = Location("s3", "bucket", ("team",))
LINK = Location("file", "", ("data",))
BASE = DESTINATION
ROOTS = Roots((DESTINATION, BUCKET), ((LINK, DESTINATION),), BASE, DESTINATION)
NO_OTHERS = Folders()

SEGMENTS = st.sampled_from(
    [
        "a",
        "A",
        "b",
        "1",
        "..",
        ".",
        "",
        "%2e%2e",
        "%2E.",
        "x;y",
        "x?y",
        "x#y",
        "c\\d",
        "é",
        "e\u0301",
    ]
    + ["srv", "artifacts", "team", "bucket", "data", "workspaces", "models", "api", "2.0"]
    + ["mlflow-artifacts", "\n", "\0", " ", "f" * 32, "m-" + "f" * 32]
)
PREFIXES = st.sampled_from(
    ["", "/", "//", "file:", "file:/", "file://", "file:///", "FILE:///", "file://host/", "s3://"]
    + ["s3://bucket/", "s3://bucket@evil/", "S3://bucket/", "s3:/", "mlflow-artifacts:/", "c:/"]
    + ["mlflow-artifacts://", "mlflow-artifacts://host/", "mlflow-artifacts:", "runs:/", "models:/"]
    + [
        "http://evil/",
        "http://evil/api/2.0/mlflow-artifacts/artifacts/",
        "dbfs:/",
        "/srv/artifacts/",
    ]
    + ["file:///srv/artifacts/", "s3://bucket/team/", "/data/"]
)
URIS = st.builds(
    lambda start, parts: start + "/".join(parts), PREFIXES, st.lists(SEGMENTS, max_size=7)
)


def resolved(uri: str) -> tuple[str, str, list[str]]:
    """Return `uri` as the most tolerant reader understands it: decoded, and with `..` resolved."""
    parts = urlsplit(uri)
    path = parts.path
    for _ in range(10):
        path = unquote(path)
    return (
        parts.scheme or "file",
        parts.netloc,
        posixpath.normpath("/" + path).strip("/").split("/"),
    )


@given(URIS)
@example("mlflow-artifacts:/../srv")
def test_allowed_location_is_in_a_root_for_every_reader(uri: str) -> None:
    may_be_location = location_problem(uri, ROOTS, NO_OTHERS) is None
    if may_be_location or source_problem(uri, ROOTS, [], [], NO_OTHERS) is None:
        scheme, authority, parts = resolved(uri)
        roots = {
            "file": [["srv", "artifacts"], ["data"]],
            "s3": [["team"]],
            "mlflow-artifacts": [[]],
        }
        assert authority == ("bucket" if scheme == "s3" else "")
        assert any(parts[: len(root)] == root for root in roots[scheme])
        # MLflow makes the folders of experiments below BASE, so a client may not.
        below = next(parts[len(root) :] for root in roots[scheme] if parts[: len(root)] == root)
        assert below and (scheme == "s3" or not below[0].isdecimal())


@given(URIS)
def test_opened_remote_location_is_in_a_root(uri: str) -> None:
    if opening_problem(uri, [BUCKET]) is None:
        scheme, authority, parts = resolved(uri.partition("?")[0].partition("#")[0])
        assert (scheme, authority, parts[0]) == ("s3", "bucket", "team")


@given(st.text() | URIS)
@example("/ /")
def test_every_text_is_read_and_shown(uri: str) -> None:
    location = read(uri)
    assert str(location).isprintable() or location.odd
    if not location.odd:
        assert read(str(location)) == location
        assert inside(location, location) and overlap(location, location)


@given(URIS, URIS)
def test_location_inside_a_root_overlaps_with_it(uri: str, root: str) -> None:
    one, other = read(uri), read(root)
    if inside(one, other):
        assert overlap(one, other) and overlap(other, one)


def test_client_may_name_a_free_folder_only() -> None:
    others = [
        "mlflow-artifacts:/0",
        "mlflow-artifacts:/Team/one",
        "s3://bucket/team/x",
        "file:///old",
    ]
    rows = {
        "mlflow-artifacts:/new": True,
        "mlflow-artifacts:/new/": True,
        "mlflow-artifacts:///new": True,
        "mlflow-artifacts:/Team/two": True,
        "/srv/artifacts/new": True,
        "/data/new": True,
        "file:///data/new/one two": True,
        "s3://bucket/team/y": True,
        "mlflow-artifacts:/Team": False,
        "mlflow-artifacts:/Team/one/below": False,
        "mlflow-artifacts:/team/ONE": False,
        "/data/Team/one": False,
        "/srv/artifacts/0/x": False,
        "mlflow-artifacts:/17": False,
        "mlflow-artifacts:/workspaces": False,
        "mlflow-artifacts:/workspaces/w": False,
        "mlflow-artifacts:/workspaces/w/17/x": False,
        "mlflow-artifacts:/workspaces/w/mine": True,
        "s3://bucket/team": False,
        "s3://bucket/team/x/1": False,
        "s3://bucket": False,
        "s3://bucket/teams": False,
        "/srv/artifacts": False,
        "/srv": False,
        "/old": False,
        "/" + "a" * 1000: False,
    }
    folders = NO_OTHERS.adding(others, ROOTS)
    wrong = {
        uri: problem
        for uri, may in rows.items()
        if ((problem := location_problem(uri, ROOTS, folders)) is None) != may
    }
    assert not wrong


def test_source_must_lie_in_its_owner_s_files() -> None:
    run, model = f"mlflow-artifacts:/1/{'a' * 32}/artifacts", "/data/1/models/m-1/artifacts"
    experiments = NO_OTHERS.adding(["mlflow-artifacts:/team/exp"], ROOTS)
    versions = ["mlflow-artifacts:/team/exp/kept", "mlflow-artifacts:/", "mlflow-artifacts:/team"]
    versions += [
        "mlflow-artifacts:/3",
        "mlflow-artifacts:/workspaces/w",
        "mlflow-artifacts:/4/kept",
    ]
    rows = {
        run: True,
        f"{run}/model": True,
        f"/srv/artifacts/1/{'a' * 32}/artifacts/model": True,
        "mlflow-artifacts:/1/models/m-1/artifacts": True,
        "mlflow-artifacts:/shared/models/a": True,
        "s3://bucket/team/models/a": True,
        "mlflow-artifacts:/team/exp/kept/model": True,
        "mlflow-artifacts:/4/kept/model": True,
        "mlflow-artifacts:/3/kept": False,
        "mlflow-artifacts:/workspaces/w/3/kept": False,
        run.removesuffix("/artifacts"): False,
        f"{run}s": False,
        f"{run}/../x": False,
        "mlflow-artifacts:/1": False,
        "mlflow-artifacts:/1/traces/t": False,
        "mlflow-artifacts:/team": False,
        "mlflow-artifacts:/team/exp/traces/t": False,
        "mlflow-artifacts:/2": False,
        "mlflow-artifacts:/": False,
        "s3://bucket/other": False,
        "/etc": False,
    }
    wrong = {
        uri: problem
        for uri, may in rows.items()
        if ((problem := source_problem(uri, ROOTS, [run, model], versions, experiments)) is None)
        != may
    }
    assert not wrong


def test_only_the_server_s_own_url_is_a_root() -> None:
    proxy = read_root("https://own/api/2.0/mlflow-artifacts/artifacts")
    roots = Roots((DESTINATION,), ((proxy, DESTINATION),), DESTINATION, DESTINATION)
    rows = {
        f"{proxy}/team": True,
        f"{proxy}/1": False,
        f"{proxy}/1/api/2.0/mlflow-artifacts/artifacts/team": False,
        "https://evil/api/2.0/mlflow-artifacts/artifacts/team": False,
        "http://own/api/2.0/mlflow-artifacts/artifacts/team": False,
    }
    wrong = [
        uri for uri, may in rows.items() if (location_problem(uri, roots, NO_OTHERS) is None) != may
    ]
    assert not wrong


def test_references() -> None:
    assert {uri: reference(read(uri)) for uri in ("runs:/r/a", "models:/m-1", "models:/n/2")} == {
        "runs:/r/a": Reference("run", "r"),
        "models:/m-1": Reference("model", "m-1"),
        "models:/n/2": Reference("version", "n", "2"),
    }
    for uri in ("runs:/", "runs:/r/..", "runs://h/r", "models:n/1", "mlflow-artifacts:/r", "r"):
        assert reference(read(uri)) is None, uri
    assert reference(read("models:/n@champion")) == Reference("version", "n@champion")


def test_paths_below_a_root() -> None:
    out = ["..", "a/../b", "a\\..\\b", "%2e%2e/b", "%252e%252e", "/etc", "%2fetc", "a\0", "a/%2E."]
    assert [path for path in out if not leads_out(path)] == []
    assert [path for path in ("a", "a/b..c", "...", "a%20b", "", "ä/%") if leads_out(path)] == []


def test_folders_outside_are_counted_without_passwords() -> None:
    run = f"{'a' * 32}/artifacts/model"
    uris = [
        ("mlflow-artifacts:/1", "1"),
        ("s3://u:pw@old/mlflow/7", "7"),
        (f"s3://u:pw@old/mlflow/7/{run}", ""),
        (f"s3://u:pw@old/mlflow/7/models/m-{'b' * 32}/artifacts", ""),
        ("s3://single/model", ""),
        ("/etc", ""),
        ("runs:/r/model", ""),
        ("dummy-source", ""),
    ]
    folders, more = outside(uris, ROOTS, 2)
    assert (folders, more) == ([("s3://u:***@old/mlflow", 3), ("/etc", 1)], 1)
