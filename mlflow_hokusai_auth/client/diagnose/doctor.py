"""The checks of `hokusai-auth doctor`: every reason why a key may not work from this machine.

The checks are in an order in which the first failure is the one to fix. Requests with the key are sent
as MLflow sends its own. No text of a check holds a key.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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
from mlflow_hokusai_auth.client import artifacts, ci_key, origin_guard, profile
from mlflow_hokusai_auth.client.admin import HokusaiAuthClient
from mlflow_hokusai_auth.client.header_provider import HokusaiHeaderProvider
from mlflow_hokusai_auth.core import keys, times

from . import mistakes, network

#: Seconds for each request.
TIMEOUT = 10.0
#: The prefixes at which a server answers by default, as clients are told of them.
PREFIXES = ("/api/mlflow", "/mlflow", "")

#: Seconds: a larger difference of the clocks fails, and an earlier expiry is mentioned.
_MAX_SKEW = 60
_SOON = 14 * 86400

_OTHERS = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")
_NETRC = "~/.netrc"
_UNSET = {
    _NETRC: f"remove this host from {_NETRC}",
    "MLFLOW_TRACKING_URI": "take the password out of MLFLOW_TRACKING_URI",
}
_REINSTALL = (
    "Reinstall the package where MLflow is installed: "
    f"{sys.executable} -m pip install --force-reinstall --no-deps mlflow-hokusai-auth"
)
NOT_OURS = (
    "Check MLFLOW_TRACKING_URI and its path. If it is right, the server runs without this package: "
    "its operator should start it with --app-name hokusai-auth."
)
_ASK_FOR_NEW = "Ask the server's operator for a new key."
_USE_NEW = f"Set {profile.KEY} to the new key before then."
#: The fix for each code of a refusal.
FIXES = {
    "KEY_MISSING": "Something between this machine and the server removes the header X-API-Key: a "
    "redirect (with a warning), or a proxy, which should pass it on.",
    "KEY_MALFORMED": mistakes.COPY,
    "KEY_UNKNOWN": "Check that this key was made for this server, and copy the whole key again.",
    "KEY_EXPIRED": _ASK_FOR_NEW,
    "KEY_REVOKED": _ASK_FOR_NEW,
    "KEY_CONFLICT": "Remove the other key. It may come from ~/.mlflow/credentials, ~/.netrc, "
    "MLFLOW_TRACKING_URI or another request header provider.",
    "ADDRESS_REFUSED": "Use the key from one of its networks, or ask the server's operator to add this "
    "one.",
    "RATE_LIMITED": "Try again later.",
    "AUTHORITY_UNAVAILABLE": "Try again in a minute.",
}


class Check(NamedTuple):
    """One line of the report. `ok` is None if the check was skipped or had no result.

    A check that passed and has a fix is a warning: `warns`.
    """

    check: str
    ok: bool | None
    found: str
    fix: str = ""

    @property
    def warns(self) -> bool:
        """True if the check passed, and something is to be done all the same."""
        return bool(self.ok and self.fix)


#: `ok`, `found` and `fix` of a Check.
Outcome = tuple[bool | None, str, str]


@dataclass
class Results:
    """Results of earlier checks that later ones use."""

    uri: str
    key: str = ""
    health: network.Answer | None = None
    identity: dict[str, Any] = field(default_factory=dict)


_S = TypeVar("_S", bound=Results)


def examine() -> Iterator[Check]:
    """Check MLflow's tracking URI and the current key, and yield each check when it is done."""
    results = Results(profile.tracking_uri())
    yield from run(_CHECKS, results, _call)
    yield from default_experiment(results)


def run(
    checks: Sequence[tuple[str, tuple[str, ...], Callable[[_S], Outcome]]],
    results: _S,
    call: Callable[[Callable[[_S], Outcome], _S], Outcome],
) -> Iterator[Check]:
    """Run `checks`, each by `call(look, results)`. Skip those of whose needs one did not pass."""
    passed = set()
    for name, needs, look in checks:
        missing = next((need for need in needs if need not in passed), None)
        if missing:
            ok, found, fix = None, f'not checked, as "{missing}" did not pass', ""
        else:
            ok, found, fix = call(look, results)
        if ok:
            passed.add(name)
        yield Check(name, ok, one_line(found, results.key), one_line(fix, results.key))


