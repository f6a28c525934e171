"""A TCP proxy to a port of this machine that can be told to fail, and tells what passed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

#: What `Proxy.fail` takes. Each is for the connections that are open as well as for new ones.
FAULTS = ("stall", "reset", "drip", "truncate", "black_hole", "refuse")
#: Seconds between two bytes of "drip": no answer of a dependency is whole within any patience.
DRIP = 0.15
_HERE = "127.0.0.1"


class Proxy:
    """Passes connections on to `target`, while the context lasts, except for what `fail` says."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._news = threading.Condition()
        #: Connections that were made, bytes that were passed on, and those that came back.
        self.connections = self.asked = self.answered = 0
        self._fault, self._after = "pass", 0
        self._changed = asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fillers: dict[int, socket.socket] = {}
        self.port = 0

    def __enter__(self) -> Proxy:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fail(self, fault: str, after: int = 0) -> None:
        """Be so from now on, whatever was before; "truncate" ends a connection `after` so
        many bytes of answers.

        "stall": takes what is sent, and holds it back for as long as it lasts. "reset": TCP resets.
        "drip": a byte at a time. "black_hole": nobody is answered, not even refused; the queue of the
        listening socket is filled, so that the kernel drops each SYN. "refuse": nothing listens.
        """
        self._do(self._be(fault, after))

    def lift(self) -> None:
        """Pass everything on, what was held back first."""
        self.fail("pass")

    def wait_for(self, happened: Callable[[Proxy], bool], seconds: float = 60) -> None:
        """Return once `happened`, which is asked again for each event."""
        with self._news:
            assert self._news.wait_for(lambda: happened(self), seconds), "it did not happen in time"

    def _do(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _listen(self) -> None:
        self._listener = socket.create_server((_HERE, self.port), backlog=256)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = self._loop.create_task(self._accept())

    async def _deafen(self) -> None:
        self._accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._accepting

    async def _be(self, fault: str, after: int) -> None:
        assert fault in (*FAULTS, "pass")
        before, self._fault, self._after = self._fault, fault, after
        self._changed.set()
        self._changed = asyncio.Event()
        if before == "refuse":
            await self._listen()
        elif before == "black_hole":
            self._listener.listen(256)
            for filler in self._fillers.values():
                filler.close()
            self._accepting = self._loop.create_task(self._accept())
        if fault in ("reset", "refuse"):
            for writer in self._writers:
                _reset(writer)
        if fault == "refuse":
            await self._deafen()
            self._listener.close()
        elif fault == "black_hole":
            await self._deafen()
            await self._fill()

    async def _fill(self) -> None:
        """Fill the queue of connections that nobody has accepted, until one is not answered."""
        self._listener.listen(0)
        with contextlib.suppress(asyncio.TimeoutError):
            while True:
                filler = socket.socket()
                filler.setblocking(False)
                filler.bind((_HERE, 0))
                self._fillers[filler.getsockname()[1]] = filler
                connecting = self._loop.sock_connect(filler, (_HERE, self.port))
                await asyncio.wait_for(connecting, 0.2)

    async def _accept(self) -> None:
        while True:
            connection, (_, port) = await self._loop.sock_accept(self._listener)
            if port in self._fillers:
                connection.close()
                continue
            task = self._loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        self._tell("connections", 1)
        writers = {writer}
        try:
            if self._fault == "reset":
                return _reset(writer)
            answers, onward = await asyncio.open_connection(_HERE, self._target)
            writers.add(onward)
            self._writers |= writers
            pumps = (self._pump(reader, onward, "asked"), self._pump(answers, writer, "answered"))
            await asyncio.gather(*pumps)
        except OSError:
            pass
        finally:
            self._writers -= writers
            for each in writers:
                each.close()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: str
    ) -> None:
        changed, left = None, 0
        while data := await source.read(65536):
            while data:
                if changed is not self._changed:
                    changed, left = self._changed, self._after
                if self._fault in ("stall", "black_hole"):
                    await changed.wait()
                    continue
                size = 1 if self._fault == "drip" else len(data)
                cut = self._fault == "truncate" and way == "answered" and left < size
                size = left if cut else size
                sink.write(data[:size])
                await sink.drain()
                left -= size
                self._tell(way, size)
                if cut:
                    raise ConnectionAbortedError
                data = data[size:]
                if self._fault == "drip":
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(changed.wait(), DRIP)
        if not sink.is_closing():
            sink.write_eof()

    def _tell(self, what: str, count: int) -> None:
        with self._news:
            setattr(self, what, getattr(self, what) + count)
            self._news.notify_all()

    async def _end(self) -> None:
        await self._be("reset", 0)
        await self._deafen()
        self._listener.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
