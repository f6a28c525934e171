"""Alerts, dashboard and runbooks name only what the server counts, and each alert is tried out."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import get_args

import pytest
import yaml
from prometheus_client import REGISTRY, Metric

from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.routes import TABLE
from mlflow_hokusai_auth.core.types import Access
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.observe import decision_log, recorder
from mlflow_hokusai_auth.server.settings import Settings
from mlflow_hokusai_auth.store import metrics as backend_metrics
from mlflow_hokusai_auth.store import notices
from mlflow_hokusai_auth.store.keys import LocalStore

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
CASES = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
CONFIG = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboard.json").read_text())
RUNBOOKS = (ROOT / "docs" / "runbooks.md").read_text()

ALERTS = {rule["alert"]: rule for group in RULES for rule in group["rules"] if "alert" in rule}
RECORDED = {rule["record"]: rule for group in RULES for rule in group["rules"] if "record" in rule}
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}

#: What Prometheus adds to every series, and to a histogram's.
OF_PROMETHEUS = {"job", "instance", "le"}
#: Metrics that Prometheus makes itself.
ITS_OWN = {"up": {"job", "instance"}}
#: The values of labels, read off `observe.py` and the help texts of the metrics.
OUTCOMES = {"allowed", "public", "refused", "unavailable", "host", "mlflow_error", "unchecked"}
DECIDED = {"allowed", "refused", "would_refuse"}
REGISTERED = {"tried", "succeeded", "refused", "failed", "rejected"}
CALLED = {"known", "rejected", "throttled", "failed", "skipped"}
CACHED = {"hit", "miss", "stale"}
VALUES = {
    ("hokusai_auth_requests", "outcome"): OUTCOMES,
    ("hokusai_auth_requests", "status"): {str(s.value) for s in HTTPStatus} | {"other"},
    ("hokusai_auth_requests", "kind"): set(re.findall(r"^\[([\w-]+)", TABLE, re.M)) | {"unknown"},
    ("hokusai_auth_decisions", "outcome"): DECIDED,
    ("hokusai_auth_decisions", "reason"): set(CODES) | {"ok"},
    ("hokusai_auth_mlflow_seconds", "access"): {access.name.lower() for access in Access},
    ("hokusai_auth_registrations", "step"): set(recorder._STEPS.values()),
    ("hokusai_auth_registrations", "result"): REGISTERED,
    ("hokusai_auth_authority_calls", "result"): CALLED,
    ("hokusai_auth_cache", "result"): CACHED,
    ("hokusai_auth_events", "event"): set(backend_metrics.EVENT_NAMES),
    ("hokusai_auth_keys_ending", "days"): {str(days) for days in notices.ENDING_DAYS},
    ("hokusai_auth_keys_unused", "days"): {str(notices.UNUSED_DAYS)},
    ("hokusai_auth_mode", "mode"): set(get_args(Settings.model_fields["mode"].annotation)),
}

_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_METRIC = re.compile(r"(?<![\w:$])[\w:]*hokusai_auth_\w[\w:]*|\bup\b")
_LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


def of_keys() -> list[Metric]:
    """The metrics of a store, which has no key."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(f"sqlite:///{folder}/keys.db")
        store.migrate()
        return list(metrics.KeyStates(store).collect())


OF_KEYS = of_keys()


