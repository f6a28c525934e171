"""The sources of the key, and the origins that it belongs to.

Both are read at every call, so that a rotated key is used without a restart. Nothing is written to
`os.environ`. MLflow is imported only when its tracking URI is needed, because MLflow loads this
package's entry points during its own import.
"""

from __future__ import annotations

import configparser
import ipaddress
import logging
import os
import re
import stat
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TypeVar

from mlflow_hokusai_auth.core import keys

KEY = "HOKUSAI_API_KEY"
KEY_FILE = "HOKUSAI_API_KEY_FILE"
PROFILE = "HOKUSAI_PROFILE"
ALLOWED_ORIGINS = "HOKUSAI_ALLOWED_ORIGINS"
PROFILES_FILE = "~/.hokusai/profiles"
CONFIG_FILE = "~/.hokusai/config"

_logger = logging.getLogger("mlflow_hokusai_auth.client")

_MAX_FILE = 64 * 1024
_MAX_WARNINGS = 256
#: Nanoseconds; a younger file is not cached, as it may change again with the same modification time.
_MIN_AGE = 2_000_000_000

#: Variables from which `requests` may take a proxy for http.
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")

_DEFAULT_PORTS = {"http": 80, "https": 443}
# This accepts less than urllib3 and urllib.parse, which differ on the rest (backslashes, a second @,
# percent signs, control characters): they all read a URL that this matches in the same way.
_URL = re.compile(
    r"(https?)://"
    r"(?:[a-z0-9._~!$&'()*+,;=:%-]*@)?"
    r"([a-z0-9._-]+|\[[0-9a-f:.]+\])"
    r"(?::([0-9]{0,5}))?"
    r"(?=[/?#]|\Z)",
    re.ASCII | re.IGNORECASE,
)

_Parsed = TypeVar("_Parsed")
_warned: set[str] = set()
_files: dict[tuple[Path, object], tuple[tuple[int, int, int], object]] = {}


class Unusable(Exception):
    """Raised if the selected source has no key. The text says why, and never quotes the content."""


