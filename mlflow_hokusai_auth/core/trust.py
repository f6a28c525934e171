"""Trusted workloads: which identity tokens are worth a key, and what that key may do.

A trust names an issuer of OpenID Connect and the claims that its tokens must have. A claim compares
exactly, or by its beginning if the trust's value ends with `*`. `authorities.identity_tokens` verifies
a token's signature, times and audience before any claim is read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from . import ownership
from .errors import InvalidRequest
from .keys import redact

#: Seconds for which an exchanged key lives: at least, by default, at most.
MIN_TTL, TTL, MAX_TTL = 60.0, 900.0, 3600.0
#: Claims of a trust, and characters of a claim's name and of its value, at most.
MAX_CLAIMS, MAX_NAME, MAX_VALUE = 16, 255, 500
#: Characters of `Accepted.source`, at most.
MAX_SOURCE = 500

#: Claims that the verification itself judges, so that no trust may ask for them.
_VERIFIED = frozenset({"iss", "aud", "exp", "nbf", "iat", "jti"})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_URL = re.compile(r"(https?)://([A-Za-z0-9.-]+|\[::1\])(?::[0-9]{1,5})?(?:/[!-~]*)?", re.ASCII)
_REPOSITORY = re.compile(r"[A-Za-z0-9-]+/[A-Za-z0-9._-]+", re.ASCII)
_PROJECT = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)+", re.ASCII)
_WORKFLOW = re.compile(r"[^/@*\s]+\.ya?ml")
_FOLDER = ".github/workflows/"
#: The part of `job_workflow_ref` after the file's name: a branch or tag, or a commit.
_AT = re.compile(r"refs/.+|[0-9a-f]{40}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Preset:
    """The claims by which a known service describes its jobs."""

    #: The issuer, unless the trust names another (GitHub Enterprise, a GitLab of one's own).
    issuer: str
    algorithms: tuple[str, ...]
    #: The claim with the repository's name, and those with numbers that no other repository ever gets.
    project: str
    ids: tuple[str, ...]
    #: The claim with the event that started the job, and the events that may run a stranger's code.
    event: str
    strangers: frozenset[str]
    #: The claim with the job's ref, and the beginning of refs that may hold a stranger's code.
    ref: str
    strange_refs: str
    #: The event of a pipeline that another one of the project started, whatever started that one; and
    #: the claim with the number of the project that the job runs in. "" if there are none.
    child: str
    runs_in: str
    #: The claim with the number of the run.
    run: str
    #: True if the service mints a token for each request of a job, so that one exchange is enough.
    single_use: bool


PRESETS = {
    # https://docs.github.com/actions/reference/openid-connect-reference
    "github": Preset(
        "https://token.actions.githubusercontent.com",
        ("RS256",),
        project="repository",
        ids=("repository_id", "repository_owner_id"),
        event="event_name",
        strangers=frozenset({"pull_request", "pull_request_target"}),
        ref="ref",
        strange_refs="refs/pull/",
        child="",
        runs_in="",
        run="run_id",
        single_use=True,
    ),
    # https://docs.gitlab.com/ci/secrets/id_token_authentication/
    "gitlab": Preset(
        "https://gitlab.com",
        ("RS256",),
        project="project_path",
        ids=("project_id", "namespace_id"),
        event="pipeline_source",
        strangers=frozenset({"merge_request_event", "external_pull_request_event"}),
        ref="ref_path",
        strange_refs="refs/merge-requests/",
        child="parent_pipeline",
        runs_in="job_project_id",
        run="pipeline_id",
        single_use=False,
    ),
}
#: The kind of a trust that names its issuer and all claims itself.
ISSUER = "issuer"
#: Algorithms of an issuer without a preset; a key of its set has exactly one of them.
ALGORITHMS = ("RS256", "ES256")
#: Issuers without a preset that mint a token for each request of a job.
_PER_REQUEST = re.compile(
    r"https://agent\.buildkite\.com|https://oidc\.circleci\.com/org/[0-9a-f-]+", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Trust:
    """An operator's decision that tokens of `issuer` with these `claims` are worth a key of `owner`."""

    trust_id: str
    owner: str
    #: One of `PRESETS`, or `ISSUER`.
    kind: str
    issuer: str
    #: (name, value): the claim's exact text, or a beginning and `*`.
    claims: tuple[tuple[str, str], ...]
    scopes: tuple[str, ...]
    models: tuple[str, ...] = ()
    no_delete: bool = False
    #: Seconds for which a key lives.
    ttl: float = TTL
    #: True if a token is exchanged once only.
    single_use: bool = True
    #: (name, value) of the numbers that the first exchange had; empty before it.
    pins: tuple[tuple[str, str], ...] = ()
    #: The issuer's key set as JSON, or None to ask the issuer.
    jwks: str | None = None

    @property
    def algorithms(self) -> tuple[str, ...]:
        """The algorithms that a token may be signed with."""
        preset = PRESETS.get(self.kind)
        return ALGORITHMS if preset is None else preset.algorithms


