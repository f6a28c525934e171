"""`python -m bench.flood`: the latency of a good key while another address floods with made-up keys.

The server's authority is a stand-in for the auth service that answers after `--away` seconds. Rounds
come in pairs, without the flood and with it, at a fixed rate. A ratio is the median of the rounds'.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path

from mlflow_hokusai_auth.core import keys
from tests.harness import SERVERS, Server, serve
from tests.standin import Standin

PATH = "/api/2.0/mlflow/experiments/get?experiment_id=0"
FLOODING, GOOD = "203.0.113.9", "198.51.100.7"
#: Connections of the flood.
CONNECTIONS = 32


def ask(server: Server, key: str, address: str) -> tuple[int, float]:
    """Return the status of one request, and its seconds."""
    began = time.perf_counter()
    headers = {"X-Forwarded-For": address}
    status = server.request("GET", PATH, key=key, headers=headers)[0]
    return status, time.perf_counter() - began


def flood(server: Server, rate: float, ended: Event) -> None:
    """Send `rate` made-up keys a second until `ended`, or as many as the server accepts."""
    began, lock = time.perf_counter(), threading.Lock()
    turns = iter(range(10**9))

    def send() -> None:
        while not ended.is_set():
            with lock:
                at = began + next(turns) / rate
            time.sleep(max(at - time.perf_counter(), 0))
            ask(server, keys.generate("test"), FLOODING)

    threads = [threading.Thread(target=send) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def turn(server: Server, key: str, seconds: float) -> tuple[list[float], Counter[int]]:
    """Return latencies and statuses of requests with the good key, sent one after the other."""
    took, statuses = [], Counter[int]()
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        status, spent = ask(server, key, GOOD)
        took.append(spent)
        statuses[status] += 1
    return took, statuses


def main() -> None:
    """Measure, and print a line for each time to live of the cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rate", type=float, default=100.0)
    parser.add_argument("--away", type=float, default=0.1)
    options = parser.parse_args()
    for ttl in ("60", "0.3"):
        with (
            tempfile.TemporaryDirectory() as folder,
            Standin() as service,
            serve(
                Path(folder),
                SERVERS["httptools"],
                HOKUSAI_AUTH_BACKEND="service",
                HOKUSAI_AUTH_SERVICE_URL=service.url,
                HOKUSAI_AUTH_FAILURES_PER_MINUTE="60",
                HOKUSAI_AUTH_TRUSTED_PROXIES="127.0.0.1",
                HOKUSAI_AUTH_CACHE_TTL=ttl,
            ) as server,
        ):
            service.behave("slow", seconds=options.away)
            key = service.add(scopes=["mlflow:read"])
            ask(server, key, GOOD)
            means, tails, total = [], [], Counter[int]()
            for _ in range(options.rounds):
                quiet, _ = turn(server, key, options.seconds)
                ended = multiprocessing.Event()
                flooding = multiprocessing.Process(target=flood, args=(server, options.rate, ended))
                flooding.start()
                time.sleep(0.5)
                flooded, statuses = turn(server, key, options.seconds)
                ended.set()
                flooding.join()
                total += statuses
                means.append(statistics.fmean(flooded) / statistics.fmean(quiet))
                tails.append(
                    statistics.quantiles(flooded, n=20)[-1] / statistics.quantiles(quiet, n=20)[-1]
                )
            print(
                f"CACHE_TTL {ttl}: with {options.rate:g} made-up keys a second, the good key's "
                f"mean is {statistics.median(means):.2f} times as long ({min(means):.2f} to "
                f"{max(means):.2f}), its 95th percentile {statistics.median(tails):.2f} times "
                f"({min(tails):.2f} to {max(tails):.2f}); statuses {dict(total)}; the service was "
                f"asked {len(service.calls)} times",
                flush=True,
            )


if __name__ == "__main__":
    main()
