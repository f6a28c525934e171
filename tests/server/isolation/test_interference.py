"""Nothing that another team does changes what a supplier sees, page by page."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow.entities import ExperimentTag, Metric, Param, RunTag, ViewType
from mlflow.entities.model_registry import RegisteredModelTag
from mlflow.exceptions import MlflowException

from mlflow_hokusai_auth.core.policy import Policy
from mlflow_hokusai_auth.core.types import ISOLATION, Principal
from mlflow_hokusai_auth.server.isolation.facts import Facts
from mlflow_hokusai_auth.server.isolation.reads import Reads
from mlflow_hokusai_auth.server.isolation.writes import Writes
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.server.upstream.artifact_roots import Watch
from mlflow_hokusai_auth.store import ownership
from tests.server.isolation.stores import Stores, calling

#: What a team may do, to the n-th thing that it made.
DEEDS = (
    "experiment",
    "run",
    "metric",
    "param",
    "tag",
    "logged model",
    "model",
    "version",
    "alias",
    "model tag",
    "delete run",
    "delete version",
    "delete experiment",
    "delete model",
)
_TEAMS = itertools.count()
_PAGE = 2


class Team:
    """A supplier who does deeds, and remembers what it has made in the order of making."""

    def __init__(self, stores: Stores, owner: str) -> None:
        self.stores = stores
        self.owner = owner
        scopes = frozenset({"model:write"})
        self.principal = Principal(f"key_{owner}", owner, scopes, owner_id=owner)
        self.experiments: list[str] = []
        self.runs: list[str] = []
        self.logged: list[str] = []
        self.models: list[str] = []

    def do(self, deed: str, n: int) -> None:
        """Do it; a deed that MLflow refuses, such as on what was deleted, is none."""
        with calling(self.principal):
            try:
                self._do(deed, n)
            except LookupError:  # there is none yet
                pass
            except MlflowException as error:
                assert error.error_code != "INTERNAL_ERROR", error

    def _do(self, deed: str, n: int) -> None:
        tracking, registry = self.stores.tracking, self.stores.registry

        def one(made: list[str]) -> str:
            if not made:
                raise LookupError
            return made[n % len(made)]

        if deed == "experiment":
            name = f"{self.owner}-e{len(self.experiments)}"
            tag = [ExperimentTag("team", "a")]
            self.experiments.append(tracking.create_experiment(name, tags=tag))
        elif deed == "run":
            run = tracking.create_run(
                one(self.experiments), "u", len(self.runs), [RunTag("n", str(n))], f"r{n}"
            )
            self.runs.append(run.info.run_id)
        elif deed == "metric":
            tracking.log_metric(one(self.runs), Metric("m", n, n, n))
        elif deed == "param":
            tracking.log_param(one(self.runs), Param(f"p{n}", str(n)))
        elif deed == "tag":
            tracking.set_tag(one(self.runs), RunTag("t", str(n)))
        elif deed == "logged model":
            made = tracking.create_logged_model(one(self.experiments), f"l{len(self.logged)}")
            self.logged.append(made.model_id)
        elif deed == "model":
            name = f"{self.owner}-m{len(self.models)}"
            registry.create_registered_model(name)
            self.models.append(name)
        elif deed == "version":
            registry.create_model_version(one(self.models), f"s3://bucket/v{n}")
        elif deed == "alias":
            registry.set_registered_model_alias(one(self.models), "champion", 1)
        elif deed == "model tag":
            registry.set_registered_model_tag(one(self.models), RegisteredModelTag("t", str(n)))
        elif deed == "delete run":
            tracking.delete_run(one(self.runs))
        elif deed == "delete version":
            registry.delete_model_version(one(self.models), 1)
        elif deed == "delete experiment":
            tracking.delete_experiment(one(self.experiments))
        elif deed == "delete model":
            registry.delete_registered_model(one(self.models))

    def view(self) -> list[Any]:
        """Return each page of each search, without times, and with ids in the order of making."""
        tracking, registry = self.stores.tracking, self.stores.registry
        highest = max(map(int, self.experiments), default=0)
        everywhere = [str(number) for number in range(highest + 3)]
        by_name = [{"field_name": "name"}]
        with calling(self.principal):
            found = [
                # Whatever has the same time comes in the order of random ids, so names order it here.
                _pages(tracking.search_experiments, ViewType.ALL, order_by=["name"]),
                *(
                    _pages(tracking.search_runs, everywhere, "", ViewType.ALL, order_by=order)
                    for order in ([], ["metrics.m DESC"], ["start_time ASC"])
                ),
                _pages(tracking.search_logged_models, everywhere, order_by=by_name),
                _pages(registry.search_registered_models),
                _pages(registry.search_model_versions),
                [
                    registry.get_latest_versions(name)
                    for name in self.models
                    if _has(registry, name)
                ],
            ]
        return self._anonymous(found)

    def _anonymous(self, found: list[Any]) -> list[Any]:
        text = "\n".join("|".join(sorted(_lines(page))) for pages in found for page in pages)
        for n, run in enumerate(self.runs):
            text = text.replace(run, f"run {n}")
        for n, model in enumerate(self.logged):
            text = text.replace(model, f"logged {n}")
        for n, number in enumerate(self.experiments):
            text = re.sub(rf"(?<=experiment_id: \"){number}(?=\")", f"e{n}", text)
            text = re.sub(rf"/{number}/", f"/e{n}/", text).replace(f'/{number}"', f'/e{n}"')
        text = text.replace(self.owner, "me").replace(self.stores.folder.as_uri(), "root")
        return re.sub(r"\w*time\w*: \d{6,}", "", text).splitlines()


def _lines(page: list[Any]) -> Iterator[str]:
    """Yield the rows of a page, each with its position: their order counts, that of tags does not."""
    for position, row in enumerate(page):
        proto = row.to_proto()
        yield f"{position} " + " ".join(sorted(re.split(r"\n(?! |\})", str(proto))))


def _pages(search: Any, *arguments: Any, **more: Any) -> list[list[Any]]:
    pages, token = [], None
    while token or not pages:
        page = search(*arguments, max_results=_PAGE, page_token=token, **more)
        pages.append(list(page))
        token = page.token
    return pages


def _has(registry: Any, name: str) -> bool:
    try:
        registry.get_registered_model(name)
    except MlflowException:
        return False
    return True


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stores, Stores]:
    """A registry with another team in it, and one without."""
    made = []
    for name in ("both", "alone"):
        folder: Path = tmp_path_factory.mktemp(name)
        stores = Stores(f"sqlite:///{folder / 'mlflow.db'}", folder)
        ownership.prepare(stores.registry.engine)
        made.append(stores)
    return made[0], made[1]


@pytest.fixture(autouse=True)
def full() -> Iterator[None]:
    isolation = Isolation(Mode("enforce"), "full")
    # Both worlds have experiments of the same numbers, so no owner may be kept in memory.
    facts = Facts(usable=True, timer=itertools.count(step=10).__next__)
    Writes(Policy(), Watch(isolation), facts).install()
    Reads(Policy(), Watch(isolation), facts).install()
    yield
    isolation.follow({"isolation": ISOLATION.index("off")})


deeds = st.lists(
    st.tuples(st.booleans(), st.sampled_from(DEEDS), st.integers(0, 5)), min_size=8, max_size=40
)
_START = [(mine, deed, 0) for deed in ("experiment", "run", "model") for mine in (True, False)]


def check(worlds: tuple[Stores, Stores], done: list[tuple[bool, str, int]]) -> None:
    both, alone = worlds
    number = next(_TEAMS)
    me, other = Team(both, f"me{number}"), Team(both, f"other{number}")
    twin = Team(alone, f"me{number}")
    for mine, deed, n in [*_START, *done]:
        if mine:
            me.do(deed, n)
            twin.do(deed, n)
        else:
            other.do(deed, n)
    assert me.view() == twin.view()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(deeds)
def test_supplier_sees_what_it_would_see_alone(
    worlds: tuple[Stores, Stores], done: list[tuple[bool, str, int]]
) -> None:
    check(worlds, done)


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(deeds)
def test_supplier_sees_what_it_would_see_alone_at_length(
    worlds: tuple[Stores, Stores], done: list[tuple[bool, str, int]]
) -> None:
    check(worlds, done)
