"""The commands of `hokusai-auth`: exit status, output, and no key where none is needed."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import sqlalchemy as sa
import time_machine
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.authorities import cache
from mlflow_hokusai_auth.cli import main, output, server
from mlflow_hokusai_auth.core import keys, times
from mlflow_hokusai_auth.core.types import Principal
from mlflow_hokusai_auth.store.database import Actor
from mlflow_hokusai_auth.store.keys import LocalStore
from mlflow_hokusai_auth.store.tables import AUDIT, KEYS
from mlflow_hokusai_auth.store.usage import UseCounter
from tests.harness import HOKUSAI_AUTH, ROOT, environment

OLD_KEY = "hk_live_" + "Ab1" * 10 + "zz"
READER = ("--owner", "ACME", "--scope", "mlflow:read")
Call = Callable[..., Result]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(f"sqlite:///{tmp_path}/hokusai_auth.db")
    store.migrate()
    return store


@pytest.fixture
def call(tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command in this process, on the database of `store`."""
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", f"sqlite:///{tmp_path}/hokusai_auth.db")
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")

    def call(*arguments: str, stdin: str | bytes = "", status: int = 0) -> Result:
        done = CliRunner().invoke(main, arguments, input=stdin, catch_exceptions=False)
        assert done.exit_code == status, done.output
        return done

    return call


def made(call: Call, *arguments: str) -> dict[str, Any]:
    return json.loads(call("keys", "create", *(arguments or READER), "--json").stdout)


def shown(call: Call, key_id: str) -> dict[str, Any]:
    return json.loads(call("keys", "show", key_id, "--json").stdout)


def audited(call: Call, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in call("audit", "--json", *arguments).stdout.splitlines()]


def mistake(done: Result) -> str:
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hokusai-auth: ")
    return line


def test_key_is_shown_once(call: Call) -> None:
    new = made(call)
    assert keys.importable(new["key"])
    for command in (["list"], ["list", "--json"], ["show", new["key_id"]], ["export"]):
        listed = call("keys", *command)
        assert listed.stderr == ""
        assert new["key_id"] in listed.stdout
        assert new["key"][8:] not in listed.stdout


def test_create_prints_only_the_key_to_standard_output(call: Call) -> None:
    created = call("keys", "create", *READER, "--environment", "test")
    assert re.fullmatch(r"hk_test_\w+\n", created.stdout)
    assert keys.importable(created.stdout.strip())
    assert "not stored" in created.stderr and created.stdout.strip() not in created.stderr


def test_create_takes_every_field(call: Call) -> None:
    before = time.time()
    fields = ("--name", "laptop", "--note", "two\nlines", "--expires-in", "30d")
    limits = ("--network", "192.0.2.0/24", "--network", "2001:db8::1", "--rate-limit", "100")
    narrowing = ("--models", "acme-*", "--models", "scorer", "--no-delete")
    new = made(call, *READER, "--scope", "model:read", *fields, *limits, *narrowing)
    assert shown(call, new["key_id"]) == {
        "key_id": new["key_id"],
        "owner": "ACME",
        "name": "laptop",
        "note": "two\nlines",
        "environment": "live",
        "scopes": ["mlflow:read", "model:read"],
        "state": "active",
        "created_at": pytest.approx(before, abs=60),
        "expires_at": pytest.approx(before + 30 * 86400, abs=60),
        "revoked_at": None,
        "deprecated_at": None,
        "replaced_by": None,
        "networks": ["192.0.2.0/24", "2001:db8::1/128"],
        "rate_limit_per_hour": 100,
        "last_used_at": None,
        "models": ["acme-*", "scorer"],
        "no_delete": True,
        "trust_id": None,
        "source": "",
        "last_four": new["key"][-4:],
        "uses_by_hour": [0] * 24,
    }


def test_times_have_units(call: Call) -> None:
    for text, lifetime in (("90s", 90), ("45m", 2700), ("12h", 43200)):
        new = made(call, *READER, "--expires-in", text)
        assert new["expires_at"] == pytest.approx(new["created_at"] + lifetime, abs=30), text
    assert made(call, *READER, "--expires-in", "never")["expires_at"] is None