def exposed() -> dict[str, tuple[str, set[str]]]:
    """Of each series that a scrape may show: the name of its metric, and its labels."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    found = {}
    for family in REGISTRY.collect():
        if family.name.startswith("hokusai_auth_"):
            collector = REGISTRY._names_to_collectors[family.name]
            for suffix in suffixes[family.type]:
                found[family.name + suffix] = (family.name, set(collector._labelnames))
    for family in OF_KEYS:
        found[family.name] = (family.name, set(family._labelnames))
    return found


EXPOSED = exposed()


def expressions() -> Iterator[tuple[str, str]]:
    """All of PromQL, with the name of its alert, recorded series or panel."""
    for name, rule in {**ALERTS, **RECORDED}.items():
        yield name, rule["expr"]
    for title, panel in PANELS.items():
        for target in panel["targets"]:
            yield f"panel {title} {target['refId']}", target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["definition"]


EXPRESSIONS = dict(expressions())


def labels_of(name: str) -> set[str]:
    """The labels of a metric, recorded or not; fails for one that there is not."""
    if name in RECORDED:
        return kept(RECORDED[name]["expr"])
    assert name in EXPOSED or name in ITS_OWN, f"{name} is counted nowhere"
    return ITS_OWN[name] if name in ITS_OWN else EXPOSED[name][1] | OF_PROMETHEUS


def kept(expression: str) -> set[str]:
    """The labels by which PromQL groups."""
    return set(re.split(r"\W+", ",".join(_GROUPING.findall(expression)))) - {""}


def metrics_in(expression: str) -> set[str]:
    """The names of metrics in PromQL, less what stands in selectors and texts."""
    return set(_METRIC.findall(re.sub(r"\{[^}]*\}", "", expression)))


def values_of(name: str, label: str) -> set[str] | None:
    """What `label` can be on the metric; None if that is not bounded."""
    if name in RECORDED:
        return values_of(next(iter(metrics_in(RECORDED[name]["expr"]))), label)
    return VALUES.get((EXPOSED[name][0], label)) if name in EXPOSED else None


def promtool(*arguments: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed; it comes with prometheus")
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules_the_configuration_and_the_dashboard(tmp_path: Path) -> None:
    panels = [text for name, text in EXPRESSIONS.items() if name.startswith("panel ")]
    assert len(panels) > 20
    rules = [
        {"record": f"panel:{number}", "expr": text.replace("$__rate_interval", "5m")}
        for number, text in enumerate(panels)
    ]
    dashboard = tmp_path / "dashboard.yml"
    dashboard.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    ours = PROMETHEUS / "rules.yml"
    promtool("check", "rules", "--lint=all", "--lint-fatal", ours, dashboard)

    (tmp_path / "key").write_text("key")
    shutil.copy(ours, tmp_path)
    text = (PROMETHEUS / "prometheus.yml").read_text()
    at_hand = text.replace("credentials_file: /run/secrets/metrics_key", "credentials_file: key")
    assert at_hand != text
    (tmp_path / "prometheus.yml").write_text(at_hand)
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    promtool("test", "rules", PROMETHEUS / "rules_test.yml")


def test_the_job_that_is_scraped_is_the_one_that_an_alert_misses() -> None:
    (job,) = CONFIG["scrape_configs"]
    assert job["metrics_path"] == "/hokusai/metrics"
    assert f'up{{job="{job["job_name"]}"}} == 0' in ALERTS["MlflowDown"]["expr"]


def test_each_alert_has_its_texts_its_runbook_and_cases_that_try_it() -> None:
    cases = {case["name"]: case for case in CASES}
    assert set(cases) == {f"{name}: {truth}" for name in ALERTS for truth in ("true", "false")}
    assert sorted(re.findall(r"^## (\w+)$", RUNBOOKS, re.M)) == sorted(ALERTS)
    wrong = []
    for name, rule in ALERTS.items():
        texts = {"summary", "description", "runbook"}
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOKS, re.M | re.S)[1]
        fires, quiet = (cases[f"{name}: {truth}"] for truth in ("true", "false"))
        first, *_ = fires["alert_rule_test"]
        of = {test["alertname"] for case in (fires, quiet) for test in case["alert_rule_test"]}
        expected = [alert for test in fires["alert_rule_test"] for alert in test["exp_alerts"]]
        severities = {alert["exp_labels"]["severity"] for alert in expected}
        tried = " ".join(series["series"] for series in quiet["input_series"])
        fraction = "/" in rule["expr"] or "histogram_quantile" in rule["expr"]
        good = {
            "how urgent it is": rule["labels"]["severity"] in ("page", "ticket"),
            "its texts": set(rule["annotations"]) == texts,
            "its runbook": rule["annotations"]["runbook"] == f"docs/runbooks.md#{name.lower()}",
            "three things to do first": len(re.findall(r"^\d\. ", section, re.M)) == 3,
            "cases of it alone": of == {name},
            "how urgent it is when it fires": severities == {rule["labels"]["severity"]},
            "what it says when it fires": all(set(a["exp_annotations"]) == texts for a in expected),
            "not true at first": not first["exp_alerts"],
            "never true": not any(test["exp_alerts"] for test in quiet["alert_rule_test"]),
            "below the threshold": '"below' in tried,
            "for too short": '"short' in tried or "for" not in rule,
            "too little traffic": '"traffic' in tried or not fraction,
        }
        wrong += [f"{name}: {what}" for what, is_so in good.items() if not is_so]
    assert not wrong, "\n".join(wrong)


def unknown(metric: str, matchers: str) -> Iterator[str]:
    """What a selector wants of a metric's labels and no series has."""
    for label, operator, text in _MATCHER.findall(matchers):
        known = values_of(metric, label)
        values = set(text.split("|") if operator in ("=~", "!~") else [text])
        if label not in labels_of(metric):
            yield f"{metric} has no label {label}"
        elif known is not None and not values <= known:
            yield f"{label} of {metric} is never {values - known}"


