"""What only the source shows: no verdict by a URL that was put together, no slow comparison."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow_hokusai_auth

PACKAGE = Path(mlflow_hokusai_auth.__file__).parent
TREES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
SECRET = re.compile(r"secret|token|digest|signature|password|credential|session|\bkey\b", re.I)
#: Comparisons for equality that look as if a secret was compared, by module, and why none is.
HARMLESS = {
    "client/diagnose/doctor.py": {
        "word != results.key"
    },  # the user's own, in the user's own process
    "client/diagnose/identity.py": {"key == used"},  # likewise
    "authorities/identity_tokens.py": {"key.algorithm != algorithm"},  # names in a public key's set
    "core/browser.py": {"key == wanted"},  # a cookie's name
    "core/credentials.py": {"session != keys.is_session_token(key)"},  # whether it is one
    # Folders of experiments, and the name of a trace's tag.
    "core/folders.py": {
        "key[:len(base)] != base",
        "key[len(base):len(base) + 1] == ('workspaces',)",
    },
    "server/isolation/locations.py": {"row.key != TRACE_LOCATION"},
    "server/isolation/provenance.py": {"tag.key == tables.CLIENT_USER"},
    "server/upstream/tables.py": {"key == name"},  # the column with the id of a run
    "store/suggestions.py": {"table.c.key == _STAMP", "_RUN_TAGS.c.key == _USER"},  # keys of tags
    # The client's own key, in its own process; and the origins of a key.
    "client/ci_key.py": {"_held.key == key", "key != _refused[0]"},
    "client/origin_guard.py": {"profile.origin(url) != key.origin", "target != key.origin"},
    # The operator's own environment.
    "authorities/server_jobs.py": {
        "environ.get(PASSWORD) == secret",
        "environ.get(name) == secret",
    },
    "server/web/leak_reports.py": {"keys.setdefault(identifier, key) != key"},  # public keys
}
#: Made into SQL, which looks up a digest or an id: nothing of a secret's is in the time that takes.
SQL = re.compile(r"[A-Z]+\.c\.(digest|token_digest|key_id) == ")


def comparisons(tree: ast.AST) -> Iterator[str]:
    """Comparisons for equality of two variable things, one of which may be a secret."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        equal = any(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops)
        fixed = any(isinstance(side, ast.Constant) for side in sides)
        text = ast.unparse(node)
        if equal and not fixed and SECRET.search(text) and not SQL.match(text):
            yield text


def test_secrets_are_compared_with_compare_digest_only() -> None:
    found = {name: set(comparisons(tree)) for name, tree in TREES.items()}
    assert {name: texts for name, texts in found.items() if texts} == HARMLESS
    calls = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hmac.compare_digest"
    }
    # The page's token, what Redis holds, and the jobs' secret. Of keys and sessions there are digests,
    # by which a row is found or not.
    assert calls == {
        "core/browser.py",
        "authorities/redis_identities.py",
        "authorities/server_jobs.py",
    }


def test_no_decision_reads_an_assembled_url() -> None:
    # Frameworks make it with the Host header, so that Host says what the path is.
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("url", "base_url", "url_root"):
                assert not re.search(r"\brequest$", ast.unparse(node.value)) or name.startswith(
                    "client/"
                ), (name, node.lineno)
