"""Everything of `docker/` together: what a supplier sees, routes, what an operator needs."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
import yaml

from tests.docker.stack import REPLICAS, ROOT, SERVICES, Stack, docker, until

pytestmark = pytest.mark.docker

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"
KEYS = "/api/2.0/hokusai/keys"
COMPOSE = ROOT / "docker" / "docker-compose.yml"


@pytest.fixture(scope="module", params=["of the key store", "of the auth service"])
def supplier_key(request: pytest.FixtureRequest, stack: Stack) -> str:
    if request.param == "of the key store":
        return stack.key("model:write")
    return stack.service_key(user_id="acme", scopes=["model:write"])


def test_a_supplier_registers_a_model_through_the_prefix_alone(
    stack: Stack, supplier_key: str, request: pytest.FixtureRequest
) -> None:
    name = f"supplied-{request.node.callspec.indices['supplier_key']}"
    done = stack.client("python", "/register.py", name, key=supplier_key)
    saw = json.loads(done.stdout)
    assert saw["tracking_uri"] == "http://nginx/api/mlflow"
    assert (saw["model"], saw["version"], saw["status"]) == (name, "1", "READY")
    assert saw["metric"] == 0.91
    assert saw["downloaded"] == {"weights.txt": "weights of the model"}
    # nginx routed all of it, both replicas had a part, and none of it was tried twice.
    lines = [line for line in stack.logs("nginx").splitlines() if saw["run"] in line]
    assert lines and all(" 200 " in line and "/api/mlflow/" in line for line in lines)
    assert all(f".{11 + number}:5000 200" in stack.logs("nginx") for number in (0, 1))


#: A path, and what is answered without a key and with one, whichever profile is asked.
ROUTES = [
    ("/api/mlflow/health", 200, 200),
    ("/api/mlflow" + EXPERIMENT, 401, 200),
    ("/api/mlflow/version", 401, 200),
    ("/api/mlflow/", 303, 200),
    ("/api/mlflow/static-files/index.html", 200, 200),
    ("/api/mlflow/static-files/none.html", 401, 404),
    ("/hokusai/login", 200, 200),
    ("/hokusai/metrics", 401, 403),
]
#: What the first profile leaves to others, and what would be that after the prefix.
ELSEWHERE = ["/", "/health", EXPERIMENT, "/mlflow" + EXPERIMENT, "/api/mlflowx/health", "/api/"]
ELSEWHERE += ["/hokusaix", "/api/mlflow/../..//health", "/api/mlflow/%2e%2e/%2e%2e/health"]


def test_both_profiles_route_the_prefix_and_the_pages(stack: Stack) -> None:
    key, wrong = stack.key("mlflow:read"), []
    for service in ("nginx", "nginx-all"):
        for path, *expected in ROUTES:
            accept = {"Accept": "text/html"} if path == "/api/mlflow/" else {}
            got = [
                stack.request(service, "GET", path, key=given, headers=accept)[0]
                for given in (None, key)
            ]
            if got != expected:
                wrong.append(f"{service} {path}: {got}, not {expected}")
    assert not wrong, "\n".join(wrong)


def test_the_prefix_profile_routes_nothing_else(stack: Stack) -> None:
    wrong = []
    for path in ELSEWHERE:
        status, headers, body = stack.request("nginx", "GET", path, key=stack.key("mlflow:read"))
        if (status, headers["server"]) != (404, "nginx") or b"nginx" not in body:
            wrong.append(f"{path}: {status} {headers} {body[:200]!r}")
    assert not wrong, "MLflow was asked:\n" + "\n".join(wrong)


def test_the_other_profile_routes_everything(stack: Stack) -> None:
    key = stack.key("mlflow:read")
    for prefix in ("", "/mlflow", "/api/mlflow"):
        asked = ((EXPERIMENT, None), (EXPERIMENT, key), ("/health", None), ("/", key))
        got = [stack.request("nginx-all", "GET", prefix + path, key=k) for path, k in asked]
        assert [status for status, *_ in got] == [401, 200, 200, 200], prefix
        assert b"<title>MLflow" in got[-1][2], prefix


#: Prints when a request was sent and what came of it, each on a connection of its own.
WATCH = """
import http.client, json, sys, time
key, path = json.load(sys.stdin)
while True:
    sent = time.time()
    connection = http.client.HTTPConnection("127.0.0.1", 5000, timeout=30)
    connection.request("GET", path, headers={"Host": "localhost:5000", "X-API-Key": key})
    print(json.dumps([sent, connection.getresponse().status]), flush=True)
    connection.close()
    time.sleep(0.1)  # Sixty refusals in a minute, and the answer is 429.
