"""What `hokusai-auth doctor` looks at: every reason for which a key may not work from this machine.

In an order in which the first failure is the one to mend. Whatever carries the key goes the way that
MLflow's own requests go. No text has a key in it.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlparse

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking._tracking_service.utils import _get_store
from mlflow.tracking.request_header.registry import _request_header_provider_registry
from mlflow.utils.rest_utils import http_request
from requests import Response
from requests.utils import get_netrc_auth

from mlflow_hokusai_auth import __version__
from mlflow_hokusai_auth.client import artifacts, origin_guard, profile
from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
from mlflow_hokusai_auth.client.header_provider import HokusaiHeaderProvider
from mlflow_hokusai_auth.core import keys

from . import network

#: Seconds for one request, of which there are three.
TIMEOUT = 10.0

#: Seconds: a clock that is further off fails; a key that ends sooner is mentioned.
_MAX_SKEW = 60
_SOON = 14 * 86400

_OTHERS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_NETRC = "~/.netrc"
_UNSET = {
    _NETRC: f"remove this host from {_NETRC}",
    "MLFLOW_TRACKING_URI": "take the password out of MLFLOW_TRACKING_URI",
}
_EXAMPLE = "https://registry.hokus.ai/api/mlflow"
_REINSTALL = (
    "Install the package anew where MLflow is: "
    f"{sys.executable} -m pip install --force-reinstall --no-deps mlflow-hokusai-auth"
)
NOT_OURS = (
    "Check MLFLOW_TRACKING_URI, with its path. If it is right, the server runs without this "
    "package: its operator should start it with --app-name hokusai-auth."
)
_ASK_FOR_NEW = "Ask the server's operator for a new key."
#: What to do about a refusal, by the code that the server gives.
_REFUSED = {
    "KEY_MISSING": "Something between here and the server takes the header X-API-Key away: a "
    "redirect (there is a warning then), or a proxy, which should let it pass.",
    "KEY_MALFORMED": "Copy the key again, whole.",
    "KEY_UNKNOWN": "Check that this key was made for this server, and copy it again, whole.",
    "KEY_EXPIRED": _ASK_FOR_NEW,
    "KEY_REVOKED": _ASK_FOR_NEW,
    "KEY_CONFLICT": "Remove the other key: it may be in ~/.mlflow/credentials, in ~/.netrc, in "
    "MLFLOW_TRACKING_URI or of another request header provider.",
    "ADDRESS_REFUSED": "Use the key from a network that it is for, or ask the server's operator to "
    "add this one.",
    "RATE_LIMITED": "Try again later.",
    "AUTHORITY_UNAVAILABLE": "Try again in a minute.",
}


class Check(NamedTuple):
    """One line of the report. `ok` is None where nothing could be said."""

    check: str
    ok: bool | None
    found: str
    fix: str = ""


_Verdict = tuple[bool | None, str, str]


@dataclass
class _Seen:
    """What later checks take from earlier ones."""

    uri: str
    key: str = ""
    health: network.Answer | None = None
    identity: dict[str, Any] = field(default_factory=dict)


_S = TypeVar("_S", bound=_Seen)


def examine() -> Iterator[Check]:
    """Look at MLflow's tracking URI and the key in use; each check is given when it is done."""
    return run(_CHECKS, _Seen(str(mlflow.get_tracking_uri())), _call)


def run(
    checks: Sequence[tuple[str, tuple[str, ...], Callable[[_S], _Verdict]]],
    seen: _S,
    call: Callable[[Callable[[_S], _Verdict], _S], _Verdict],
) -> Iterator[Check]:
    """Do `checks`, each by `call(look, seen)`, but for those whose needs did not pass."""
    passed = set()
    for name, needs, look in checks:
        lacking = next((need for need in needs if need not in passed), None)
        if lacking:
            ok, found, fix = None, f'not checked, as "{lacking}" did not pass', ""
        else:
            ok, found, fix = call(look, seen)
        if ok:
            passed.add(name)
        yield Check(name, ok, one_line(found, seen.key), one_line(fix, seen.key))


def _call(look: Callable[[_Seen], _Verdict], seen: _Seen) -> _Verdict:
    try:
        return look(seen)
    except MlflowException as error:
        return False, str(error), "Change what this message of MLflow's names."
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return False, f"an answer of another form ({type(error).__name__})", NOT_OURS


def fix_for(error: MlflowException, otherwise: str) -> str:
    """What to do about a refusal of this package's server, or `otherwise` if it is none."""
    said = getattr(error, "json", {})
    code = said.get("error") if isinstance(said, dict) else None
    return _REFUSED.get(str(code), "Tell the server's operator.") if code else otherwise


def one_line(text: str, key: str = "") -> str:
    """`text`, much of it a server's, as one printable line without `key` or any password."""
    if key:
        text = text.replace(key, "***")
    text = re.sub(r"//[^/@\s]*@", "//", keys.redact(text))
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= 500 else text[:500] + "…"


