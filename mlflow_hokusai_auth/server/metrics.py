"""The gate's metrics for Prometheus, which reads them at `/hokusai/metrics`.

All labels come from fixed sets: the kinds and access levels of the table of routes, the configured
prefixes, the codes of refusals, and HTTP's status codes. So the number of series does not grow with the
paths and keys that clients send.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.isolation import CODES
from mlflow_hokusai_auth.core.isolation import HIDDEN as HIDDEN_KIND
from mlflow_hokusai_auth.core.types import ISOLATION as ISOLATION_LEVELS
from mlflow_hokusai_auth.core.types import MODES
from mlflow_hokusai_auth.store import notices
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.metrics import EVENT_NAMES, EVENTS

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST

REQUESTS = Counter(
    "hokusai_auth_requests",
    "Requests by kind and access of their operation, prefix, status and outcome: allowed, public, "
    "refused, would_refuse (mode observe), unchecked (mode off), unavailable (no verdict possible), "
    "host (MLflow refused Host or Origin), or mlflow_error (MLflow answered 5xx or broke off).",
    ["kind", "access", "prefix", "status", "outcome"],
)
DECISIONS = Counter(
    "hokusai_auth_decisions",
    "Verdicts: allowed, refused, or would_refuse in mode observe; with the reason.",
    ["outcome", "reason"],
)
MLFLOW_SECONDS = Histogram(
    "hokusai_auth_mlflow_seconds",
    "Time from the gate's verdict to the first byte of MLflow's response.",
    ["access"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
GATE_SECONDS = Histogram(
    "hokusai_auth_gate_seconds",
    "Time until the gate's verdict, with the lookup of the key.",
    buckets=(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10),
)
REGISTRATIONS = Counter(
    "hokusai_auth_registrations",
    "Steps of registering a model (the model itself, and a version of it): tried, succeeded, refused "
    "(by the gate), failed (5xx) or rejected (by MLflow, such as for a name in use).",
    ["step", "result"],
)
RATE_LIMITED = Counter(
    "hokusai_auth_rate_limited", "Requests refused because of a rate limit.", ["by"]
)
EXCHANGES = Counter(
    "hokusai_auth_exchanges",
    "Identity tokens that came to be exchanged for a key: exchanged, or the code of the refusal.",
    ["result"],
)
QUERY_KEYS = Counter("hokusai_auth_query_keys", "Requests whose key was in the query.")
LOCATIONS = Counter(
    "hokusai_auth_locations",
    "Locations outside the artifact roots, or in files of another experiment: of an experiment "
    "(artifact_location), of a version (source), of a trace (trace), or about to be opened (opened); "
    "refused, observed (mode observe), or stored for an administrator.",
    ["kind", "outcome"],
)
ISOLATION = Counter(
    "hokusai_auth_isolation",
    "Changes in MLflow's data that a key may not make, by kind: of a tag that the server sets (tag), "
    "or the code of the refusal; refused, or observed (mode or isolation observe).",
    ["kind", "outcome"],
)
HIDDEN = Counter(
    "hokusai_auth_hidden",
    "Answers that something does not exist, to suppliers who asked for what is not theirs.",
)
INTERCEPTOR_ERRORS = Counter(
    "hokusai_auth_interceptor_errors", "Exceptions of an interceptor, by its entry point.", ["name"]
)
MODE = Gauge("hokusai_auth_mode", "1 for the current mode.", ["mode"], multiprocess_mode="livemax")
ISOLATION_LEVEL = Gauge(
    "hokusai_auth_isolation_level",
    "1 for the isolation in effect, which is off unless the mode is enforce.",
    ["isolation"],
    multiprocess_mode="livemax",
)
INFO = Gauge(
    "hokusai_auth_info",
    "Always 1; the labels name the versions, the policy and the authorities.",
    ["version", "mlflow_version", "policy", "authority"],
    multiprocess_mode="livemax",
)

disable_created_metrics()  # type: ignore[no-untyped-call]


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set, in `environ`, a new directory in which all workers keep their counts, unless one is set.

    Call it before any worker starts.
    """
    if not environ.get(DIRECTORY):
        environ[DIRECTORY] = tempfile.mkdtemp(prefix="hokusai-auth-metrics-")


