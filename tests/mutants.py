"""`make mutants`: does a test fail for each guard of core, store, authorities and server that goes?

In a copy of the tree, one condition after another is made true or false; one operand, `raise`, call
or row of a table left out. The tests that look at the module are then run until one fails. What
survives is printed, and written as JSON. It takes hours; `--only` and `--again` divide them.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mlflow_hokusai_auth"
FOLDERS = ("core", "store", "authorities", "server")
COPIED = (PACKAGE, "tests", "docker", "docs", ".ci", ".github")
#: Seconds for the tests of one file: a mutant that makes them hang is found, too.
TIMEOUT = 600
#: What the tests import, none of it the package, so that it is imported once.
PRELOADED = (
    "alembic",
    "fastapi",
    "flask",
    "hypothesis",
    "pydantic_settings",
    "schemathesis.pytest.plugin",
    "sqlalchemy",
)
#: The tests that look at a module besides those of its name. Those of whole servers run last.
TESTS = """
core/prefixes       e2e/test_registration
decision_log        e2e/test_artifact_paths server/gate/test_exchanges server/observe/test_recorder
decision_log        e2e/test_metrics e2e/test_modes e2e/test_secrets
explain             test_cli test_cli_ownership
fast_path           server/upstream/test_flask_bridge server/upstream/test_fast_path
flask_bridge        server/upstream/test_fast_path e2e/test_registration
folders             core/test_artifact_paths core/test_locations e2e/test_artifact_paths
gate/bodies         server/gate/test_adapters adversarial/test_bodies adversarial/test_grammar
gate/asgi           server/gate/test_exchanges server/gate/test_gate server/gate/test_interceptors
gate/asgi           server/observe/test_decision_log adversarial/test_bodies
gate/asgi           adversarial/test_grammar adversarial/test_spelling e2e/test_modes
gate/asgi           e2e/test_faults_are_distinguishable
gate/cors           server/gate/test_adapters server/test_app server/upstream/test_fast_path
gate/cors           adversarial/test_spelling
gate/flow           server/gate/test_flow server/gate/test_exchanges server/gate/test_interceptors
gate/flow           adversarial/test_bodies adversarial/test_grammar
gate/gate           server/gate/test_flow server/gate/test_exchanges server/gate/test_limits
gate/gate           server/gate/test_interceptors adversarial/test_caches_between
gate/gate           server/observe/test_decision_log e2e/test_modes server/gate/test_state_table
gate/gate           adversarial/test_bodies adversarial/test_sign_in e2e/test_service
gate/gate           adversarial/test_grammar
gate/outage         server/gate/test_gate
gate/proxy_warning  server/gate/test_verdicts
gate/graphql        server/gate/test_flow adversarial/test_bodies
gate/limits         adversarial/test_sign_in
gate/wsgi           server/gate/test_exchanges server/gate/test_interceptors
gate/wsgi           server/observe/test_decision_log adversarial/test_bodies
gate/wsgi           adversarial/test_grammar adversarial/test_spelling
gate/wsgi           e2e/test_faults_are_distinguishable
job_roots           e2e/test_jobs
jobs                e2e/test_jobs
server/live_settings       server/gate/test_state_table e2e/test_modes e2e/test_log_level
lookup_pool         server/gate/test_gate
metrics             server/observe/test_decision_log e2e/test_metrics
recorder            server/observe/test_tracing server/observe/test_decision_log e2e/test_metrics
redaction           e2e/test_log_level e2e/test_metrics e2e/test_secrets
server/app          server/test_settings server/upstream/test_sockets test_cli e2e/test_running
server/app          e2e/test_modes e2e/test_jobs e2e/test_outbound e2e/test_metrics
server/authorities  server/gate/test_state_table contract/test_authorities e2e/test_service
server/caller       e2e/test_faults_are_distinguishable e2e/test_lifecycle
server/settings     server/gate/test_header_policy test_cli e2e/test_metrics
session             adversarial/test_sign_in e2e/test_browser
setting_types       server/test_settings
upstream/apps       server/test_app server/upstream/test_fast_path
upstream/origins    server/test_app
upstream/routes     contract/test_mlflow core/test_operations server/upstream/test_fast_path
upstream/routes     e2e/test_every_route
upstream/stores     server/web/test_health e2e/test_health
upstream/tables     server/upstream/test_experiment_folders e2e/test_locations
validate_key        contract/test_authorities e2e/test_lifecycle
web/health          e2e/test_health
web/keys_api        contract/test_openapi e2e/test_lifecycle contract/test_client_server
web/openapi         docs/test_generated contract/test_openapi
web/pages           authorities/test_browser_session adversarial/test_sign_in e2e/test_browser
web/schemas         server/web/test_keys_api contract/test_openapi e2e/test_lifecycle
core/               core/test_* server/gate/test_adapters contract/test_mlflow
server/             server/gate/test_adapters server/gate/test_verdicts server/test_every_setting
"""


@dataclass(frozen=True)
class Mutant:
    """`source[start:end]` (bytes) of a file gives way to `replacement`."""

    file: str
    line: int
    start: int
    end: int
    replacement: str
    what: str


def mutants(file: str, source: bytes) -> Iterator[Mutant]:
    """All mutants of a Python file; none of its docstrings, log lines and type annotations."""
    offsets = [0]
    for row in source.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(row))

    def made(node: ast.expr | ast.stmt, replacement: str) -> Mutant:
        start = offsets[node.lineno - 1] + node.col_offset
        end = offsets[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        text = " ".join(source[start:end].decode().split())
        return Mutant(file, node.lineno, start, end, replacement, f"{text} -> {replacement}")

    tree = ast.parse(source)
    for statement in tree.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            for element, nothing in _elements(statement.value):
                if isinstance(element, tuple):
                    first, last = made(element[0], nothing), made(element[1], nothing)
                    text = " ".join(source[first.start : last.end].decode().split())
                    yield Mutant(file, first.line, first.start, last.end, nothing, f"{text} -> ")
                else:
                    yield made(element, nothing)
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from (made(node.test, value) for value in ("True", "False"))
        elif isinstance(node, ast.comprehension):
            yield from (made(test, "True") for test in node.ifs)
        elif isinstance(node, ast.BoolOp):
            neutral = "True" if isinstance(node.op, ast.And) else "False"
            yield from (made(value, neutral) for value in node.values)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Compare):
            yield from (made(node.value, value) for value in ("True", "False"))
        elif isinstance(node, ast.Raise) or (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call | ast.Await)
            and not ast.unparse(node).startswith("_log.")
        ):
            yield made(node, "pass")


def _elements(
    value: ast.expr | None,
) -> Iterator[tuple[ast.expr | tuple[ast.expr, ast.expr], str]]:
    """The rows of a table, each with what stands for no row."""
    if isinstance(value, ast.Call) and len(value.args) == 1:
        value = value.args[0]
    if isinstance(value, ast.Dict):
        for key, item in zip(value.keys, value.values, strict=True):
            yield (item, "{}") if key is None else ((key, item), "**{}")
    elif isinstance(value, ast.List | ast.Set | ast.Tuple):
        yield from ((element, "*()") for element in value.elts)


def tests_of(file: str) -> list[str]:
    """The files with tests that look at `file`, of the package; that of its name first."""
    found = [f"tests/{Path(file).parent}/test_{Path(file).stem}.py"]
    for row in TESTS.strip().splitlines():
        part, *names = row.split()
        if part in file:
            found += [
                str(path.relative_to(ROOT))
                for name in names
                for path in sorted((ROOT / "tests").glob(f"{name}.py"))
            ]
    files = [one for one in dict.fromkeys(found) if (ROOT / one).exists()]
    return sorted(files, key=lambda one: "/e2e/" in one or "/test_every_setting" in one)


class Copy:
    """A copy of the tree, in which one mutant at a time lives."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        for name in COPIED:
            without = shutil.ignore_patterns("__pycache__", "_build")
            shutil.copytree(ROOT / name, self.folder / name, ignore=without)
        for path in ROOT.iterdir():
            if path.is_file():
                shutil.copy(path, self.folder)
        self.environ = os.environ | {
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def pass_all(self, file: str, *, long: bool, timeout: float) -> bool:
        """Whether the tests of a file pass, in a fork of this process, which has what they import."""
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            self._run(file, long)
        while time.monotonic() < begun + timeout:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                # 5: there are none, but for those left out.
                return os.waitstatus_to_exitcode(status) in (0, 5)
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False

    def survives(self, mutant: Mutant, files: list[str], *, long: bool) -> bool:
        """Whether the tests of all `files` pass with the mutant in its place."""
        path = self.folder / mutant.file
        source = path.read_bytes()
        path.write_bytes(
            source[: mutant.start] + mutant.replacement.encode() + source[mutant.end :]
        )
        try:
            return all(self.pass_all(file, long=long, timeout=TIMEOUT) for file in files)
        finally:
            path.write_bytes(source)

    def _run(self, file: str, long: bool) -> NoReturn:
        code = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            os.chdir(self.folder)
            os.environ.update(self.environ)
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self.folder))
            for name in [n for n in sys.modules if n.split(".")[0] in ("tests", PACKAGE)]:
                del sys.modules[name]
            wanted = "not docker" if long else "not docker and not long"
            code = int(pytest.main(["-x", "-p", "no:cacheprovider", file, "-m", wanted]))
        finally:
            os._exit(code)


