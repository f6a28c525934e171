"""A fault between the server and the PostgreSQL of its key store."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from mlflow_hokusai_auth.authorities.cache import MAX_UNCONFIRMED
from mlflow_hokusai_auth.store.database import BUSY_TIMEOUT
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.conftest import Postgresql
from tests.harness import Server, serve

from .proxy import FAULTS, Proxy
from .watch import EXPERIMENT, SLACK, Administrator, Asker, crowd

pytestmark = pytest.mark.long  # a server of its own, for as long as its patience lasts

TIMEOUT = 1.0
#: Bytes of an answer until it breaks off.
AFTER = 100


@pytest.fixture(scope="module")
def proxy(postgresql: Postgresql) -> Iterator[Proxy]:
    with Proxy(postgresql.port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def store(postgresql: Postgresql) -> LocalStore:
    """The key store, past the proxy."""
    return LocalStore(postgresql.uri)


@pytest.fixture(scope="module")
def served(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(
        tmp_path_factory.mktemp("served"),
        HOKUSAI_AUTH_DATABASE_URI=f"postgresql://postgres@127.0.0.1:{proxy.port}/postgres",
        HOKUSAI_AUTH_SERVICE_TIMEOUT=str(TIMEOUT),
    ) as server:
        yield server


@pytest.mark.parametrize("fault", FAULTS)
def test_the_database(served: Server, store: LocalStore, proxy: Proxy, fault: str) -> None:
    proxy.lift()
    made = [store.create(owner="fault", scopes=["mlflow:read"]) for _ in range(200)]
    (gone, revoked), (_, known), (ending, late), *rest = made
    store.revoke(gone.key_id)
    fresh = iter([key for _, key in rest])
    administrator = Administrator(served, store)
    manages = Asker(administrator, 0.02)
    ends = Asker(lambda: served.request("GET", EXPERIMENT, key=late))
    try:
        with crowd(
            served, revoked=revoked, known=known, fresh=lambda: next(fresh), bound=TIMEOUT + 5
        ) as at_work:
            for asker, status in ((manages, 201), (manages, 200), (ends, 200)):
                asker.wait_for(status, 0)
            began = time.monotonic()
            proxy.fail(fault, AFTER)
            at_work.known.wait_for(503, began)
            # Not for long is it held up by a change that this server could not finish.
            store.revoke(ending.key_id)
            assert time.monotonic() - began < TIMEOUT + 5 + BUSY_TIMEOUT + SLACK
            # It is asked again by then, in vain.
            at_work.fresh.wait_for(503, began + 2)
            lifted = time.monotonic()
            proxy.lift()
            at_work.tell(f"database, {fault}", began, lifted)
            for asker, status in ((manages, 201), (manages, 200), (ends, 401)):
                asker.wait_for(status, lifted)
            at_work.known.wait_for(200, lifted)
    finally:
        manages.stop()
        ends.stop()
    print(f"administrator: {manages.statuses(began)}, longest {manages.longest():.1f} s")
    assert set(manages.statuses()) <= {200, 201, 503}
    for key_id in administrator.created:
        assert store.get(key_id)
    assert all(store.get(key_id).revoked_at for key_id in administrator.revoked)
    for asker in (at_work.known, ends):
        served_on = [a.sent - began for a in asker.answers if a.status == 200 and a.over < lifted]
        assert max(served_on) < MAX_UNCONFIRMED + SLACK
    assert not [a for a in ends.answers if a.status == 200 and a.sent > lifted]