def test_lifetimes_are_those_of_the_settings(
    call: Call, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call("keys", "create", *READER)
    record = store.page()[0][0]
    assert record.expires_at == pytest.approx(record.created_at + 365 * 86400, abs=30)
    assert f"It ends on {times.date(record.expires_at or 0)}." in done.stderr
    never = call("keys", "create", *READER, "--expires-in", "never")
    assert "It never ends." in never.stderr
    call("keys", "import", *READER, stdin=OLD_KEY)
    ids = [record.key_id for record in store.page()[0]]
    monkeypatch.setenv("HOKUSAI_AUTH_KEY_LIFETIME_MAX", "86400")
    new = made(call)
    assert new["expires_at"] == pytest.approx(new["created_at"] + 86400, abs=30)
    for command in (("create", *READER), ("edit", ids[0])):
        for text, says in (("never", "a key must end"), ("2d", "this is too long")):
            printed = mistake(call("keys", *command, "--expires-in", text, status=2))
            assert f"{says}: keys of this server live 1 day (86400 s) at most" in printed, command
    assert store.get(ids[0]).expires_at is None and store.get(ids[1]).expires_at is None
    monkeypatch.setenv("HOKUSAI_AUTH_KEY_LIFETIME_MAX", "0")
    monkeypatch.setenv("HOKUSAI_AUTH_KEY_LIFETIME", "0")
    assert made(call)["expires_at"] is None


def test_rotated_key_lives_as_long_as_the_old_one(call: Call) -> None:
    with time_machine.travel(time.time() - 3000, tick=False):
        old = made(call, *READER, "--expires-in", "1h")
    new = json.loads(call("keys", "rotate", old["key_id"], "--json").stdout)
    assert new["expires_at"] - new["created_at"] == pytest.approx(3600)
    assert new["replaces"]["expires_at"] == old["expires_at"]


@pytest.mark.parametrize("way", ["stdin", "file"])
def test_import_does_not_print_the_key(
    call: Call, store: LocalStore, tmp_path: Path, way: str
) -> None:
    (tmp_path / "key.txt").write_text(OLD_KEY + "\n")
    source = ("--key-file", str(tmp_path / "key.txt")) if way == "file" else ()
    stdin = OLD_KEY + "\r\n" if way == "stdin" else ""
    answers = [call("keys", "import", *READER, "--rate-limit", "5", *source, stdin=stdin)]
    record = store.find(OLD_KEY)
    assert record is not None and (record.owner, record.rate_limit_per_hour) == ("ACME", 5)
    answers.append(call("keys", "import", *READER, *source, stdin=stdin, status=1))
    assert "already" in mistake(answers[-1])
    answers += [call("keys", *command) for command in (["export"], ["show", record.key_id])]
    answers += [call("audit"), call("audit", "--json")]
    for answer in answers:
        assert OLD_KEY not in answer.output and OLD_KEY[8:] not in answer.output
        assert keys.digest(OLD_KEY) not in answer.output


def test_key_is_never_an_argument(call: Call, store: LocalStore) -> None:
    call("keys", "import", *READER, OLD_KEY, status=2)
    call("keys", "import", *READER, "--key", OLD_KEY, status=2)
    assert store.find(OLD_KEY) is None
    for arguments in (
        ["keys", "import", *READER, OLD_KEY],
        ["keys", "find", OLD_KEY],
        ["keys", "find", f"{OLD_KEY}x"],
        ["keys", "import", *READER, "--key-file", OLD_KEY],
        ["mode", OLD_KEY],
        [OLD_KEY],
    ):
        assert OLD_KEY[8:] not in call(*arguments, status=2).output, arguments
    assert "run `hokusai-auth keys find -`" in call("keys", "find", OLD_KEY, status=2).stderr


def test_which_key_a_file_or_standard_input_holds(
    call: Call, store: LocalStore, tmp_path: Path
) -> None:
    record, key = store.create(owner="ACME", scopes=["mlflow:read"])
    (tmp_path / "key").write_text(key)
    for source, stdin in (("-", f"{key}\n"), ("-", key[-4:]), (str(tmp_path / "key"), "")):
        done = call("keys", "find", source, stdin=stdin)
        assert record.key_id in done.stdout and key not in done.output
        found = json.loads(call("keys", "find", source, "--json", stdin=stdin).stdout)
        assert [one["key_id"] for one in found["keys"]] == [record.key_id]
    assert "this store has no such key" in mistake(
        call("keys", "find", "-", stdin=OLD_KEY, status=1)
    )
    none = call("keys", "find", "-", "--json", stdin=OLD_KEY, status=1).stdout
    assert json.loads(none) == {"keys": []}
    for stdin in ("", "no key"):
        printed = mistake(call("keys", "find", "-", stdin=stdin, status=2))
        assert "no key to find" in printed or "can't be a key" in printed


def test_malformed_key_is_not_imported(call: Call, store: LocalStore) -> None:
    for stdin in ("", "\n"):
        printed = mistake(call("keys", "import", *READER, stdin=stdin, status=2))
        assert "there is no key to import: " in printed
    for stdin in ("no key", "\xff\xfe".encode("latin-1"), "x" * 20_000):
        printed = mistake(call("keys", "import", *READER, stdin=stdin, status=2))
        assert "not a key that can be imported" in printed or "at most 256 characters" in printed
        assert store.page().records == []


def test_list_prints_pages(call: Call) -> None:
    ids = [made(call)["key_id"] for _ in range(3)][::-1]
    first = call("keys", "list", "--max-results", "2", "--json")
    page = json.loads(first.stdout)
    assert [key["key_id"] for key in page["keys"]] == ids[:2]
    table = call("keys", "list", "--max-results", "2")
    assert [line.split()[0] for line in table.stdout.splitlines()] == ["key_id", *ids[:2]]
    # The hint for the next page is not written to standard output.
    assert f"--page-token {page['next_page_token']}" in table.stderr
    rest = call("keys", "list", "--page-token", page["next_page_token"])
    assert ids[2] in rest.stdout and ids[1] not in rest.stdout and rest.stderr == ""
    last = json.loads(call("keys", "list", "--max-results", "3", "--json").stdout)
    assert len(last["keys"]) == 3 and last["next_page_token"] is None


def test_list_filters(call: Call) -> None:
    acme = made(call, *READER, "--name", "Laptop")["key_id"]
    test = made(call, "--owner", "Bee", "--scope", "mlflow:read", "--environment", "test")["key_id"]
    gone = made(call, *READER)["key_id"]
    call("keys", "revoke", gone)
    for options, expected in (
        ((), {acme, test, gone}),
        (("--owner", "ACME"), {acme, gone}),
        (("--environment", "test"), {test}),
        (("--state", "active"), {acme, test}),
        (("--state", "revoked", "--owner", "ACME"), {gone}),
        (("--query", "lapTOP"), {acme}),
        (("--query", "nobody"), set()),
    ):
        answer = json.loads(call("keys", "list", *options, "--json").stdout)
        assert {key["key_id"] for key in answer["keys"]} == expected, options
    assert call("keys", "list", "--query", "nobody").stdout == "none\n"


def test_list_takes_an_order_and_columns(call: Call) -> None:
    for owner, lifetime in (("Bee", "2d"), ("ACME", "3d"), ("Cat", "1d")):
        made(call, "--owner", owner, "--scope", "mlflow:read", "--expires-in", lifetime)
    for sort, owners in (
        ("owner", ["ACME", "Bee", "Cat"]),
        ("-owner", ["Cat", "Bee", "ACME"]),
        ("expires_at", ["Cat", "Bee", "ACME"]),
    ):
        lines = call("keys", "list", "--sort", sort, "--columns", "owner, environment").stdout
        assert [line.split() for line in lines.splitlines()] == [
            ["owner", "environment"],
            *([owner, "live"] for owner in owners),
        ], sort
    first = call("keys", "list", "--sort", "owner", "--max-results", "2")
    assert "These are keys 1 to 2 of 3: " in first.stderr
    token = first.stderr.split()[-1]
    rest = call("keys", "list", "--sort", "owner", "--page-token", token)
    assert "Cat" in rest.stdout and "Bee" not in rest.stdout
    old = json.loads(call("keys", "list", "--json").stdout)["keys"][0]["key_id"]
    call("keys", "rotate", old)
    # People read "replaced"; the value of the REST API is an older word.
    for state in ("replaced", "deprecated"):
        listed = call("keys", "list", "--state", state)
        assert [line.split()[:2] for line in listed.stdout.splitlines()[1:]] == [[old, "replaced"]]
    described = json.loads(call("keys", "list", "--state", "replaced", "--json").stdout)["keys"]
    assert [key["state"] for key in described] == ["deprecated"]
    fields = call("keys", "show", old).stdout
    assert re.search(r"state: +replaced\n", fields) and re.search(r"replaced_at: +20", fields)


def test_table_of_keys_fits_a_terminal(
    call: Call, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = "\u65e5\u672c\u8a9e\u306e\u6240\u6709\u8005\u3067\u3059" * 3
    for owner, name in (("ACME", "x" * 60), (wide, wide), ("e\u0301" * 30, "laptop")):
        store.create(owner=owner, name=name, scopes=["mlflow:read", "model:write"], expires_at=5e9)
    whole = call("keys", "list").stdout
    assert wide in whole and "\x1b" not in whole  # no terminal: nothing is cut or coloured
    monkeypatch.setattr(output, "is_terminal", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for columns in (80, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("NO_COLOR", "1")
        plain = call("keys", "list").stdout
        monkeypatch.delenv("NO_COLOR")
        done = CliRunner().invoke(main, ["keys", "list"], color=True)
        assert "\x1b[32mactive\x1b[0m" in done.stdout
        assert click.unstyle(done.stdout) == plain
        lines = plain.splitlines()
        assert max(map(output.width, lines)) == columns
        # The columns are below each other, and ids and times are whole.
        assert all(re.search(r"2128-06-11 08:53Z$", line) for line in lines[1:])
        assert {output.width(line[: line.rindex("2128")]) for line in lines[1:]} == {columns - 17}
        assert all(re.match(r"key_[0-9a-f]{16}  ", line) for line in lines[1:])


def test_show_prints_every_field_on_its_own_line(call: Call, store: LocalStore) -> None:
    note = "first\nstate: active\tand well"
    new = made(call, *READER, "--note", note, "--expires-in", "1d")
    key_id = new["key_id"]
    counter = UseCounter(store.database)
    for _ in range(3):
        counter.add(key_id)
    counter.write()
    call("keys", "revoke", key_id)
    lines = call("keys", "show", key_id).stdout.splitlines()
    fields = dict(line.split(":", 1) for line in lines if not line.startswith(" "))
    assert {name: text.strip() for name, text in fields.items()} == {
        "key_id": key_id,
        "owner": "ACME",
        "name": "-",
        "note": "first",
        "environment": "live",
        "scopes": "mlflow:read",
        "state": "revoked",
        **{
            name: time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(at))
            for name, at in shown(call, key_id).items()
            if name in ("created_at", "expires_at", "revoked_at", "last_used_at")
        },
        "replaced_at": "-",
        "replaced_by": "-",
        "networks": "-",
        "rate_limit_per_hour": "-",
        "models": "-",
        "last_four": new["key"][-4:],
        "no_delete": "no",
        "trust_id": "-",
        "source": "-",
        "uses in 24 hours": "3",
    }
    assert sum(shown(call, key_id)["uses_by_hour"]) == 3
    assert any(re.fullmatch(r" +state: active +and well", line) for line in lines)


def test_edit_changes_only_the_given_fields(call: Call) -> None:
    limits = ("--network", "192.0.2.7", "--rate-limit", "9", "--expires-in", "1d")
    before = made(call, *READER, "--name", "old", *limits)
    del before["key"]

    def edit(*options: str) -> dict[str, Any]:
        return json.loads(call("keys", "edit", before["key_id"], *options, "--json").stdout)

    after = edit("--name", "", "--scope", "mlflow:write", "--note", "n", "--rate-limit", "10")
    assert after == {
        **before,
        **{"name": "", "note": "n", "scopes": ["mlflow:write"], "rate_limit_per_hour": 10},
    }
    after = edit("--owner", "Bee", "--any-network", "--rate-limit", "none", "--expires-in", "never")
    assert (after["owner"], after["networks"]) == ("Bee", [])
    assert (after["rate_limit_per_hour"], after["expires_at"]) == (None, None)
    assert edit("--network", "2001:db8::/32")["networks"] == ["2001:db8::/32"]
    assert edit("--expires-in", "2d")["expires_at"] == pytest.approx(time.time() + 172800, abs=60)
    assert "Bee" in call("keys", "edit", before["key_id"], "--name", "x").stdout
    call("keys", "edit", before["key_id"], "--any-network", "--network", "192.0.2.7", status=2)


def test_key_is_narrowed_and_widened_again(call: Call) -> None:
    supplier = ("--owner", "ACME", "--scope", "model:write")
    key_id = made(call, *supplier, "--models", "acme-*", "--no-delete")["key_id"]
    lines = call("keys", "show", key_id).stdout.splitlines()
    fields = {line.split(":")[0]: line.split(":")[1].strip() for line in lines}
    assert (fields["models"], fields["no_delete"]) == ("acme-*", "yes")

    def edit(*options: str) -> tuple[list[str], bool]:
        record = json.loads(call("keys", "edit", key_id, *options, "--json").stdout)
        return record["models"], record["no_delete"]

    assert edit("--name", "x") == (["acme-*"], True)
    assert edit("--models", "acme-a", "--models", "acme-b") == (["acme-a", "acme-b"], True)
    assert audited(call, "--limit", "1")[0]["detail"] == {"models": ["acme-a", "acme-b"]}
    assert edit("--may-delete") == (["acme-a", "acme-b"], False)
    assert edit("--any-model", "--no-delete") == ([], True)
    call("keys", "import", *supplier, "--models", "acme-*", "--no-delete", stdin=OLD_KEY)
    (imported,) = json.loads(call("keys", "list", "--json").stdout)["keys"][:1]
    assert (imported["models"], imported["no_delete"]) == (["acme-*"], True)


def test_staffs_key_is_not_narrowed(call: Call) -> None:
    staff = made(call, "--owner", "Boss", "--scope", "mlflow:write")["key_id"]
    supplier = made(call, "--owner", "ACME", "--scope", "model:write", "--no-delete")["key_id"]
    before = len(audited(call))
    for command in (
        ("create", *READER, "--models", "acme-*"),
        ("create", "--owner", "Boss", "--scope", "model:write", "--scope", "admin", "--no-delete"),
        ("import", *READER, "--no-delete"),
        ("edit", staff, "--no-delete"),
        ("edit", supplier, "--scope", "mlflow:write"),
    ):
        printed = call("keys", *command, stdin=OLD_KEY, status=2).stderr
        assert "Usage: " in printed and "staff's keys are never narrowed" in printed, command
    assert len(audited(call)) == before


def test_rotate_prints_the_new_key_and_reports_the_old_one(call: Call) -> None:
    old = made(call, *READER, "--name", "laptop")
    done = call("keys", "rotate", old["key_id"], "--overlap", "2h")
    new = done.stdout.removesuffix("\n")
    assert keys.importable(new) and new != old["key"]
    before = shown(call, old["key_id"])
    assert before["state"] == "deprecated"
    assert before["expires_at"] == pytest.approx(time.time() + 7200, abs=60)
    until = time.strftime("%Y-%m-%d %H:%MZ", time.gmtime(before["expires_at"]))
    assert before[
        "replaced_by"
    ] in done.stderr and f"{old['key_id']} stays valid until {until}" in (done.stderr)
    assert new not in done.stderr
    assert shown(call, before["replaced_by"])["name"] == "laptop"
    assert before["replaced_by"] in mistake(call("keys", "rotate", old["key_id"], status=1))


def test_old_key_ends_after_the_overlap_which_is_a_day_by_default(call: Call) -> None:
    first, second = made(call), made(call)
    answer = json.loads(call("keys", "rotate", first["key_id"], "--json").stdout)
    assert keys.importable(answer["key"]) and answer["replaces"]["key_id"] == first["key_id"]
    assert answer["replaces"]["expires_at"] == pytest.approx(time.time() + 86400, abs=60)
    assert "has ended" in call("keys", "rotate", second["key_id"], "--overlap", "0s").stderr
    assert shown(call, second["key_id"])["state"] == "expired"
    assert "is expired" in mistake(call("keys", "rotate", second["key_id"], status=1))


def test_revoke_ends_a_key_and_may_be_repeated(call: Call) -> None:
    key_id = made(call)["key_id"]
    assert "revoked" in call("keys", "revoke", key_id).stdout
    first = shown(call, key_id)["revoked_at"]
    again = json.loads(call("keys", "revoke", key_id, "--json").stdout)
    assert (again["state"], again["revoked_at"]) == ("revoked", first)


def test_revoke_with_wait_returns_once_no_server_accepts_the_key(
    call: Call, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the worst case a server process does not notice the change by itself.
    monkeypatch.setattr(cache, "POLL", 3600)
    new = made(call)
    for _ in range(600):
        server = cache.CachedBackend(store, ttl=3600, secret=b"secret")
        server.lookup(new["key"], "")  # starts the watcher, which polls once
        time.sleep(0.05)
        server.lookup(new["key"], "")
        if isinstance(server.peek(new["key"], ""), Principal):
            break
    else:
        pytest.fail("the key was never served from the cache")
    call("keys", "revoke", new["key_id"], "--wait")
    assert server.peek(new["key"], "") is None


def test_last_administrators_key_is_revoked_only_by_force(call: Call) -> None:
    key_id = made(call, "--owner", "Boss", "--scope", "mlflow:admin")["key_id"]
    made(call)
    for command in (["revoke", key_id], ["edit", key_id, "--scope", "mlflow:read"]):
        assert "last key that may manage keys" in mistake(call("keys", *command, status=1))
    assert shown(call, key_id)["state"] == "active"
    call("keys", "revoke", key_id, "--force")
    assert shown(call, key_id)["state"] == "revoked"


def test_all_keys_of_a_leaver_are_revoked_after_a_look(call: Call, store: LocalStore) -> None:
    other = made(call, "--owner", "ACME Ltd", "--scope", "model:read")["key_id"]
    trusted = json.loads(
        call(
            *("trust", "add", "--owner", "ACME", "--github", "acme/models"),
            *("--workflow", "release.yml", "--scope", "model:write", "--json"),
        ).stdout
    )["trust_id"]
    ids = {made(call)["key_id"] for _ in range(2)}
    leaver = ("keys", "revoke", "--owner", "ACME")
    plan = call(*leaver)
    assert all(one in plan.stdout for one in ids) and other not in plan.stdout
    assert "2 keys of ACME and 1 trust would end; none did, without --apply." in plan.stdout
    assert f"{trusted}, which gave CI jobs keys of this owner, would be removed." in plan.stdout
    for command in ("owners assign --from ACME", "grants list", "grants remove ID"):
        assert f"`hokusai-auth {command}" in plan.stderr, command
    assert trusted in call("trust", "list").stdout
    assert all(shown(call, one)["state"] == "active" for one in ids)
    found = json.loads(call(*leaver, "--apply", "--json").stdout)
    assert {one["key_id"] for one in found["keys"]} == ids and found["applied"]
    assert found["trusts"] == [trusted] and trusted not in call("trust", "list").stdout
    assert all(shown(call, one)["state"] == "revoked" for one in ids)
    assert shown(call, other)["state"] == "active"
    assert "0 keys of ACME revoked." in call(*leaver, "--apply").stdout
    assert "No key of this store has this owner" in mistake(call(*leaver[:3], "ACMEE", status=1))
    for wrong in ((), (other, "--owner", "ACME"), (other, "--apply")):
        assert "--owner" in call("keys", "revoke", *wrong, status=2).stderr
    assert shown(call, other)["state"] == "active"
    boss = made(call, "--owner", "Boss", "--scope", "mlflow:admin")["key_id"]
    refused = call("keys", "revoke", "--owner", "Boss", "--apply", status=1)
    assert "last key that may manage keys" in refused.stderr
    call("keys", "revoke", "--owner", "Boss", "--apply", "--force")
    assert shown(call, boss)["state"] == "revoked"


def test_export_prints_a_line_of_json_for_each_key(call: Call, store: LocalStore) -> None:
    ids = [made(call, *READER, "--note", "two\nlines")["key_id"] for _ in range(3)][::-1]
    lines = call("keys", "export").stdout.splitlines()
    assert [json.loads(line)["key_id"] for line in lines] == ids
    with store.database.reading() as connection:
        for digest in connection.scalars(sa.select(KEYS.c.digest)):
            assert digest not in "".join(lines)
    assert {"owner", "scopes", "state", "note"} < json.loads(lines[0]).keys()


def test_audit_prints_who_did_what(call: Call) -> None:
    new = made(call)
    call("keys", "edit", new["key_id"], "--name", "desk", "--expires-in", "1d")
    call("keys", "rotate", new["key_id"])
    call("keys", "revoke", new["key_id"])
    call("keys", "import", *READER, stdin=OLD_KEY)
    events = audited(call)
    assert [event["event"] for event in events] == [
        "key.created",
        "key.edited",
        "key.rotated",
        "key.revoked",
        "key.imported",
    ]
    assert {event["actor"] for event in events} == {"cli:alice"}
    assert events[1]["key_id"] == new["key_id"] and events[1]["detail"]["name"] == "desk"
    head, *lines = call("audit").stdout.splitlines()
    assert head.split() == ["time", "event", "actor", "key_id", "address", "detail"]
    assert len(lines) == len(events)
    at = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(events[1]["at"]))
    assert re.fullmatch(rf"{at} +key.edited +cli:alice +{new['key_id']} +-  .*", lines[1])
    assert 'name="desk"' in lines[1] and re.search(r"expires_at=\d{4}-\d\d-\d\d ", lines[1])


def test_audit_filters(call: Call, store: LocalStore) -> None:
    with store.database.changing() as change:
        change.connection.execute(
            sa.insert(AUDIT).values(
                at=time.time() - 8 * 86400,
                event="key.created",
                actor="cli:alice",
                actor_key_id="",
                address="",
                request_id="",
                key_id="key_old",
                detail={},
            )
        )
    first = made(call)["key_id"]
    call("keys", "revoke", first)
    with store.database.changing() as change:
        change.audit("session.ended", Actor("ACME", first, "192.0.2.7"))
    everything = audited(call)
    assert len(everything) == 4
    for options, expected in (
        (("--since", "7d"), everything[1:]),
        (("--since", "9d"), everything),
        (("--event", "key.revoked"), everything[2:3]),
        (("--event", "session"), everything[3:]),
        (("--key", first), everything[1:]),
        (("--key", "key_old"), everything[:1]),
        (("--actor", "ACME"), everything[3:]),
        (("--actor", "cli:alice", "--event", "key.created", "--since", "1h"), everything[1:2]),
        (("--limit", "2"), everything[2:]),
        (("--actor", "nobody"), []),
    ):
        assert audited(call, *options) == expected, options
    assert call("audit", "--actor", "nobody").stdout == "none\n"
    assert "192.0.2.7" in call("audit", "--event", "session").stdout


def test_audit_says_if_there_are_more_events(call: Call, store: LocalStore) -> None:
    with store.database.changing() as change:
        for _ in range(101):
            change.audit("session.ended", Actor("ACME"))
    for options, count, more in (
        ((), 100, True),
        (("--limit", "101"), 101, False),
        (("--limit", "2"), 2, True),
        (("--since", "1h"), 101, False),
        (("--since", "1h", "--limit", "2"), 2, True),
        (("--event", "key."), 0, False),
    ):
        for printed in ("--json",), ():
            done = call("audit", *options, *printed)
            lines = len(done.stdout.splitlines()) - (1 if not printed else 0)
            assert lines == count, options
            assert ("There are more events before" in done.stderr) is more, options


def test_audit_follows(call: Call, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 4:
            raise KeyboardInterrupt
        if len(naps) % 2:
            with store.database.changing() as change:
                change.audit("session.ended", Actor("ACME"), key_id=f"key_{len(naps)}")
                change.audit("key.edited", Actor("ACME"), key_id="key_other")

    monkeypatch.setattr(server, "time", SimpleNamespace(time=time.time, sleep=sleep))
    with store.database.changing() as change:
        change.audit("session.ended", Actor("ACME"), key_id="key_0")
    which = ("audit", "--follow", "--event", "session")
    printed = [json.loads(line) for line in call(*which, "--json", status=1).stdout.splitlines()]
    assert [event["key_id"] for event in printed] == ["key_0", "key_1", "key_3"]
    assert len(naps) == 4
    naps.clear()
    table = call(*which, status=1).stdout.splitlines()
    assert [line.split()[4] for line in table[1:6]] == ["key_0", "key_1", "key_3", "key_1", "key_3"]


def test_stored_text_can_not_control_the_terminal(call: Call, store: LocalStore) -> None:
    evil = "\x1b[2J\x9b1m\r\n\u202eforged\x00"
    record, _ = store.create(owner=evil, scopes=["mlflow:read"], name=evil, note=evil)
    with store.database.changing() as change:
        change.audit("key.edited", Actor(evil), record.key_id, note=evil, other=[evil])
    for command, count in (
        (("keys", "list"), 2),
        (("keys", "show", record.key_id), 21 + 3),  # three texts of two lines
        (("keys", "edit", record.key_id, "--rate-limit", "1"), 2),
        (("audit", "--limit", "10"), 4),
    ):
        answer = call(*command).stdout
        assert len(answer.split("\n")) == count + 1, command
        assert all(text.isprintable() for text in answer.split("\n")), command
    assert "forged" in answer


def test_user_without_a_name_is_audited(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    made(call)
    assert [event["actor"] for event in audited(call)] == ["cli:unknown"]


#: Calls, and a part of the message for each.
MISTAKES = [
    (["keys", "show", "key_nobody"], "There is no key 'key_nobody'"),
    (["keys", "revoke", "key_nobody"], "There is no key 'key_nobody'"),
    (["keys", "rotate", "key_nobody"], "There is no key 'key_nobody'"),
    (["keys", "edit", "key_nobody", "--name", "x"], "There is no key 'key_nobody'"),
]
#: Calls with a wrong value, and a part of the message for each.
WRONG_VALUES = [
    (["keys", "edit", "key_nobody"], "Nothing to change"),
    (["keys", "edit", "key_nobody", "--rate-limit", "many"], "a whole number, or none"),
    (["keys", "edit", "key_nobody", "--scope", "root"], "unknown scope 'root'; known: admin"),
    (["keys", "create", "--owner", "x", "--scope", "root"], "unknown scope 'root'; known: "),
    (["keys", "create", "--owner", " ", "--scope", "mlflow:read"], "owner: must name"),
    (["keys", "create", *READER, "--name", "a\x1b[31mb"], "name: must be printable"),
    (["keys", "create", *READER, "--expires-in", "1y"], "--expires-in takes a number and s,"),
    (["keys", "create", *READER, "--expires-in", "0s"], "expires_in: "),
    (["keys", "create", *READER, "--expires-in", "999999999d"], "expires_in: "),
    (["keys", "create", *READER, "--models", "*-a"], "*-a is neither a name nor a beginning"),
    (["keys", "create", *READER, "--environment", "prod"], "must be one of live, test, dev"),
    (["keys", "create", *READER, "--network", "here"], "here is no network: give an address"),
    (["keys", "create", *READER, "--rate-limit", "0"], "rate_limit_per_hour: "),
    (["keys", "create", *READER, "--rate-limit", "1.5"], "--rate-limit takes a whole number"),
    (["keys", "rotate", "key_nobody", "--overlap", "1"], "--overlap takes a number and s,"),
    (["keys", "rotate", "key_nobody", "--overlap", "91d"], "overlap: "),
    (["keys", "list", "--state", "gone"], "--state takes one of active, replaced, expired"),
    (["keys", "list", "--state", "replced"], "Did you mean `replaced`?"),
    (["keys", "list", "--sort", "expires"], "Did you mean `expires_at`?"),
    (["keys", "list", "--columns", "owner,sate"], "Did you mean `state`?"),
    (["keys", "list", "--max-results", "0"], "max_results must be from 1 to 1000"),
    (["keys", "list", "--page-token", "key_nobody"], "page_token is not one"),
    (["keys", "list", "--owner", "a\udcff"], "'owner' must be printable"),
    (["audit", "--since", "yesterday"], "--since takes a number and s, m, h or d"),
    (["audit", "--actor", "a\udcff"], "--actor takes printable text"),
    (["keys", "create", "--owner", "x", "--scope", "models:write"], "Did you mean `model:write`?"),
    (["keys", "list", "--state", "activ"], "Did you mean `active`?"),
]
WRONG_CALLS = [
    ["keys", "create", "--scope", "mlflow:read"],
    ["keys", "create", "--owner", "x"],
    ["keys", "list", "--max-results", "many"],
    ["keys", "edit", "key_nobody", "--models", "a", "--any-model"],
    ["keys", "edit", "key_nobody", "--no-delete", "--may-delete"],
    ["audit", "--limit", "0"],
    ["explain"],
    ["explain", "GET"],
    ["explain", "--as", "key_nobody"],
    ["explain", "--model", "scorer"],
    ["explain", "--as", "key_nobody", "--model", "scorer", "--run", "x"],
    ["explain", "GET", "/", "--as", "key_nobody", "--model", "scorer"],
    ["explain", "--as", "key_nobody", "--model", "scorer", "--scope", "model:read"],
    ["keys", "import", *READER, "--key-file", "/nowhere/key.txt"],
    ["nothing"],
]
#: A database, and why it can't be used.
DATABASES = [
    ("postgresql://u:secret@127.0.0.1:1/x", ": connection failed: "),
    ("postgresql://u:secret@:x@127.0.0.1/x", "DATABASE_URI is no database URL"),
    ("sqlite:////nowhere/x.db", "can't be written: No such file"),
    ("postgresql+pg8000://u:secret@127.0.0.1/x", "HOKUSAI_AUTH_DATABASE_URI needs pg8000"),
]


def test_mistake_prints_one_line_with_status_1(call: Call) -> None:
    for arguments, says in MISTAKES:
        assert says in mistake(call(*arguments, status=1)), arguments
        assert audited(call) == [], arguments


def test_wrong_value_prints_one_line_with_status_2(call: Call) -> None:
    for arguments, says in WRONG_VALUES:
        assert says in mistake(call(*arguments, status=2)), arguments
        assert audited(call) == [], arguments


def test_wrong_usage_has_status_2(call: Call) -> None:
    for arguments in WRONG_CALLS:
        assert "Usage: " in call(*arguments, status=2).stderr, arguments


def test_unusable_database_prints_one_line(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri, says in DATABASES:
        monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", uri)
        printed = mistake(call("keys", "create", *READER, status=1))
        assert says in printed and "secret" not in printed, uri
        for command in (["keys", "list"], ["audit"]):
            printed = mistake(call(*command, status=1))
            # Where there is no file, none is made.
            found = "there is no key store" if uri.startswith("sqlite") else says
            assert found in printed and "secret" not in printed, uri


def test_new_store_is_reported(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store in the wrong folder is empty, and no server uses it."""
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", f"sqlite:///{tmp_path}/new.db")
    done = call("keys", "create", *READER)
    assert f"made a new key store, {tmp_path.resolve()}/new.db. Only" in done.stderr
    assert call("keys", "list").stderr == ""
    for setting in (("mode", "observe"), ("log-level", "info"), ("isolation", "off")):
        (tmp_path / "new.db").unlink()
        assert "made a new key store" in call(*setting).stderr


def test_command_in_the_wrong_folder_makes_no_store(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOKUSAI_AUTH_DATABASE_URI")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    monkeypatch.chdir(wrong)
    mlflow = f"sqlite:///{tmp_path}/mlflow.db"
    (tmp_path / "mlflow.db").touch()
    place = ("--backend-store-uri", mlflow)
    for command in (
        ("keys", "list"),
        ("keys", "show", "key_1"),
        ("keys", "export"),
        ("keys", "edit", "key_1", "--name", "x"),
        ("keys", "rotate", "key_1"),
        ("keys", "revoke", "key_1"),
        ("keys", "revoke", "--owner", "ACME", "--apply"),
        ("audit",),
        ("mode",),
        ("mode", "--report"),
        ("isolation",),
        ("log-level",),
        ("status",),
        ("trust", "list"),
        ("trust", "remove", "trust_1"),
        ("owners", "list", *place),
        ("owners", "check", *place),
        ("owners", "assign", "--models", "a", "--owner", "b", "--apply", *place),
        ("grants", "list", *place),
        ("prefixes", "list", *place),
        ("explain", "--as", "key_1", "--model", "a", *place),
    ):
        printed = mistake(call(*command, status=1))
        assert f"there is no key store {wrong.resolve()}/hokusai_auth.db" in printed, command
        assert "HOKUSAI_AUTH_DATABASE_URI" in printed, command
    assert "no key store" in mistake(call("keys", "find", "-", stdin="abcd", status=1))
    assert list(wrong.iterdir()) == [] and (tmp_path / "mlflow.db").stat().st_size == 0


def test_log_level_is_shown_set_and_reset(call: Call) -> None:
    assert call("log-level").stdout == "default\n"
    assert call("log-level", "debug").stdout == ""
    assert json.loads(call("log-level", "--json").stdout) == {"log_level": "debug"}
    assert json.loads(call("log-level", "default", "--json").stdout) == {"log_level": "default"}


def test_explain_takes_only_a_path(call: Call) -> None:
    for path in ("api/2.0/x", "http://127.0.0.1:5000/api/2.0/x"):
        assert "give the path alone" in mistake(call("explain", "GET", path, status=2))


def test_explain_names_the_methods_of_a_route(call: Call) -> None:
    for prefix in ("", "/mlflow"):
        printed = call("explain", "GET", f"{prefix}/api/2.0/mlflow/runs/search", status=1).stdout
        assert "known to have this route with POST only" in printed
    assert "not known to have this route\n" in call("explain", "GET", "/x", status=1).stdout


def in_a_process(folder: Path, *arguments: str, **environ: str) -> str:
    """Return the command's standard output."""
    done = subprocess.run(
        [*HOKUSAI_AUTH, *arguments],
        env=environment(folder, **environ),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_on_the_key_store_need_not_wait_for_mlflow(
    tmp_path: Path, store: LocalStore
) -> None:
    code = (
        "import sys\n"
        "from mlflow_hokusai_auth.cli import main\n"
        "for call in ('mode', 'isolation', 'log-level', 'status', 'audit', 'keys list'):\n"
        "    main(call.split(), standalone_mode=False)\n"
        "    assert 'mlflow' not in sys.modules, call\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_command_writes_no_metrics(tmp_path: Path, store: LocalStore) -> None:
    folder = tmp_path / "metrics"
    in_a_process(tmp_path, "keys", "list", PROMETHEUS_MULTIPROC_DIR=str(folder))
    assert not folder.exists()


def test_mode_of_a_later_version_gives_no_traceback(call: Call, store: LocalStore) -> None:
    store.database.set_state("mode", 17, "mode.changed", Actor("later"))
    assert "default" in call("mode").stdout


def test_misspelt_words_are_answered_with_help(call: Call) -> None:
    for arguments, word in (
        (("mode", "obsrve"), "observe"),
        (("isolation", "fulll"), "full"),
        (("log-level", "warn"), "warning"),
        (("owners", "list", "--kind", "modle"), "model"),
        (("grants", "add", "--owner", "A", "--model", "m", "--level", "contibute"), "contribute"),
    ):
        said = call(*arguments, status=2).stderr
        assert f"Did you mean `{word}`?" in said and "Usage: " in said, arguments
    assert "Did you mean" not in call("mode", "17", status=2).stderr


def test_shell_completes_values() -> None:
    shell = ShellComplete(main, {}, "hokusai-auth", "_HOKUSAI_AUTH_COMPLETE")
    for arguments, begun, values in (
        (["keys", "create", "--scope"], "model:", ["model:read", "model:write"]),
        (["explain", "--scope"], "metrics", ["metrics:read"]),
        (["keys", "create", "--environment"], "", ["live", "test", "dev"]),
        (["keys", "list", "--state"], "re", ["replaced", "revoked"]),
        (["keys", "list", "--sort"], "e", ["expires_at"]),
        (["keys", "list", "--columns"], "owner,exp", ["owner,expires_at"]),
        (["mode"], "o", ["observe", "off"]),
        (["isolation"], "w", ["writes"]),
        ([], "stat", ["status"]),
    ):
        found = [item.value for item in shell.get_completions(arguments, begun)]
        assert found == values, arguments


def test_mode_says_what_is_in_force_and_why(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def of() -> tuple[str, dict[str, Any]]:
        return call("mode").stdout, json.loads(call("mode", "--json").stdout)

    text, answer = of()
    assert text == (
        "default: enforce, because HOKUSAI_AUTH_MODE is not set; each server has its own\n"
    )
    assert answer == {
        "mode": "default",
        "since": None,
        "by": None,
        "in_force": "enforce",
        "because": "setting",
    }
    monkeypatch.setenv("HOKUSAI_AUTH_MODE", "observe")
    text, answer = of()
    assert "default: observe, by HOKUSAI_AUTH_MODE; " in text and answer["in_force"] == "observe"
    call("mode", "enforce")
    text, answer = of()
    assert text.startswith("enforce\nsince ")
    assert (answer["in_force"], answer["because"]) == ("enforce", "store")
    monkeypatch.setenv("HOKUSAI_AUTH_FORCE_MODE", "off")
    text, answer = of()
    assert text.startswith(
        "off: HOKUSAI_AUTH_FORCE_MODE overrides what is set with this command:\n"
    )
    assert (answer["mode"], answer["in_force"], answer["because"]) == (
        "enforce",
        "off",
        "force_mode",
    )


def test_status_fits_one_screen(
    call: Call, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(call, *READER, "--expires-in", "13d")
    old = made(call, *READER)["key_id"]
    call("keys", "rotate", old)
    call("keys", "revoke", made(call)["key_id"])
    call("mode", "observe")
    monkeypatch.setenv("HOKUSAI_AUTH_ISOLATION", "full")
    lines = call("status").stdout.splitlines()
    fields = {name: text.strip() for name, text in (line.split(":", 1) for line in lines)}
    assert fields.pop("version") == __version__
    assert fields.pop("  key_store").startswith("ok  generation ")
    assert fields == {
        "mode": "observe (set with `hokusai-auth mode`)",
        "isolation": "full (HOKUSAI_AUTH_ISOLATION); off while the mode is observe",
        "keys": "4: 2 active, 1 replaced, 1 revoked",
        "ending in 14 days": "1",
        "links": "0 waiting",
        "migrations": "current",
        "health": "ok",
        "  migrations": "ok  current",
    }
    assert len(lines) < 24 and max(map(len, lines)) <= 80
    monkeypatch.delenv("HOKUSAI_AUTH_ISOLATION")
    answer = json.loads(call("status", "--json").stdout)
    assert (answer["isolation"], answer["isolation_by"]) == ("unknown", "decision")
    assert "unknown: set MLFLOW_BACKEND_STORE_URI" in call("status").stdout
    (tmp_path / "mlflow.db").touch()
    elsewhere = call("status", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db").stdout
    assert "unknown: no decision can be read" in elsewhere
    # A look changes nothing: there is no new store, and an old one stays as it is.
    monkeypatch.setenv("HOKUSAI_AUTH_DATABASE_URI", f"sqlite:///{tmp_path}/none.db")
    printed = mistake(call("status", status=1))
    assert (
        "there is no key store" in printed
        and "in the server's folder or with its HOKUSAI_AUTH_DATABASE_URI" in printed
    )
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "none.db").touch()
    printed = call("status", status=1).stdout
    assert re.search(r"^migrations: +not current$", printed, re.MULTILINE)
    assert re.search(r"^keys: +unknown$", printed, re.MULTILINE)
    empty = sa.create_engine(f"sqlite:///{tmp_path}/none.db")
    assert sa.inspect(empty).get_table_names() == []
    empty.dispose()


def test_wrong_setting_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOKUSAI_AUTH_MODE", "maybe")
    for command in (["keys", "list"], ["explain", "GET", "/"]):
        assert "HOKUSAI_AUTH_MODE" in mistake(call(*command, status=1))


def test_routes_prints_every_route_with_its_access(tmp_path: Path) -> None:
    # Only in a new process does MLflow's app have no routes but MLflow's.
    rows = json.loads(in_a_process(tmp_path, "routes", "--json"))
    assert len(rows) > 480
    assert {row["access"] for row in rows} == {"public", "read", "write", "admin"}
    assert [row for row in rows if row["access"] == "public"] == [
        {
            "access": "public",
            "method": "GET",
            "route": "/health",
            "kind": "server",
            "served_by": served_by,
        }
        for served_by in ("flask", "native")
    ]


def test_explain_names_the_rule_and_the_verdict(call: Call) -> None:
    arguments = ["POST", "/api/mlflow/api/2.0/mlflow/experiments/delete", "--scope", "model:write"]
    answer = call("explain", *arguments, status=1).stdout
    assert "POST /api/2.0/mlflow/experiments/delete" in answer
    assert "a key with model:write is refused" in answer
    answer = json.loads(call("explain", *arguments, "--scope", "mlflow:write", "--json").stdout)
    assert answer["needs"] == "write" and answer["verdict"].endswith("allowed")
    assert answer["allowed"] is True
    assert "mlflow:write" in answer["scopes"] and "mlflow:read" not in answer["scopes"]
    graphql = ("explain", "POST", "/graphql", *arguments[2:], "--json")
    printed = json.loads(call(*graphql, status=1).stdout)
    assert {name: printed[name] for name in printed if name.startswith("allowed")} == {
        "allowed": False,
        "allowed_queries_of_pages": True,
        "allowed_other_queries": False,
        "allowed_mutations": False,
    }
    assert json.loads(call(*graphql, "--scope", "mlflow:write").stdout)["allowed"] is True
    assert printed["verdict"] == (
        "a key with model:write is allowed queries of MLflow's pages; refused other queries, mutations"
    )
    assert ["model:read" in printed[name] for name in printed if name.startswith("scopes")] == [
        True,
        False,
        False,
    ]
    assert "mlflow:read" in printed["scopes_for_other_queries"]
    assert "mlflow:read" not in printed["scopes_for_mutations"]
    assert "everybody" in call("explain", "GET", "/mlflow/health").stdout
    assert "not known" in call("explain", "GET", "/mlflow/mlflow/health", status=1).stdout
    root = call("explain", "GET", "/mlflow").stdout
    assert "GET /" in root and "not known" not in root
    assert "a key without scopes (see --scope) is allowed" in root


#: Prints the exit status of each, and what it has to say.
WITHOUT_EXTRA = """
import contextlib, io, json
from mlflow_hokusai_auth.cli import main
def server():
    import mlflow_hokusai_auth.server.app
for call in (
    ["--help"], ["--version"], ["keys", "create", "--help"], ["whoami", "--help"],
    ["doctor", "--help"], ["keys", "list"], ["audit"], None,
):
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main(call, prog_name="hokusai-auth") if call else server()
    except SystemExit as end:
        code, message = (end.code, "") if isinstance(end.code, int) else (1, end.code)
        print(json.dumps([call, code, printed.getvalue() + message]))
"""


def test_only_supplier_commands_work_without_the_server_extra(tmp_path: Path) -> None:
    extra = "alembic cryptography flask limits pydantic_settings sqlalchemy werkzeug"
    for name in extra.split():
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('none here', name={name!r})")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRA],
        env={**environment(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *served, keys_list, audit, server = map(json.loads, done.stdout.splitlines())
    assert len(served) == 5
    for call, code, printed in served:
        assert code == 0 and printed.startswith(
            ("Usage: hokusai-auth ", "hokusai-auth, version")
        ), call
    for call, code, printed in (keys_list, audit, server):
        assert code == 1 and "pip install 'mlflow-hokusai-auth[server]'" in printed, call