def test_expressions_ask_for_metrics_labels_and_values_that_there_are() -> None:
    wrong = []
    for name, expression in EXPRESSIONS.items():
        asked = metrics_in(expression)
        assert asked, name
        there = set().union(*map(labels_of, asked))
        said = [f"{label} is on none of {asked}" for label in kept(expression) - there]
        for selector in _SELECTOR.findall(expression):
            said += unknown(*selector)
        wrong += [f"{name}: {what}" for what in said]
    assert not wrong, "\n".join(wrong)


def test_series_of_the_cases_are_such_as_the_server_exposes() -> None:
    wrong = []
    for series in [series["series"] for case in CASES for series in case["input_series"]]:
        name, matchers = _SELECTOR.fullmatch(series).groups()
        given = {label for label, *_ in _MATCHER.findall(matchers)}
        said = list(unknown(name, matchers))
        if name in EXPOSED:
            said += [f"{label} is missing" for label in EXPOSED[name][1] - given]
        wrong += [f"{series}: {what}" for what in said]
    assert not wrong, "\n".join(wrong)


def test_legends_and_texts_name_labels_that_are_kept() -> None:
    wrong = []
    for title, panel in PANELS.items():
        for target in panel["targets"]:
            lost = set(_LEGEND.findall(target["legendFormat"])) - kept(target["expr"])
            wrong += [f"{title}: {label}" for label in lost]
    for name, rule in ALERTS.items():
        there = set().union(*map(labels_of, metrics_in(rule["expr"]))) - {"le"}
        if " by (" in rule["expr"]:
            there = kept(rule["expr"]) | ({"job"} if ":" in rule["expr"] else set())
        texts = " ".join(rule["annotations"].values())
        lost = set(re.findall(r"\$labels\.(\w+)", texts)) - there - {"authority"}
        wrong += [f"{name}: {label}" for label in lost]
    assert not wrong, "\n".join(wrong)


def test_the_values_that_are_expected_of_labels_are_those_that_are_documented() -> None:
    documented = {
        metrics.REQUESTS: OUTCOMES,
        metrics.DECISIONS: DECIDED,
        metrics.REGISTRATIONS: REGISTERED,
        backend_metrics.AUTHORITY_CALLS: CALLED,
        backend_metrics.CACHE: CACHED,
    }
    for metric, values in documented.items():
        words = set(re.findall(r"\w+", metric._documentation))
        assert values <= words, f"{metric} does not tell of {values - words}"
    source = inspect.getsource(decision_log) + inspect.getsource(recorder)
    told = {value for value in OUTCOMES | DECIDED | REGISTERED if f'"{value}"' in source}
    assert told == OUTCOMES | DECIDED | REGISTERED


def test_each_alert_s_runbook_is_linked_from_a_panel_that_shows_what_it_looks_at() -> None:
    def looked_at(expressions: Iterable[str]) -> set[str]:
        found = set().union(*map(metrics_in, expressions))
        return found.union(*(metrics_in(RECORDED[name]["expr"]) for name in found & set(RECORDED)))

    wrong, linked = [], set()
    for title, panel in PANELS.items():
        for link in panel.get("links", []):
            name = link["title"].removeprefix("Runbook: ")
            linked.add(name)
            seen = looked_at(target["expr"] for target in panel["targets"])
            if link["url"] != f"${{docs:raw}}/runbooks.html#{name.lower()}" or name not in ALERTS:
                wrong.append(f"{title}: {link}")
            elif not seen & looked_at([ALERTS[name]["expr"]]):
                wrong.append(f"{title} shows nothing that {name} looks at")
    assert not wrong, "\n".join(wrong)
    assert linked == set(ALERTS)
    assert "docs" in {variable["name"] for variable in DASHBOARD["templating"]["list"]}


def test_the_dashboard_works_with_any_data_source_and_several_instances() -> None:
    assert DASHBOARD["schemaVersion"] >= 38
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert {"datasource", "job", "instance"} <= names
    for panel in PANELS.values():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    for name, expression in EXPRESSIONS.items():
        if name.startswith("panel "):
            for metric, matchers in _SELECTOR.findall(expression):
                assert 'job=~"$job"' in matchers, name
                assert metric == "up" or 'instance=~"$instance"' in matchers, name


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
