"""Two replicas on one PostgreSQL, and suppliers who claim one name on both at once."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from typing import IO, Any

import pytest

from tests.docker.stack import REPLICAS, Stack, until
from tests.server.isolation.stores import unused_name

pytestmark = pytest.mark.docker

#: Makes what each line of its input says, on a connection that stays open; prints status and answer.
_CLAIM = """
import http.client, json, sys
key = json.loads(sys.stdin.readline())
connection = http.client.HTTPConnection("127.0.0.1", 5000, timeout=60)
headers = {"Host": "localhost:5000", "X-API-Key": key, "Content-Type": "application/json"}
for line in sys.stdin:
    path, name = json.loads(line)
    body = json.dumps({"name": name})
    connection.request("POST", f"/api/2.0/mlflow/{path}/create", body, headers)
    answer = connection.getresponse()
    print(json.dumps([answer.status, answer.read().decode()]), flush=True)
"""


class Claimant:
    """A supplier's process beside one replica."""

    def __init__(self, stack: Stack, replica: str, owner: str) -> None:
        command = ["hokusai-auth", "keys", "create", "--json", "--scope=model:write"]
        made = json.loads(stack.exec(replica, *command, f"--owner={owner}").stdout)
        self.process = subprocess.Popen(
            ["docker", "exec", "-i", stack.container(replica), "python", "-c", _CLAIM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.send(made["key"])

    def send(self, line: Any) -> None:
        stdin: IO[str] | None = self.process.stdin
        assert stdin is not None
        stdin.write(json.dumps(line) + "\n")
        stdin.flush()

    def answer(self) -> tuple[int, str]:
        assert self.process.stdout is not None
        status, body = json.loads(self.process.stdout.readline())
        return status, body

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def claimants(stack: Stack) -> Iterator[list[Claimant]]:
    line = "The isolation is now writes"
    before = {replica: stack.logs(replica).count(line) for replica in REPLICAS}
    stack.exec(REPLICAS[0], "hokusai-auth", "isolation", "writes")
    with contextlib.ExitStack() as last:
        last.callback(stack.exec, REPLICAS[0], "hokusai-auth", "isolation", "default")
        for replica, count in before.items():
            # Both of its workers.
            until(lambda r=replica, c=count: stack.logs(r).count(line) == c + 2)
        found = []
        for replica, owner in zip(REPLICAS, ("ACME", "GLOBEX"), strict=True):
            found.append(Claimant(stack, replica, owner))
            last.callback(found[-1].end)
        yield found


@pytest.mark.parametrize("path", ["registered-models", "experiments"])
def test_name_that_is_claimed_on_both_replicas_is_one_owner_s(
    claimants: list[Claimant], path: str
) -> None:
    for number in range(50):
        name = unused_name()
        for claimant in claimants if number % 2 else reversed(claimants):
            claimant.send([path, name])
        answers = [claimant.answer() for claimant in claimants]
        assert sorted(status for status, _ in answers) == [200, 403], answers
        (lost,) = [body for status, body in answers if status == 403]
        assert json.loads(lost)["error"] == "NAME_TAKEN" and "[SQL" not in lost