"""


@contextlib.contextmanager
def watched(stack: Stack, replica: str, key: str) -> Iterator[list[tuple[float, int]]]:
    """What the replica answers to this key, past nginx, while the context lasts."""
    seen: list[tuple[float, int]] = []
    command = ["docker", "exec", "--interactive", stack.container(replica), "timeout", "180"]
    watcher = subprocess.Popen(
        [*command, "python", "-c", WATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert watcher.stdin and watcher.stdout
    watcher.stdin.write(json.dumps([key, EXPERIMENT]))
    watcher.stdin.close()
    lines = watcher.stdout
    thread = threading.Thread(target=lambda: seen.extend(tuple(json.loads(n)) for n in lines))
    thread.start()
    try:
        yield seen
    finally:
        watcher.kill()
        thread.join()
        watcher.wait()


def test_a_key_revoked_on_one_replica_is_refused_by_the_other_once_it_says_so(stack: Stack) -> None:
    made = stack.new_key("mlflow:read")
    admin = stack.key("mlflow:admin")
    through_nginx: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.1):
            path = "/api/mlflow" + EXPERIMENT
            through_nginx.append(stack.request("nginx", "GET", path, key=made["key"])[0])

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        with watched(stack, "mlflow-2", made["key"]) as seen:
            # Enough for both workers to have the key in their caches.
            until(lambda: len(seen) > 20 and len(through_nginx) > 5)
            path = f"{KEYS}/{made['key_id']}?wait=true"
            assert stack.ask("mlflow-1", "DELETE", path, key=admin)[0] == 200
            answered = time.time()
            until(lambda: sum(sent > answered for sent, _ in seen) > 12)
    finally:
        over.set()
        asking.join()
    assert {status for sent, status in seen if sent > answered} == {401}
    assert {status for _, status in seen} == {200, 401} == set(through_nginx)


#: A supplier's script: a random file of `size` MiB up and down again, never whole in memory.
LARGE = """
import hashlib, json, os, sys, tempfile
from pathlib import Path
import mlflow
from mlflow import MlflowClient

def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

with tempfile.TemporaryDirectory() as name:
    up = Path(name, "large.bin")
    block = os.urandom(1 << 20)
    with up.open("wb") as file:
        for number in range(int(sys.argv[1])):
            file.write(number.to_bytes(8, "big") + block[8:])
    sent, client = [up.stat().st_size, digest(up)], MlflowClient()
    run = client.create_run(client.create_experiment("large")).info
    client.log_artifact(run.run_id, str(up))
    up.unlink()
    (listed,) = client.list_artifacts(run.run_id)
    down = Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path="large.bin"))
    print(json.dumps([sent, [down.stat().st_size, digest(down)], listed.file_size]))