def clear() -> None:
    """Remove the directory that `prepare` made."""
    folder = os.environ.get(DIRECTORY, "")
    if Path(folder).name.startswith("hokusai-auth-metrics-"):
        shutil.rmtree(folder, ignore_errors=True)


def show_mode(mode: str) -> None:
    """Set the metric of this process's mode."""
    for name in MODES:
        MODE.labels(name).set(name == mode)


def show_isolation(level: str) -> None:
    """Set the metric of the isolation that is in effect in this process."""
    for name in ISOLATION_LEVELS:
        ISOLATION_LEVEL.labels(name).set(name == level)


def describe(policy: str, authority: str) -> None:
    """Set the metric of versions, policy and authorities, and start counters at 0."""
    # Prometheus sees no increase in a series that begins with 1.
    for event in EVENT_NAMES:
        EVENTS.labels(event)
    for step in ("model", "version"):
        for result in ("tried", "succeeded", "refused", "rejected", "failed"):
            REGISTRATIONS.labels(step, result)
    for kind in ("artifact_location", "source", "trace", "opened"):
        LOCATIONS.labels(kind, "refused")
        LOCATIONS.labels(kind, "observed")
    for kind in ("tag", HIDDEN_KIND.lower(), *map(str.lower, CODES)):
        for outcome in ("refused", "observed"):
            ISOLATION.labels(kind, outcome)
    EXCHANGES.labels("exchanged")
    import mlflow

    INFO.labels(__version__, mlflow.__version__, policy, authority).set(1)


class KeyStates(Collector):
    """Counts the store's keys at each scrape."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See `prometheus_client`. Yields nothing while the store is unavailable."""
        keys = GaugeMetricFamily("hokusai_auth_keys", "Keys in the store.", labels=["state"])
        ending = GaugeMetricFamily(
            "hokusai_auth_keys_ending",
            "Active keys that end within so many days, and were not replaced. A key that was made for "
            "fewer days does not count.",
            labels=["days"],
        )
        unused = GaugeMetricFamily(
            "hokusai_auth_keys_unused",
            "Active keys that nobody has used for so many days, and that were not replaced.",
            labels=["days"],
        )
        try:
            states, due = self._store.counts(), notices.counts(self._store.database)
        except AuthorityUnavailable:
            return
        for state, count in states.items():
            keys.add_metric([state], count)
        for (event, days), count in due.items():
            (ending if event == "key.ending" else unused).add_metric([str(days)], count)
        yield from (keys, ending, unused)


def text(store: LocalStore) -> bytes:
    """Return all metrics of all worker processes in Prometheus's text format."""
    registry = _of_all_processes()
    return bytes(generate_latest(registry)) + bytes(generate_latest(_only(KeyStates(store))))


def serve(address: str, store: LocalStore) -> None:
    """Serve the metrics without a key at `address` ("host:port"), from a thread of this process.

    Raises ValueError if the address can't be used.
    """
    host, _, port = address.rpartition(":")
    registry = _of_all_processes()
    registry.register(KeyStates(store))
    try:
        start_http_server(int(port), host.strip("[]"), registry=registry)
    except OSError as error:
        raise ValueError(f"metrics can't be served at {address}: {error.strerror}") from None


class _AllProcesses(Collector):
    """The metrics of all worker processes, without the gauges of those that have ended."""

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client`."""
        # This raises if the directory is gone: an empty scrape would look like an idle server.
        collector = multiprocess.MultiProcessCollector(None)  # type: ignore[no-untyped-call]
        folder = Path(os.environ[DIRECTORY])
        # The gauges of a worker that has ended, such as of its breaker, must go.
        for file in folder.glob("gauge_live*_*.db"):
            pid = file.stem.rpartition("_")[2]
            if pid.isdecimal() and not _runs(int(pid)):
                # Another process may do the same at this moment.
                file.unlink(missing_ok=True)
        # A process that was killed while it made its file leaves an empty one, which can't be read.
        files = [str(file) for file in folder.glob("*.db") if _size(file)]
        merged: Iterable[Metric] = collector.merge(files)  # type: ignore[no-untyped-call]
        return merged


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # Another process has just removed it.
        return 0


def _runs(pid: int) -> bool:
    if os.name == "nt":  # Signal 0 is Ctrl+C there.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _of_all_processes() -> CollectorRegistry:
    return _only(_AllProcesses()) if os.environ.get(DIRECTORY) else REGISTRY


def _only(collector: Collector) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry
