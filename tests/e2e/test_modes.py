"""What the settings change on a running server: the mode, the policy, and GraphQL by its body."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from mlflow_hokusai_auth.core import keys
from tests.e2e.parts import EXPERIMENT, hokusai_auth
from tests.harness import (
    PREFIXES,
    SERVERS,
    Server,
    each_worker_answers,
    environment,
    free_port,
    run_command,
    serve,
    wait_until,
)

pytestmark = pytest.mark.servers

CREATE = "/api/2.0/mlflow/experiments/create"
KEYS = "/api/2.0/hokusai/keys"
JSON = {"Content-Type": "application/json"}
QUERY = b'{"query": "{ test(inputString: \\"x\\") { output } }"}'
KINDS = ("uvicorn", "gunicorn")
#: The start of the query by which MLflow's pages show a run.
RUN = b"""{"query": "query GetRun($data: MlflowGetRunInput!) { mlflowGetRun(input: $data) {
  apiError { code } run { info { runUuid } experiment { name } modelVersions { name } } } }",
  "variables": {"data": {"runId": "none"}}}""".replace(b"\n", b" ")
SCHEMA = b'{"query": "{ __schema { queryType { name } } }"}'
MUTATION = b'{"query": "mutation { testMutation(inputString: \\"x\\") { output } }"}'


def test_graphql_is_told_apart_by_its_body(servers: dict[str, Server]) -> None:
    cases = [
        ("mlflow:read", QUERY, 200),
        ("mlflow:read", MUTATION, 403),
        ("mlflow:read", b"not json", 403),
        ("mlflow:read", b'{"query": "{ a }", "pad": "' + b"x" * 300_000 + b'"}', 403),
        ("mlflow:write", MUTATION, 200),
        ("model:write", RUN, 200),
        ("model:read", RUN, 200),
        ("mlflow:write", RUN, 200),
        ("predict", RUN, 403),
        ("metrics:read", RUN, 403),
        # A field that has no row in the table of fields takes a scope for everything.
        ("model:write", QUERY, 403),
        ("model:write", SCHEMA, 403),
        ("mlflow:read", SCHEMA, 200),
        ("model:write", MUTATION, 403),
        ("model:write", b'{"query": "{ a: mlflowGetRun ...F } fragment F on Query { test }"}', 403),
    ]
    wrong = []
    for kind, prefix in itertools.product(KINDS, ("", "/api/mlflow")):
        for scope, body, status in cases:
            answer = servers[kind].request(
                "POST",
                f"{prefix}/graphql",
                key=servers[kind].key(scope),
                headers=JSON,
                body=body,
            )
            if answer[0] != status or (status == 200 and not json.loads(answer[2])["data"]):
                wrong.append(f"{kind} {prefix} {scope} {body[:60]!r}: {answer}")
    assert not wrong, "\n".join(wrong)


def test_graphql_reads_no_body_of_a_key_that_may_not_read(servers: dict[str, Server]) -> None:
    for server in (servers[kind] for kind in KINDS):
        for key in (keys.generate(), server.key("predict"), server.key("metrics:read")):
            answer = server.raw(
                f"POST /graphql HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: {key}\r\n"
                "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n".encode()
            )
            assert answer.startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 403 ")), answer


def test_graphql_refusals_and_log_say_what_the_body_takes(tmp_path: Path) -> None:
    wrong = []
    # (body, scope of the key) -> the scope that the refusal names, access and outcome in the log.
    cases = [
        ("model:write", QUERY, "mlflow:read", "read", "refused"),
        ("model:write", MUTATION, "mlflow:write", "write", "refused"),
        ("mlflow:read", MUTATION, "mlflow:write", "write", "refused"),
        ("predict", RUN, "mlflow:read", "read", "refused"),
        ("model:read", RUN, None, "read", "allowed"),
        ("mlflow:write", RUN, None, "read", "allowed"),
        ("mlflow:write", MUTATION, None, "write", "allowed"),
    ]
    for kind in KINDS:
        with serve(tmp_path / kind, SERVERS[kind], HOKUSAI_AUTH_LOG_READS="1") as server:
            for number, (scope, body, named, access, outcome) in enumerate(cases):
                headers = {**JSON, "X-Request-Id": f"case-{number}"}
                key = server.key(scope)
                answer = server.request("POST", "/graphql", key=key, headers=headers, body=body)
                content = json.loads(answer[2])
                line = logged(server, f"case-{number}")
                got = (content.get("required_scope"), line["access"], line["outcome"])
                if got != (named, access, outcome) or (named and named not in content["message"]):
                    wrong.append(f"{kind} {scope} {body[:40]!r}: {got} {content}")
    assert not wrong, "\n".join(wrong)


def logged(server: Server, request_id: str) -> dict[str, object]:
    """The decision log's line of that request."""
    wanted = f'"request_id": "{request_id}"'
    wait_until(lambda: wanted in server.log)
    line = next(line for line in server.log.splitlines() if wanted in line)
    found: dict[str, object] = json.loads(line[line.index("{") :])
    return found


