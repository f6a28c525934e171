"""Reading the commands on a page, and running them in a shell.

The `bash` and `python` blocks of a page are run unchanged, in their order and in one folder. Blocks of
any other language (`console`, `text`, `nginx`, `r`, …) are not run.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.harness import environment

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
IN_FORK = Path(__file__).with_name("in_fork.py")
#: The address of a server and the key that pages show.
ADDRESS = "https://registry.example.com"
KEY = "hk_live_YOUR_KEY"
#: Seconds that all commands of a page may take.
TIMEOUT = 600
_BLOCK = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, without the indentation of a list around them."""
    found = []
    for indent, language, text in _BLOCK.findall(page.read_text()):
        lines = [line.removeprefix(indent) for line in text.splitlines(keepends=True)]
        found.append(Block(language, "".join(lines)))
    return found


def script(page: Path, replaced: dict[str, str]) -> str:
    """The commands of a page as one shell script, with the keys of `replaced` replaced."""
    parts = ["set -euo pipefail\n"]
    for block in blocks(page):
        if block.language == "python":
            parts.append(f"python - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON\n")
        elif block.language == "bash":
            parts.append(_in_background(block.text))
    text = "".join(parts)
    for old, new in replaced.items():
        text = text.replace(old, new)
    return text


def run(
    page: Path, folder: Path, replaced: dict[str, str], *, forked: bool = False, **environ: str
) -> str:
    """Run the commands of a page in `folder` and return their output; fail if one of them fails.

    `forked`: those that import MLflow are forks of the run's fork server, which a test has started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    env = environment(folder, **environ)
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    if forked:
        env["PATH"] = f"{_programs_in_forks(folder)}{os.pathsep}{env['PATH']}"
    # Unless the test says otherwise, the page's own setting counts, or the default: the folder.
    if "HOKUSAI_AUTH_DATABASE_URI" not in environ:
        del env["HOKUSAI_AUTH_DATABASE_URI"]
    if "HOKUSAI_AUTH_ISOLATION" not in environ:
        del env["HOKUSAI_AUTH_ISOLATION"]
    log = folder / "commands.log"
    with log.open("wb") as output:
        shell = subprocess.Popen(
            ["bash", "-c", script(page, replaced)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        status = shell.wait(TIMEOUT)
    finally:
        # The servers that it started are killed, too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
    printed = log.read_text(errors="replace")
    assert status == 0, f"{page.name}:\n{printed[-4000:]}"
    return printed


def _programs_in_forks(folder: Path) -> Path:
    programs = folder / "programs-in-forks"
    programs.mkdir()
    python_path = shlex.quote(os.environ.get("PYTHONPATH", ""))
    for name in ("hokusai-auth", "mlflow", "python"):
        program = programs / name
        command = f"{sys.executable} -ES {IN_FORK} {name} {python_path}"
        program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        program.chmod(0o755)
    return programs


def _in_background(text: str) -> str:
    """`text`; if its last command starts a server, that runs in the background."""
    command = text.replace("\\\n", " ").strip().splitlines()[-1]
    if "mlflow server" not in command or command.startswith("#"):
        return text
    words = shlex.split(command)
    port = words[words.index("--port") + 1] if "--port" in words else "5000"
    health = f"http://127.0.0.1:{port}/health"
    wait = f"until curl -fs {health}; do kill -0 $! || {{ cat server.log; exit 1; }}; sleep 0.2; done\n"
    return f"{text.rstrip()} > server.log 2>&1 &\n{wait}"
