"""Checks if a server answers and, if not, which step fails: DNS, TCP, TLS, proxy or HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import requests
from requests import exceptions

_MAX_BODY = 64 * 1024


class Answer(NamedTuple):
    """A reply with status 200: seconds that it took, local time in seconds since the epoch, headers."""

    took: float
    at: float
    headers: Mapping[str, str]


class Failure(NamedTuple):
    """The reason of a failure, and its fix."""

    found: str
    fix: str
    #: True if something answered there, but maybe not the server.
    path_may_be_wrong: bool = False


def fetch(url: str, timeout: float, verify: bool | str, cert: str | None) -> Answer | Failure:
    """GET `url` once, without a key; `timeout` in seconds, `verify` and `cert` as for `requests`."""
    started = time.perf_counter()
    try:
        with requests.get(
            url, timeout=timeout, verify=verify, cert=cert, allow_redirects=False, stream=True
        ) as response:
            took, at = time.perf_counter() - started, time.time()
    # urllib3 raises ValueError for some URLs that `requests` accepts.
    except (exceptions.RequestException, ValueError) as error:
        return describe_failure(url, timeout, error)
    if response.status_code == 200:
        return Answer(took, at - took / 2, response.headers)
    found = f"{url} answered {response.status_code}"
    if "Location" in response.headers:
        there = response.headers["Location"].removesuffix("/health")
        return Failure(
            f"{found}, a redirect to {there}",
            "Set MLFLOW_TRACKING_URI to its target; the key is not forwarded to other servers.",
        )
    if response.status_code >= 500:
        return Failure(found, "Try again in a minute, then tell the server's operator.")
    return Failure(
        found,
        "Check the path in MLFLOW_TRACKING_URI: it is /api/mlflow, /mlflow or none, unless you were "
        "given another. If it is right, a status of 401 or 403 comes from something in front of the "
        "server, which itself needs no key for this.",
        path_may_be_wrong=True,
    )


def asks_for_key(url: str, timeout: float, verify: bool | str, cert: str | None) -> bool:
    """Return True if a request without a key is refused at `url` as this package refuses it."""
    try:
        with requests.get(
            url,
            # Without this, `requests` would add credentials from ~/.netrc or the URL.
            auth=lambda request: request,
            timeout=timeout,
            verify=verify,
            cert=cert,
            allow_redirects=False,
            stream=True,
        ) as response:
            if response.status_code != 401:
                return False
            answer = json.loads(response.raw.read(_MAX_BODY, decode_content=True))
    # The answer may be anything: this only looks for a better URL.
    except Exception:
        return False
    return isinstance(answer, dict) and answer.get("error") == "KEY_MISSING"


def describe_failure(url: str, timeout: float, error: Exception) -> Failure:
    """Explain why a request to `url` failed with `error`. `timeout` is in seconds."""
    causes = list(_causes(error))

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if is_a(exceptions.ProxyError):
        return Failure(
            f"the proxy for {url} cannot be used", "Check HTTP_PROXY, HTTPS_PROXY and NO_PROXY."
        )
    if is_a(exceptions.SSLError) and "WRONG_VERSION_NUMBER" in str(error):
        return Failure(
            f"the server at {url} speaks plain http",
            "Check the port in MLFLOW_TRACKING_URI; http:// is for servers on this machine.",
        )
    if is_a(exceptions.SSLError):
        return Failure(
            f"TLS with {url} failed: {error}",
            "If the certificate comes from a private CA, set MLFLOW_TRACKING_SERVER_CERT_PATH to that "
            "CA's file. Check the port, too.",
        )
    if is_a(socket.gaierror):
        return Failure(
            f"the host of {url} has no address",
            "Check the host in MLFLOW_TRACKING_URI, then this machine's DNS or VPN.",
        )
    if is_a(ConnectionRefusedError):
        return Failure(
            f"nothing listens at {url}",
            "Check the port in MLFLOW_TRACKING_URI, then ask whether the server runs.",
        )
    if is_a(exceptions.Timeout):
        return Failure(
            f"{url} did not answer within {timeout:g} s",
            "Check this machine's network: VPN, firewall, proxy.",
        )
    return Failure(
        f"{url} cannot be reached: {error}", "Check MLFLOW_TRACKING_URI and the network."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and all its causes, which `requests` and urllib3 keep in different attributes."""
    left, seen = [error], set[int]()
    while left:
        cause = left.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        further = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args)
        left += [error for error in further if isinstance(error, BaseException)]