def would_refuse(server: Server) -> list[str]:
    lines = [line for line in server.log.splitlines() if '"would_refuse"' in line]
    return [json.loads(line)["reason"] for line in lines]


def test_observe_refuses_nobody_and_says_whom_it_would(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE="observe") as server:
        reader = server.key("mlflow:read")
        assert server.request("GET", EXPERIMENT)[0] == 200
        body = b'{"name": "observed"}'
        assert server.request("POST", CREATE, key=reader, headers=JSON, body=body)[0] == 200
        assert server.request("GET", "/api/mlflow" + EXPERIMENT, key=reader)[0] == 200
        wrong = "hk_live_" + "b" * 32
        assert server.request("GET", EXPERIMENT, key=wrong)[0] == 200
        expected = ["KEY_MISSING", "SCOPE_MISSING", "KEY_UNKNOWN"]
        # A line is written once the answer is sent.
        wait_until(lambda: would_refuse(server) == expected)
        assert "mode is observe" in server.log
        assert wrong not in server.log
        nobody_manages_keys(server)


def test_off_asks_nobody_and_says_so(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE="off") as server:
        assert server.request("GET", EXPERIMENT)[0] == 200
        assert server.request("GET", "/api/mlflow" + EXPERIMENT)[0] == 200
        assert "MODE IS off" in server.log
        nobody_manages_keys(server)


def test_off_under_gunicorn(tmp_path: Path) -> None:
    options = ("--workers", "1", "--gunicorn-opts", "--log-level info")
    with serve(tmp_path, options, HOKUSAI_AUTH_MODE="off") as server:
        assert server.request("GET", EXPERIMENT)[0] == 200
        nobody_manages_keys(server)