def main() -> None:
    """Run what the options say."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("mutants.json"), help="the survivors")
    parser.add_argument("--only", default="", help="files whose path has this in it")
    parser.add_argument("--again", action="store_true", help="only those that survived before")
    parser.add_argument("--long", action="store_true", help="run long tests as well")
    parser.add_argument("--without", nargs="*", default=[], help="tests to leave out, such as e2e/")
    options = parser.parse_args()
    for name in PRELOADED:
        importlib.import_module(name)
    before = json.loads(options.json.read_text()) if options.again else []
    survivors: list[Mutant] = []
    count = 0
    copy = Copy()
    for path in sorted(p for f in FOLDERS for p in (ROOT / PACKAGE / f).rglob("*.py")):
        file = str(path.relative_to(ROOT / PACKAGE))
        if options.only not in file:
            continue
        source = (copy.folder / PACKAGE / file).read_bytes()
        files = [f for f in tests_of(file) if not any(part in f for part in options.without)]
        for mutant in mutants(f"{PACKAGE}/{file}", source):
            if options.again and [mutant.file, mutant.what] not in before:
                continue
            count += 1
            if copy.survives(mutant, files, long=options.long):
                survivors.append(mutant)
                print(f"{mutant.file}:{mutant.line}: {mutant.what}", flush=True)
        print(f"# {count} tried with {file}, {len(survivors)} survived", flush=True)
    options.json.write_text(json.dumps([(one.file, one.what) for one in survivors], indent=1))


if __name__ == "__main__":
    main()