@dataclass(frozen=True, slots=True)
class Accepted:
    """The verdict that a token is worth a key of `trust`."""

    trust: Trust
    #: Seconds for which the key lives.
    ttl: float
    #: The job, such as `github:org/repo@sha#run`.
    source: str
    #: The numbers to pin, if the trust has none yet.
    pins: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """The verdict that a token is worth nothing. `code` is in `denials.CODES`.

    Claims are no secrets, so the texts may be shown. `expected` is "" if it is nobody's business.
    """

    code: str
    message: str
    #: The claim that differs, with what was expected and what came; "" if no claim is the reason.
    claim: str = ""
    expected: str = ""
    came: str = ""
    #: Seconds after which the exchange may succeed, if the refusal is temporary.
    retry_after: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """The part of a trust that says which tokens it is about."""

    kind: str
    issuer: str
    claims: tuple[tuple[str, str], ...]
    single_use: bool


def workload(
    *,
    github: str | None = None,
    gitlab: str | None = None,
    issuer: str | None = None,
    workflow: str | None = None,
    environment: str | None = None,
    claims: Mapping[str, str] | None = None,
    single_use: bool | None = None,
) -> Workload:
    """Return the workload that the options of `trust add` describe. Raises InvalidRequest."""
    if github is not None and gitlab is not None:
        raise InvalidRequest("Give one of github and gitlab, not both.")
    if issuer is not None and (problem := _issuer_problem(issuer)):
        raise InvalidRequest(f"issuer {problem}.")
    wanted: dict[str, str] = {}
    if github is not None:
        kind = "github"
        wanted |= _of_github(github, workflow)
    elif gitlab is not None:
        kind = "gitlab"
        wanted |= _of_gitlab(gitlab, workflow, issuer)
    elif issuer is None:
        raise InvalidRequest(
            "Say who is trusted: github (org/repo), gitlab (group/project), or issuer and claims."
        )
    else:
        kind = ISSUER
        for known, one in PRESETS.items():
            # A company on GitHub may have an issuer of its own below that address.
            if f"{issuer}/".startswith(f"{one.issuer}/"):
                raise InvalidRequest(
                    f"The issuer {issuer} needs {known}, not claims alone: without it, pull requests "
                    "and a repository that somebody made again under its name would be good."
                )
        if workflow is not None or environment is not None:
            raise InvalidRequest(
                "workflow and environment belong to github and gitlab; use claims for others."
            )
    if environment is not None:
        wanted["environment"] = environment
    for name, value in (claims or {}).items():
        if wanted.setdefault(name, value) != value:
            raise InvalidRequest(f"The claim {shown(name)} is given twice, with two values.")
    _check_claims(wanted)
    preset = PRESETS.get(kind)
    if preset is None:
        assert issuer is not None
        by_default = _PER_REQUEST.fullmatch(issuer) is not None
    else:
        issuer, by_default = issuer or preset.issuer, preset.single_use
    return Workload(
        kind, issuer, tuple(wanted.items()), by_default if single_use is None else single_use
    )


def choose(trusts: Iterable[Trust], claims: Mapping[str, object], now: float) -> Accepted | Refused:
    """Judge verified `claims` by `trusts` of their issuer, oldest first. `now`: seconds since 1970.

    The trust with the most claims wins, and the oldest of several. A refusal names what a trust expects
    only to the workload that it is about: anybody has tokens of a public issuer, and must not learn
    whom a server trusts.
    """
    best: Refused | None = None
    nearest: Trust | None = None
    for trust in sorted(trusts, key=lambda trust: -len(trust.claims)):
        verdict = judge(trust, claims, now)
        if isinstance(verdict, Accepted):
            return verdict
        nearest = nearest or trust
        if best is None and _is_about(trust, claims):
            best = verdict
    if best is not None:
        return best
    if nearest is None:
        return Refused("TOKEN_UNTRUSTED", "No trust of this server is for this issuer.", "iss")
    name = nearest.claims[0][0]
    came = _shown_claim(claims, name)
    return Refused(
        "TOKEN_UNTRUSTED",
        f"No trust of this server is for a token whose claim {name} is {came}; upper and lower case "
        "count. Its operator, or a supplier who may, adds one with `hokusai-auth trust add`.",
        name,
        "",
        came,
    )


