"""One connection: one request at a time, each stage with one deadline, however the bytes drip.

    idle -> head -> body -> answer -> idle again, or closing

Whoever is slow holds a socket, and no thread. A body is read to its end before its answer goes out,
or the connection closes.
"""

import asyncio
import contextlib
import math
import socket
import time

from reinforce.serving.host import Host
from reinforce.serving.http import HttpError, Reply, Request, reply_bytes
from reinforce.serving.reader import Reader

IDLE_SECONDS = 15.0  # between two requests
HEAD_SECONDS = 10.0  # for a whole head
BODY_SECONDS = 30.0  # for a whole body
ANSWER_SECONDS = 50.0  # below the client's 60 s a try
CLOSE_SECONDS = 1.0  # for the client to read the last reply, which closing at once may destroy
AHEAD = 64 << 10  # bytes of the next request that are taken while one is answered
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"


def late() -> Reply:
    """The answer did not come in time."""
    return HttpError(504, "deadline", f"no answer within {ANSWER_SECONDS:g} s").reply()


class Connection(asyncio.Protocol):
    """A client's connection; only `gone` may be called outside the event loop's thread."""

    transport: asyncio.Transport

    def __init__(self, host: Host, welcome: bool = True) -> None:
        """`welcome`: False closes it as soon as it is made."""
        self._host, self._reader, self._held = host, Reader(host.admit), 0
        self._welcome = welcome
        self._task: asyncio.Task[Reply] | None = None  # the answer that is being made
        self._closing = self._paused = self._half_closed = self._lost = False
        self._wait(IDLE_SECONDS)

    def _wait(self, seconds: float) -> None:
        """A new stage begins: the client has kept us waiting since `since`."""
        self.since = time.monotonic()
        self.deadline = self.since + seconds

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self.transport = transport  # type: ignore[assignment]
        if self._welcome:
            self._host.connections.add(self)
        else:
            self.transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Nobody waits for the answer any more."""
        self._lost = True
        self._host.connections.discard(self)
        self._host.hold(-self._held)
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Bytes; those after the last reply are taken in and forgotten."""
        if self._closing:
            return
        fresh = not self._reader.begun
        self._reader.feed(data)
        if fresh and data:
            self._wait(HEAD_SECONDS)
        try:
            self._hold()
            self._advance()
        except HttpError as error:
            if self._task is None:
                self._send(error.reply(), keep=False)
            else:
                self.transport.abort()

    def eof_received(self) -> bool:
        """The client has left, or has only closed its half and waits: `gone` finds out which."""
        self._half_closed = True
        if self._task is not None and self._reader.head and self._reader.head.minor == 1:
            self.transport.write(GO_ON)  # whoever listens skips it; a closed socket resets us
        return self._task is not None

    def gone(self) -> bool:
        """Whether nobody waits for the answer any more."""
        if self._lost or not self._half_closed:
            return self._lost
        try:
            raw = self.transport.get_extra_info("socket")
            return bool(raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0)
        except OSError:
            return True

    def pause_writing(self) -> None:
        """The client does not read: no further request of its is begun."""
        self._paused = True

    def resume_writing(self) -> None:
        """It reads again."""
        self._paused = False
        self.transport.resume_reading()
        self.data_received(b"")

    @property
    def busy(self) -> bool:
        """An answer is being made or sent."""
        return self._task is not None or self.transport.get_write_buffer_size() > 0

    def expire(self) -> None:
        """The deadline has passed."""
        if self._task is not None:
            self._task.cancel()
        elif self._closing or self._paused:
            self.transport.abort()
        elif self._reader.begun:
            error = HttpError(408, "timeout", "the request did not arrive")
            self._send(error.reply(), keep=False)
        elif self.busy:  # it does not read its reply
            self.transport.abort()
        else:
            self.transport.close()

    def _advance(self) -> None:
        while self._task is None and not self._paused and not self._closing:
            fresh = self._reader.head is None
            if not self._reader.take_head():
                return
            if fresh:
                self._wait(BODY_SECONDS)
                if self._reader.awaits_go:
                    self.transport.write(GO_ON)
            body = self._reader.take_body()
            if body is None:
                return
            self._answer(body)
        if (self._task is not None or self._paused) and self._reader.ahead > AHEAD:
            self.transport.pause_reading()

    def _answer(self, body: bytes) -> None:
        assert self._reader.head is not None
        try:
            answer = self._host.route(Request(self._reader.head, body, self.gone))
        except HttpError as error:
            answer = error.reply()
        if isinstance(answer, Reply):
            self._send(answer)
            return
        self._wait(ANSWER_SECONDS)
        self.since = math.inf  # it is us who keep the client waiting
        self._task = asyncio.get_running_loop().create_task(answer)
        self._task.add_done_callback(self._answered)

    def _answered(self, task: "asyncio.Task[Reply]") -> None:
        self._task = None
        reply = late() if task.cancelled() else task.result()
        if not self._lost:
            self._send(reply)
            self.transport.resume_reading()
            self.data_received(b"")

    def _send(self, reply: Reply, keep: bool = True) -> None:
        head = self._reader.head
        keep = keep and head is not None and head.keep and not self._half_closed
        keep = self._host.replied(reply.status) and keep
        without_body = head is not None and head.method == "HEAD"
        self.transport.write(reply_bytes(reply, keep, without_body))
        self._reader.answered()
        self._hold()
        self._wait(HEAD_SECONDS if self._reader.begun else IDLE_SECONDS)
        if not keep:
            self._close()

    def _close(self) -> None:
        self._closing = True
        self._reader.close()
        self._hold()
        if not self.busy:
            self._wait(CLOSE_SECONDS)
        with contextlib.suppress(OSError):
            self.transport.write_eof()
        if self._half_closed:
            self.transport.close()

    def _hold(self) -> None:
        """Tell the server how many bytes are held here."""
        before, self._held = self._held, self._reader.held
        self._host.hold(self._held - before)
