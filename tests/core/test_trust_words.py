"""Trusts in words."""

from __future__ import annotations

from typing import Any

from mlflow_hokusai_auth.core.trust import Trust, workload
from mlflow_hokusai_auth.core.trust_words import warning, words

from .rows import agree


def trust(**given: Any) -> Trust:
    made = workload(**given)
    return Trust("trust_1", "ACME", made.kind, made.issuer, made.claims, ("model:write",))


def test_every_claim_of_a_trust_is_in_its_words() -> None:
    github = {"github": "acme/models", "workflow": "release.yml"}
    agree(
        words,
        {
            trust(**github): "release.yml of acme/models on GitHub",
            trust(**github, environment="prod"): (
                "release.yml of acme/models on GitHub, environment prod"
            ),
            trust(github="a/b", workflow="c/d/.github/workflows/e.yml"): (
                "c/d/.github/workflows/e.yml of a/b on GitHub"
            ),
            # The repository of the file ends like the caller's.
            trust(github="a/b", workflow="x-a/b/.github/workflows/e.yml"): (
                "x-a/b/.github/workflows/e.yml of a/b on GitHub"
            ),
            trust(**github, issuer="https://ghe.example/_services/token"): (
                "release.yml of acme/models on GitHub (https://ghe.example/_services/token)"
            ),
            trust(**github, claims={"ref": "refs/tags/*", "repository_id": "74"}): (
                "release.yml of acme/models on GitHub, with ref refs/tags/…, repository_id 74"
            ),
            trust(gitlab="acme/a/b"): "acme/a/b on GitLab",
            trust(gitlab="acme/b", workflow="ci/.gitlab-ci.yml", environment="p*"): (
                "ci/.gitlab-ci.yml of acme/b on GitLab, environment p…"
            ),
            trust(gitlab="a/b", workflow="c.yml", issuer="https://gitlab.example.com"): (
                "c.yml of a/b on GitLab (https://gitlab.example.com)"
            ),
            trust(gitlab="a/b", workflow="c.yml", issuer="https://x.example/gitlab"): (
                "c.yml of a/b on GitLab (https://x.example/gitlab)"
            ),
            trust(issuer="https://i", claims={"sub": "system:*", "team": "a"}): (
                "tokens of https://i, with sub system:…, team a"
            ),
        }.items(),
    )


def test_warning_says_who_else_gets_keys() -> None:
    def warned(**given: Any) -> str:
        made = workload(**given)
        return warning(made.kind, dict(made.claims))

    github = {"github": "acme/models", "workflow": "release.yml"}
    assert "push to any branch of" in warned(**github)
    assert "push to refs/tags/… of" in warned(**github, claims={"ref": "refs/tags/*"})
    for narrow in (
        {**github, "environment": "prod"},
        {**github, "claims": {"ref": "refs/heads/main"}},
        {"gitlab": "acme/models"},
        {"issuer": "https://i.example", "claims": {"sub": "job"}},
    ):
        assert warned(**narrow) == "", narrow
