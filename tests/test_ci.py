"""The workflows and hooks: that they are valid, agree with the rest of the tree, and can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlflow_hokusai_auth.core import keys

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
CI = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
RELEASE = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
#: What lets a command fail unseen.
NEUTRALISED = re.compile(r"\|\| *(true|:|echo|exit 0)|\bset \+e")


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    for workflow in (CI, RELEASE):
        yield from workflow["jobs"].items()


def steps() -> list[dict[str, Any]]:
    return [step for _, job in jobs() for step in job.get("steps", [])]


def commands() -> list[str]:
    return [step["run"] for step in steps() if "run" in step]


def run(*command: str | Path, cwd: Path = ROOT, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, **more
    )


def tool(name: str) -> Path:
    """A program beside this Python."""
    return Path(sys.executable).parent / name


# The workflows and the image


def test_the_workflows_are_what_github_takes(tmp_path: Path) -> None:
    def check(*paths: Path) -> subprocess.CompletedProcess[str]:
        schema = ("--builtin-schema", "vendor.github-workflows")
        return run(tool("check-jsonschema"), *schema, *paths)

    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]
    done = check(*WORKFLOWS)
    assert done.returncode == 0, done.stdout
    for change in (("timeout-minutes:", "timeout:"), ("runs-on:", "run-on:")):
        (tmp_path / "ci.yml").write_text(WORKFLOWS[0].read_text().replace(*change, 1))
        assert check(tmp_path / "ci.yml").returncode == 1, change


def test_every_target_that_is_called_exists() -> None:
    called = []
    for command in commands():
        for version in CI["jobs"]["mlflow"]["strategy"]["matrix"]["mlflow"]:
            command = command.replace("${{ matrix.mlflow }}", version)
            assert re.fullmatch(r"make( [\w.-]+)+", command), command
            called += command.split()[1:]
    assert {
        "lint",
        "test",
        "test-servers",
        "test-long",
        "test-docker",
        "check-dist",
        "smoke",
    } <= set(called)
    for target in dict.fromkeys(called):
        done = run("make", "--dry-run", target)
        assert done.returncode == 0, done.stderr


def test_no_step_ignores_its_failure() -> None:
    for name, job in jobs():
        assert "continue-on-error" not in job, name
        assert "if" not in job, name
    for step in steps():
        assert not {"continue-on-error", "if"} & set(step), step
    recipes = [line for line in MAKEFILE.splitlines() if line.startswith("\t")]
    scripts = {ROOT / name for name in re.findall(r"bash (\.ci/\S+)", MAKEFILE)}
    assert {path.name for path in scripts} == {"check-dist", "check-tag", "python", "smoke"}
    for text in (*commands(), *recipes, *(path.read_text() for path in scripts)):
        assert not NEUTRALISED.search(text), text
    assert not [line for line in recipes if re.match(r"\t@?-", line)]
    for path in scripts:
        assert "\nset -euo pipefail\n" in path.read_text(), path


def test_what_the_image_depends_on_is_installed_anew_for_setup_py_alone() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text, re.M | re.S))
    installing = ("dependencies", "client-dependencies", "server-dependencies")
    copied = [re.findall(r"^(?:COPY|ADD|ARG) .*", stages[name], re.M) for name in installing]
    assert copied == [["COPY setup.py ./"], [], []]


def test_every_job_is_bounded_and_may_do_little() -> None:
    for workflow in (CI, RELEASE):
        assert workflow["permissions"] == {"contents": "read"}
        assert workflow["concurrency"]
    may = {name: job["permissions"] for name, job in jobs() if "permissions" in job}
    assert may == {"publish": {"id-token": "write"}}
    assert [n for n, job in jobs() if "uses" not in job and "timeout-minutes" not in job] == []
    used = [step["uses"] for step in steps() if "uses" in step]
    assert [one for one in used if not re.search(r"@(v\d+|release/v\d+)$", one)] == []


def test_nothing_of_an_event_is_part_of_a_command() -> None:
    assert [one for one in commands() if re.search(r"\$\{\{(?! matrix\.)", one)] == []


def test_the_versions_are_those_that_are_promised() -> None:
    claimed = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert CI["jobs"]["test"]["strategy"]["matrix"]["python"] == claimed
    assert f'python_requires=">={claimed[0]}"' in (ROOT / "setup.py").read_text()
    matrix = re.search(r"^MATRIX \?= (.+)$", MAKEFILE, re.MULTILINE)
    assert matrix is not None
    assert CI["jobs"]["mlflow"]["strategy"]["matrix"]["mlflow"] == matrix[1].split()


def test_nothing_is_published_that_did_not_run() -> None:
    made = RELEASE["jobs"]
    publishing = [n for n, job in made.items() if "pypi-publish" in str(job.get("steps"))]
    assert publishing == ["publish"]
    assert set(made["publish"]["needs"]) == {"ci", "smoke"}
    assert made["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert {made[name]["needs"] for name in ("ci", "smoke")} == {"tag"}
    # One call of make builds once, so what is smoked is what is kept, and what is kept is published.
    assert "make check-dist smoke smoke-image" in commands()
    kept, taken = (
        [step["with"] for step in steps() if f"actions/{which}-artifact" in step.get("uses", "")]
        for which in ("upload", "download")
    )
    assert [(one["name"], one["path"]) for one in kept] == [("dist", "dist/")]
    assert [(one["name"], one["path"]) for one in taken] == [("dist", "dist/")]
    # It builds nothing itself.
    assert not any("run" in step or "checkout" in step["uses"] for step in made["publish"]["steps"])


#: A tag, the changelog's heading, and what is said of it if the version is 1.2.3.
TAGS = [
    ("v1.2.3", "## 1.2.3 - 2030-01-01", ""),
    ("v1.2.3", "## [1.2.3]", ""),
    ("v1.2.3", "## 1.2.30", "no section"),
    ("v1.2.3", "## 1x2.3", "no section"),
    ("v1.2.3", "## Unreleased", "no section"),
    ("1.2.3", "## 1.2.3", "The tag is"),
    ("v1.2.4", "## 1.2.3", "The tag is"),
    ("", "## 1.2.3", "The tag is"),
    ("v$(false)`false`", "## 1.2.3", "The tag is"),
]


def test_a_tag_names_the_version(tmp_path: Path) -> None:
    (tmp_path / "mlflow_hokusai_auth").mkdir()
    (tmp_path / "mlflow_hokusai_auth/__init__.py").write_text('__version__ = "1.2.3"\n')
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    shutil.copy(ROOT / "Makefile", tmp_path)
    wrong = []
    for tag, heading, says in TAGS:
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n- Something.\n")
        done = run("make", "check-tag", cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "TAG": tag})
        if (done.returncode == 0) != (not says) or says not in done.stderr:
            wrong.append(f"{tag}, {heading}: {done.returncode} {done.stderr}, not {says!r}")
    assert not wrong, "\n".join(wrong)


# Keys in files


def find_keys(folder: Path, texts: dict[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    return run(sys.executable, ".ci/find_keys.py", *(folder / name for name in texts))


def test_a_key_in_a_file_is_found(tmp_path: Path) -> None:
    new = {environment: keys.generate(environment) for environment in keys.ENVIRONMENTS}
    texts, lines = {}, set()
    for name, key in new.items():
        forms = [f"key = '{key}'\n", key[:-6], f"\\n{key[:-14]}.", f"\0\udcff{key}\0"]
        for number, text in enumerate(forms, 1):
            texts[f"{name}{number}"] = "a\n" * number + text
            lines.add(f"{tmp_path}/{name}{number}:{number + 1}: an API key.")
    done = find_keys(tmp_path, texts)
    assert done.returncode == 1
    assert {line.partition(" Generate")[0] for line in done.stderr.splitlines()} == lines
    assert not [key for key in new.values() if key[12:30] in done.stderr + done.stdout]
    # One alone is enough.
    assert find_keys(tmp_path, {"none": "", "one": new["live"]}).returncode == 1


def test_what_is_no_key_passes(tmp_path: Path) -> None:
    good = keys.generate()
    damaged = good[:-1] + ("a" if good[-1] != "a" else "b")
    made_up = ["hk_live_…", "hk_live_" + "a" * 32, "hk_test_" + "aB3" * 15, "hk_live_", "hk_live_x"]
    texts = [damaged, good[:30], "x" + good[8:], *made_up]
    done = find_keys(tmp_path, {f"file{number}": text for number, text in enumerate(texts)})
    assert (done.returncode, done.stderr) == (0, "")


# Pages

#: A page, a part of it, what takes its place, and what is found then, on that line or the first one.
MISMATCHES = [
    ("README.md", "(docs/benchmarks.md)", "(docs/fast.md)", "there is no file docs/fast.md"),
    (
        "docs/requirements.md",
        "`tests/e2e/test_stock_mlflow.py::test_stock_mlflow_lets_anybody_in`",
        "`tests/e2e/test_stock_mlflow.py::test_x`, `tests/e2e/test_x.py::test_y`, "
        "`tests/e2e/job.py::main`",
        "there is no test tests/e2e/test_stock_mlflow.py::test_x",
        "there is no test tests/e2e/test_x.py::test_y",
        "there is no test tests/e2e/job.py::main",
    ),
    ("docs/requirements.md", "`core/forwarding.py`; there", "`core/x.py`", "there is no core/x.py"),
    ("docs/requirements.md", "#manyrefusals", "#x", "there is no heading x in runbooks.md"),
    ("docs/requirements.md", "| 18b | ", "| 18c | ", "18c stands where 18b should"),
    ("docs/requirements.md", "| `make lint` |", "| nobody |", "nothing proves 11a"),
    (
        "docs/runbooks.md",
        "HOKUSAI_AUTH_MODE",
        "HOKUSAI_AUTH_M",
        "there is no setting HOKUSAI_AUTH_M",
    ),
    ("docs/threat-model.md", "\n| 50 |", " | 50 |", "nothing stands where 50 should"),
    ("docs/threat-model.md", "`core/scopes.py`", "`core/y.py`", "there is no core/y.py"),
    ("docs/team/gate-checklist.md", "`core/routes.py`", "`core/z/`", "there is no core/z/"),
    (
        "docs/supplier/errors.md",
        "\n## KEY_MALFORMED\n",
        "\n## KEY_ODD\n",
        "1: KEY_MALFORMED and its status 401 don't stand there once",
        "KEY_ODD stands on the wrong side of messages without a code",
    ),
    (
        "docs/supplier/errors.md",
        "Status 401. The key's",
        "Status 403. The key's",
        "1: KEY_EXPIRED and its status 401 don't stand there once",
    ),
    (
        "docs/supplier/errors.md",
        "\n### Connection refused\n",
        "\n### KEY_UNKNOWN\n",
        "KEY_UNKNOWN stands on the wrong side of messages without a code",
    ),
    (
        "docs/rollback.md",
        "```sh mode-back\n",
        "```sh back\n",
        "tests/docker/test_rollback.py does not run the block 'back'",
        "1: there is no block 'mode-back', which tests/docker/test_rollback.py runs",
    ),
]


def test_names_of_what_does_not_exist_are_found_on_pages(tmp_path: Path) -> None:
    for path in ROOT.iterdir():
        if path.name == "docs":
            shutil.copytree(path, tmp_path / "docs", ignore=lambda *_: ["_build"])
        elif path.suffix == ".md":
            shutil.copy(path, tmp_path)
        else:
            (tmp_path / path.name).symlink_to(path)
    for page, old, new, *_ in MISMATCHES:
        edit(tmp_path / page, old, new)
    expected = set()
    for page, _, new, *findings in MISMATCHES:
        before = (tmp_path / page).read_text().partition(new.strip())[0]
        line = before.count("\n") + 1
        expected |= {f"{page}:{f if f.startswith('1: ') else f'{line}: {f}'}" for f in findings}
    done = run(sys.executable, ".ci/check_pages.py", tmp_path)
    assert done.returncode == 1, done.stderr
    assert sorted(expected ^ set(done.stdout.splitlines())) == []


# The hooks


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of its own with all that git has, or would add, of this one."""
    folder = tmp_path_factory.mktemp("tree")
    listed = run("git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard")
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    run("git", "init", "-q", cwd=folder, check=True)
    (folder / ".git/info/exclude").write_text(".venv\n")
    run("git", "add", "--all", cwd=folder, check=True)
    return folder


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


