"""The artifact roots of this server, and the refusal of a location outside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.uri import get_uri_scheme
from prometheus_client import Counter

from mlflow_hokusai_auth.core.denials import CODES, full_message
from mlflow_hokusai_auth.core.keys import redact
from mlflow_hokusai_auth.core.locations import Location, Roots, inside, read, read_root
from mlflow_hokusai_auth.server import caller as callers
from mlflow_hokusai_auth.server import metrics
from mlflow_hokusai_auth.server.live_settings import Isolation, Mode
from mlflow_hokusai_auth.store.dry_run import WouldRefuse

#: Variables in which `mlflow server` passes its options to its workers.
TRACKING = "_MLFLOW_SERVER_FILE_STORE"
REGISTRY = "_MLFLOW_SERVER_REGISTRY_STORE"
DESTINATION = "_MLFLOW_SERVER_ARTIFACT_DESTINATION"
DEFAULT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"
SERVES = "_MLFLOW_SERVER_SERVE_ARTIFACTS"
SETTING = "HOKUSAI_AUTH_ARTIFACT_ROOTS"

_log = logging.getLogger(__name__)


def is_local(uri: str) -> bool:
    """Return whether MLflow reads `uri` as a path on this machine."""
    return get_uri_scheme(uri) in ("", "file")


def local_place(uri: str) -> Location:
    """Return the folder that MLflow opens for a local `uri`, with links followed.

    Raises ValueError if the URI has a NUL.
    """
    return real_folder(local_file_uri_to_path(uri))


def real_folder(path: str) -> Location:
    """Return the folder or file at `path`, with links followed. Raises ValueError for a NUL."""
    return _folder(os.path.realpath(path))


def _folder(path: str) -> Location:
    # `read` would decode the path a second time, after MLflow.
    return Location("file", "", Path(path).parts[1:])


def load(extra: Iterable[str], environ: Mapping[str, str] = os.environ) -> Roots:
    """Return the roots that `extra` and the options of `mlflow server` in `environ` name.

    Raises ValueError if locations can't be compared with one of them.
    """
    aliases: list[tuple[Location, Location]] = []

    def place(uri: str, name: str) -> Location:
        if is_local(uri):
            real = local_place(uri)
            written = _folder(os.path.abspath(local_file_uri_to_path(uri)))  # noqa: PTH100
            if written != real:
                aliases.append((written, real))
            return real
        try:
            return read_root(uri)
        except ValueError as error:
            raise ValueError(f"{name} {read(uri)} {error}") from None

    served = base = None
    places = [place(uri, SETTING) for uri in extra]
    if destination := environ.get(DESTINATION):
        places.append(place(destination, "--artifacts-destination"))
        served = places[-1] if environ.get(SERVES) == "true" else None
    if served is not None:
        # The clients of jobs open artifacts by this URI.
        aliases.append((read("mlflow-artifacts:/"), served))
    if default := environ.get(DEFAULT_ROOT):
        base = place(default, "--default-artifact-root")
        if served is not None and (base.scheme in ("http", "https", "mlflow-artifacts")):
            proxied, base = base, Roots((), served=served).place(base)
            aliases.append((proxied, base))
        # A folder below a root is no root of its own, so that no root contains another.
        if not any(inside(base, root) for root in places):
            places.append(base)
    return Roots(tuple(dict.fromkeys(places)), tuple(aliases), base, served)


@dataclass(frozen=True, slots=True)
class Watch:
    """Refuses locations in mode enforce, and only counts them in mode observe."""

    mode: Mode | Isolation
    #: Called for each location that mode observe lets pass.
    observed: Callable[[WouldRefuse], object] = lambda _: None
    #: The contact for questions about keys, or "".
    contact: str = ""

    @property
    def looks(self) -> bool:
        """True if the mode needs a check of locations."""
        return self.mode.now != "off"

    @property
    def observes(self) -> bool:
        """True if refusals are only counted."""
        return self.mode.now == "observe"

    @property
    def hides(self) -> bool:
        """True if callers must not learn what others have."""
        return getattr(self.mode, "hides", False)

    def refuse(
        self,
        code: str,
        kind: str,
        uri: str | None,
        message: str,
        counter: Counter = metrics.LOCATIONS,
    ) -> None:
        """Refuse a request with `code`, or only count it, in `counter`.

        A request that is only counted counts once for `code` and `kind`, whatever it changes. `uri` is
        the location that the request would store or open, if it is about one.

        Raises MlflowException, which MLflow answers with 403.
        """
        caller = callers.current.get()
        enforced = self.mode.now == "enforce"
        if not enforced and caller.spared is not None:
            if (code, kind) in caller.spared:
                return
            caller.spared.add((code, kind))
        counter.labels(kind, "refused" if enforced else "observed").inc()
        _log.warning(
            "%s (%s) by key %s, request %s: %s%s",
            code if enforced else f"Only counted, in mode observe: {code}",
            kind,
            caller.principal.key_id if caller.principal else "none",
            caller.request_id or "none",
            "" if uri is None else f"{shown(uri)}: ",
            # Names of clients may have line breaks.
            redact(message).encode("unicode_escape").decode(),
        )
        if enforced:
            raise MlflowException(
                full_message(code, message, self.contact),
                error_code=PERMISSION_DENIED,
                error=code,
                detail=CODES[code].detail,
            )
        self.observed(WouldRefuse.now(code, kind, caller.principal, caller.address))


def shown(uri: str) -> str:
    """Return `uri` for a log: one line of at most 300 characters, without a key or a password."""
    return ascii(redact(str(read(uri))))[:300]
