"""Many streams on one event loop, each of which gives way to all others between any two messages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_hokusai_auth.core import keys
from mlflow_hokusai_auth.server import caller
from mlflow_hokusai_auth.server.gate.asgi import AsgiGate
from mlflow_hokusai_auth.server.upstream.flask_bridge import FlaskBridge
from mlflow_hokusai_auth.store.keys import LocalStore
from tests.server.gate.test_adapters import Wire, make_gate, scope_of
from tests.soak.test_crosstalk import owners

#: Messages of a body, each way.
STEPS = 20


async def native(scope: Any, receive: Any, send: Any) -> None:
    """Answers each message with whom it takes the request for."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        more = (await receive())["more_body"]
        said = f"{scope['state']['username']}\n{caller.principal().owner}\n".encode()
        await send({"type": "http.response.body", "body": said, "more_body": more})


def flask(environ: Any, start_response: Any) -> Iterator[bytes]:
    """The like in a thread, as MLflow's Flask routes are called."""
    start_response("200 OK", [])
    for _ in range(STEPS):
        yield f"{environ['HTTP_X_HOKUSAI_USER_ID']}\n{caller.principal().owner}\n".encode()


async def ask(gate: AsgiGate, key: str) -> tuple[int, list[str]]:
    left = iter(range(STEPS - 1, -1, -1))
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        if (number := next(left, None)) is None:
            await asyncio.Event().wait()  # until the client leaves, which it does not
        return {"type": "http.request", "body": b".", "more_body": bool(number)}

    async def send(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)
        sent.append(message)

    wire = Wire(headers=(("X-API-Key", key),))
    await gate(scope_of(wire, state={}, http_version="1.1"), receive, send)
    body = b"".join(message["body"] for message in sent[1:])
    return sent[0]["status"], body.decode().splitlines()


@pytest.mark.parametrize("app", [native, FlaskBridge(flask)], ids=["native", "flask"])
def test_a_stream_is_one_owner_s_from_its_first_byte_to_its_last(tmp_path: Path, app: Any) -> None:
    store = LocalStore(f"sqlite:///{tmp_path}/keys.db")
    store.migrate()
    known = {key: owner for owner, key in owners(store).items()}
    # Twice each: while the key is looked up, and once it is known.
    turns = [key for one in known for key in (one, keys.generate(), one)]

    async def all_at_once(gate: AsgiGate) -> list[tuple[int, list[str]]]:
        return await asyncio.gather(*(ask(gate, key) for key in turns))

    gate = AsgiGate(app, make_gate(store))
    for _ in range(2):
        for key, (status, said) in zip(turns, asyncio.run(all_at_once(gate)), strict=True):
            if key in known:
                assert (status, said) == (200, [known[key]] * 2 * STEPS)
            else:
                assert status == 401