def _call(look: Callable[[Results], Outcome], results: Results) -> Outcome:
    try:
        return look(results)
    except MlflowException as error:
        return False, str(error), "Change the setting that MLflow's message names."
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        return False, f"the server's answer has an unknown form ({type(error).__name__})", NOT_OURS


def fix_for(error: MlflowException, otherwise: str) -> str:
    """Return the fix for a refusal by this package's server, or `otherwise` for another error."""
    code = _code(error)
    return FIXES.get(code, "Tell the server's operator.") if code else otherwise


def _code(error: MlflowException) -> str | None:
    """Return the code of a refusal by this package's server, or None for another error."""
    body = getattr(error, "json", {})
    code = body.get("error") if isinstance(body, dict) else None
    return str(code) if code else None


def one_line(text: str, key: str = "") -> str:
    """Return `text`, which a server may have sent, as one printable line without `key` or passwords."""
    if key:
        text = text.replace(key, "***")
    text = keys.one_line(re.sub(r"//[^/@\s]*@", "//", text))
    return text if len(text) <= 500 else text[:500] + "…"


def check_key(results: Results) -> Outcome:
    """Check that a key is configured and well-formed."""
    try:
        source, text = profile.find_key()
    except profile.Unusable as reason:
        return False, f"none: {reason}", f"Correct that, or set {profile.KEY} to the key."
    results.key = text.strip()
    if not results.key and ci_key.is_wanted():
        try:
            results.key = ci_key.obtain()
        except ci_key.Unavailable as reason:
            return False, f"none, and {ci_key.TRUST}=auto gets none: {reason}", "Correct that."
        return True, f"exchanged for this job's identity token ({ci_key.TRUST}=auto)", ""
    if not results.key:
        fix = f"Set {profile.KEY} to the key that you were given."
        return False, "none is configured", fix
    if mistake := mistakes.in_key(results.key):
        return False, f"in {source}, but {mistake[0]}", mistake[1]
    match = re.match("hk_({})_".format("|".join(keys.ENVIRONMENTS)), results.key)
    return True, f"in {source}, for {match[1] if match else 'no known environment'}", ""


def check_other_credentials(results: Results) -> Outcome:
    """Check that no other credential is sent that the server takes for a second key."""
    others = {name: os.environ.get(name, "").strip() for name in _OTHERS}
    others["MLFLOW_TRACKING_URI"] = unquote(urlparse(results.uri).password or "")
    # `requests` prefers the password of ~/.netrc to any other value for Authorization.
    netrc = get_netrc_auth(results.uri) if not os.environ.get("MLFLOW_TRACKING_AUTH") else None
    others[_NETRC] = netrc[1] if netrc else ""
    differ = {name: text for name, text in others.items() if text not in ("", results.key)}
    # The server takes a differing value for a second key if it looks like one, or if ours does not.
    ours = results.key.startswith("hk_")
    if refused := [name for name, text in differ.items() if text.startswith("hk_") or not ours]:
        names = " and ".join(refused)
        found = f"{names}: another key, and the server refuses requests with two different keys"
        fix = " and ".join(_UNSET.get(name, f"unset {name}") for name in refused)
        return False, found, f"{fix[0].upper()}{fix[1:]}."
    sent = f"; {_NETRC} has one for this host, which is sent as a Basic password" if netrc else ""
    if not differ:
        return True, f"none that differs from the key{sent}", ""
    names = " and ".join(differ)
    return True, f"{names}: not a key, so the server ignores it beside the key{sent}", ""


def check_header_providers(results: Results) -> Outcome:
    """Check that no other header provider sets a header of ours."""
    others = [
        one
        for one in _request_header_provider_registry
        if not isinstance(one, HokusaiHeaderProvider)
        and not type(one).__module__.startswith("mlflow.tracking.")
    ]
    if not others:
        return True, "no others", ""
    reports, refused = [], []
    for one in others:
        name = f"{type(one).__module__}.{type(one).__name__}"
        try:
            headers = dict(one.request_headers()) if one.in_context() else {}
        except Exception as error:
            reports.append(f"{name} fails ({type(error).__name__}), so MLflow skips it")
            continue
        reports.append(f"{name} sets {', '.join(headers) or 'nothing now'}")
        refused += [
            f"{header} of {name}" for header in headers if _clashes(headers, header, results)
        ]
    if not refused:
        return True, "; ".join(reports), ""
    found = (
        f"{'; '.join(reports)}. MLflow joins that to the key or sends both: the server refuses it"
    )
    return (
        False,
        found,
        f"Remove {' and '.join(refused)}: this package sets {origin_guard.HEADER} itself.",
    )