def judge(trust: Trust, claims: Mapping[str, object], now: float) -> Accepted | Refused:
    """Judge the verified `claims` of a token by `trust`, whose issuer signed it.

    `now` is in seconds since the epoch.
    """
    preset = PRESETS.get(trust.kind)
    for name, wanted in trust.claims:
        if not _agrees(trust, name, wanted, claims):
            return _differs("TOKEN_UNTRUSTED", name, wanted, claims)
    pins: tuple[tuple[str, str], ...] = ()
    if preset is None:
        # A server of GitHub's or GitLab's may be trusted by its URL and claims.
        for known in PRESETS.values():
            if known.event in claims and (refused := _stranger(known, claims)) is not None:
                return refused
    else:
        if (refused := _stranger(preset, claims)) is not None:
            return refused
        pinned = dict(trust.pins)
        found = []
        for name in preset.ids:
            came = text_of(claims.get(name))
            if not came:
                return _differs("TOKEN_UNTRUSTED", name, "a number", claims)
            if pinned.get(name, came) != came:
                return _differs("REPOSITORY_CHANGED", name, pinned[name], claims)
            found.append((name, came))
        pins = () if trust.pins else tuple(found)
    ttl = trust.ttl
    if not trust.single_use:
        # The same token can be exchanged again, so no key outlives it.
        ends = claims.get("exp")
        left = float(ends) - now if isinstance(ends, (int, float)) else 0.0
        if left <= 0:
            return Refused("TOKEN_EXPIRED", "The token has expired.", "exp")
        ttl = min(ttl, left)
    return Accepted(trust, ttl, source(trust, claims), pins)


def source(trust: Trust, claims: Mapping[str, object]) -> str:
    """Return the job that `claims` describe: `github:org/repo@sha#run`, or the issuer and `sub`."""
    preset = PRESETS.get(trust.kind)
    if preset is None:
        text = f"{trust.issuer.partition('://')[2]}:{text_of(claims.get('sub')) or ''}"
    else:
        names = (preset.project, "sha", preset.run)
        project, commit, run = (text_of(claims.get(name)) or "" for name in names)
        text = f"{trust.kind}:{project}@{commit}#{run}"
    return _printable(text)[:MAX_SOURCE]


def repository(trust: Trust) -> tuple[str, str] | None:
    """Return the issuer and the repository that `trust` is about; None for a trust without a preset.

    The name is in lower case, because no two repositories of GitHub or GitLab differ in case only, and
    an owner may change the case of its name.
    """
    preset = PRESETS.get(trust.kind)
    name = None if preset is None else dict(trust.claims).get(preset.project)
    return None if name is None else (trust.issuer, name.lower())


