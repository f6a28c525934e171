"""What isolation adds to requests, in this process: statements, and CPU time through MLflow's Flask.

The same requests run in turns with and without the hooks, so that a disturbance meets both, and the
time is that of the process. Statements are counted exactly, and tested in `make test`.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import sqlalchemy as sa
from mlflow.server import app as flask_app
from mlflow.server import handlers

from mlflow_hokusai_auth.core.locations import Location
from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.server.isolation.artifacts import Artifacts
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.hooks import Hooks
from mlflow_hokusai_auth.server.isolation.locations import Stored
from mlflow_hokusai_auth.server.isolation.provenance import Provenance
from mlflow_hokusai_auth.server.isolation.reads import Reads, Statements
from mlflow_hokusai_auth.server.isolation.shadows import Dialect
from mlflow_hokusai_auth.server.isolation.writes import Writes
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.upstream import artifact_roots, pragmas
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.server.upstream.experiment_folders import ExperimentFolders
from mlflow_hokusai_auth.server.upstream.repositories import Change
from mlflow_hokusai_auth.server.upstream.tables import SqlModelVersion
from mlflow_hokusai_auth.store import ownership
from tests.server.isolation import bulk, plans
from tests.server.isolation.stores import ACME, STAFF, Stores, calling, unused_name

#: Alternations of the two sides, and the seconds of each turn.
ROUNDS = 31
_SECONDS = 0.05
_API = "/api/2.0/mlflow/"


class Row(NamedTuple):
    """A request, whose it is, and the budget for it from the issue."""

    name: str
    principal: Principal
    method: str
    call: str
    #: Returns the request's fields, other ones each time if they must be new.
    fields: Callable[[World], dict[str, Any]]
    most_sql: int
    most_ratio: float
    #: Whether it is a read in isolation full, which is compared with the same read of staff.
    full: bool = False


class Cost(NamedTuple):
    """What was measured, and what is allowed."""

    more_sql: int | None
    most_sql: int | None
    ratio: tuple[float, float, float]
    most_ratio: float


class World:
    """A registry in a folder, and the hooks on it."""

    def __init__(
        self,
        folder: Path,
        size: bulk.Size | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stores = Stores(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")
        self.engine = self.stores.tracking.engine
        ownership.prepare(self.engine)
        if size is not None:
            bulk.fill(self.engine, (folder / "artifacts").as_uri(), size)
        # The server sets them once whatever isolation is, so both sides have it.
        pragmas.set_once()
        environ = {
            artifact_roots.DESTINATION: str(folder / "artifacts"),
            artifact_roots.DEFAULT_ROOT: (folder / "artifacts").as_uri(),
            artifact_roots.SERVES: "true",
        }
        roots, policy, watch = artifact_roots.load((), environ), Policy(), Watch(Mode("enforce"))
        folders = ExperimentFolders(roots, {})
        self.artifacts = Artifacts(roots, policy, folders, watch, Facts(usable=True, timer=timer))
        self._provenance = Provenance(watch)
        self._writes = Writes(policy, watch, self.artifacts.facts)
        full = Watch(Isolation(Mode("enforce"), "full"))
        self._reads = Reads(policy, full, self.artifacts.facts)
        self._sources = Stored(roots, policy, watch, folders, self.artifacts)
        #: The check of locations, which there is without isolation, too.
        self._plain = Stored(roots, policy, watch, folders)
        self._numbers = itertools.count(1)
        self._client = flask_app.test_client()
        with self.hooked(checked=False), calling(ACME):
            self.made = self.stores.make()

    def number(self) -> int:
        return next(self._numbers)

    @property
    def folder(self) -> str:
        """The path of the files of the run, below the root of artifacts."""
        return f"{self.made.experiment}/{self.made.run}/artifacts"

    @contextlib.contextmanager
    def hooked(
        self, *, hooks: bool = True, checked: bool = True, full: bool = False
    ) -> Iterator[None]:
        """Let MLflow in this process use this registry, with the hooks or without.

        Sources of versions are `checked` with and without them. With `full`, reads are confined, too.
        """
        sources = self._sources if hooks else self._plain
        every: tuple[Hooks, ...] = (self._provenance, self._writes) if hooks else ()
        if full:
            every += (self._reads,)
        names = ("before_insert", "before_update") if checked else ()

        with (
            mock.patch.object(handlers, "_get_tracking_store", lambda *_: self.stores.tracking),
            mock.patch.object(
                handlers, "_get_model_registry_store", lambda *_: self.stores.registry
            ),
        ):
            for one in every:
                one.install()
            for name in names:
                sa.event.listen(SqlModelVersion, name, sources.version)
            try:
                yield
            finally:
                for name in names:
                    sa.event.remove(SqlModelVersion, name, sources.version)
                for one in every:
                    one.remove()

    def ask(self, row: Row) -> None:
        fields = row.fields(self)
        how = {"query_string": fields} if row.method == "GET" else {"json": fields}
        answer = self._client.open(_API + row.call, method=row.method, **how)
        assert answer.status_code == 200, (row.name, answer.get_data())


def _metric(world: World) -> dict[str, Any]:
    return {"run_id": world.made.run, "key": "m", "value": 1.0, "timestamp": world.number()}


def _batch(world: World) -> dict[str, Any]:
    metrics = [
        {"key": f"m{i}", "value": 0.5, "timestamp": world.number(), "step": 1} for i in range(10)
    ]
    tags = [{"key": f"t{i}", "value": str(world.number())} for i in range(3)]
    return {"run_id": world.made.run, "metrics": metrics, "tags": tags}


def _version(world: World) -> dict[str, Any]:
    source = f"{world.stores.folder.as_uri()}/{world.folder}/model{world.number()}"
    return {"name": world.made.model, "source": source, "run_id": world.made.run}


_NAME = "registered-models/get"
READS: tuple[tuple[str, str, Callable[[World], dict[str, Any]]], ...] = (
    ("GET", "experiments/get", lambda world: {"experiment_id": world.made.experiment}),
    ("GET", "runs/get", lambda world: {"run_id": world.made.run}),
    ("POST", "runs/search", lambda world: {"experiment_ids": [world.made.experiment]}),
    ("GET", "registered-models/get", lambda world: {"name": world.made.model}),
    ("GET", "registered-models/search", lambda world: {"max_results": 100}),
    ("GET", "model-versions/get", lambda world: {"name": world.made.model, "version": "1"}),
)
_LOGS: tuple[tuple[str, str, Callable[[World], dict[str, Any]]], ...] = (
    ("POST", "runs/log-metric", _metric),
    ("POST", "runs/log-batch", _batch),
)
_VERSION = ("POST", "model-versions/create", _version)
_OTHER: tuple[tuple[str, str, Callable[[World], dict[str, Any]]], ...] = (
    (
        "POST",
        "runs/create",
        lambda world: {"experiment_id": world.made.experiment, "start_time": world.number()},
    ),
    ("POST", "registered-models/create", lambda world: {"name": unused_name()}),
    (
        "POST",
        "registered-models/alias",
        lambda world: {"name": world.made.model, "alias": f"a{world.number() % 9}", "version": "1"},
    ),
    (
        "POST",
        "model-versions/set-tag",
        lambda world: {
            "name": world.made.model,
            "version": "1",
            "key": "t",
            "value": str(world.number()),
        },
    ),
)


def _rows(who: str, principal: Principal, calls: Any, sql: int, ratio: float) -> list[Row]:
    return [
        Row(f"{who}: {call}", principal, method, call, fields, sql, ratio)
        for method, call, fields in calls
    ]


ROWS = [
    *_rows("staff", STAFF, (*READS, *_LOGS), 0, 1.02),
    *_rows("supplier", ACME, READS, 0, 1.02),
    *_rows("supplier", ACME, _LOGS, 0, 1.10),
    *_rows("supplier", ACME, [_VERSION], 3, 1.25),
]
#: Reads in isolation full, beside those of staff.
FULL = [row._replace(full=True) for row in _rows("full", ACME, READS, 0, 1.25)]
#: Writes, whose cost must not grow with what others have.
GROWING = _rows("supplier", ACME, (*_LOGS, _VERSION, *_OTHER), 0, 1.2)


def costs(rounds: int = ROUNDS, size: bulk.Size = bulk.FULL) -> dict[str, Cost]:
    """Return the cost of each row, by its name."""
    found: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as folder:
        worlds = []
        for name, much in (("plain", bulk.SMALL), ("small", bulk.SMALL), ("large", size)):
            Path(folder, name, "artifacts").mkdir(parents=True)
            worlds.append(World(Path(folder, name), much))
        plain, small, large = worlds
        # As the server does at its start: a full collection in one turn would be its whole cost.
        gc.collect()
        gc.freeze()
        for row in ROWS:
            more = _more(plain, row)
            taken = _ratio(
                rounds,
                lambda calls, row=row: _turn(plain, row, calls),
                lambda calls, row=row: _turn(plain, row, calls, hooks=False),
            )
            found[row.name] = Cost(more, row.most_sql, taken, row.most_ratio)
        # What the machine makes of no difference at all.
        batch = next(row for row in ROWS if row.call == "runs/log-batch")
        taken = _ratio(rounds, *[lambda calls: _turn(plain, batch, calls)] * 2)
        found["control: runs/log-batch, twice the same"] = Cost(None, None, taken, 1.02)
        for row in GROWING:
            taken = _ratio(
                rounds,
                lambda calls, row=row: _turn(large, row, calls),
                lambda calls, row=row: _turn(small, row, calls),
            )
            found[f"{row.name}, at size"] = Cost(None, None, taken, row.most_ratio)
        found |= _full(plain, small, large, rounds)
        found |= _granted(Path(folder), rounds)
        found["full: statements in memory (MB)"] = _memory()
        found |= _artifacts(large)
    return found


def _full(plain: World, small: World, large: World, rounds: int) -> dict[str, Cost]:
    """Return the costs of reads in isolation full: beside staff's, and with what others have."""
    found = {}
    for row in FULL:
        staff = row._replace(principal=STAFF)
        taken = _ratio(
            rounds,
            lambda calls, row=row: _turn(plain, row, calls),
            lambda calls, staff=staff: _turn(plain, staff, calls),
        )
        more = statements(plain, row) - statements(plain, staff)
        found[row.name] = Cost(more, row.most_sql, taken, row.most_ratio)
        taken = _ratio(
            rounds,
            lambda calls, row=row: _turn(large, row, calls),
            lambda calls, row=row: _turn(small, row, calls),
        )
        found[f"{row.name}, at size"] = Cost(None, None, taken, 1.3)
    middle = median(found[row.name].ratio[0] for row in FULL)
    found["full: median of the reads"] = Cost(None, None, (middle, middle, middle), 1.10)
    return found


