"""Alerts, dashboard and runbooks name only what the server counts, and each alert is tried out."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from prometheus_client import REGISTRY

from mlflow_hokusai_auth.backends import metrics as backend_metrics
from mlflow_hokusai_auth.core.denials import CODES
from mlflow_hokusai_auth.core.routes import TABLE
from mlflow_hokusai_auth.core.types import Access
from mlflow_hokusai_auth.server import metrics, observe, tally
from mlflow_hokusai_auth.server.settings import Settings

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
CALLED = {"accepted", "rejected", "throttled", "failed", "skipped"}
CACHED = {"hit", "miss", "stale"}
VALUES = {
    ("hokusai_auth_requests", "outcome"): OUTCOMES,
    ("hokusai_auth_requests", "status"): {str(s.value) for s in HTTPStatus} | {"other"},
    ("hokusai_auth_requests", "kind"): set(re.findall(r"^\[([\w-]+)", TABLE, re.M)) | {"unknown"},
    ("hokusai_auth_decisions", "outcome"): DECIDED,
    ("hokusai_auth_decisions", "reason"): set(CODES) | {"ok"},
    ("hokusai_auth_mlflow_seconds", "access"): {access.name.lower() for access in Access},
    ("hokusai_auth_registrations", "step"): set(tally._STEPS.values()),
    ("hokusai_auth_registrations", "result"): REGISTERED,
    ("hokusai_auth_authority_calls", "result"): CALLED,
    ("hokusai_auth_cache", "result"): CACHED,
    ("hokusai_auth_events", "event"): set(backend_metrics.EVENT_NAMES),
    ("hokusai_auth_mode", "mode"): set(get_args(Settings.model_fields["mode"].annotation)),
}

_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_METRIC = re.compile(r"(?<![\w:$])[\w:]*hokusai_auth_\w[\w:]*|\bup\b")
_LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


class _Store:
    def counts(self, _within: float) -> tuple[dict[str, int], int]:
        return {"active": 1}, 0


def exposed() -> dict[str, tuple[str, set[str]]]:
    """Of each series that a scrape may show: the name of its metric, and its labels."""
    suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    found = {}
    for family in REGISTRY.collect():
        if family.name.startswith("hokusai_auth_"):
            collector = REGISTRY._names_to_collectors[family.name]
            for suffix in suffixes[family.type]:
                found[family.name + suffix] = (family.name, set(collector._labelnames))
    for family in metrics.KeyStates(_Store()).collect():  # type: ignore[arg-type]
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
    if name in ITS_OWN:
        return ITS_OWN[name]
    if name in RECORDED:
        return set(re.split(r"\W+", _GROUPING.search(RECORDED[name]["expr"])[1]))
    assert name in EXPOSED, f"{name} is counted nowhere"
    return EXPOSED[name][1] | OF_PROMETHEUS


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
    done = subprocess.run(
        ["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", PROMETHEUS / "rules.yml")


def test_each_alert_fires_when_it_should_and_not_when_it_should_not() -> None:
    promtool("test", "rules", PROMETHEUS / "rules_test.yml")


def test_prometheus_takes_the_configuration_and_finds_its_files(tmp_path: Path) -> None:
    promtool("check", "config", "--syntax-only", PROMETHEUS / "prometheus.yml")
    (tmp_path / "key").write_text("key")
    (tmp_path / "rules.yml").write_text((PROMETHEUS / "rules.yml").read_text())
    text = (PROMETHEUS / "prometheus.yml").read_text()
    at_hand = text.replace("credentials_file: /run/secrets/metrics_key", "credentials_file: key")
    assert at_hand != text
    (tmp_path / "prometheus.yml").write_text(at_hand)
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_prometheus_takes_the_expressions_of_the_dashboard(tmp_path: Path) -> None:
    rules = []
    for number, (name, expression) in enumerate(EXPRESSIONS.items()):
        if name.startswith("panel "):
            plain = expression.replace("$__rate_interval", "5m")
            rules.append({"record": f"panel:{number}", "expr": plain})
    assert len(rules) > 20
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]})
    )
    promtool("check", "rules", tmp_path / "rules.yml")


def test_the_job_that_is_scraped_is_the_one_that_an_alert_misses() -> None:
    (job,) = CONFIG["scrape_configs"]
    assert job["metrics_path"] == "/hokusai/metrics"
    assert f'up{{job="{job["job_name"]}"}} == 0' in ALERTS["MlflowDown"]["expr"]


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_urgent_it_is_what_it_means_and_where_help_is(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{name.lower()}"


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_has_its_section_in_the_runbooks(name: str) -> None:
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", RUNBOOKS, re.M | re.S)
    assert section, f"docs/runbooks.md has no heading {name}"
    steps = re.findall(r"^\d\. ", section[1], re.M)
    assert len(steps) == 3, "three things to do first"


def test_the_runbooks_have_no_section_of_an_alert_that_is_gone() -> None:
    headings = re.findall(r"^## (\w+)$", RUNBOOKS, re.M)
    assert sorted(headings) == sorted(ALERTS)


def test_settings_that_the_runbooks_name_exist() -> None:
    named = {name.lower() for name in re.findall(r"HOKUSAI_AUTH_([A-Z_]+)", RUNBOOKS)}
    assert named
    # Promised by `server.interceptors`, and a setting as soon as the server has them called.
    named.discard("interceptor_errors")
    assert named <= set(Settings.model_fields)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_is_tried_with_what_fires_it_and_with_what_must_not(name: str) -> None:
    cases = {case["name"]: case for case in CASES}
    fires, quiet = cases[f"{name}: true"], cases[f"{name}: false"]
    for case in (fires, quiet):
        assert {test["alertname"] for test in case["alert_rule_test"]} == {name}
    expected = [alert for test in fires["alert_rule_test"] for alert in test["exp_alerts"]]
    assert expected
    for alert in expected:
        assert alert["exp_labels"]["severity"] == ALERTS[name]["labels"]["severity"]
        assert set(alert["exp_annotations"]) == {"summary", "description", "runbook"}
    assert not fires["alert_rule_test"][0]["exp_alerts"], "at first it must not be true yet"
    assert not any(test["exp_alerts"] for test in quiet["alert_rule_test"])
    tried = " ".join(series["series"] for series in quiet["input_series"])
    why = {"below"}
    if "for" in ALERTS[name]:
        why.add("short")
    if "/" in ALERTS[name]["expr"] or "histogram_quantile" in ALERTS[name]["expr"]:
        why.add("traffic")
    assert {word for word in why if f'"{word}' not in tried} == set()


def test_no_case_is_of_an_alert_that_is_gone() -> None:
    assert {case["name"].partition(":")[0] for case in CASES} == set(ALERTS)


def test_series_of_the_cases_are_such_as_the_server_exposes() -> None:
    for case in CASES:
        for series in case["input_series"]:
            name, matchers = _SELECTOR.fullmatch(series["series"]).groups()
            given = {label: value for label, _, value in _MATCHER.findall(matchers)}
            assert set(given) <= labels_of(name), series
            if name in EXPOSED:
                assert set(given) >= EXPOSED[name][1], series
            for label, value in given.items():
                known = values_of(name, label)
                assert known is None or value in known, series


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_asks_for_metrics_labels_and_values_that_there_are(name: str) -> None:
    expression = EXPRESSIONS[name]
    asked = metrics_in(expression)
    assert asked
    there = set().union(*map(labels_of, asked))
    for group in _GROUPING.findall(expression):
        labels = {label for label in re.split(r"\W+", group) if label}
        assert labels <= there, f"{labels - there} is on none of {asked}"
    for metric, matchers in _SELECTOR.findall(expression):
        for label, operator, text in _MATCHER.findall(matchers):
            assert label in labels_of(metric), f"{metric} has no label {label}"
            known = values_of(metric, label)
            if known is None:
                continue
            values = text.split("|") if operator in ("=~", "!~") else [text]
            assert set(values) <= known, f"{label} of {metric} is never {set(values) - known}"


@pytest.mark.parametrize("title", PANELS)
def test_a_panel_s_legend_names_labels_that_are_kept(title: str) -> None:
    for target in PANELS[title]["targets"]:
        kept = set(re.split(r"\W+", ",".join(_GROUPING.findall(target["expr"]))))
        assert set(_LEGEND.findall(target["legendFormat"])) <= kept, target


def test_an_alert_s_text_names_labels_that_are_kept() -> None:
    for name, rule in ALERTS.items():
        texts = " ".join(rule["annotations"].values())
        kept = set().union(*map(labels_of, metrics_in(rule["expr"]))) - {"le"}
        if " by (" in rule["expr"]:
            grouped = ",".join(_GROUPING.findall(rule["expr"]))
            kept = set(re.split(r"\W+", grouped)) | ({"job"} if ":" in rule["expr"] else set())
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= kept | {"authority"}, name


def test_the_values_that_are_expected_of_labels_are_those_that_are_documented() -> None:
    documented: dict[Any, set[str]] = {
        metrics.REQUESTS: OUTCOMES,
        metrics.DECISIONS: DECIDED,
        metrics.REGISTRATIONS: REGISTERED,
        backend_metrics.AUTHORITY_CALLS: CALLED,
        backend_metrics.CACHE: CACHED,
    }
    for metric, values in documented.items():
        words = set(re.findall(r"\w+", metric._documentation))
        assert values <= words, f"{metric} does not tell of {values - words}"
    source = inspect.getsource(observe) + inspect.getsource(tally)
    told = {value for value in OUTCOMES | DECIDED | REGISTERED if f'"{value}"' in source}
    assert told == OUTCOMES | DECIDED | REGISTERED


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