def date(seconds: float) -> str:
    """`seconds` since the epoch as people read it."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _key(seen: _Seen) -> _Verdict:
    try:
        source, text = profile.find()
    except profile.Unusable as reason:
        return False, f"none: {reason}", f"Put that right, or set {profile.KEY} to the key."
    seen.key = text.strip()
    if not seen.key:
        fix = f"Set {profile.KEY} to the key that you were given."
        return False, "none is configured", fix
    if problem := keys.problem(seen.key):
        return False, f"in {source}, but {problem}", "Copy the key again, whole."
    known = re.match("hk_({})_".format("|".join(keys.ENVIRONMENTS)), seen.key)
    return True, f"in {source}, for {known[1] if known else 'no known environment'}", ""


def _other_credentials(seen: _Seen) -> _Verdict:
    others = {name: os.environ.get(name, "").strip() for name in _OTHERS}
    others["MLFLOW_TRACKING_URI"] = unquote(urlparse(seen.uri).password or "")
    # As requests itself finds it, which sends it instead of whatever else is set for Authorization.
    netrc = get_netrc_auth(seen.uri) if not os.environ.get("MLFLOW_TRACKING_AUTH") else None
    others[_NETRC] = netrc[1] if netrc else ""
    differ = {name: text for name, text in others.items() if text not in ("", seen.key)}
    # What the server takes for a second key.
    ours = seen.key.startswith("hk_")
    if refused := [name for name, text in differ.items() if text.startswith("hk_") or not ours]:
        names = " and ".join(refused)
        found = f"{names}: not the key, and the server refuses requests with two different ones"
        fix = " and ".join(_UNSET.get(name, f"unset {name}") for name in refused)
        return False, found, f"{fix[0].upper()}{fix[1:]}."
    sent = (
        f"; {_NETRC} has one for this host, which is sent as the password of Basic" if netrc else ""
    )
    if not differ:
        return True, f"none that differ from the key{sent}", ""
    names = " and ".join(differ)
    return True, f"{names}: no key, so it goes along and does not count beside the key{sent}", ""


def _header_providers(seen: _Seen) -> _Verdict:
    others = [
        one
        for one in _request_header_provider_registry
        if not isinstance(one, HokusaiHeaderProvider)
        and not type(one).__module__.startswith("mlflow.tracking.")
    ]
    if not others:
        return True, "no others", ""
    told, refused = [], []
    for one in others:
        name = f"{type(one).__module__}.{type(one).__name__}"
        try:
            headers = dict(one.request_headers()) if one.in_context() else {}
        except Exception as error:
            told.append(f"{name} fails ({type(error).__name__}), so MLflow leaves it out")
            continue
        told.append(f"{name} sets {', '.join(headers) or 'nothing at the moment'}")
        refused += [f"{header} of {name}" for header in headers if _clashes(headers, header, seen)]
    if not refused:
        return True, "; ".join(told), ""
    found = (
        f"{'; '.join(told)}. MLflow joins it to the key, or sends both, which the server refuses"
    )
    return (
        False,
        found,
        f"Remove {' and '.join(refused)}: this package sets {origin_guard.HEADER} itself.",
    )


def _clashes(headers: dict[str, str], name: str, seen: _Seen) -> bool:
    """Whether the server refuses the key for what another provider sets the header `name` to."""
    others = [word for word in str(headers[name]).split() if word != seen.key]
    if name.lower() == origin_guard.HEADER.lower():
        return bool(others)
    return name.lower() == "authorization" and any(word.startswith("hk_") for word in others)


def _tracking_uri(seen: _Seen) -> _Verdict:
    if seen.uri.lower().startswith(("http://", "https://")):
        return True, seen.uri, ""
    fix = f"Set MLFLOW_TRACKING_URI to the URL of the server, such as {_EXAMPLE}."
    return False, f"{seen.uri} is not the URL of a server", fix


def _origin(seen: _Seen) -> _Verdict:
    target = profile.origin(seen.uri)
    if profile.origin_allowed(seen.uri):
        return True, f"the key may be sent to {target}", ""
    return False, *origin_guard.why_not(target)


def _plugin(seen: _Seen) -> _Verdict:
    versions = f"mlflow-hokusai-auth {__version__}, MLflow {mlflow.__version__}"
    if any(isinstance(one, HokusaiHeaderProvider) for one in _request_header_provider_registry):
        return True, versions, ""
    return False, f"MLflow does not know of it ({versions})", _REINSTALL


def _server(seen: _Seen) -> _Verdict:
    credentials = _get_store(seen.uri).get_host_creds()
    url = seen.uri.rstrip("/") + "/health"
    answer = network.ask(url, TIMEOUT, credentials.verify, credentials.client_cert_path)
    if isinstance(answer, network.Failure):
        return False, *answer
    seen.health = answer
    return True, f"answered in {answer.took * 1000:.0f} ms", ""


def _accepted(seen: _Seen) -> _Verdict:
    try:
        answer = HokusaiAuthClient(seen.uri).whoami(timeout=TIMEOUT, max_retries=0)
    except MlflowException as error:
        return False, str(error), fix_for(error, NOT_OURS)
    if "key_id" not in answer:
        return False, "the answer is not that of a server with this package", NOT_OURS
    seen.identity = answer
    return True, f"as {answer['key_id']} of {answer.get('owner')}", ""


def _scope(seen: _Seen) -> _Verdict:
    can = seen.identity.get("can")
    if not isinstance(can, list):
        return None, "this server does not say what a key can do", ""
    able = f"the key can {', '.join(map(str, can)) or 'do nothing'}"
    if "register" in can:
        return True, able, ""
    scopes = ", ".join(map(str, seen.identity.get("scopes") or ())) or "none"
    found = f"{able}, and so register no model; its scopes: {scopes}"
    fix = "To register models, ask the server's operator for a key with the scope model:write."
    # Enough for whoever loads models only.
    return (None if "read" in can else False), found, fix


def _artifact_path(seen: _Seen) -> _Verdict:
    repository = get_artifact_repository("mlflow-artifacts:/")
    url = str(repository.artifact_uri)
    prefix = re.sub("/+", "/", urlparse(seen.uri).path).rstrip("/")
    if not urlparse(url).path.startswith(prefix + artifacts._SERVICE):
        return False, f"MLflow would send artifacts to {url}, outside of {prefix}", _REINSTALL
    # A path that does not exist, so that the server has nothing to look through.
    response: Response = http_request(
        repository._host_creds,
        "",
        "GET",
        params={"path": "hokusai-auth-doctor"},
        timeout=TIMEOUT,
        max_retries=0,
        raise_on_status=False,
    )
    found = f"{url} answered {response.status_code}"
    if response.status_code == 404 or response.status_code >= 500:
        return (
            False,
            found,
            f"The server's operator should send all of {prefix or ''}/api/2.0/mlflow-artifacts/ to "
            "MLflow, and start it with --artifacts-destination.",
        )
    return True, found, ""


def _clock(seen: _Seen) -> _Verdict:
    assert seen.health is not None
    try:
        theirs = parsedate_to_datetime(seen.health.headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None, "the server does not tell its time", ""
    skew = seen.health.at - theirs
    if abs(skew) < _MAX_SKEW:
        return True, f"less than {_MAX_SKEW} s from the server's", ""
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    fix = "Set this machine's clock, or have the server's set: certificates and keys end by it."
    return False, found, fix


def _expiry(seen: _Seen) -> _Verdict:
    ends = seen.identity.get("expires_at")
    if ends is None:
        return True, "the key does not end", ""
    replaced = seen.identity.get("deprecated_at") is not None
    found = f"the key {'was replaced and ' * replaced}ends on {date(ends)}"
    left = ends - time.time()
    if left >= _SOON:
        return True, found, ""
    fix = f"Set {profile.KEY} to the new key before then." if replaced else _ASK_FOR_NEW
    return True, f"{found}, in {max(left, 0) / 86400:.0f} days", fix


def _other_ways(seen: _Seen) -> _Verdict:
    told = (
        "mlflow.otel.autolog() and models of gateway:/ send the key; other programs, and "
        "OpenTelemetry's own exporters, take it from their own variables"
    )
    for signal in ("TRACES_", "METRICS_", ""):
        endpoint = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT", "")
        if profile.origin(endpoint) is None or profile.origin(endpoint) != profile.origin(seen.uri):
            continue
        names = {f"OTEL_EXPORTER_OTLP_{signal}HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"}
        if not any(seen.key in unquote(os.environ.get(name, "")) for name in names):
            found = f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT is this server, without a key"
            fix = f"Set OTEL_EXPORTER_OTLP_{signal}HEADERS to x-api-key=YOUR_KEY."
            return False, found, fix
    return True, told, ""


#: Name, what has to have passed before, and the check.
_CHECKS: list[tuple[str, tuple[str, ...], Callable[[_Seen], _Verdict]]] = [
    ("key", (), _key),
    ("other credentials", ("key",), _other_credentials),
    ("header providers", ("key",), _header_providers),
    ("tracking URI", (), _tracking_uri),
    ("origin", ("tracking URI",), _origin),
    ("plugin", (), _plugin),
    ("server", ("tracking URI",), _server),
    ("key accepted", ("key", "tracking URI", "origin", "plugin", "server"), _accepted),
    ("scope", ("key accepted",), _scope),
    ("artifact path", ("key accepted",), _artifact_path),
    ("clock", ("server",), _clock),
    ("expiry", ("key accepted",), _expiry),
    ("other ways", ("key accepted",), _other_ways),
]
