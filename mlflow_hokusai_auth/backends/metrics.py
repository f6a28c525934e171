"""What authorities and the store count for Prometheus. Labels come from fixed sets only.

With several worker processes, prometheus-client adds them up through files in the directory
PROMETHEUS_MULTIPROC_DIR, which must be set before this module is imported (`server.app` does).
"""

from __future__ import annotations

import os
from pathlib import Path

from prometheus_client import Counter, Gauge, Histogram

if _folder := os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    Path(_folder).mkdir(parents=True, exist_ok=True)

#: Seconds; an authority is on another machine at most.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

AUTHORITY_CALLS = Counter(
    "hokusai_auth_authority_calls",
    "Questions about a key to an authority: accepted, rejected, throttled, failed, or skipped while "
    "it is left alone.",
    ["authority", "result"],
)
AUTHORITY_SECONDS = Histogram(
    "hokusai_auth_authority_seconds",
    "Time until an authority answered, or failed.",
    ["authority"],
    buckets=_BUCKETS,
)
BREAKER_OPEN = Gauge(
    "hokusai_auth_breaker_open",
    "1 while an authority is left alone because it kept failing.",
    ["authority"],
    multiprocess_mode="livemax",
)
CACHE = Counter(
    "hokusai_auth_cache",
    "Identities that were found in this process (hit), not found (miss), or served although the "
    "authority failed (stale).",
    ["authority", "result"],
)
EVENTS = Counter("hokusai_auth_events", "Audited events: of keys and of sessions.", ["event"])

#: What `EVENTS` is counted under; the audit log knows no other.
EVENT_NAMES = (
    "key.created",
    "key.imported",
    "key.edited",
    "key.rotated",
    "key.revoked",
    "key.leaked",
    "session.begun",
    "session.ended",
    "session.refused",
    "log_level.changed",
    "mode.changed",
)
