"""A trust in the words of people who have not read its claims."""

from __future__ import annotations

from collections.abc import Mapping

from .trust import PRESETS, Trust

#: Kind -> the service's name, the claim with the workflow's file, and what stands before its name.
_SERVICES = {
    "github": ("GitHub", "job_workflow_ref", "/.github/workflows/"),
    "gitlab": ("GitLab", "ci_config_ref_uri", "//"),
}


def words(trust: Trust) -> str:
    """Return whose jobs get keys, such as "release.yml of acme/models on GitHub"."""
    claims = dict(trust.claims)
    preset = PRESETS.get(trust.kind)
    if preset is None:
        text = f"tokens of {trust.issuer}"
    else:
        service, name, mark = _SERVICES[trust.kind]
        project = claims.pop(preset.project)
        host = trust.issuer.partition("://")[2].rstrip("/")
        text = f"{project} on {service}"
        place, found, file = claims.get(name, "").rpartition(mark)
        # The file of a reusable workflow may be another repository's, which its place then shows.
        if found and file.endswith("@*"):
            del claims[name]
            own = place in (project, f"{host}/{project}")
            text = f"{file[:-2] if own else f'{place}{mark}{file[:-2]}'} of {text}"
        if trust.issuer != preset.issuer:
            text += f" ({trust.issuer})"
        if (environment := claims.pop("environment", None)) is not None:
            text += f", environment {_value(environment)}"
    more = [f"{name} {_value(value)}" for name, value in claims.items()]
    return f"{text}, with {', '.join(more)}" if more else text


def warning(kind: str, claims: Mapping[str, str]) -> str:
    """Return a warning if more people than those who release get keys by such a trust, or ""."""
    ref = claims.get("ref", "")
    if kind != "github" or "environment" in claims or (ref and not ref.endswith("*")):
        return ""
    where = _value(ref) if ref else "any branch"
    return (
        f"Everybody who may push to {where} of the repository can change the workflow there, and get a "
        "key."
    )


def _value(wanted: str) -> str:
    return f"{wanted[:-1]}…" if wanted.endswith("*") else wanted
