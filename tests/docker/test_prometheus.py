"""A real Prometheus reads a real server, and its alerts say what is wrong."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import sqlalchemy as sa
import yaml

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.store.tables import KEYS
from tests.docker.stack import until
from tests.docker.test_alerts import ALERTS, EXPOSED, PROMETHEUS, RECORDED, metrics_in
from tests.harness import Server, free_port, serve

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


def shortened(rules: str) -> str:
    """The rules with windows of ten seconds and waits of one, as a test can't last for minutes."""
    short = re.sub(r"\[\d+[mh]\]", "[10s]", rules)
    short = re.sub(r"\bfor: \d+[mh]\b", "for: 1s", short)
    short = re.sub(r"\boffset \d+[mh]\b", "offset 10s", short)
    assert short.count("[10s]") > 10 and short.count("for: 1s") > 5
    return short


class Prometheus:
    """One that scrapes `server` each second."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._port = free_port()
        self._log = folder / "prometheus.log"
        (folder / "rules.yml").write_text(shortened((PROMETHEUS / "rules.yml").read_text()))
        (folder / "key").write_text(server.key("metrics:read"))
        # As in docker/prometheus, but for the times, the target and the key's place.
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        assert job["authorization"]["type"] == "Bearer"
        job["authorization"]["credentials_file"] = str(folder / "key")
        job["static_configs"] = [{"targets": [server.origin.removeprefix("http://")]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={folder}/prometheus.yml"]
                + [f"--storage.tsdb.path={folder}/data"]
                + [f"--web.listen-address=127.0.0.1:{self._port}"],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(self, path: str, **query: str) -> Any:
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urlencode(query)}"
        with urlopen(url, timeout=30) as response:
            answer = json.load(response)
        assert answer["status"] == "success"
        return answer["data"]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(URLError, ConnectionError):
            return bool(self.ask("targets")["activeTargets"])
        return False

    def target(self) -> dict[str, Any]:
        (target,) = self.ask("targets", state="active")["activeTargets"]
        return target

    def value(self, expression: str) -> float:
        result = self.ask("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else 0.0

    def firing(self) -> dict[str, dict[str, Any]]:
        alerts = self.ask("alerts")["alerts"]
        return {a["labels"]["alertname"]: a for a in alerts if a["state"] == "firing"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("scraped"), ("--workers", "4")) as running:
        yield running


@pytest.fixture(scope="module")
def prometheus(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    running = Prometheus(server, tmp_path_factory.mktemp("prometheus"))
    try:
        until(running.is_ready)
        until(lambda: running.target()["health"] != "unknown")
        yield running
    finally:
        running.process.terminate()
        running.process.wait(30)


def test_it_reads_the_server_with_the_key_of_its_file(prometheus: Prometheus) -> None:
    target = prometheus.target()
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["scrapeUrl"].endswith("/hokusai/metrics")
    until(lambda: prometheus.value("up") == 1)
    # Each scrape is a request that the server counts, too.
    scrapes = 'sum(hokusai_auth_requests_total{kind="hokusai",outcome="allowed",status="200"})'
    until(lambda: prometheus.value(scrapes) >= 3)


def test_it_sees_what_the_workers_counted_together(server: Server, prometheus: Prometheus) -> None:
    selector = '{kind="experiments",outcome="allowed",prefix="/mlflow"}'
    query = f"sum(hokusai_auth_requests_total{selector})"
    for _ in range(40):
        key = server.key("mlflow:read")
        assert server.request("GET", f"/mlflow{EXPERIMENT}", key=key)[0] == 200
    until(lambda: prometheus.value(query) == 40)
    # Whichever of them answers a scrape, no counter ever goes back.
    resets = prometheus.ask("query", query="max(resets(hokusai_auth_requests_total[5m]))")
    assert [result["value"][1] for result in resets["result"]] == ["0"]


def test_metrics_that_the_rules_ask_for_exist(prometheus: Prometheus) -> None:
    def there() -> set[str]:
        return set(prometheus.ask("label/__name__/values"))

    asked = set().union(
        *(metrics_in(rule["expr"]) for rule in (*ALERTS.values(), *RECORDED.values()))
    )
    assert len(asked) > 8
    # With labels, a metric begins to exist with its first count.
    now = {name for name in asked & EXPOSED.keys() if not EXPOSED[name][1]}
    now |= {"hokusai_auth_requests_total", "hokusai_auth_mode", "hokusai_auth_keys_ending"}
    assert now <= there(), now - there()
    # What the rules record exists where there is what it is made of.
    recorded = {"job:hokusai_auth_requests:rate5m", "job_outcome:hokusai_auth_requests:rate5m"}
    until(lambda: recorded <= there())


def test_every_rule_can_be_evaluated(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert {rule["name"]: rule.get("lastError") for rule in rules() if rule["health"] != "ok"} == {}


def test_alerts_tell_of_wrong_keys_and_end_with_them(
    server: Server, prometheus: Prometheus
) -> None:
    until(lambda: "KeysNotRecognised" not in prometheus.firing())

    def fires() -> bool:
        for _ in range(10):
            assert server.request("GET", EXPERIMENT, key=keys.generate())[0] == 401
        return {"KeysNotRecognised", "ManyRefusals"} <= set(prometheus.firing())

    until(fires)
    alerts = prometheus.firing()
    assert alerts["KeysNotRecognised"]["labels"]["job"] == "mlflow"
    for alert in alerts.values():
        assert alert["labels"]["severity"] in ("page", "ticket")
        texts = alert["annotations"]
        assert not re.search(r"no value|error|%!", " ".join(texts.values())), texts
    # As soon as the window is past in which there were any.
    until(lambda: not {"KeysNotRecognised", "ManyRefusals"} & set(prometheus.firing()))


def test_an_alert_tells_of_a_key_that_is_about_to_end(
    server: Server, prometheus: Prometheus
) -> None:
    until(lambda: not {"KeysEnding", "KeysEndingSoon"} & set(prometheus.firing()))
    now = time.time()
    record, _ = server.store.create(owner="x", scopes=["mlflow:read"], expires_at=now + 86400)
    with server.store.database.engine.begin() as connection:
        connection.execute(sa.update(KEYS).values(created_at=now - 30 * 86400))
    until(lambda: {"KeysEnding", "KeysEndingSoon"} <= set(prometheus.firing()))
    assert prometheus.firing()["KeysEnding"]["value"].startswith("1e+00")
    server.store.revoke(record.key_id)
    until(lambda: not {"KeysEnding", "KeysEndingSoon"} & set(prometheus.firing()))


def test_prometheus_has_nothing_to_complain_of(prometheus: Prometheus) -> None:
    complaints = [
        line for line in prometheus.log.splitlines() if re.search("level=(warn|err)", line)
    ]
    assert complaints == []


def test_an_alert_tells_of_a_server_that_is_gone(server: Server, prometheus: Prometheus) -> None:
    until(lambda: "MlflowDown" not in prometheus.firing())
    server.signal(signal.SIGKILL)
    until(lambda: "MlflowDown" in prometheus.firing())
    assert prometheus.firing()["MlflowDown"]["labels"]["severity"] == "page"