def nobody_manages_keys(server: Server) -> None:
    """Keys that are made while nobody is refused would open the gate later."""
    writer = server.key("mlflow:write")
    body = '{"owner": "me", "scopes": ["mlflow:admin"]}'
    # As routers understand them, some of which take off all slashes at the beginning.
    for start in ("", "/", "//", "/mlflow", "/mlflow/", "/api/mlflow//"):
        for method, path in (
            ("POST", KEYS),
            ("GET", KEYS),
            ("GET", f"{KEYS}/export"),
            ("POST", f"{KEYS}/import"),
            ("DELETE", f"{KEYS}/key_1?force=true"),
            ("GET", "/api/2.0/hokusai/whoami"),
            ("POST", "/api/v1/keys/validate"),
            ("GET", "/hokusai/keys"),
            ("GET", "/hokusai/models"),
            ("POST", "/hokusai/models/assign"),
            ("POST", "/hokusai/trusts/add"),
            ("GET", "/hokusai/links"),
            ("GET", "/hokusai/metrics"),
            ("GET", "/api/health/mlflow/detailed"),
            ("GET", "/ajax-api/3.0/mlflow/assistant/config"),
        ):
            answer = server.raw(
                f"{method} {start}{path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
                "Connection: close\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            assert answer.startswith(b"HTTP/1.1 401 "), (start, path, answer)
    assert server.request("GET", KEYS, key=writer)[0] == 403
    assert {record.owner for record in server.store.each()} == {"test"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_process_of_every_replica_follows_a_change_of_mode(tmp_path: Path, kind: str) -> None:
    options = ("--workers", "2", *(("--gunicorn-opts", "--log-level info") * (kind == "gunicorn")))
    # Two replicas of two workers on one store.
    with serve(tmp_path / "a", options) as one:
        uri = one.environ["HOKUSAI_AUTH_DATABASE_URI"]
        with serve(tmp_path / "b", options, HOKUSAI_AUTH_DATABASE_URI=uri) as other:
            replicas = (one, other)
            ready = "Application startup complete" if kind == "uvicorn" else "Booting worker"
            wait_until(lambda: all(r.log.count(ready) == 2 for r in replicas))
            if kind == "gunicorn":
                for replica in replicas:
                    each_worker_answers(replica)

            def asked(key: str | None = None) -> set[tuple[int, str | None]]:
                """Status and header of answers to more connections than there are processes."""
                answers = [
                    r.request("GET", EXPERIMENT, key=key) for r in replicas for _ in range(8)
                ]
                return {(a[0], a[1].get("x-hokusai-auth-mode")) for a in answers}

            def follow(mode: str) -> None:
                told = f"The mode is now {mode}"
                before = [replica.log.count(told) for replica in replicas]
                hokusai_auth(one, "mode", mode)
                wait_until(lambda: [replica.log.count(told) - 2 for replica in replicas] == before)

            assert asked() == {(401, None)}
            follow("observe")
            assert asked() == {(200, None)}
            follow("off")
            assert asked() == {(200, "off")}
            # A key is not asked for, and not looked up either.
            assert asked("hk_live_" + "c" * 32) == {(200, "off")}
            metrics_key = one.key("metrics:read")
            for replica in replicas:
                text = replica.request("GET", "/hokusai/metrics", key=metrics_key)[2].decode()
                assert 'hokusai_auth_mode{mode="off"} 1.0' in text
                assert 'hokusai_auth_mode{mode="enforce"} 0.0' in text
            # Refusals and redirects say so, too.
            for path, status in ((KEYS, 401), ("/api/mlflow", 308)):
                answer = one.request("GET", path)
                assert (answer[0], answer[1]["x-hokusai-auth-mode"]) == (status, "off"), path
            follow("enforce")
            assert asked() == {(401, None)}
            assert asked(one.key("mlflow:read")) == {(200, None)}
            # Whoever starts later, or again, goes on with what was said.
            follow("observe")
            settings = {"HOKUSAI_AUTH_DATABASE_URI": uri, "HOKUSAI_AUTH_MODE": "enforce"}
            with serve(tmp_path / "c", options, **settings) as late:
                assert late.request("GET", EXPERIMENT)[0] == 200
                assert "It overrides HOKUSAI_AUTH_MODE=enforce" in late.log
            follow("enforce")
    events = one.store.database.audited(event="mode.changed")
    said = ["observe", "off", "enforce", "observe", "enforce"]
    assert [event["detail"] for event in events] == [{"mode": mode} for mode in said]
    assert all(event["actor"].startswith("cli:") for event in events)
    assert json.loads(hokusai_auth(one, "mode", "--json"))["mode"] == "enforce"
    assert hokusai_auth(one, "mode").startswith("enforce\nsince 20")


def test_default_is_what_the_server_was_started_with(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE="observe") as server:
        for mode, status in (("enforce", 401), ("default", 200)):
            hokusai_auth(server, "mode", mode)
            wait_until(lambda s=status: server.request("GET", EXPERIMENT)[0] == s)
        assert json.loads(hokusai_auth(server, "mode", "--json"))["mode"] == "default"


def test_the_report_says_who_would_have_been_refused(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_MODE="observe") as server:
        reader = server.key("mlflow:read")
        key_id = server.store.page()[0][0].key_id
        for _ in range(3):
            server.request("POST", CREATE, key=reader, headers=JSON, body=b"{}")
        for _ in range(2):
            server.request("GET", EXPERIMENT)
        server.request("GET", "/no/such/route", key=server.key("mlflow:admin"))
        wait_until(lambda: len(json.loads(hokusai_auth(server, "mode", "--report", "--json"))) == 2)
        rows = json.loads(hokusai_auth(server, "mode", "--report", "--json"))
        assert [(r["requests"], r["reason"], r["rule"], r["key_id"], r["owner"]) for r in rows] == [
            (3, "SCOPE_MISSING", "POST /api/2.0/mlflow/experiments/create", key_id, "test"),
            (2, "KEY_MISSING", "GET /api/2.0/mlflow/experiments/get", "", ""),
        ]
        assert {row["address"] for row in rows} == {"127.0.0.1"}
        table = hokusai_auth(server, "mode", "--report")
        assert table.splitlines()[1].split()[:2] == ["3", "SCOPE_MISSING"]
        assert hokusai_auth(server, "mode", "--report", "--since", "1s") == "none\n"


def test_forcing_a_mode_counts_more_than_the_store(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_FORCE_MODE="off") as server:
        hokusai_auth(server, "mode", "enforce")
        # Whoever follows a level that is set later, and then another, has seen the mode.
        for level in ("info", "error"):
            hokusai_auth(server, "log-level", level)
            told = f"The log level is now {level.upper()}"
            wait_until(lambda told=told: told in server.log)
        assert server.request("GET", EXPERIMENT)[0] == 200


def test_forced_off_it_serves_without_its_key_store(tmp_path: Path) -> None:
    """The last resort: neither the store nor the authority is there, and models are registered."""
    nowhere = f"postgresql://u:p@127.0.0.1:{free_port()}/gone"
    with serve(
        tmp_path, HOKUSAI_AUTH_FORCE_MODE="off", HOKUSAI_AUTH_DATABASE_URI=nowhere
    ) as server:
        assert "starts all the same" in server.log
        for prefix in PREFIXES:
            answer = server.request("GET", prefix + EXPERIMENT)
            assert (answer[0], answer[1]["x-hokusai-auth-mode"]) == (200, "off")
        assert server.request("GET", KEYS, key="hk_live_" + "d" * 32)[0] == 503
        assert server.request("GET", "/health")[0] == 200


def test_forced_off_is_the_only_way_to_serve_without_it(tmp_path: Path) -> None:
    nowhere = f"postgresql://u:p@127.0.0.1:{free_port()}/gone"
    with (
        pytest.raises(
            AssertionError, match="hokusai-auth can't start: the key store can't be read"
        ),
        serve(tmp_path, HOKUSAI_AUTH_MODE="off", HOKUSAI_AUTH_DATABASE_URI=nowhere),
    ):
        pass


def test_mode_command_refuses_bad_arguments(tmp_path: Path) -> None:
    for arguments in (["strict"], ["off", "--report"], ["--report", "--since", "x"]):
        done = run_command(tmp_path, "mode", *arguments, environ=environment(tmp_path))
        assert done.returncode in (1, 2), arguments
        assert len(done.stderr.strip().splitlines()[-1]) > 20, arguments
        assert "Traceback" not in done.stderr, arguments


def test_the_admin_policy_locks_everybody_else_out(tmp_path: Path) -> None:
    with serve(tmp_path, HOKUSAI_AUTH_POLICY="admin", REGISTRY_ADMIN_SCOPES="ops") as server:
        assert server.request("GET", EXPERIMENT, key=server.key("mlflow:write"))[0] == 403
        assert server.request("GET", EXPERIMENT, key=server.key("mlflow:admin"))[0] == 200
        assert server.request("GET", EXPERIMENT, key=server.key("ops"))[0] == 200
        assert server.request("GET", "/health")[0] == 200