#: Grants of a supplier that many share their models with.
_GRANTS = 1_000


def _granted(folder: Path, rounds: int) -> dict[str, Cost]:
    """Return the costs of reads for a supplier with `_GRANTS` grants, beside the same one without.

    It owns more models than a page has, so that both answers have the same length.
    """
    worlds = []
    for name in ("none", "many"):
        Path(folder, name, "artifacts").mkdir(parents=True)
        world = World(folder / name, bulk.SMALL._replace(models=10_000))
        worlds.append(world)
        with world.engine.begin() as connection:
            connection.exec_driver_sql(
                "UPDATE hokusai_models SET owner = ? WHERE name LIKE 'bulk-10%'", (ACME.owner_id,)
            )
            if name == "many":
                connection.exec_driver_sql(
                    "INSERT INTO hokusai_model_access (grant_id, name, grantee, level) "
                    "SELECT 'many-' || name, name, ?, 'read' FROM hokusai_models "
                    "WHERE owner <> ? LIMIT ?",
                    (ACME.owner_id, ACME.owner_id, _GRANTS),
                )
            connection.exec_driver_sql("ANALYZE")
    none, many = worlds
    return {
        f"{row.name}, {_GRANTS:,} grants": Cost(
            None,
            None,
            _ratio(
                rounds,
                lambda calls, row=row: _turn(many, row, calls),
                lambda calls, row=row: _turn(none, row, calls),
            ),
            2.5,
        )
        for row in FULL
    }