"""


class Memory:
    """The peaks of a container's memory, five times a second: of its programs, and of its files.

    Not what `docker stats` shows, which counts files that are being read or written, so that an
    artifact on its way to the disk looks like a leak. `files` is what tells of temporary files that
    have no name any more, as nginx's have none.
    """

    FILES = "cd /sys/fs/cgroup; [ -f memory.stat ] || cd memory; cat memory.stat"

    def __init__(self, stack: Stack, service: str) -> None:
        self._stack, self._service = stack, service
        self._over = threading.Event()
        self.before = self.peak = self._now()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _now(self) -> tuple[int, int]:
        said = self._stack.exec(self._service, "sh", "-c", self.FILES).stdout
        found = dict(line.split() for line in said.splitlines())
        # Version 2 of control groups, or version 1.
        names = ("anon", "file") if "anon" in found else ("total_rss", "total_cache")
        return int(found[names[0]]), int(found[names[1]])

    def _watch(self) -> None:
        while not self._over.wait(0.2):
            self.peak = tuple(map(max, self.peak, self._now()))

    def stop(self) -> tuple[int, int]:
        """By how many MiB programs and files grew at most."""
        self._over.set()
        self._thread.join()
        own, files = ((b - a) >> 20 for a, b in zip(self.before, self.peak, strict=True))
        return own, files


def test_an_artifact_of_a_gibibyte_passes_through_in_both_directions(stack: Stack) -> None:
    watched = {service: Memory(stack, service) for service in (*REPLICAS, "nginx")}
    began = time.monotonic()
    try:
        done = stack.client("python", "-c", LARGE, "1024", key=stack.key("model:write"))
    finally:
        grown = {service: memory.stop() for service, memory in watched.items()}
    print(f"{time.monotonic() - began:.0f} s; MiB grown, own and files: {grown}")
    sent, got, listed = json.loads(done.stdout.splitlines()[-1])
    assert sent[0] == listed == 1 << 30
    assert got == sent
    assert max(grown[replica][1] for replica in REPLICAS) > 100, "these had to write the file"
    assert all(grown[replica][0] < 100 for replica in REPLICAS)
    assert max(grown["nginx"]) < 20


def test_an_upload_is_refused_before_it_is_sent(stack: Stack) -> None:
    """As nobody without a key may fill a disk or hold a line; curl and MLflow read the reason."""
    path = "/api/mlflow/api/2.0/mlflow-artifacts/artifacts/0/x/artifacts/large.bin"
    connection = http.client.HTTPConnection(*stack.url("nginx")[7:].split(":"), timeout=30)
    connection.putrequest("PUT", path)
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders(b"x" * 65536)
    answer = connection.getresponse()
    assert answer.status == 401
    assert json.loads(answer.read())["error_code"] == "UNAUTHENTICATED"


#: Changes a key's note and prints which address this machine did it from.
CHANGE = """
import http.client, os, sys
connection = http.client.HTTPConnection("nginx", timeout=30)
headers = {"X-API-Key": os.environ["HOKUSAI_API_KEY"], "Content-Type": "application/json"}
headers["X-Forwarded-For"] = "203.0.113.9"
connection.connect()
print(connection.sock.getsockname()[0])
connection.request("PATCH", sys.argv[1], b'{"note": "changed"}', headers)
sys.exit(connection.getresponse().status != 200)
"""


def test_a_client_s_address_is_what_nginx_saw_and_not_what_the_client_says(stack: Stack) -> None:
    changed = stack.new_key("model:read")["key_id"]
    command = ("python", "-c", CHANGE, f"/api/mlflow{KEYS}/{changed}")
    address = stack.client(*command, key=stack.key("mlflow:admin")).stdout.split()[-1]
    audited = stack.exec("mlflow-2", "hokusai-auth", "audit", "--json", "--event", "key.").stdout
    events = [json.loads(line) for line in audited.splitlines()]
    (event,) = [e for e in events if e["key_id"] == changed and e["event"] != "key.created"]
    assert event["address"] == address


def test_prometheus_reads_both_replicas_and_has_all_rules(stack: Stack) -> None:
    def ask(path: str) -> dict[str, list[dict[str, object]]]:
        with urlopen(f"{stack.url('prometheus')}/api/v1/{path}", timeout=30) as answer:
            return json.load(answer)["data"]

    def targets() -> dict[object, object]:
        found = ask("targets?state=active")["activeTargets"]
        return {target["scrapeUrl"]: target["health"] for target in found}

    wanted = {f"http://{replica}:5000/hokusai/metrics": "up" for replica in REPLICAS}
    until(lambda: targets() == wanted)
    written = yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())["groups"]
    loaded = ask("rules")["groups"]
    count = {group["name"]: len(group["rules"]) for group in written}
    assert {group["name"]: len(group["rules"]) for group in loaded} == count


def test_a_second_up_changes_nothing_and_works(stack: Stack) -> None:
    def containers() -> dict[str, tuple[str, str]]:
        return {s: (stack.inspect(s)["Image"], stack.container(s)) for s in SERVICES}

    before = containers()
    secrets = {file.name: file.read_text() for file in stack.secrets.iterdir()}
    said = stack.up()
    assert '"status": "READY"' in said and stack.url("nginx").split(":")[-1] in said
    after = containers()
    # If somebody has changed the code meanwhile, there is a new image and a new container.
    assert {s: after[s] for s in SERVICES if after[s][0] == before[s][0]}.items() <= before.items()
    assert after["postgres"] == before["postgres"] and after["nginx"] == before["nginx"]
    assert {file.name: file.read_text() for file in stack.secrets.iterdir()} == secrets


def test_without_an_engine_the_script_says_so(stack: Stack) -> None:
    nowhere = Stack(stack.secrets.parent / "other", DOCKER_HOST="unix:///nowhere/docker.sock")
    with pytest.raises(AssertionError, match="no Docker engine answers at unix:///nowhere"):
        nowhere.up()
    assert not nowhere.secrets.exists()


def secrets_of(stack: Stack) -> dict[str, str]:
    """Every text that nobody but its reader may see, by the name of its file."""
    found = {file.name: file.read_text() for file in stack.secrets.iterdir()}
    of_service = json.loads(found.pop("service_keys"))
    assert of_service and all(len(text) > 20 for text in found.values())
    return {**found, **{f"key {number}": key for number, key in enumerate(of_service)}}


def test_no_secret_is_in_the_compose_file_or_in_what_the_engine_tells(stack: Stack) -> None:
    stack.service_key(user_id="x", scopes=[])
    secrets = secrets_of(stack)
    config = stack.compose("config").stdout
    assert yaml.safe_load(config)["services"]
    places = {"config": config, "compose file": COMPOSE.read_text()}
    for service in SERVICES:
        container = stack.container(service)
        places[f"inspect {service}"] = docker("inspect", container)
        places[f"processes of {service}"] = docker("top", container, "-eo", "pid,args")
        assert len(places[f"processes of {service}"].splitlines()) > 1
        places[f"log of {service}"] = stack.logs(service)
        image = stack.inspect(service)["Image"]
        places[f"image of {service}"] = docker("history", "--no-trunc", image)
    found = [(p, name) for p, text in places.items() for name, s in secrets.items() if s in text]
    assert found == []


def test_a_key_in_the_query_is_in_no_log(stack: Stack) -> None:
    key = stack.new_key("mlflow:read")["key"]
    path = f"/api/mlflow{EXPERIMENT}&api_key={key}"
    referer = {"Referer": f"http://localhost/?api_key={key}"}
    assert stack.request("nginx", "GET", path, headers=referer)[0] == 200
    assert stack.request("nginx", "GET", f"/api/mlflow/{key}")[0] == 401
    # Docker shows a line some time after nginx has written it.
    until(lambda: "[has a key]" in stack.logs("nginx"))
    assert "/api/mlflow/api/2.0/mlflow/experiments/get" in stack.logs("nginx")
    for service in ("nginx", *REPLICAS):
        assert key not in stack.logs(service), service
