"""One HTTP exchange within one total time, on a connection that is kept.

`http.client` follows neither redirects nor proxy settings. Left out: TLS (see serving/http.py).
"""

import http.client
import json
import os
import re
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from reinforce.errors import ConfigError, FailedError

MAX_REPLY = 64 << 20  # bytes
RETRIED = (408, 429, 502, 503, 504)  # statuses that another try may cure
LATE = (408, 504)  # those of them that say that something took too long
GLANCE = 1.0  # seconds between two looks whether the run is to stop
AFTER_STOP = 10.0  # seconds that a run that is to stop still waits for a reply
MOST_CONNECT = 10.0  # seconds until a connection is there


def url_of(host: str, port: int) -> str:
    """The URL of a server; an IPv6 address stands in brackets.

    >>> url_of("::1", 5567)
    'http://[::1]:5567'
    """
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_token() -> str | None:
    """The shared secret, from RM_TOKEN or the file RM_TOKEN_FILE.

    Never from a command line, which every user of the machine can read.
    """
    path = os.environ.get("RM_TOKEN_FILE")
    if not path:
        return (
            _checked_token(os.environ["RM_TOKEN"], "RM_TOKEN")
            if os.environ.get("RM_TOKEN")
            else None
        )
    try:
        text = Path(path).read_text().strip()
    except OSError as error:
        raise ConfigError(f"RM_TOKEN_FILE {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"RM_TOKEN_FILE {path}: it is not text") from error
    return _checked_token(text, f"RM_TOKEN_FILE {path}")


def _checked_token(token: str, where: str) -> str:
    """The token, if it can be sent in a header. Raises ConfigError, which does not repeat it."""
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(
            f"{where}: a token must be one line of visible ASCII characters, without spaces, "
            "and not empty"
        )
    return token


class RewardError(FailedError):
    """The server answered, and the answer cannot be used: trying again would not help."""


class TryAgainError(Exception):
    """A failure that another try may cure; `pause` is the server's Retry-After, seconds."""

    def __init__(self, message: str, pause: float = 0.0, late: bool = False) -> None:
        """`pause` 0: the server said nothing. `late`: it has taken too long."""
        super().__init__(message)
        self.pause, self.late = pause, late


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    kind: str  # content type
    body: bytes
    pause: float  # Retry-After, seconds; 0 without one


def pause_of(response: http.client.HTTPResponse) -> float:
    """Seconds of Retry-After; 0 without one."""
    after = response.getheader("Retry-After") or ""
    return float(after) if re.fullmatch(r"[0-9]{1,9}", after) else 0.0


class _DeadlineSocket(socket.socket):
    """Every call ends at one instant, `limit`, however many calls there are.

    A time-out alone would start anew with each byte. A run that is to stop does not wait to the
    end: its finished steps are not saved yet.
    """

    limit = 0.0  # a time.monotonic()
    watched: "Connection"

    def _left(self) -> float:
        left = self.limit - time.monotonic()
        if left <= 0:
            raise TimeoutError("the exchange did not end in time")
        return left

    def _in_time(self, call: Callable[..., int], *args: Any, **named: Any) -> int:
        while True:
            self.settimeout(min(self._left(), GLANCE))
            try:
                return call(*args, **named)
            except TimeoutError:
                if self.watched.stopped():
                    self.limit = min(self.limit, time.monotonic() + AFTER_STOP)

    def recv_into(self, *args: Any, **named: Any) -> int:
        return self._in_time(super().recv_into, *args, **named)

    def sendall(self, data: Any, flags: int = 0) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._in_time(super().send, rest, flags) :]


def _is_readable(sock: socket.socket) -> bool:
    """Whether an idle connection has bytes, of a reply sent twice say, or its end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


class Connection:
    """One keep-alive connection to a server."""

    def __init__(
        self, host: str, port: int, token: str | None, before_post: Callable[[float], None]
    ) -> None:
        """`before_post(limit)` is called before a body goes out on a new connection.

        Another server may be behind it.
        """
        self.url = url_of(host, port)
        self._address, self._token, self._before_post = (host, port), token, before_post
        self.stopped: Callable[[], bool] = lambda: False  # whether the run is to stop
        self.keep_alive = True  # False: each request has a connection of its own
        self._connection: http.client.HTTPConnection | None = None
        self._vetted = False  # `before_post` has passed since it was opened

    def trust(self) -> None:
        """What is connected now has been vetted."""
        self._vetted = self._connection is not None

    def exchange(self, method: str, path: str, payload: Any, limit: float) -> Reply:
        """The reply to one request before `limit`, a time.monotonic().

        Raises TryAgainError, RewardError for an endless reply, http.client.HTTPException for what
        is no HTTP.
        """
        body = None if payload is None else json.dumps(payload, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        for fresh in (
            False,
            True,
        ):  # a kept connection that the server closed meanwhile is no failure of the server
            if self._connection is not None and _is_readable(self._connection.sock):
                self._close()
            reused = self._connection is not None
            if not self._vetted and body is not None:
                self._before_post(limit)
                self._vetted = True  # where its reply closed the connection, the next one's tells
            try:
                connection = self._connected(limit)
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                data = self._read(response)
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                self._close()
                if reused and not fresh:
                    continue
                raise TryAgainError(f"connection closed ({type(error).__name__})") from error
            except http.client.IncompleteRead as error:
                self._close()
                raise TryAgainError("the reply was cut short") from error
            except http.client.HTTPException:
                self._close()
                raise
            except (OSError, UnicodeError) as error:  # the latter: a name that cannot be one
                self._close()
                late = isinstance(error, TimeoutError)
                raise TryAgainError(str(error) or type(error).__name__, late=late) from error
            kind = (response.getheader("Content-Type") or "").split(";")[0].strip().lower()
            if response.will_close or not self.keep_alive:
                self._close()
            return Reply(response.status, kind, data, pause_of(response))
        raise AssertionError("unreachable")

    def _connected(self, limit: float) -> http.client.HTTPConnection:
        if self._connection is None:
            timeout = min(max(0.001, limit - time.monotonic()), MOST_CONNECT)
            connection = http.client.HTTPConnection(*self._address, timeout=timeout)
            try:
                connection.connect()
            except TimeoutError as error:  # not `late`: no text was too long
                raise TryAgainError("no answer to a connection") from error
            plain = connection.sock
            connection.sock = _DeadlineSocket(
                plain.family, plain.type, plain.proto, fileno=plain.detach()
            )
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sock.watched = self
            self._connection, self._vetted = connection, False
        cast(_DeadlineSocket, self._connection.sock).limit = limit
        return self._connection

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """The body. Raises RewardError for one that is endless, in chunks or packed."""
        for name in ("Transfer-Encoding", "Content-Encoding"):
            if value := response.getheader(name):
                self._close()
                if response.status in RETRIED:  # a proxy's page, which is not needed
                    late = response.status in LATE
                    raise TryAgainError(f"HTTP {response.status}", pause_of(response), late)
                raise RewardError(
                    f"the reply of {self.url} has {name} {value[:60]!r}, which is not taken"
                )
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > MAX_REPLY:
                self._close()
                raise RewardError(f"the reply of {self.url} is longer than {MAX_REPLY} bytes")
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        response.close()  # read1 leaves a whole answer open, and the connection busy
        return b"".join(parts)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection, self._vetted = None, False