def _clashes(headers: dict[str, str], name: str, results: Results) -> bool:
    """Return True if the server refuses the key beside another provider's header `name`."""
    others = [word for word in str(headers[name]).split() if word != results.key]
    if name.lower() == origin_guard.HEADER.lower():
        return bool(others)
    return name.lower() == "authorization" and any(word.startswith("hk_") for word in others)


def check_tracking_uri(results: Results) -> Outcome:
    """Check that the tracking URI is an http(s) URL."""
    if mistake := mistakes.in_uri(results.uri):
        return False, *mistake
    return True, results.uri, ""


def check_origin(results: Results) -> Outcome:
    """Check that the key may be sent to the tracking URI."""
    target = profile.origin(results.uri)
    if origin_guard.is_allowed(results.uri, results.key):
        return True, f"the key may be sent to {target}", ""
    return False, *origin_guard.explain_refusal(target, results.key)


def check_plugin(results: Results) -> Outcome:
    """Check that MLflow has loaded the header provider."""
    versions = f"mlflow-hokusai-auth {__version__}, MLflow {mlflow.__version__}"
    if any(isinstance(one, HokusaiHeaderProvider) for one in _request_header_provider_registry):
        return True, versions, ""
    return False, f"MLflow has not loaded it ({versions})", _REINSTALL


def check_server(results: Results) -> Outcome:
    """Check that the server answers /health."""
    credentials = _get_store(results.uri).get_host_creds()
    url = results.uri.rstrip("/") + "/health"
    answer = network.fetch(url, TIMEOUT, credentials.verify, credentials.client_cert_path)
    if isinstance(answer, network.Failure):
        found, fix, path_may_be_wrong = answer
        return False, found, (path_may_be_wrong and _other_path(results.uri)) or fix
    results.health = answer
    return True, f"answered in {answer.took * 1000:.0f} ms", ""


def _other_path(uri: str) -> str:
    """Return the fix if a server with this package answers at another path of `uri`, or "".

    No key is sent: such a server refuses `whoami` without one in a way of its own.
    """
    credentials = _get_store(uri).get_host_creds()
    parts = urlparse(uri)
    for prefix in PREFIXES:
        found = parts._replace(path=prefix, params="", query="", fragment="").geturl()
        if found != uri.rstrip("/") and network.asks_for_key(
            f"{found}/api/2.0/hokusai/whoami",
            TIMEOUT,
            credentials.verify,
            credentials.client_cert_path,
        ):
            return f"Set MLFLOW_TRACKING_URI to {found}: there the server answers."
    return ""


def check_accepted(results: Results) -> Outcome:
    """Check that the server accepts the key."""
    try:
        answer = HokusaiAuthClient(results.uri).whoami(timeout=TIMEOUT, max_retries=0)
    except MlflowException as error:
        # Each good key may send this request, so a refusal that names a scope is of another path.
        if _code(error) in (None, "SCOPE_MISSING", "ISOLATED"):
            return False, str(error), _other_path(results.uri) or NOT_OURS
        return False, str(error), fix_for(error, NOT_OURS)
    if "key_id" not in answer:
        found = "the answer does not come from a server with this package"
        return False, found, _other_path(results.uri) or NOT_OURS
    results.identity = answer
    return True, f"as {answer['key_id']} of {answer.get('owner')}", ""


def check_scope(results: Results) -> Outcome:
    """Check that the key may register models."""
    can = results.identity.get("can")
    if not isinstance(can, list):
        return None, "this server does not say what a key can do", ""
    able = f"the key can {', '.join(map(str, can)) or 'do nothing'}"
    if "register" in can:
        return True, able, ""
    scopes = ", ".join(map(str, results.identity.get("scopes") or ())) or "none"
    found = f"{able}, so it can't register a model; its scopes: {scopes}"
    fix = "To register models, ask the server's operator for a key with the scope model:write."
    # Reading is enough for users who only load models, so it is a warning.
    return "read" in can, found, fix