def text_of(value: object) -> str | None:
    """Return the text of a claim that compares, or None for a list, an object, a fraction, a null."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    return value if isinstance(value, str) else None


def shown(text: str) -> str:
    """Return `text` from outside for a message: printable, without keys, of at most 200 characters."""
    return _printable(text)[:200]


def _printable(text: str) -> str:
    return redact("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def _agrees(trust: Trust, name: str, wanted: str, claims: Mapping[str, object]) -> bool:
    came = text_of(claims.get(name))
    if came is None or not ownership.matches(wanted, came):
        return False
    if trust.kind == "github" and name == "job_workflow_ref":
        # A file may be named `release.yml@other.yml`.
        return _AT.fullmatch(came[len(wanted) - 1 :]) is not None
    return True


def _stranger(preset: Preset, claims: Mapping[str, object]) -> Refused | None:
    """Return the refusal of a job that may run the code of somebody who only opened a pull request.

    The token does not say if the request came from a fork, so it is refused either way.
    """
    event = text_of(claims.get(preset.event))
    if not event:
        return _differs("TOKEN_UNTRUSTED", preset.event, "the event that started the job", claims)
    ref = text_of(claims.get(preset.ref)) or ""
    # GitLab: a child pipeline hides the merge request that started it, except that its branch is not
    # protected, and that a fork's job runs in another project than the one that its token names.
    runs_in = text_of(claims.get(preset.runs_in)) or ""
    for name, came, strange in (
        (
            preset.event,
            event,
            event in preset.strangers
            or (event == preset.child and text_of(claims.get("ref_protected")) != "true"),
        ),
        (preset.ref, ref, ref.startswith(preset.strange_refs)),
        (
            preset.runs_in,
            runs_in,
            preset.runs_in in claims and runs_in != text_of(claims.get(preset.ids[0])),
        ),
    ):
        if strange:
            return Refused(
                "PULL_REQUEST_REFUSED",
                f"The claim {name} is '{shown(came)}': jobs of pull and merge requests get no key, as "
                "they may run a fork's code, and GitLab's child pipelines only get one on a protected "
                "branch. Register models from a branch, a tag or by hand.",
                name,
                "no pull or merge request",
                shown(came),
            )
    return None


def _is_about(trust: Trust, claims: Mapping[str, object]) -> bool:
    """Return whether the token is of the workload that `trust` names, though something else differs.

    Claims such as `email_verified` are those of many strangers, so only the one that names it counts.
    """
    preset = PRESETS.get(trust.kind)
    naming = "sub" if preset is None else preset.project
    wanted = dict(trust.claims).get(naming)
    return wanted is not None and _agrees(trust, naming, wanted, claims)


def _differs(code: str, name: str, wanted: str, claims: Mapping[str, object]) -> Refused:
    came = _shown_claim(claims, name)
    more = (
        " A repository was deleted and made again, or moved: if it is the right one, whoever "
        "manages the trust runs `hokusai-auth trust edit TRUST_ID --forget-ids`."
        if code == "REPOSITORY_CHANGED"
        else ""
    )
    return Refused(
        code,
        f"The claim {shown(name)} is {came}; expected: '{shown(wanted)}'.{more}",
        name,
        shown(wanted),
        came,
    )


def _shown_claim(claims: Mapping[str, object], name: str) -> str:
    if name not in claims:
        return "missing"
    text = text_of(claims[name])
    return "no text or whole number" if text is None else f"'{shown(text)}'"


def _of_github(repository: str, workflow: str | None) -> dict[str, str]:
    if not _REPOSITORY.fullmatch(repository):
        raise InvalidRequest("github must be a repository, such as org/repo.")
    if not workflow:
        raise InvalidRequest(
            "github needs workflow, the file that registers the models, such as release.yml."
        )
    # A reusable workflow is named with its repository; the caller's repository is judged as well.
    owner, _, file = workflow.rpartition(_FOLDER)
    if not _WORKFLOW.fullmatch(file) or (owner and not _REPOSITORY.fullmatch(owner[:-1])):
        raise InvalidRequest(
            "workflow must be a file such as release.yml, or for a reusable workflow of another "
            "repository org/repo/.github/workflows/release.yml."
        )
    where = owner or f"{repository}/"
    return {"repository": repository, "job_workflow_ref": f"{where}{_FOLDER}{file}@*"}


def _of_gitlab(project: str, workflow: str | None, issuer: str | None) -> dict[str, str]:
    if not _PROJECT.fullmatch(project):
        raise InvalidRequest("gitlab must be a project, such as group/project.")
    if workflow is None:
        return {"project_path": project}
    if not re.fullmatch(r"[^@*\s]+\.ya?ml", workflow) or workflow.startswith("/"):
        raise InvalidRequest("workflow must be the pipeline's file, such as .gitlab-ci.yml.")
    # GitLab may be below a path of its host, which this claim begins with as well.
    where = (issuer or PRESETS["gitlab"].issuer).partition("://")[2].rstrip("/")
    return {"project_path": project, "ci_config_ref_uri": f"{where}/{project}//{workflow}@*"}


def _issuer_problem(issuer: str) -> str | None:
    """Return why `issuer` can't be one, for its author, or None if it can."""
    match = _URL.fullmatch(issuer)
    if match is None or len(issuer) > MAX_NAME or set(issuer) & set("?#\\@"):
        return "must be the exact URL in the claim iss, such as https://gitlab.example.com"
    if match[1] == "http" and match[2] not in _LOOPBACK:
        return "must be https: whoever can change plain http could make keys"
    return None


def _check_claims(claims: Mapping[str, str]) -> None:
    if not 0 < len(claims) <= MAX_CLAIMS:
        raise InvalidRequest(
            f"A trust needs from 1 to {MAX_CLAIMS} claims, such as sub: without any, every token of "
            "the issuer would be good."
        )
    for name, value in claims.items():
        if problem := ownership.name_problem(name, MAX_NAME):
            raise InvalidRequest(f"The name of a claim can't be used: {problem}.")
        if name in _VERIFIED:
            raise InvalidRequest(f"The claim {name} is always checked, and is no part of a trust.")
        problem = ownership.name_problem(value.removesuffix("*"), MAX_VALUE)
        if problem or "*" in value[:-1]:
            raise InvalidRequest(
                f"The value of the claim {shown(name)} must be its text, or a beginning and `*` at the "
                "end."
            )
