"""One HTTP exchange within one total time, on a connection that is kept.

`http.client` follows neither redirects nor proxy settings. Left out: TLS (see serving/http.py).
"""

import http.client
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforce.errors import ConfigError, FailedError

MAX_REPLY = 64 << 20  # bytes


def read_token() -> str | None:
    """The shared secret, from RM_TOKEN or the file RM_TOKEN_FILE; never from a command line, which every user can read."""
    if path := os.environ.get("RM_TOKEN_FILE"):
        try:
            return Path(path).read_text().strip() or None
        except OSError as error:
            raise ConfigError(f"RM_TOKEN_FILE {path}: {error.strerror}") from error
    return os.environ.get("RM_TOKEN") or None


class RewardError(FailedError):
    """The server answered, and the answer cannot be used: trying again would not help."""


class TryAgainError(Exception):
    """A failure that another try may cure; `pause` is the server's Retry-After, seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        """`pause` 0: the server said nothing."""
        super().__init__(message)
        self.pause = pause


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    kind: str  # content type
    body: bytes
    pause: float  # Retry-After, seconds; 0 without one


class Connection:
    """One keep-alive connection to a server."""

    def __init__(self, host: str, port: int, token: str | None, before_post: Callable[[float], None]) -> None:
        """`before_post(limit)` is called before a body goes out on a new connection, behind which may be another server."""
        self.url = f"http://{host}:{port}"
        self._address, self._token, self._before_post = (host, port), token, before_post
        self._connection: http.client.HTTPConnection | None = None

    def exchange(self, method: str, path: str, payload: Any, limit: float) -> Reply:
        """The reply to one request before `limit`, a time.monotonic().

        Raises TryAgainError, RewardError for an endless reply, http.client.HTTPException for what is no HTTP.
        """
        body = None if payload is None else json.dumps(payload, allow_nan=False).encode()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        for fresh in (False, True):  # a kept connection that the server closed meanwhile is no failure of the server
            reused = self._connection is not None
            if not reused and body is not None:
                self._before_post(limit)
            try:
                connection = self._connected(limit)
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                data = self._read(response, connection, limit)
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
            except OSError as error:
                self._close()
                raise TryAgainError(str(error) or type(error).__name__) from error
            kind = (response.getheader("Content-Type") or "").split(";")[0].strip().lower()
            after = response.getheader("Retry-After") or ""
            if response.will_close:
                self._close()
            return Reply(response.status, kind, data, float(after) if after.isdigit() else 0.0)
        raise AssertionError("unreachable")

    def _connected(self, limit: float) -> http.client.HTTPConnection:
        timeout = max(0.001, limit - time.monotonic())
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=timeout)
            self._connection.connect()
            self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection.sock.settimeout(timeout)
        return self._connection

    def _read(self, response: http.client.HTTPResponse, connection: http.client.HTTPConnection, limit: float) -> bytes:
        """The body, within a total time: a socket's time-out alone would start anew with every byte of a slow drip."""
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > MAX_REPLY:
                self._close()
                raise RewardError(f"the reply of {self.url} is longer than {MAX_REPLY} bytes")
            left = limit - time.monotonic()
            if left <= 0:
                raise TimeoutError("the reply did not arrive in time")
            if connection.sock is not None:
                connection.sock.settimeout(left)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        response.close()  # read1 leaves a whole answer open, and the connection busy
        return b"".join(parts)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
