"""Metrics of authorities and the store, for Prometheus. Labels come from fixed sets only.

With several worker processes, prometheus-client adds them up through files in the directory
PROMETHEUS_MULTIPROC_DIR, which must be set before this module is imported (`server.app` does).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

#: Bytes of each file: enough for all series in practice.
_RESERVED = 2**17


def _reserve(folder: str) -> None:
    """Reserve disk space for this process's files in `folder`, or exit with a message.

    prometheus-client maps the files into memory, where a write to a full disk is a SIGBUS.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Gauges need one page only, which prometheus-client writes at the start.
        for kind in ("counter", "histogram"):
            with Path(folder, f"{kind}_{os.getpid()}.db").open("ab") as file:
                if sys.platform == "linux":
                    os.posix_fallocate(file.fileno(), 0, _RESERVED)
    except OSError as error:
        print(
            f"hokusai-auth can't start: metrics can't be kept in {folder}: {error.strerror}. Check "
            "its disk, or name another folder in PROMETHEUS_MULTIPROC_DIR.",
            file=sys.stderr,
            flush=True,
        )
        # uvicorn's STARTUP_FAILURE, see `server.app`.
        sys.exit(3)


if _folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    _reserve(_folder)

#: Seconds. An authority may be on another machine.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

AUTHORITY_CALLS = Counter(
    "hokusai_auth_authority_calls",
    "Lookups in an authority: known, rejected, throttled, failed, or skipped while its breaker is "
    "open.",
    ["authority", "result"],
)
AUTHORITY_SECONDS = Histogram(
    "hokusai_auth_authority_seconds",
    "Seconds until an authority answered or failed.",
    ["authority"],
    buckets=_BUCKETS,
)
BREAKER_OPEN = Gauge(
    "hokusai_auth_breaker_open",
    "1 while an authority gets no lookups because it failed repeatedly.",
    ["authority"],
    multiprocess_mode="livemax",
)
CACHE = Counter(
    "hokusai_auth_cache",
    "Lookups in this process's cache: found (hit), not found (miss), or answered with a stale entry "
    "because the authority failed (stale).",
    ["authority", "result"],
)
EVENTS = Counter("hokusai_auth_events", "Events in the audit log.", ["event"])

#: The labels of `EVENTS`, which are all events of the audit log.
EVENT_NAMES = (
    "key.created",
    "key.imported",
    "key.edited",
    "key.rotated",
    "key.revoked",
    "key.leaked",
    "key.exchanged",
    "trust.added",
    "trust.edited",
    "trust.removed",
    "link.created",
    "link.opened",
    "link.refused",
    "link.revoked",
    "owners.assigned",
    "owners.released",
    "grants.added",
    "grants.removed",
    "prefixes.added",
    "prefixes.removed",
    "key.ending",
    "key.unused",
    "session.begun",
    "session.ended",
    "session.refused",
    "isolation.changed",
    "log_level.changed",
    "mode.changed",
)