def check_artifact_path(results: Results) -> Outcome:
    """Check that artifact requests keep the prefix and are served."""
    repository = get_artifact_repository("mlflow-artifacts:/")
    url = str(repository.artifact_uri)
    prefix = re.sub("/+", "/", urlparse(results.uri).path).rstrip("/")
    if not urlparse(url).path.startswith(prefix + artifacts.SERVICE):
        return False, f"MLflow would send artifacts to {url}, outside of {prefix}", _REINSTALL
    # The path does not exist, so that the server need not list a large folder.
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
            f"The server's operator should route {prefix or ''}/api/2.0/mlflow-artifacts/ to MLflow, "
            "and start it with --artifacts-destination.",
        )
    return True, found, ""


def check_clock(results: Results) -> Outcome:
    """Compare this machine's clock with the server's."""
    assert results.health is not None
    try:
        theirs = parsedate_to_datetime(results.health.headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None, "the server does not send its time", ""
    skew = results.health.at - theirs
    if abs(skew) < _MAX_SKEW:
        return True, f"less than {_MAX_SKEW} s from the server's", ""
    found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
    fix = (
        "Set this machine's clock, or have the server's set: keys and certificates expire by them."
    )
    return False, found, fix


def check_expiry(results: Results) -> Outcome:
    """Report when the key expires."""
    ends = results.identity.get("expires_at")
    replaced = results.identity.get("deprecated_at") is not None
    if ends is None:
        return True, "the key does not end", _USE_NEW if replaced else ""
    found = f"the key {'was replaced and ' * replaced}ends on {times.date(ends)}"
    left = ends - time.time()
    if left < _SOON:
        found += f", in {times.span(left)}"
    elif not replaced:
        return True, found, ""
    return True, found, _USE_NEW if replaced else _ASK_FOR_NEW


def check_other_ways(results: Results) -> Outcome:
    """Check that OpenTelemetry's exporters to this server have the key."""
    found = (
        "mlflow.otel.autolog() and models of gateway:/ send the key; other programs and "
        "OpenTelemetry's own exporters take it from their own variables"
    )
    for signal in ("TRACES_", "METRICS_", ""):
        endpoint = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT", "")
        if profile.origin(endpoint) is None or profile.origin(endpoint) != profile.origin(
            results.uri
        ):
            continue
        names = {f"OTEL_EXPORTER_OTLP_{signal}HEADERS", "OTEL_EXPORTER_OTLP_HEADERS"}
        if not any(results.key in unquote(os.environ.get(name, "")) for name in names):
            found = f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT is this server, but without the key"
            fix = f"Set OTEL_EXPORTER_OTLP_{signal}HEADERS to x-api-key=YOUR_KEY."
            return False, found, fix
    return True, found, ""


def default_experiment(results: Results) -> Iterator[Check]:
    """Report which experiment runs go to that name none, if the server tells of one."""
    if name := results.identity.get("default_experiment"):
        found = f"runs that name no experiment go to {name}"
        yield Check("default experiment", True, one_line(found, results.key))


#: Name, names of the checks that must have passed before, and the check.
_CHECKS: list[tuple[str, tuple[str, ...], Callable[[Results], Outcome]]] = [
    ("key", (), check_key),
    ("other credentials", ("key",), check_other_credentials),
    ("header providers", ("key",), check_header_providers),
    ("tracking URI", (), check_tracking_uri),
    ("origin", ("tracking URI",), check_origin),
    ("plugin", (), check_plugin),
    ("server", ("tracking URI",), check_server),
    ("key accepted", ("key", "tracking URI", "origin", "plugin", "server"), check_accepted),
    ("scope", ("key accepted",), check_scope),
    ("artifact path", ("key accepted",), check_artifact_path),
    ("clock", ("server",), check_clock),
    ("expiry", ("key accepted",), check_expiry),
    ("other ways", ("key accepted",), check_other_ways),
]
