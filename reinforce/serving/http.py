"""Strict framing and bounded resources on top of the standard library's HTTP server.

`http.server` answers in 44 ms by default (Nagle's algorithm against delayed acknowledgements), resets most of 64 simultaneous
clients (a backlog of 5), believes any Content-Length and starts a thread for everyone. Each line below mends one of these; see
RFC 9112 for the framing. Left out: TLS. On an untrusted network put an ssh tunnel or a reverse proxy in front.
"""

import base64
import contextlib
import hmac
import json
import math
import re
import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_BODY = 16 << 20  # bytes of one request
MAX_CONNECTIONS = 64
BODY_SECONDS = 30.0  # to receive a whole body, however slowly it drips
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\nRetry-After: 1\r\n\r\n"


class HttpError(Exception):
    """An answer other than 200: status, a short machine-readable code, and optionally the index of the guilty text."""

    def __init__(self, status: int, code: str, message: str = "", index: int | None = None) -> None:
        """`message` goes to the client: nothing internal belongs in it."""
        super().__init__(message or code)
        self.status, self.code, self.message, self.index = status, code, message, index


class Server(ThreadingHTTPServer):
    """At most MAX_CONNECTIONS threads; others hear 503 at once."""

    request_queue_size = 128
    daemon_threads = True
    token: str | None = None

    def __init__(self, address: tuple[str, int], handler: type["Handler"]) -> None:
        """Binds at once: a port in use raises OSError."""
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without HTTPServer's reverse look-up of the host name, which can hang for half a minute."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread a connection while there are slots."""
        if not self._slots.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(BUSY)
            return self.shutdown_request(request)
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Run the connection, then give its slot back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()


class Handler(BaseHTTPRequestHandler):
    """JSON in, JSON out. A subclass defines `route(method, path) -> (status, content type, body)`."""

    protocol_version = "HTTP/1.1"
    timeout = 15  # seconds a connection may be idle
    wbufsize = -1  # one write an answer
    disable_nagle_algorithm = True
    server_version, sys_version = "rm", ""
    server: Server
    _unread: float = 0  # bytes of the body that have not been read

    def route(self, method: str, path: str) -> tuple[int, str, bytes]:
        """Answer one request; raise HttpError for any other status."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer("GET")

    def do_POST(self) -> None:
        """Answer a POST."""
        self._answer("POST")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """The standard library's own refusals (an unknown method, a bad request line), as JSON too."""
        status = 405 if code == 501 else code
        self.close_connection = True
        self._send(
            status, "application/json", _error_body(HttpError(status, "bad_request", message or ""))
        )

    def handle_expect_100(self) -> bool:
        """Refuse a body that is too long, or from a stranger, before it is sent."""
        try:
            self._authorise(self.path)
            if self._length() > MAX_BODY:
                raise HttpError(413, "too_large")
        except HttpError as error:
            self.close_connection = True
            self._send(error.status, "application/json", _error_body(error))
            return False
        super().handle_expect_100()
        self.wfile.flush()  # the client waits for it before it sends the body
        return True

    def log_message(self, format: str, *args: Any) -> None:
        """No access log: it would hold prompts of strangers' making."""

    def _answer(self, method: str) -> None:
        try:
            self._unread = self._announced()
            path = self.path.split("?")[0]
            self._authorise(path)
            status, kind, body = self.route(method, path)
        except HttpError as error:
            status, kind, body = error.status, "application/json", _error_body(error)
        if self._unread and status != 401:
            self._drain()
        if self._unread:
            self.close_connection = (
                True  # what is left of the body would be taken for the next request
            )
        self._send(status, kind, body)

    def _announced(self) -> float:
        """Bytes of the body that are to come; infinity where the framing does not say it in the one way that is taken."""
        framed = any(
            self.headers.get(name) is not None for name in ("Content-Length", "Transfer-Encoding")
        )
        try:
            return self._length() if framed else 0
        except HttpError:
            return math.inf

    def _send(self, status: int, kind: str, body: bytes) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.send_response_only(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            if status in (429, 503):
                self.send_header("Retry-After", "1")
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def _authorise(self, path: str) -> None:
        """One gate before every route but /health."""
        token = self.server.token
        if token is None or path == "/health":
            return
        given = self.headers.get_all("Authorization") or []
        kind, _, value = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        kind = kind.lower()
        if kind == "basic":
            with contextlib.suppress(ValueError):
                value = (
                    base64.b64decode(value, validate=True)
                    .decode("utf-8", "replace")
                    .partition(":")[2]
                )
        if kind not in ("bearer", "basic") or not hmac.compare_digest(
            value.encode("utf-8", "replace"), token.encode()
        ):
            raise HttpError(
                401, "unauthorized", "a token is needed: Authorization: Bearer <RM_TOKEN>"
            )

    def _length(self) -> int:
        lengths = self.headers.get_all("Content-Length") or []
        if (
            self.headers.get("Transfer-Encoding")
            or len(lengths) != 1
            or not re.fullmatch(r"[0-9]{1,12}", lengths[0])
        ):
            raise HttpError(
                411, "length_required", "exactly one Content-Length and no Transfer-Encoding"
            )
        return int(lengths[0])

    def read_json(self) -> Any:
        """The body of this POST. Raises HttpError 400, 408, 411, 413 or 415."""
        if (self.headers.get("Content-Type") or "").split(";")[
            0
        ].strip().lower() != "application/json":
            raise HttpError(415, "unsupported_media_type", "Content-Type must be application/json")
        self._unread = self._length()
        if self._unread > MAX_BODY:
            raise HttpError(413, "too_large", f"at most {MAX_BODY} bytes")
        end, parts = time.monotonic() + BODY_SECONDS, []
        while self._unread:
            try:
                part = self.rfile.read1(min(int(self._unread), 1 << 16))
            except TimeoutError:
                part = b""
            if not part or time.monotonic() > end:
                raise HttpError(408, "timeout", "the body did not arrive")
            parts.append(part)
            self._unread -= len(part)
        try:
            return json.loads(b"".join(parts), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise HttpError(400, "bad_json", "the body is not JSON") from error

    def _drain(self) -> None:
        """Take in what is left of a body, for a second at most, so that the client reads our answer instead of a broken pipe."""
        if self._unread == math.inf:
            return
        most, end = MAX_BODY, time.monotonic() + 1.0
        self.connection.settimeout(1.0)
        with contextlib.suppress(OSError):
            while (
                self._unread
                and most > 0
                and time.monotonic() < end
                and (part := self.rfile.read1(min(int(self._unread), 1 << 16)))
            ):
                self._unread -= len(part)
                most -= len(part)
        self.connection.settimeout(self.timeout)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _error_body(error: HttpError) -> bytes:
    return json.dumps(
        {"error": error.code, "message": error.message, "index": error.index}
    ).encode()


def json_body(value: Any) -> bytes:
    """JSON without NaN or Infinity (ValueError), which are not JSON."""
    return json.dumps(value, allow_nan=False).encode()
