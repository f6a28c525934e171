"""With isolation full, no supplier can tell what another one has from what does not exist."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import pytest

from mlflow_hokusai_auth.server.upstream.routes import installed_routes, template
from tests.contract.test_mlflow import VERSION
from tests.e2e.test_isolation import OWN, Supplier
from tests.e2e.test_isolation_upgrade import python_of
from tests.e2e.test_registration import run_job
from tests.harness import SERVERS, Server, run_forked, serve, wait_until
from tests.server.isolation.stores import unused_name

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(VERSION < (3, 9), reason="isolation needs MLflow 3.9"),
]

READER = Path(__file__).with_name("reader_job.py")
TRAINING = Path(__file__).with_name("team_job.py")
#: Routes that take a name of the client's choice: a taken name can be told from a free one.
NAMING = re.compile(r"/(registered-models|experiments)/(create|rename|update)$")
#: What differs from one answer to the next, whatever the question was.
NOISE = re.compile(rb'"(request_id|requestId)": ?"[^"]*"')
#: Spellings of paths in, and of, the folders of an experiment, of a run and of a logged model.
SPELLINGS = (
    "{experiment}/{run}",
    "{experiment}/{run}/artifacts/file.txt",
    "{experiment}/%2e/{run}/artifacts/file.txt",
    "./{experiment}/./{run}/./artifacts/file.txt",
    "./{experiment}/./{run}",
    "./{experiment}//{run}",
    "{experiment}/%252e/{run}/artifacts/file.txt",
    "%2e/{experiment}%2f{run}%2fartifacts/file.txt",
    "%252e/{experiment}%252f{run}%252fartifacts",
    "{experiment}/./{coded}/artifacts",
    "{experiment}//{run}//artifacts/file.txt",
    "{experiment}/{run}/artifacts/file.txt/.",
    "{experiment}/{run}/artifacts/file.txt/",
    "{experiment}/{run}/./",
    "{experiment}/{run}/artifacts/file.txt/below",
    "{experiment}/{run}/x/../artifacts/file.txt",
    "{experiment}/models/./{logged}/artifacts/file.txt",
    "{experiment}/./models//{logged}/",
    "file:{experiment}/./{run}/artifacts",
    "{experiment}/./{run}/artifacts/file.txt%09",
    "{experiment}/./{run}/artifacts/file.txt%23",
    "{experiment}/./{run}/artifacts/%00file.txt",
)


class World(NamedTuple):
    """What a team has, or the ids of nothing; each text in it holds `word`."""

    word: str
    experiment: str
    run: str
    logged: str
    model: str

    def fields(self) -> dict[str, Any]:
        """Return a value for each field by which MLflow's messages name something."""
        run, experiment = self.run, self.experiment
        return {
            "experiment_id": experiment,
            "experiment_ids": [experiment],
            "experiment_name": f"{self.word}-experiment",
            "run_id": run,
            "run_uuid": run,
            "run_ids": [run],
            "source_run_id": run,
            "model_id": self.logged,
            "name": self.model,
            "version": "1",
            "alias": f"{self.word}-alias",
            "path": f"{self.word}.txt",
            "artifact_path": f"{self.word}.txt",
            "metric_key": f"{self.word}-metric",
            "key": f"{self.word}-tag",
            "value": "changed",
            "stage": "Production",
            "max_results": 100,
        }

    def parts(self) -> dict[str, str]:
        """Return a value for each parameter in the path of a route."""
        return {"model_id": self.logged, "tag_key": f"{self.word}-tag", "run_id": self.run}

    def spelled(self, spelling: str) -> str:
        """Return one of `SPELLINGS` with the names of this world."""
        coded = f"%25{ord(self.run[0]):x}{self.run[1:]}"
        written = spelling.format(**self._asdict(), coded=coded)
        return written.replace("file.txt", f"{self.word}.txt")

    def anonymous(self, text: bytes) -> bytes:
        """Return an answer without the ids and the word of this world, and without what is noise."""
        for word in (self.logged, self.run, self.model, self.word):
            text = text.replace(word.encode(), b"?").replace(word[2:].encode(), b"?")
        # MLflow before 3.12 shows the folder of a file that is missing.
        text = re.sub(rf"(artifacts/|\./){self.experiment}\b".encode(), b"?", text)
        text = re.sub(rf"(?<![\w/.-])(?<!Errno ){self.experiment}(?![\w.])".encode(), b"?", text)
        return NOISE.sub(b"", text)


def nothing() -> World:
    word = f"w{secrets.token_hex(8)}"
    run = secrets.token_hex(16)
    return World(word, "987654321", run, f"m-{secrets.token_hex(16)}", f"{word}-model")


