"""The Hokusai auth service over HTTP: `POST {url}/api/v1/keys/validate`, with the key as Bearer.

Only a 200 of the documented shape or a 401 is an answer. A 429 raises Throttled, and everything else
AuthorityUnavailable: a fault on the way neither accepts a key nor tells its owner that it is wrong.
`service_reply` reads the reply. No usage is debited, as calls of the registry are free.
"""

from __future__ import annotations

import os
import re
import time
from concurrent import futures
from http.cookiejar import DefaultCookiePolicy

import requests

from mlflow_hokusai_auth.core.errors import AuthorityUnavailable
from mlflow_hokusai_auth.core.types import Principal, Rejected

from .service_reply import Reply, read_reply
from .timed_http import cause, read_body, session, until

PATH = "/api/v1/keys/validate"
#: Most bytes of a reply's body; a real one has a few hundred.
MAX_REPLY = 64 * 1024
#: Statuses whose replies have no body (RFC 9110, 6.4.1). If the service sends one all the same, it
#: stays on the connection and would be taken for the reply to the next lookup.
_NO_BODY = frozenset({204, 304})


class AuthService:
    """The service at `url`, over at most `connections` connections for each process.

    A lookup takes at most `timeout` seconds, from the wait for a free connection to the reply's last
    byte. `ca_bundle` is a file of certificates to trust instead of the usual ones. A proxy named in the
    environment is used only with `use_environment_proxies`. Raises ValueError for a wrong `url`.
    """

    name = "service"
    #: A key may have a list of addresses, which the service checks.
    by_address = True
    #: The service does not report that a key has changed.
    watched = False

    def __init__(
        self,
        url: str,
        *,
        service_id: str = "platform",
        timeout: float = 5.0,
        ca_bundle: str | None = None,
        connections: int = 8,
        use_environment_proxies: bool = False,
    ) -> None:
        if not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", url):
            raise ValueError("the auth service's URL must look like https://auth.example.com")
        self._url = url.rstrip("/") + PATH
        self._service_id = service_id
        self._timeout = timeout
        self._verify = ca_bundle or True
        self._connections = connections
        self._use_proxies = use_environment_proxies
        self._clients: dict[int, tuple[requests.Session, futures.Executor]] = {}

    def lookup(self, key: str, address: str = "") -> Principal | Rejected:
        """Return the owner of `key`. Raises AuthorityUnavailable or Throttled."""
        client, threads = self._client()
        deadline = time.monotonic() + self._timeout
        # Only a thread bounds the time for name resolution, and for several addresses in a row.
        sent = threads.submit(self._send, client, key, address, deadline)
        done, _ = futures.wait([sent], self._timeout)
        if not done:
            sent.cancel()
            raise AuthorityUnavailable(f"the auth service took more than {self._timeout:g} s")
        error = sent.exception()
        if isinstance(error, AuthorityUnavailable):
            raise error
        if error is not None:
            # Raised outside of an `except`, so that no `__context__` leads to the request with the key.
            raise AuthorityUnavailable(f"the auth service can't be reached: {cause(error)}")
        return read_reply(sent.result(), key)

    def generation(self) -> int:
        """Return 0, as the service is not watched."""
        return 0

    def _send(self, client: requests.Session, key: str, address: str, deadline: float) -> Reply:
        body = {"service_id": self._service_id}
        if address:
            # Without this field the service takes our own address for the client's.
            body["client_ip"] = address
        with client.post(
            self._url,
            json=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=until(deadline),
            allow_redirects=False,
            stream=True,
        ) as response:
            connection = response.raw.connection
            content = read_body(response, MAX_REPLY)
            if content is None:
                raise AuthorityUnavailable("the auth service's reply is too large")
            if response.status_code in _NO_BODY and connection is not None:
                connection.close()
            return Reply(response.status_code, response.headers, content)

    def _client(self) -> tuple[requests.Session, futures.Executor]:
        pid = os.getpid()
        if (client := self._clients.get(pid)) is None:
            # If two threads come here at once, one client is dropped; it has opened no connection yet.
            new = (self._session(), futures.ThreadPoolExecutor(self._connections, "auth-service"))
            client = self._clients.setdefault(pid, new)
            # A client inherited through a fork has the parent's sockets, and threads that don't run.
            for other in set(self._clients.copy()) - {pid}:
                self._clients.pop(other, None)
        return client

    def _session(self) -> requests.Session:
        proxied = self._url if self._use_proxies else None
        made = session(self._verify, proxied=proxied, connections=self._connections)
        # A cookie that is set for one key must not be sent with the next.
        made.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        return made