def _memory() -> Cost:
    """Return the megabytes of statements with shadows, after more than a process keeps."""
    statements, dialect = Statements(), Dialect("sqlite", "main", "qmark")
    gc.collect()
    tracemalloc.start()
    for number in range(1, 5_000):
        statements.of(dialect, f"SELECT * FROM tags WHERE run_uuid IN (?{', ?' * number})")
    taken = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    return Cost(None, None, (taken, taken, taken), 25)


def counts() -> dict[str, tuple[int, int]]:
    """Return how many statements more there are in each row, and how many may be."""
    with tempfile.TemporaryDirectory() as folder:
        # However slow the machine is, no owner gets too old between two requests.
        world = World(Path(folder), timer=lambda: 0.0)
        found = {row.name: (_more(world, row), row.most_sql) for row in (*ROWS, *FULL)}
        artifact = _artifacts(world)["artifact PUT, miss"]
        return {**found, "artifact PUT, miss": (artifact.more_sql or 0, artifact.most_sql or 0)}


def _more(world: World, row: Row) -> int:
    return statements(world, row) - statements(world, row, hooks=False)


def statements(world: World, row: Row, *, hooks: bool = True) -> int:
    """Return the number of statements of a request, the second of its kind."""
    with world.hooked(hooks=hooks, full=row.full and hooks), calling(row.principal):
        world.ask(row)
        with plans.sent() as seen:
            world.ask(row)
    return len(seen)