class Origin(NamedTuple):
    """Scheme ("http" or "https"), lower-case host without brackets, and effective port."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _DEFAULT_PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    @property
    def confidential(self) -> bool:
        """True for https, and for http that stays on this machine: nobody can read the key."""
        return self.scheme == "https" or (self.loopback and not _is_proxied(self))

    @property
    def loopback(self) -> bool:
        """True if the host is this machine."""
        return _is_loopback(self.host)


def warn_once(message: str) -> None:
    """Log `message` as a warning, the first time only. It must not hold a secret."""
    # The set is bounded, because messages hold hosts that a server chose.
    if message not in _warned and len(_warned) < _MAX_WARNINGS:
        _warned.add(message)
        warn(message)


def warn(message: str) -> None:
    """Log `message` as a warning. It must not hold a secret."""
    _logger.warning("%s", message)


def api_key() -> str | None:
    """Return the current key, or None if none is configured or the configured one can't be sent.

    The first of these sources that is set counts: `HOKUSAI_API_KEY`; the file named by
    `HOKUSAI_API_KEY_FILE`; the section of ~/.hokusai/profiles named by `HOKUSAI_PROFILE`;
    `[default] api_key` of ~/.hokusai/config. If none is, and only with `HOKUSAI_TRUST=auto`, the key is
    the one that `ci_key` exchanges for this job's identity token. If the first source is unusable, the
    function warns once and tries no later one: sending another key than the selected one would be
    worse. Never raises for the content of a source.
    """
    try:
        source, text = find_key()
    except Unusable as reason:
        warn_once(f"No Hokusai API key is sent: {reason}.")
        return None
    key = text.strip()
    if not key:
        from . import ci_key

        return ci_key.current() if ci_key.is_wanted() else None
    # Only a key that no header can hold is withheld. A mistyped key is sent, as the server's message
    # about it reaches the user as MLflow's error.
    problem = keys.unsendable(key)
    if problem:
        warn_once(f"No Hokusai API key is sent: {source} holds no usable key, {problem}.")
        return None
    return key


def origin(url: str) -> Origin | None:
    """Return the origin that an HTTP client would connect to for `url`, or None if it is ambiguous.

    Ambiguous are a scheme other than http and https, a host that isn't plain ASCII, a port outside
    1-65535, and anything that two URL parsers read differently.
    """
    match = _URL.match(url)
    if not match:
        return None
    scheme, host = match[1].lower(), match[2].lower()
    # Port 0 is refused, as `requests` would connect to the default port instead.
    port = int(match[3]) if match[3] else _DEFAULT_PORTS[scheme]
    if not 0 < port < 65536:
        return None
    if host.startswith("["):
        try:
            host = str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            return None
    return Origin(scheme, host, port)


def allowed_origins() -> frozenset[Origin]:
    """Return the origins that may get the key.

    `HOKUSAI_ALLOWED_ORIGINS` (separated by commas) is the exact list if it is set. Otherwise the origin
    of MLflow's current tracking URI counts or, if that isn't an http(s) URL, of its registry URI, and
    only over https or on a loopback address. A registry beside an http(s) tracking server may belong to
    someone else, so it is not included.
    """
    origins = os.environ.get(ALLOWED_ORIGINS, "").strip()
    if origins:
        return _parse_origins(origins)
    home = origin(_home_uri())
    return frozenset({home} if home and home.confidential else ())


def origin_allowed(url: str) -> bool:
    """Return True if the key may be sent to `url`, an absolute URL. See `allowed_origins`."""
    target = origin(url)
    return target is not None and target in allowed_origins()


def find_key() -> tuple[str, str]:
    """Return the name of the selected source and its text, or ("", ""). Raises Unusable."""
    text = os.environ.get(KEY, "")
    if text.strip():
        return KEY, text
    path = os.environ.get(KEY_FILE, "").strip()
    if path:
        source = f"the file named by {KEY_FILE}"
        text = _load(source, path, str)
        if not text.strip():
            raise Unusable(f"{source} is empty")
        return source, text
    profile = os.environ.get(PROFILE, "").strip()
    if profile:
        section = _load(PROFILES_FILE, PROFILES_FILE, _parse_ini).get(profile)
        if section is None:
            raise Unusable(f"{PROFILES_FILE} has no section with the name in {PROFILE}")
        if not section.strip():
            raise Unusable(f"the section of {PROFILES_FILE} named by {PROFILE} has no api_key")
        return f"the section of {PROFILES_FILE} named by {PROFILE}", section
    try:
        config = _load(CONFIG_FILE, CONFIG_FILE, _parse_ini)
    except FileNotFoundError:
        return "", ""
    return f"[default] api_key of {CONFIG_FILE}", config.get("default", "")


def profiles() -> list[str]:
    """Return the names of the sections of ~/.hokusai/profiles, if it exists. Raises Unusable."""
    try:
        if not os.path.lexists(Path(PROFILES_FILE).expanduser()):
            return []
    except RuntimeError:  # there is no home directory
        return []
    return list(_load(PROFILES_FILE, PROFILES_FILE, _parse_ini))


def _load(name: str, path: str, parse: Callable[[str], _Parsed]) -> _Parsed:
    """Return the parsed content of the file at `path`, cached while the file stays the same.

    Raises FileNotFoundError only for the config file, which is optional, and `Unusable` otherwise.
    `name` is for messages: a path may be a key that was put into the wrong variable.
    """
    try:
        full = Path(path).expanduser()
        status = full.stat()
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        cached = _files.get((full, parse))
        if cached and cached[0] == stamp:
            return cached[1]  # type: ignore[return-value]
        # A pipe can be read only once, and would block the second time.
        if not stat.S_ISREG(status.st_mode):
            raise Unusable(f"{name} is not a regular file")
        with full.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(_MAX_FILE + 1)
    except (FileNotFoundError, NotADirectoryError, RuntimeError) as error:
        # RuntimeError: there is no home directory to find the file in.
        if name == CONFIG_FILE:
            raise FileNotFoundError from error
        raise Unusable(f"{name} does not exist") from None
    except (OSError, ValueError) as error:
        raise Unusable(f"{name} cannot be read ({type(error).__name__})") from None
    if len(content) > _MAX_FILE:
        raise Unusable(f"{name} is larger than {_MAX_FILE} bytes")
    try:
        parsed = parse(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, configparser.Error) as error:
        raise Unusable(f"{name} cannot be parsed ({type(error).__name__})") from None
    if time.time_ns() - status.st_mtime_ns > _MIN_AGE:
        if len(_files) > 16:
            _files.clear()
        _files[full, parse] = ((status.st_mtime_ns, status.st_size, status.st_ino), parsed)
    return parsed


def _parse_ini(text: str) -> dict[str, str]:
    """Return the `api_key` of each section, empty if the section has none."""
    # A plain ConfigParser would take a % in another option for an interpolation.
    parser = configparser.RawConfigParser()
    parser.read_string(text)
    return {section: parser.get(section, "api_key", fallback="") for section in parser.sections()}


@lru_cache(maxsize=16)
def _parse_origins(origins: str) -> frozenset[Origin]:
    parsed = set()
    for position, entry in enumerate(origins.split(","), start=1):
        entry = entry.strip()
        if target := origin(entry):
            parsed.add(target)
        elif entry:
            warn_once(
                f"Entry {position} of {ALLOWED_ORIGINS} is ignored: it must be an origin in ASCII, "
                "such as https://registry.example.com:8443."
            )
    return frozenset(parsed)


def tracking_uri() -> str:
    """Return MLflow's current tracking URI."""
    import mlflow

    return str(mlflow.get_tracking_uri())


def _home_uri() -> str:
    tracking = tracking_uri()
    if tracking.lower().startswith(("http://", "https://")):
        return tracking
    import mlflow

    return str(mlflow.get_registry_uri())


def _is_proxied(target: Origin) -> bool:
    """Return True if `requests` would use a proxy for `target`, even if that is this machine."""
    if sys.platform == "linux" and not any(map(os.environ.get, _PROXIES)):
        return False
    from requests.utils import get_environ_proxies, select_proxy

    url = str(target)
    return select_proxy(url, get_environ_proxies(url)) is not None


@lru_cache(maxsize=16)
def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # IPv6Address.is_loopback differs between Python versions for mapped addresses.
    return host == "::1" if address.version == 6 else address.is_loopback
