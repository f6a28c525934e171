"""Lines of docs/requirements.md that no other test proves: 2b and 11c."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mlflow_hokusai_auth.server.aliases import Prefixes
from mlflow_hokusai_auth.server.settings import Settings

ROOT = Path(__file__).parent.parent
ROUTES = (ROOT / "tests/vectors/mlflow_routes.txt").read_text().splitlines()
PACKAGE = ROOT / "mlflow_hokusai_auth"
MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.stat().st_size]


def test_no_route_of_mlflow_lies_under_a_prefix() -> None:
    """Else it could not be reached any more: its path would lose what it begins with."""
    prefixes = Prefixes(Settings.model_fields["prefixes"].default)
    paths = {line.split()[2] for line in ROUTES if line and not line.startswith("#")}
    assert len(paths) > 200
    assert {path for path in paths if prefixes.split(path) != ("", path)} == set()


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_public_says_what_it_is(module: Path) -> None:
    tree = ast.parse(module.read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    # A migration's functions are Alembic's, which says what they are.
    own = [] if module.parent.name == "versions" else tree.body
    public = [one for one in own if isinstance(one, kinds) and not one.name.startswith("_")]
    assert ast.get_docstring(tree)
    assert [one.name for one in public if not ast.get_docstring(one)] == []
