"""What the gate counts for Prometheus, and how it is read: `/hokusai/metrics`.

Labels come from fixed sets: the kinds and classes of the table of routes, the configured prefixes, the
refusals there are, the status codes of HTTP. So however many paths and keys are tried, the number of
series stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, MutableMapping
from pathlib import Path

import mlflow
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
from mlflow_hokusai_auth.core.types import MODES
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.metrics import EVENT_NAMES, EVENTS

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
#: Days before a key's end from which on it counts as about to expire.
EXPIRING_DAYS = 7

REQUESTS = Counter(
    "hokusai_auth_requests",
    "Requests by what they do (kind and class of the route), prefix, status and outcome: allowed, "
    "public, refused, would_refuse (mode observe), unchecked (mode off), unavailable (no verdict to be "
    "had), host (MLflow refused Host or Origin), or mlflow_error (MLflow answered 5xx or broke off).",
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
    "Time until the gate's verdict, questions to the key's authority included.",
    buckets=(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10),
)
REGISTRATIONS = Counter(
    "hokusai_auth_registrations",
    "Steps of registering a model, the model itself and a version of it: tried, succeeded, refused "
    "(by the gate), failed (5xx) or rejected (by MLflow, such as for a name that is taken).",
    ["step", "result"],
)
RATE_LIMITED = Counter(
    "hokusai_auth_rate_limited", "Requests refused for coming too often.", ["by"]
)
QUERY_KEYS = Counter("hokusai_auth_query_keys", "Requests whose key was in the query.")
LOCATIONS = Counter(
    "hokusai_auth_locations",
    "Locations outside the artifact roots, or not their sender's to name: of an experiment "
    "(artifact_location), of a version (source), of a trace (trace), or about to be opened (opened); "
    "refused, observed (mode observe), or stored for an administrator.",
    ["kind", "outcome"],
)
INTERCEPTOR_ERRORS = Counter(
    "hokusai_auth_interceptor_errors", "Exceptions of an interceptor, by its entry point.", ["name"]
)
MODE = Gauge(
    "hokusai_auth_mode", "1 for the mode that is on.", ["mode"], multiprocess_mode="livemax"
)
INFO = Gauge(
    "hokusai_auth_info",
    "1, with what is running.",
    ["version", "mlflow_version", "policy", "authority"],
    multiprocess_mode="livemax",
)

disable_created_metrics()  # type: ignore[no-untyped-call]


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Name, in `environ`, an empty directory through which worker processes add up their counts.

    Called where the server starts, before any worker does. One that is set already is kept.
    """
    if not environ.get(DIRECTORY):
        environ[DIRECTORY] = tempfile.mkdtemp(prefix="hokusai-auth-metrics-")


def clear() -> None:
    """Remove the directory that `prepare` made."""
    folder = os.environ.get(DIRECTORY, "")
    if Path(folder).name.startswith("hokusai-auth-metrics-"):
        shutil.rmtree(folder, ignore_errors=True)


def show_mode(mode: str) -> None:
    """Tell, in metrics, which mode this process is in."""
    for name in MODES:
        MODE.labels(name).set(name == mode)


def describe(policy: str, authority: str) -> None:
    """Tell, in metrics, what is running."""
    # From 0, as Prometheus sees no increase in what begins with 1.
    for event in EVENT_NAMES:
        EVENTS.labels(event)
    for step in ("model", "version"):
        for result in ("tried", "succeeded", "refused", "rejected", "failed"):
            REGISTRATIONS.labels(step, result)
    for kind in ("artifact_location", "source", "trace", "opened"):
        LOCATIONS.labels(kind, "refused")
        LOCATIONS.labels(kind, "observed")
    INFO.labels(__version__, mlflow.__version__, policy, authority).set(1)


class KeyStates(Collector):
    """Counts the store's keys, when they are asked for."""

    def __init__(self, store: LocalStore) -> None:
        self._store = store

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See `prometheus_client`. Says nothing while the store can't be asked."""
        keys = GaugeMetricFamily("hokusai_auth_keys", "Keys in the store.", labels=["state"])
        expiring = GaugeMetricFamily(
            "hokusai_auth_keys_expiring",
            f"Active keys that end within {EXPIRING_DAYS} days and were not replaced.",
        )
        try:
            counts, soon = self._store.counts(EXPIRING_DAYS * 86400.0)
        except AuthorityUnavailable:
            return
        for state, count in counts.items():
            keys.add_metric([state], count)
        expiring.add_metric([], soon)
        yield keys
        yield expiring


def text(store: LocalStore) -> bytes:
    """All metrics, of every worker process, in Prometheus's text format."""
    registry = _of_all_processes()
    return bytes(generate_latest(registry)) + bytes(generate_latest(_only(KeyStates(store))))


def serve(address: str, store: LocalStore) -> None:
    """Answer at `address`, "host:port", in a thread of this process, without asking for a key."""
    host, _, port = address.rpartition(":")
    registry = _of_all_processes()
    registry.register(KeyStates(store))
    try:
        start_http_server(int(port), host.strip("[]"), registry=registry)
    except OSError as error:
        raise ValueError(f"metrics can't be served at {address}: {error.strerror}") from None


class _AllProcesses(Collector):
    """What all worker processes counted, without the gauges of those that are gone."""

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client`."""
        # Fails if the directory is gone: a scrape without any counts would look like a quiet server.
        collector = multiprocess.MultiProcessCollector(None)  # type: ignore[no-untyped-call]
        folder = Path(os.environ[DIRECTORY])
        # Else a worker that is gone would go on telling of its breaker.
        for file in folder.glob("gauge_live*_*.db"):
            pid = file.stem.rpartition("_")[2]
            if pid.isdecimal() and not _runs(int(pid)):
                # Another process may have been faster.
                file.unlink(missing_ok=True)
        # A process makes its file before it has a size, and may be killed in between.
        files = [str(file) for file in folder.glob("*.db") if _size(file)]
        found: Iterable[Metric] = collector.merge(files)  # type: ignore[no-untyped-call]
        return found


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # another process, which saw that its maker is gone
        return 0


def _runs(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl+C
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
