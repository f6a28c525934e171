"""Identity tokens that are worth a key: rows for what services document, properties for the rest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_hokusai_auth.core import trust as trusts
from mlflow_hokusai_auth.core.errors import InvalidRequest
from mlflow_hokusai_auth.core.trust import Accepted, Refused, Trust

NOW = 1_800_000_000.0
#: As https://docs.github.com/actions/reference/openid-connect-reference shows it.
GITHUB = {
    "jti": "example-id",
    "sub": "repo:acme/models:environment:prod",
    "environment": "prod",
    "aud": "https://registry.example.com",
    "ref": "refs/heads/main",
    "sha": "0123456789abcdef0123456789abcdef01234567",
    "repository": "acme/models",
    "repository_owner": "acme",
    "actor_id": "12",
    "repository_visibility": "private",
    "repository_id": "74",
    "repository_owner_id": "65",
    "run_id": "9876543210",
    "run_number": "10",
    "run_attempt": "2",
    "runner_environment": "github-hosted",
    "actor": "octocat",
    "workflow": "release",
    "head_ref": "",
    "base_ref": "",
    "event_name": "workflow_dispatch",
    "ref_type": "branch",
    "job_workflow_ref": "acme/models/.github/workflows/release.yml@refs/heads/main",
    "iss": "https://token.actions.githubusercontent.com",
    "nbf": NOW - 10,
    "exp": NOW + 290,
    "iat": NOW - 10,
}
#: As https://docs.gitlab.com/ci/secrets/id_token_authentication/ shows it.
GITLAB = {
    "namespace_id": "72",
    "namespace_path": "acme",
    "project_id": "20",
    "project_path": "acme/models",
    "user_id": "1",
    "user_login": "sample-user",
    "pipeline_id": "574",
    "pipeline_source": "push",
    "job_id": "302",
    "ref": "main",
    "ref_type": "branch",
    "ref_path": "refs/heads/main",
    "ref_protected": "true",
    "environment": "prod",
    "runner_environment": "self-hosted",
    "sha": "714a629c0b401fdce83e847fc9589983fc6f46bc",
    "ci_config_ref_uri": "gitlab.com/acme/models//.gitlab-ci.yml@refs/heads/main",
    "jti": "235b3a54-b797-45c7-ae9a-f72d7bc6ef5b",
    "iat": NOW - 10,
    "nbf": NOW - 15,
    "exp": NOW + 3590,
    "iss": "https://gitlab.com",
    "sub": "project_path:acme/models:ref_type:branch:ref:main",
}
KUBERNETES = {
    "aud": ["https://registry.example.com"],
    "exp": NOW + 3600,
    "iat": NOW,
    "nbf": NOW,
    "iss": "https://kubernetes.default.svc.cluster.local",
    "kubernetes.io": {"namespace": "acme", "serviceaccount": {"name": "trainer", "uid": "4"}},
    "sub": "system:serviceaccount:acme:trainer",
}

texts = st.text("aB-/@.*é", max_size=8)


def trust(**given: Any) -> Trust:
    fields = {"trust_id": "trust_1", "owner": "ACME", "scopes": ("model:write",)}
    others = {name: given.pop(name) for name in ("ttl", "pins", "trust_id") if name in given}
    workload = trusts.workload(**given)
    return Trust(**{**fields, **dataclasses.asdict(workload), **others})


def github(**given: Any) -> Trust:
    return trust(**{"github": "acme/models", "workflow": "release.yml", **given})


def accepted(one: Trust, claims: dict[str, Any]) -> Accepted:
    verdict = trusts.judge(one, claims, NOW)
    assert isinstance(verdict, Accepted), verdict
    return verdict


def refused(one: Trust, claims: dict[str, Any]) -> Refused:
    verdict = trusts.judge(one, claims, NOW)
    assert isinstance(verdict, Refused), verdict
    return verdict


def test_documented_tokens_are_worth_a_key() -> None:
    key = accepted(github(environment="prod"), GITHUB)
    assert key.source == f"github:acme/models@{GITHUB['sha']}#9876543210"
    assert key.ttl == 900
    assert key.pins == (("repository_id", "74"), ("repository_owner_id", "65"))
    key = accepted(trust(gitlab="acme/models", workflow=".gitlab-ci.yml"), GITLAB)
    assert key.source == f"gitlab:acme/models@{GITLAB['sha']}#574"
    assert key.pins == (("project_id", "20"), ("namespace_id", "72"))
    key = accepted(trust(issuer=KUBERNETES["iss"], claims={"sub": KUBERNETES["sub"]}), KUBERNETES)
    assert key.source == ("kubernetes.default.svc.cluster.local:system:serviceaccount:acme:trainer")
    assert key.pins == ()


def test_each_claim_that_differs_is_named_with_both_values() -> None:
    for claim, came in (
        ("repository", "acme/models2"),
        ("repository", "Acme/models"),
        ("environment", "prod "),
        ("job_workflow_ref", "acme/models/.github/workflows/other.yml@refs/heads/main"),
        ("job_workflow_ref", "evil/models/.github/workflows/release.yml@refs/heads/main"),
        ("job_workflow_ref", "acme/models/.github/workflows/release.yml"),
        ("job_workflow_ref", "acme/models/.github/workflows/release.yml@other.yml@refs/heads/main"),
    ):
        one = github(environment="prod")
        verdict = refused(one, {**GITHUB, claim: came})
        expected = dict(one.claims)[claim]
        assert (verdict.code, verdict.claim) == ("TOKEN_UNTRUSTED", claim), came
        assert (verdict.expected, verdict.came) == (expected, f"'{came}'")
        assert expected in verdict.message
        assert came in verdict.message
    for claim in ("repository", "job_workflow_ref", "environment", "event_name", "repository_id"):
        without = {name: value for name, value in GITHUB.items() if name != claim}
        verdict = refused(github(environment="prod"), without)
        assert (verdict.claim, verdict.came) == (claim, "missing")


@given(st.sampled_from(sorted(GITHUB)), st.one_of(st.none(), st.booleans(), st.integers(), texts))
def test_another_value_of_a_claim_that_is_asked_for_is_never_accepted(
    claim: str, came: object
) -> None:
    one = github(environment="prod")
    one = dataclasses.replace(one, pins=(("repository_id", "74"), ("repository_owner_id", "65")))
    verdict = trusts.judge(one, {**GITHUB, claim: came}, NOW)
    asked = {*dict(one.claims), *dict(one.pins)}
    if claim in asked and came != GITHUB[claim]:
        assert isinstance(verdict, Refused)
        assert verdict.claim == claim
    elif claim not in ("event_name", "ref"):
        assert isinstance(verdict, Accepted)


@given(texts.filter(bool), texts, texts)
def test_a_star_at_the_end_asks_for_a_beginning_and_nothing_else_does(
    start: str, rest: str, other: str
) -> None:
    def good(value: str, came: object) -> bool:
        one = Trust("t", "o", "issuer", "https://i", (("sub", value),), ("model:read",))
        return isinstance(trusts.judge(one, {"sub": came}, NOW), Accepted)

    start = start.replace("*", "+")
    assert good(f"{start}*", start + rest)
    assert good(f"{start}*", other) is other.startswith(start)
    assert good(start, other) is (start == other)
    assert not good(f"{start}*", [start])
    assert not good(f"{start}*", {start: start})


def test_numbers_and_truths_compare_as_their_text() -> None:
    def good(wanted: str, came: object) -> bool:
        one = trust(issuer="https://issuer.example.com", claims={"x": wanted}, single_use=True)
        return isinstance(trusts.judge(one, {"x": came}, NOW), Accepted)

    assert good("74", 74)
    assert good("74", "74")
    assert good("true", True)
    assert good("false", False)
    for wanted, came in (("1", True), ("74", 74.0), ("None", None), ("null", None), ("a", ["a"])):
        assert not good(wanted, came), came


def test_pull_requests_get_no_key() -> None:
    loose = trust(issuer="https://git.acme.example", claims={"environment": "prod"})
    for one, claims, changes in (
        (github(), GITHUB, {"event_name": "pull_request", "ref": "refs/pull/7/merge"}),
        (github(), GITHUB, {"event_name": "pull_request_target"}),
        (github(), GITHUB, {"event_name": "pull_request_review", "ref": "refs/pull/7/merge"}),
        (trust(gitlab="acme/models"), GITLAB, {"pipeline_source": "merge_request_event"}),
        (trust(gitlab="acme/models"), GITLAB, {"ref_path": "refs/merge-requests/7/head"}),
        (trust(gitlab="acme/models"), GITLAB, {"pipeline_source": "external_pull_request_event"}),
        # A merge request's child pipeline has its own event, and the merge request's branch.
        (
            trust(gitlab="acme/models"),
            GITLAB,
            {"pipeline_source": "parent_pipeline", "ref_protected": "false"},
        ),
        # The job of a fork's merge request has the fork's name and numbers, and runs elsewhere.
        (trust(gitlab="acme/models"), GITLAB, {"job_project_id": "666", "job_project_path": "e/x"}),
        # A server of theirs that is trusted by its URL and claims.
        (loose, GITHUB, {"event_name": "pull_request_target"}),
        (loose, GITLAB, {"pipeline_source": "merge_request_event"}),
    ):
        verdict = refused(one, {**claims, **changes})
        assert verdict.code == "PULL_REQUEST_REFUSED", changes
        assert verdict.claim in changes


def test_child_pipeline_of_a_protected_branch_gets_a_key() -> None:
    child = {**GITLAB, "pipeline_source": "parent_pipeline", "job_project_id": "20"}
    accepted(trust(gitlab="acme/models"), child)


def test_reusable_workflow_is_judged_by_the_callers_repository_and_its_own_file() -> None:
    shared = "acme/shared/.github/workflows/publish.yml"
    one = github(workflow=shared)
    for commit in ("refs/heads/main", "refs/tags/v1", "f" * 40):
        accepted(one, {**GITHUB, "job_workflow_ref": f"{shared}@{commit}"})
    # The caller's own file of that name, another repository that calls the shared one.
    assert refused(one, GITHUB).claim == "job_workflow_ref"
    stranger = {**GITHUB, "repository": "evil/models", "job_workflow_ref": f"{shared}@refs/heads/x"}
    assert refused(one, stranger).claim == "repository"
    # A trust in the caller's own file does not hold for what that file calls.
    verdict = refused(github(), {**GITHUB, "job_workflow_ref": f"{shared}@refs/heads/main"})
    assert verdict.claim == "job_workflow_ref"


def test_only_the_preset_s_file_asks_for_a_branch_a_tag_or_a_commit_after_its_name() -> None:
    accepted(github(claims={"actor": "bot@*"}), {**GITHUB, "actor": "bot@acme"})
    own = trust(issuer=KUBERNETES["iss"], claims={"job_workflow_ref": "a.yml@*"}, single_use=True)
    accepted(own, {"job_workflow_ref": "a.yml@v1"})


def test_repository_that_was_made_again_is_not_trusted() -> None:
    pinned = dataclasses.replace(github(), pins=accepted(github(), GITHUB).pins)
    assert accepted(pinned, GITHUB).pins == ()
    for claim in ("repository_id", "repository_owner_id"):
        verdict = refused(pinned, {**GITHUB, claim: "999"})
        assert (verdict.code, verdict.claim) == ("REPOSITORY_CHANGED", claim)
        assert (verdict.expected, verdict.came) == (str(GITHUB[claim]), "'999'")
        assert "--forget-ids" in verdict.message
    # Numbers that are given from the beginning are claims as any other.
    given_ids = github(claims={"repository_id": "74"})
    assert refused(given_ids, {**GITHUB, "repository_id": "999"}).claim == "repository_id"


@given(st.floats(60, 3600), st.floats(-100, 8000))
def test_key_outlives_no_token_that_can_be_exchanged_again(ttl: float, left: float) -> None:
    claims = {**KUBERNETES, "exp": NOW + left}
    once, again = (
        trust(issuer=KUBERNETES["iss"], claims={"sub": "system:*"}, ttl=ttl, single_use=single)
        for single in (True, False)
    )
    assert accepted(once, claims).ttl == ttl
    verdict = trusts.judge(again, claims, NOW)
    if isinstance(verdict, Accepted):
        assert 0 < verdict.ttl <= min(ttl, claims["exp"] - NOW)
    else:
        assert (verdict.code, claims["exp"] <= NOW) == ("TOKEN_EXPIRED", True)
    assert isinstance(trusts.judge(again, {**KUBERNETES, "exp": "soon"}, NOW), Refused)


def test_who_mints_a_token_per_request_exchanges_it_once() -> None:
    for given_, once in (
        ({"github": "acme/models", "workflow": "release.yml"}, True),
        ({"gitlab": "acme/models"}, False),
        ({"issuer": "https://agent.buildkite.com", "claims": {"pipeline_slug": "x"}}, True),
        ({"issuer": "https://oidc.circleci.com/org/0f-1", "claims": {"sub": "x"}}, True),
        ({"issuer": "https://kubernetes.default.svc", "claims": {"sub": "x"}}, False),
        ({"issuer": "https://agent.buildkite.com.evil.example", "claims": {"sub": "x"}}, False),
    ):
        assert trust(**given_).single_use is once, given_
        assert trust(**given_, single_use=not once).single_use is not once


def test_most_specific_trust_wins_and_then_the_oldest() -> None:
    loose, strict = github(trust_id="loose"), github(trust_id="strict", environment="prod")
    later = github(trust_id="later", environment="prod")
    verdict = trusts.choose([loose, strict, later], GITHUB, NOW)
    assert isinstance(verdict, Accepted)
    assert verdict.trust.trust_id == "strict"
    verdict = trusts.choose([loose, strict], {**GITHUB, "environment": "test"}, NOW)
    assert isinstance(verdict, Accepted)
    assert verdict.trust.trust_id == "loose"


def test_strangers_learn_nobodys_name() -> None:
    others = [github(), trust(github="globex/secret-project", workflow="a.yml")]
    verdict = trusts.choose(others, {**GITHUB, "repository": "evil/evil"}, NOW)
    assert isinstance(verdict, Refused)
    assert (verdict.claim, verdict.expected, verdict.came) == ("repository", "", "'evil/evil'")
    for name in ("acme", "globex", "secret", "release"):
        assert name not in verdict.message
    # The workload itself is told what differs.
    verdict = trusts.choose(others, {**GITHUB, "job_workflow_ref": "x"}, NOW)
    assert isinstance(verdict, Refused)
    assert "release.yml" in verdict.expected
    assert isinstance(trusts.choose([], GITHUB, NOW), Refused)
    one = trust(issuer="https://issuer.example.com", claims={"sub": "secret", "team": "a"})
    verdict = trusts.choose([one], {"sub": "other", "team": "b"}, NOW)
    assert isinstance(verdict, Refused)
    assert "secret" not in verdict.message
    # Any account of a public issuer has the second claim.
    claims = {"email": "secret@acme.example", "email_verified": "true"}
    one = trust(issuer="https://accounts.example.com", claims=claims)
    stranger = {"sub": "1", "email": "evil@evil.example", "email_verified": True}
    verdict = trusts.choose([one], stranger, NOW)
    assert isinstance(verdict, Refused)
    assert "secret" not in verdict.message + verdict.expected
    # A workload that the trust names is told what differs.
    one = trust(issuer="https://issuer.example.com", claims={"sub": "job", "team": "a"})
    verdict = trusts.choose([one], {"sub": "job", "team": "b"}, NOW)
    assert isinstance(verdict, Refused)
    assert (verdict.claim, verdict.expected, verdict.came) == ("team", "a", "'b'")


@given(st.dictionaries(st.sampled_from(sorted(GITHUB)), st.text(max_size=20)))
def test_messages_and_sources_have_no_line_break_and_no_key(changes: dict[str, str]) -> None:
    changes["sha"] = "\n\x1b[31mhk_live_" + "a" * 46
    verdict = trusts.choose([github(environment="prod")], {**GITHUB, **changes}, NOW)
    text = verdict.message if isinstance(verdict, Refused) else verdict.source
    assert text.isprintable()
    source = trusts.source(github(), {**GITHUB, **changes})
    assert source.isprintable()
    assert "aaaa" not in source


def test_long_claims_are_cut() -> None:
    verdict = refused(github(), {**GITHUB, "repository": "x" * 16_000})
    assert len(verdict.message) < 600
    assert len(trusts.source(github(), {**GITHUB, "sha": "x" * 16_000})) <= trusts.MAX_SOURCE


def test_what_is_no_trust_is_told_why() -> None:
    issuer = "https://issuer.example.com"
    verified = ("iss", "aud", "exp", "nbf", "iat", "jti")
    for given_, why in (
        ({}, "Say who is trusted"),
        ({"github": "acme/models"}, "needs workflow"),
        ({"github": "acme", "workflow": "a.yml"}, "org/repo"),
        ({"github": "acme/*", "workflow": "a.yml"}, "org/repo"),
        ({"github": "acme/models", "gitlab": "acme/models"}, "not both"),
        ({"github": "acme/models", "workflow": "*"}, "workflow must be a file"),
        ({"github": "acme/models", "workflow": "a.yml@b.yml"}, "workflow must be a file"),
        ({"github": "acme/models", "workflow": "acme/a.yml"}, "workflow must be a file"),
        ({"gitlab": "acme"}, "group/project"),
        ({"gitlab": "a/b", "workflow": "/a.yml"}, "pipeline's file"),
        ({"issuer": issuer}, "from 1 to 16 claims"),
        ({"issuer": GITHUB["iss"], "claims": {"repository": "a/b"}}, "needs github"),
        ({"issuer": f"{GITHUB['iss']}/acme", "claims": {"repository": "a/b"}}, "needs github"),
        ({"issuer": GITLAB["iss"], "claims": {"project_path": "a/b"}}, "needs gitlab"),
        ({"issuer": issuer, "workflow": "a.yml"}, "belong to github and gitlab"),
        ({"issuer": "http://issuer.example.com", "claims": {"sub": "x"}}, "must be https"),
        ({"issuer": "http://127.0.0.1.evil.example", "claims": {"sub": "x"}}, "must be https"),
        ({"issuer": "https://a@b", "claims": {"sub": "x"}}, "exact URL"),
        ({"issuer": "https://a/?x", "claims": {"sub": "x"}}, "exact URL"),
        ({"issuer": "issuer.example.com", "claims": {"sub": "x"}}, "exact URL"),
        ({"issuer": issuer, "claims": {"sub": "*"}}, "a beginning and `*`"),
        ({"issuer": issuer, "claims": {"sub": ""}}, "a beginning and `*`"),
        ({"issuer": issuer, "claims": {"sub": "a*b"}}, "a beginning and `*`"),
        ({"issuer": issuer, "claims": {"sub": "a**"}}, "a beginning and `*`"),
        *(({"issuer": issuer, "claims": {name: "x"}}, "always checked") for name in verified),
        ({"issuer": issuer, "claims": {"": "x"}}, "empty"),
        ({"issuer": issuer, "claims": {f"c{n}": "x" for n in range(17)}}, "from 1 to 16 claims"),
        (
            {"github": "a/b", "workflow": "a.yml", "claims": {"repository": "c/d"}},
            "given twice",
        ),
    ):
        with pytest.raises(InvalidRequest) as error:
            trusts.workload(**given_)
        assert why in str(error.value), given_


def test_own_servers_of_the_presets() -> None:
    one = trust(gitlab="acme/models", workflow="ci.yml", issuer="https://git.acme.example:8443")
    assert dict(one.claims)["ci_config_ref_uri"] == "git.acme.example:8443/acme/models//ci.yml@*"
    assert one.issuer == "https://git.acme.example:8443"
    # GitLab below a path of its host, as its settings spell it with and without a slash at the end.
    for url in ("https://acme.example/gitlab", "https://acme.example/gitlab/"):
        one = trust(gitlab="acme/models", workflow=".gitlab-ci.yml", issuer=url)
        assert one.issuer == url
        uri = "acme.example/gitlab/acme/models//.gitlab-ci.yml@refs/heads/main"
        accepted(one, {**GITLAB, "iss": url, "ci_config_ref_uri": uri})
        refused(one, {**GITLAB, "iss": url, "ci_config_ref_uri": uri.replace("/gitlab/", "/")})
    assert github(issuer="https://ghe.acme.example/_services/token").algorithms == ("RS256",)
    for host in ("localhost", "127.0.0.1", "[::1]"):
        one = trust(issuer=f"http://{host}:8080/x", claims={"sub": "a"})
        assert one.algorithms == ("RS256", "ES256"), host


def test_trusts_of_one_repository_are_known_whatever_the_case_of_its_name() -> None:
    here = trusts.repository(github())
    assert here == (GITHUB["iss"], "acme/models")
    assert trusts.repository(github(github="Acme/Models", workflow="other.yml")) == here
    for other in (
        github(github="acme/others"),
        github(issuer="https://ghe.acme.example/_services/token"),
        trust(gitlab="acme/models"),
        trust(issuer="https://issuer.example.com", claims={"repository": "acme/models"}),
    ):
        assert trusts.repository(other) != here, other