#: What each hook must not let pass: a file, a part of it, what takes its place, and what it says.
VIOLATIONS = {
    "keys": ("README.md", "# mlflow", "# {key}\n# mlflow", "README.md:1: an API key"),
    "ruff": ("mlflow_hokusai_auth/core/keys.py", "import re\n", "import re\nimport os\n", "F401"),
    "ruff-format": (
        "mlflow_hokusai_auth/core/keys.py",
        "import re\n",
        "import re  \n\n",
        "1 file would be reformatted",
    ),
    # Every good key would open everything.
    "auth": (
        "mlflow_hokusai_auth/core/policy.py",
        "policy) >= operation.access\n    if not enough",
        "policy) >= Access.PUBLIC\n    if not enough",
        "FAILED tests/core/test_policy.py",
    ),
    "vectors": (
        "tests/vectors/mlflow_routes.txt",
        " GET /version\n",
        " GET /versions\n",
        "FAILED tests/core/test_operations.py",
    ),
}


def test_every_hook_has_a_violation_and_fetches_nothing() -> None:
    repositories = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [one["repo"] for one in repositories] == ["local"]
    hooks = [one for repository in repositories for one in repository["hooks"]]
    assert {one["language"] for one in hooks} == {"system"}
    assert {one["id"] for one in hooks} == set(VIOLATIONS)


@pytest.mark.long
@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_hook_fails_on_a_violation(name: str, tree: Path) -> None:
    where, old, new, says = VIOLATIONS[name]
    before = (tree / where).read_text()
    edit(tree / where, old, new.replace("{key}", keys.generate()))
    run("git", "add", where, cwd=tree, check=True)
    try:
        env = {**os.environ, "PRE_COMMIT_HOME": str(tree / ".git/pre-commit")}
        done = run(tool("pre-commit"), "run", name, cwd=tree, env=env)
    finally:
        (tree / where).write_text(before)
        run("git", "add", where, cwd=tree, check=True)
    assert (done.returncode, "Failed" in done.stdout) == (1, True), done.stdout
    assert says in done.stdout
