"""Prometheus reads the metrics of all running processes and of the store's keys."""

from __future__ import annotations

import shutil
import socket
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.tables import KEYS
from tests.harness import free_port
from tests.server.forked import count_in, forked

Samples = Mapping[str, Mapping[tuple[tuple[str, str], ...], float]]


def parsed(text: bytes) -> Samples:
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            name = sample.name.removeprefix("hokusai_auth_")
            found.setdefault(name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


@pytest.fixture
def uri(tmp_path: Path) -> str:
    uri = f"sqlite:///{tmp_path}/keys.db"
    store = LocalStore(uri)
    store.migrate()
    store.create(owner="a", scopes=["mlflow:read"])
    for days in (2, 13, 15):
        store.create(owner="b", scopes=["mlflow:read"], expires_at=time.time() + days * 86400)
    store.revoke(store.create(owner="d", scopes=["mlflow:read"])[0].key_id)
    with store.database.engine.begin() as connection:
        connection.execute(sa.update(KEYS).values(created_at=time.time() - 91 * 86400))
    return uri


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "counts"
    folder.mkdir()
    monkeypatch.setenv(metrics.DIRECTORY, str(folder))
    return folder


def process(folder: Path, uri: str) -> Samples:
    """The metrics of a process that sets its description and mode, and counts one request."""

    def work() -> str:
        count_in(folder)
        metrics.describe("scopes", "local,service")
        metrics.show_mode("observe")
        metrics.QUERY_KEYS.inc()
        return metrics.text(LocalStore(uri)).decode()

    return parsed(forked(work).encode())


def test_metrics_describe_the_process_and_the_keys(folder: Path, uri: str) -> None:
    told = process(folder, uri)
    assert {dict(labels)["mode"]: value for labels, value in told["mode"].items()} == {
        "enforce": 0,
        "observe": 1,
        "off": 0,
    }
    ((labels, value),) = told["info"].items()
    assert dict(labels)["policy"] == "scopes" and dict(labels)["authority"] == "local,service"
    assert value == 1
    # Prometheus sees no increase in a series that begins with 1.
    assert set(told["registrations_total"].values()) == {0}
    assert len(told["registrations_total"]) == 10
    assert set(told["events_total"].values()) == {0}
    assert {dict(labels)["state"]: value for labels, value in told["keys"].items()} == {
        "active": 4,
        "deprecated": 0,
        "expired": 0,
        "revoked": 1,
    }
    assert told["keys_ending"] == {(("days", "14"),): 2, (("days", "3"),): 1}
    assert told["keys_unused"] == {(("days", "90"),): 4}
    assert not [name for name in told if name.endswith("_created")]


def test_counters_of_an_ended_process_stay_and_its_gauges_go(folder: Path, uri: str) -> None:
    process(folder, uri)
    assert process(folder, uri)["query_keys_total"] == {(): 2}
    told = parsed(metrics.text(LocalStore(uri)))
    assert told["query_keys_total"] == {(): 2}
    assert not {"mode", "info"} & set(told)


def test_empty_file_of_a_killed_process_is_skipped(folder: Path, uri: str) -> None:
    (folder / "counter_1.db").touch()
    assert process(folder, uri)["query_keys_total"] == {(): 1}


def test_scrape_fails_if_the_directory_is_gone(folder: Path, uri: str) -> None:
    folder.rmdir()
    with pytest.raises(ValueError, match="not a directory"):
        metrics.text(LocalStore(uri))


def test_file_without_a_process_number_stays(folder: Path, uri: str) -> None:
    process(folder, uri)
    (gone,) = folder.glob("gauge_livemax_*.db")
    shutil.copy(gone, folder / "gauge_livemax_another.db")
    assert "mode" in parsed(metrics.text(LocalStore(uri)))


def test_other_metrics_are_served_while_the_store_is_unavailable(
    folder: Path, tmp_path: Path
) -> None:
    told = process(folder, f"sqlite:///{tmp_path}/none/keys.db")
    assert told["mode"] and not {"keys", "keys_ending", "keys_unused"} & set(told)


def test_metrics_without_workers_are_those_of_this_process(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(metrics.DIRECTORY, raising=False)
    told = parsed(metrics.text(LocalStore(uri)))
    assert "query_keys_total" in told
    assert not [name for name in told if name.endswith("_created")]


def test_directory_is_made_if_none_is_set_and_only_that_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {metrics.DIRECTORY: str(tmp_path)}
    metrics.prepare(environ)
    assert environ == {metrics.DIRECTORY: str(tmp_path)}
    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path))
    metrics.clear()
    assert tmp_path.exists()
    made: dict[str, str] = {}
    metrics.prepare(made)
    assert Path(made[metrics.DIRECTORY]).is_dir()
    monkeypatch.setenv(metrics.DIRECTORY, made[metrics.DIRECTORY])
    metrics.clear()
    assert not Path(made[metrics.DIRECTORY]).exists()


def test_metrics_have_an_address_of_their_own(folder: Path, uri: str) -> None:
    port = free_port()
    metrics.serve(f"127.0.0.1:{port}", LocalStore(uri))
    process(folder, uri)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        told = parsed(answer.read())
    assert told["query_keys_total"] == {(): 1} and told["keys"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"can't be served at {address}: .*in use"):
            metrics.serve(address, LocalStore(uri))
