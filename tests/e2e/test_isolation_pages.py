"""Two suppliers and staff look at one registry in MLflow's own pages, in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.test_browser import NewPerson, browser, expect, person, pytestmark
from tests.e2e.test_isolation import Supplier
from tests.harness import Server, serve
from tests.server.isolation.stores import unused_name

__all__ = ["browser", "person", "pytestmark"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("pages"), HOKUSAI_AUTH_ISOLATION="writes") as running:
        yield running


def part(page: Any, label: str, above: str) -> Any:
    """The part of MLflow's page that shows `label` and its value. Tags have the owner's name, too."""
    return page.get_by_text(label, exact=True).first.locator(f"xpath={above}")


def test_pages_say_who_made_what(person: NewPerson, server: Server) -> None:
    teams = [Supplier(server, "ACME"), Supplier(server, "GLOBEX")]
    staff = Supplier(server, "HOKUSAI", "mlflow:write")
    made = []
    for owner, team in zip(("Acme", "Globex"), teams, strict=True):
        name = f"{owner}-{unused_name()}"
        experiment = team.good("experiments/create", name=name)["experiment_id"]
        # MLflow's client sends the user of its computer.
        tags = [{"key": "mlflow.user", "value": "root"}]
        run = team.good("runs/create", experiment_id=experiment, tags=tags)["run"]["info"]
        source = {"source": f"{run['artifact_uri']}/model", "run_id": run["run_id"]}
        # The version's page looks for this file.
        file = f"{experiment}/{run['run_id']}/artifacts/model/MLmodel"
        url = f"/api/2.0/mlflow-artifacts/artifacts/{file}"
        assert server.request("PUT", url, key=team.key, body=b"flavors: {}")[0] == 200
        team.good("registered-models/create", name=name)
        team.good("model-versions/create", name=name, **source)
        made.append((owner.upper(), f"{experiment}/runs/{run['run_id']}", name))
    # Reading is open, so each of them sees who made what, its own and the other's.
    for reader in (*teams, staff):
        looking = person(reader.key)
        for owner, run_path, name in made:
            page = looking.open(f"/#/experiments/{run_path}")
            expect(part(page, "Created by", "..")).to_have_text(f"Created by{owner}")
            page = looking.open(f"/#/models/{name}/versions/1")
            expect(part(page, "Creator", "../..")).to_have_text(f"Creator:{owner}")
        assert looking.wrong == []
