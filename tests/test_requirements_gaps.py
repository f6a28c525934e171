"""The line of docs/requirements.md that no other test proves: 2b."""

from __future__ import annotations

from pathlib import Path

from mlflow_hokusai_auth.core.prefixes import Prefixes
from mlflow_hokusai_auth.server.settings import Settings

ROOT = Path(__file__).parent.parent
ROUTES = (ROOT / "tests/vectors/mlflow_routes.txt").read_text().splitlines()


def test_no_route_of_mlflow_lies_under_a_prefix() -> None:
    """Else it could not be reached any more: its path would lose what it begins with."""
    prefixes = Prefixes(Settings.model_fields["prefixes"].default)
    paths = {line.split()[2] for line in ROUTES if line and not line.startswith("#")}
    assert len(paths) > 200
    assert {path for path in paths if prefixes.split(path) != ("", path)} == set()
