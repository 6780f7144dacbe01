"""The HTTP server: one thread with an event loop for all connections, and bounds on their cost.

A socket costs next to nothing, so clients are not counted; what is bounded is requests in flight,
bytes in memory and open files. Of many connections the longest idle one gives way to a new one;
where none has been idle for long, and a quarter more are there, the new one is closed.
"""

import asyncio
import contextlib
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from reinforce.serving.body import MAX_BODY
from reinforce.serving.connection import Connection
from reinforce.serving.gate import admit, is_loopback
from reinforce.serving.http import Head, HttpError, Reply, Request

BACKLOG = 4096  # connections that the kernel holds for us
AT_ONCE = 8  # of them that are taken before any is counted
MAX_CONNECTIONS = 4096
MAX_HELD = 512 << 20  # bytes of all requests
PATIENCE = 1.0  # seconds a connection may be idle or slow before it gives way to a new one
SWEEP_SECONDS = 0.1


class Server:
    """Answers in a thread of its own, from `start` to `close`. A subclass defines `route`."""

    token: str | None = None

    def __init__(self, address: tuple[str, int]) -> None:
        """Binds at once: a port in use raises OSError."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.socket = socket.create_server(address, family=family, backlog=BACKLOG)
        self.server_port: int = self.socket.getsockname()[1]
        self.connections: set[Connection] = set()
        self.replies: Counter[int] = Counter()  # by status
        self.draining = False
        self.max_body = MAX_BODY
        self._loopback = is_loopback(address[0])
        self._limit = min(MAX_CONNECTIONS, _open_files() // 2)
        self._held = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True, name="http")

    def start(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        """End; what has not gone out is lost."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self.socket.close()

    @property
    def busy(self) -> bool:
        """A reply is still to be made or sent."""
        return any(connection.busy for connection in tuple(self.connections))

    def route(self, request: Request) -> Reply | Coroutine[Any, Any, Reply]:
        """The answer, or a way to it. Raises HttpError."""
        raise NotImplementedError

    def admit(self, head: Head) -> int:
        """The length of the body that is to come. Raises HttpError."""
        length = head.length()
        admit(head, self.token, self._loopback)
        if length > self.max_body:
            raise HttpError(413, "too_large", f"at most {self.max_body} bytes")
        return length

    def hold(self, size: int) -> None:
        """Requests hold so many bytes more, or less. Raises HttpError 503."""
        self._held += size
        if size > 0 and self._held > MAX_HELD:
            raise HttpError(503, "busy", "too many bytes in requests at once")

    def replied(self, status: int) -> bool:
        """A reply goes out; whether its connection may be kept."""
        self.replies[status] += 1
        return not self.draining and len(self.connections) <= self._limit

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        listen = self._loop.create_server(self._connected, sock=self.socket, backlog=AT_ONCE)
        self._loop.run_until_complete(listen)
        self.socket.listen(BACKLOG)  # asyncio has one number for both
        self._sweep()
        self._loop.run_forever()
        for connection in tuple(self.connections):
            connection.transport.abort()
        self._loop.run_until_complete(asyncio.sleep(0))

    def _connected(self) -> Connection:
        """A new connection, for which the longest idle one makes room."""
        if len(self.connections) >= self._limit:
            oldest = min(self.connections, key=lambda connection: connection.since)
            if oldest.since < time.monotonic() - PATIENCE:
                oldest.transport.abort()
                self.connections.discard(oldest)
        return Connection(self, welcome=len(self.connections) < self._limit * 5 // 4)

    def _sweep(self) -> None:
        """End what has outlived its deadline, again and again."""
        now = time.monotonic()
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.expire()
        self._loop.call_later(SWEEP_SECONDS, self._sweep)


def _open_files() -> int:
    """How many files this process may open, after asking for as many as it may ask for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