def everything(team: Team) -> World:
    """Make one of each thing that a supplier can make, each text of it with a random word."""
    word = f"w{secrets.token_hex(8)}"
    tag = [{"key": f"{word}-tag", "value": word}]
    experiment = team.good("experiments/create", name=f"{word}-experiment", tags=tag)[
        "experiment_id"
    ]
    made = team.good("runs/create", experiment_id=experiment, run_name=word, tags=tag)
    run = made["run"]["info"]["run_id"]
    logged = team.good("logged-models", experiment_id=experiment, name=word, source_run_id=run)
    model_id = logged["model"]["info"]["model_id"]
    metric = {"key": f"{word}-metric", "value": 1, "timestamp": 1, "step": 1}
    team.good(
        "runs/log-batch",
        run_id=run,
        metrics=[metric, metric | {"model_id": model_id, "key": f"{word}-other"}],
        params=[{"key": f"{word}-param", "value": word}],
        tags=tag,
    )
    dataset = {"name": word, "digest": "1", "source_type": "local", "source": word}
    context = [{"key": "mlflow.data.context", "value": word}]
    team.good("runs/log-inputs", run_id=run, datasets=[{"dataset": dataset, "tags": context}])
    team.good("runs/outputs", run_id=run, models=[{"model_id": model_id, "step": 1}])
    for place in (f"{run}/artifacts", f"models/{model_id}/artifacts"):
        status, _ = team.put(f"{experiment}/{place}/{word}.txt", word.encode())
        assert status == 200
    model = f"{word}-model"
    team.good("registered-models/create", name=model, tags=tag, description=word)
    source = f"{made['run']['info']['artifact_uri']}/model"
    version = team.good(
        "model-versions/create", name=model, source=source, run_id=run, tags=tag, description=word
    )
    assert version["model_version"]["version"] == "1"
    team.good("registered-models/alias", name=model, alias=f"{word}-alias", version="1")
    return World(word, experiment, run, model_id, model)


class Team(Supplier):
    """A supplier with files."""

    def __init__(self, server: Server, owner: str, **more: Any) -> None:
        super().__init__(server, owner, **more)
        self.owner = owner

    def send(
        self, method: str, path: str, body: bytes | None = None, kind: str = "application/json"
    ) -> tuple[int, bytes]:
        headers = {"Content-Type": kind}
        # Each on a connection of its own: uvicorn closes one that is idle for five seconds.
        status, _, answer = self.server.request(
            method, path, key=self.key, headers=headers, body=body
        )
        return status, answer

    def put(self, path: str, content: bytes) -> tuple[int, bytes]:
        url = f"/api/2.0/mlflow-artifacts/artifacts/{path}"
        return self.send("PUT", url, content, "application/octet-stream")