def _turn(world: World, row: Row, calls: int, *, hooks: bool = True) -> float:
    with world.hooked(hooks=hooks, full=row.full and hooks), calling(row.principal):
        begun = time.process_time()
        for _ in range(calls):
            world.ask(row)
        return time.process_time() - begun


def _ratio(
    rounds: int, one: Callable[[int], float], other: Callable[[int], float]
) -> tuple[float, float, float]:
    """Return the median, least and greatest of one / other over the rounds."""
    calls = max(1, round(_SECONDS / max(one(3) / 3, other(3) / 3, 1e-6)))
    ratios = []
    for number in range(rounds):
        if number % 2:
            first = one(calls)
            ratios.append(first / other(calls))
        else:
            second = other(calls)
            ratios.append(one(calls) / second)
    ratios.sort()
    return median(ratios), ratios[0], ratios[-1]


def _each(call: Callable[[], object], calls: int = 1_000) -> float:
    """Return the microseconds of CPU time of a call, the median of the rounds."""
    taken = []
    for _ in range(ROUNDS):
        begun = time.process_time()
        for _ in range(calls):
            call()
        taken.append((time.process_time() - begun) / calls * 1e6)
    return median(taken)


def _artifacts(world: World) -> dict[str, Cost]:
    """Return microseconds of decisions on artifacts, and the statements of a miss."""
    root = world.artifacts.roots.served
    assert root is not None

    def change(path: str) -> Change:
        return Change(Location("file", "", (*root.parts, *path.split("/"))), True, False)

    own = change(f"{world.folder}/new/file")
    found = {}
    with world.hooked(), calling(ACME):
        look = lambda: world.artifacts.check(own, last=False)  # noqa: E731
        world.artifacts.check(change(f"{world.folder}/first"))
        with plans.sent() as seen:
            world.artifacts.check(own)
        taken = _each(look)
    found["artifact PUT, hit (µs)"] = Cost(0, 0, (taken, taken, taken), 10)
    found["artifact PUT, miss"] = Cost(len(seen), 1, (1, 1, 1), 1)
    return found


if __name__ == "__main__":
    print(json.dumps(counts()))
