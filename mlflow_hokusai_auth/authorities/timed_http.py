"""HTTP requests to other servers with a deadline for the whole answer and a bound on its size.

Nothing of the machine's own settings goes into them that the caller did not ask for.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any

import requests.adapters
import urllib3


def session(
    verify: bool | str, *, proxied: str | None = None, connections: int = 1
) -> requests.Session:
    """Return a session of at most `connections` connections to each server; see `until`.

    `verify` is that of requests. A proxy that the environment names for the URL `proxied` is used.
    """
    made = requests.Session()
    # With trust_env, ~/.netrc would send its passwords, and REQUESTS_CA_BUNDLE replace `verify`.
    made.trust_env = False
    made.verify = verify
    if proxied is not None:
        made.proxies.update(requests.utils.get_environ_proxies(proxied))
    made.headers["User-Agent"] = "mlflow-hokusai-auth"
    made.headers["Accept-Encoding"] = "identity"
    for scheme in ("http://", "https://"):
        made.mount(scheme, _TimedAdapter(1, connections, max_retries=0, pool_block=True))
    return made


def until(deadline: float) -> Any:
    """Return the `timeout` of a request whose answer must be there at `deadline` (`time.monotonic`)."""
    # Only urllib3's own type has a total time; the stubs of requests don't know it.
    return urllib3.Timeout(total=max(deadline - time.monotonic(), 0.01))


def read_body(response: requests.Response, limit: int) -> bytes | None:
    """Return the body of a streamed `response` as it was sent, or None if it has more bytes."""
    content = b""
    for chunk in response.raw.stream(8192, decode_content=False):
        content += chunk
        if len(content) > limit:
            return None
    return content


def cause(error: BaseException) -> str:
    """Return the innermost error's class and, for an OSError, its text: neither can hold a key."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    text = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _TimedReader(io.RawIOBase):
    """A socket's reader with one deadline for all reads together, not a timeout for each."""

    def __init__(self, raw: io.RawIOBase, connection: socket.socket) -> None:
        self._raw = raw
        self._connection = connection
        # urllib3 has set the socket's timeout to the rest of the total time.
        self._deadline = time.monotonic() + (connection.gettimeout() or 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if (remaining := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        self._connection.settimeout(remaining)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(http.client.HTTPResponse):
    """A response whose headers and body must arrive by the deadline, even if a server drips bytes."""

    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_TimedReader(self.fp.detach(), sock))


def _timed(pool: type[urllib3.HTTPConnectionPool]) -> type[urllib3.HTTPConnectionPool]:
    timed = {"response_class": _TimedResponse}
    connections = type("_TimedConnection", (pool.ConnectionCls,), timed)
    return type("_TimedPool", (pool,), {"ConnectionCls": connections})


_POOLS = {
    "http": _timed(urllib3.HTTPConnectionPool),
    "https": _timed(urllib3.HTTPSConnectionPool),
}


class _TimedAdapter(requests.adapters.HTTPAdapter):
    """Connections with `_TimedResponse`, with a proxy and without."""

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = _POOLS
        return manager