@pytest.fixture(scope="module", params=["uvicorn", "gunicorn"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder: Path = tmp_path_factory.mktemp("confidential")
    with serve(folder, SERVERS[request.param], HOKUSAI_AUTH_ISOLATION="full") as running:
        yield running


def camel(fields: dict[str, Any]) -> dict[str, Any]:
    return {re.sub(r"_(\w)", lambda part: part[1].upper(), name): fields[name] for name in fields}


def requests_about(world: World) -> dict[str, tuple[str, str, bytes | None]]:
    """Return each request that names something of `world`, by the same name for each world."""
    found: dict[str, tuple[str, str, bytes | None]] = {}
    fields = world.fields()
    for method, rule, _ in installed_routes():
        if method == "HEAD" or NAMING.search(rule) or "gateway/supported-models" in rule:
            continue
        path = re.sub(
            r"\{(\w+)(:path)?\}", lambda part: world.parts().get(part[1], "1"), template(rule)
        )
        query = urlencode(fields, doseq=True)
        if method in ("GET", "DELETE"):
            found[f"{method} {rule} query"] = method, f"{path}?{query}", None
        for name, content in (("snake", fields), ("camel", camel(fields))):
            found[f"{method} {rule} {name}"] = method, path, json.dumps(content).encode()
    root = "/api/2.0/mlflow-artifacts/"
    for name, place in {
        "root": "",
        "experiment": world.experiment,
        "run": f"{world.experiment}/{world.run}",
        "artifacts": f"{world.experiment}/{world.run}/artifacts",
        "file": f"{world.experiment}/{world.run}/artifacts/{world.word}.txt",
        "model": f"{world.experiment}/models/{world.logged}/artifacts/{world.word}.txt",
        **{spelling: world.spelled(spelling) for spelling in SPELLINGS},
    }.items():
        found[f"list {name}"] = "GET", f"{root}artifacts?path={quote(place)}", None
        if place:
            found[f"get {name}"] = "GET", f"{root}artifacts/{place}", None
            found[f"presigned {name}"] = "GET", f"{root}presigned/{place}", None
            found[f"put {name}"] = "PUT", f"{root}artifacts/{place}/x", b"x"
            found[f"delete {name}"] = "DELETE", f"{root}artifacts/{place}", None
    error = "apiError { code message }"
    queries = {
        "mlflowGetRun": (f'runId: "{world.run}"', "run { info { runId runName } }"),
        "mlflowGetExperiment": (f'experimentId: "{world.experiment}"', "experiment { name }"),
        "mlflowGetMetricHistoryBulkInterval": (
            f'runIds: ["{world.run}"], metricKey: "{world.word}-metric", maxResults: 10',
            "metrics { key }",
        ),
        "mlflowSearchRuns": (f'experimentIds: ["{world.experiment}"]', "runs { info { runName } }"),
        "mlflowSearchModelVersions": (
            f"filter: \"name = '{world.model}'\"",
            "modelVersions { name }",
        ),
    }
    for name, (given, wanted) in queries.items():
        text = f"{{ {name}(input: {{{given}}}) {{ {wanted} {error} }} }}"
        found[f"graphql {name}"] = "POST", "/graphql", json.dumps({"query": text}).encode()
    return found


def test_foreign_and_missing_things_answer_alike(server: Server) -> None:
    acme, globex = Team(server, "ACME"), Team(server, "GLOBEX")
    everything(globex)
    foreign, missing = everything(acme), nothing()
    about_nothing = requests_about(missing)
    wrong, asked = [], 0
    for name, request in requests_about(foreign).items():
        status, body = globex.send(*request)
        asked += status == HTTPStatus.OK
        seen = status, foreign.anonymous(body)
        of_nothing = globex.send(*about_nothing[name])
        expected = of_nothing[0], missing.anonymous(of_nothing[1])
        if seen != expected:
            wrong.append((name, seen, expected))
    assert asked > 50
    assert not wrong, "\n".join(map(str, wrong))


def test_own_folder_does_not_tell_whether_an_id_is_another_owner_s(server: Server) -> None:
    """The owner sees that nothing is at a path in its own folder, whatever the path names."""
    acme, globex = Team(server, "ACME"), Team(server, "GLOBEX")
    foreign, own, missing = everything(acme), everything(globex), nothing()
    file = f"{{experiment}}/{own.run}/artifacts/{own.word}.txt/"
    folder = f"./{{experiment}}/./{own.run}/artifacts/"
    below = (f"{file}{{run}}", f"{file}{{logged}}", f"{folder}{{run}}/x", f"{folder}{{logged}}")
    root = "/api/2.0/mlflow-artifacts/"
    questions = (
        f"{root}artifacts/{{}}",
        f"{root}artifacts?path={{}}",
        f"{root}presigned/{{}}",
        f"/get-artifact?run_uuid={own.run}&path={{}}",
        f"/api/2.0/mlflow/artifacts/list?run_id={own.run}&path={{}}",
        f"/model-versions/get-artifact?name={own.model}&version=1&path={{}}",
        f"/ajax-api/2.0/mlflow/logged-models/{own.logged}/artifacts/files?artifact_file_path={{}}",
    )
    padded = f"./{{experiment}}/{'./' * 2440}{{run}}/{'./' * 2440}artifacts"
    wrong = []
    for spelling in (*SPELLINGS, *below, padded):
        for question in questions:
            answers = []
            for world in (foreign, missing):
                path = world._replace(experiment=own.experiment).spelled(spelling)
                request = question.format(quote(path, safe="%/") if "?" in question else path)
                status, body = globex.send("GET", request)
                answers.append((status, world.anonymous(body)))
            if answers[0] != answers[1]:
                wrong.append((spelling, question, *answers))
    assert not wrong, "\n".join(map(str, wrong))


def test_nothing_of_a_foreign_world_was_changed(server: Server) -> None:
    acme, globex = Team(server, "ACME"), Team(server, "GLOBEX")
    world = everything(acme)
    before = seen_by(acme, world)
    for request in requests_about(world).values():
        globex.send(*request)
    assert seen_by(acme, world) == before


def seen_by(team: Team, world: World) -> list[tuple[int, bytes]]:
    query = urlencode(world.fields(), doseq=True)
    return [
        team.send("GET", f"/api/2.0/mlflow/{path}?{query}")
        for path in (
            "runs/get",
            "experiments/get",
            "registered-models/get",
            "model-versions/get",
            "artifacts/list",
        )
    ]


def test_reader_uses_a_shared_model_and_sees_no_run(server: Server) -> None:
    name, copy = unused_name(), unused_name()
    acme, globex = Team(server, "ACME"), Team(server, "GLOBEX")
    environ = {**server.environ, "MLFLOW_TRACKING_URI": f"{server.origin}/api/mlflow"}
    run_job(environ | {"HOKUSAI_API_KEY": acme.key}, name)
    grant = {"grantee": "GLOBEX", "pattern": name, "level": "read"}
    status, granted = acme.ask("POST", f"{OWN}/grants", **grant)
    assert status == HTTPStatus.CREATED, granted
    done = run_forked(
        Path(environ["HOME"]),
        str(READER),
        name,
        copy,
        environ=environ | {"HOKUSAI_API_KEY": globex.key},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert seen["prediction"] == [42] and seen["copied"] == [2], seen
    assert {name, copy, f"{copy}-again"} <= set(seen["listed"])
    assert not [one for one in seen["experiments"] if name in one]
    assert seen["run"] == seen["experiment of the run"] == "RESOURCE_DOES_NOT_EXIST", seen
    assert seen["change"] == "PERMISSION_DENIED"
    assert not seen["key ids"]
    assert acme.ask("DELETE", f"{OWN}/grants/{granted['id']}")[0] == HTTPStatus.OK
    query = urlencode({"name": name})
    assert globex.send("GET", f"/api/2.0/mlflow/registered-models/get?{query}")[0] == 404


#: The oldest client that `make test-matrix` has an environment for.
OLDEST = "3.4.0"


@pytest.mark.parametrize("version", [None, pytest.param(OLDEST, marks=pytest.mark.long)])
def test_clients_of_two_teams_at_once_see_only_their_own(
    server: Server, version: str | None
) -> None:
    """They log the same dataset. One of them may have an older MLflow."""
    pythons = [None, None if version is None else python_of(version)]
    names = [unused_name(), unused_name()]
    teams = [Team(server, f"owner of {name}") for name in names]
    environ = {**server.environ, "MLFLOW_TRACKING_URI": f"{server.origin}/api/mlflow"}

    def work(name: str, team: Team, python: Path | None) -> dict[str, Any]:
        own = environ | {"HOKUSAI_API_KEY": team.key}
        if python is None:
            done = run_forked(Path(environ["HOME"]), str(TRAINING), name, environ=own)
        else:
            command = [str(python), str(TRAINING), name]
            done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
        found: dict[str, Any] = json.loads(line)
        return found

    with ThreadPoolExecutor() as threads:
        seen = list(threads.map(work, names, teams, pythons))
    for name, found in zip(names, seen, strict=True):
        assert found["copied"] == f"{name}-copy/1"
        assert found["prediction"] == 2
        assert sorted(found["experiments"]) == sorted(["Default", f"{name}-experiment"])
        assert found["runs"] == [f"{name}-run"]
        assert "everybody's" in found["datasets"]
        assert found["models"] == [name, f"{name}-copy"]
        assert sorted(found["versions"]) == [f"{name}-copy/1", f"{name}/1"]
        assert set(found["logged"]) <= set(found["run ids"])
    assert seen[0]["datasets"] == seen[1]["datasets"]


def test_operators_learn_what_was_hidden(server: Server) -> None:
    # Of the answers to the tests before, up to a hundred wait to be looked behind.
    acme, spy = Team(server, "ACME"), Team(server, unused_name())
    world, own = everything(acme), everything(spy)

    def hidden() -> list[str]:
        return [line for line in server.log.splitlines() if f"of {spy.owner}, request" in line]

    def ask(path: str) -> bool:
        return spy.send("GET", path)[0] == HTTPStatus.NOT_FOUND

    # What does not exist, or is one's own, is not hidden.
    assert ask(f"/api/2.0/mlflow/runs/get?run_id={nothing().run}")
    # To a file that is missing MLflow 3.9 answers 500.
    spy.send("GET", f"/get-artifact?run_id={own.run}&path=missing")
    wait_until(lambda: ask(f"/api/2.0/mlflow/runs/get?run_id={world.run}") and bool(hidden()))
    assert all("(GET /api/2.0/mlflow/runs/get)" in line for line in hidden())
    place = f"{world.experiment}/{world.run}/artifacts/{world.word}.txt"
    spy.send("GET", f"/api/2.0/mlflow-artifacts/artifacts/{place}")
    # Another worker may still look behind an answer from before.
    wait_until(lambda: any("artifacts at " in one and world.run in one for one in hidden()))
