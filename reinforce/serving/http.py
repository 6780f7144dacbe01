"""Strict HTTP/1.1 framing, RFC 9112: bytes to the head of a request, a reply to bytes. No sockets.

Where a request ends is said in one way alone, one Content-Length, and whatever is defective is
refused: a byte that one reader takes for the end of a request and another for its middle lets a
stranger smuggle a request in. Left out: TLS. On an untrusted network put an ssh tunnel or a reverse
proxy in front.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from http.client import responses
from typing import Any

MAX_HEAD = 16 << 10  # bytes of request line and headers
MAX_FIELDS = 100

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%s) ([!-~]+) HTTP/1\.([01])" % _TOKEN)
_FIELD = re.compile(rb"(%s):([\t -~\x80-\xff]*)" % _TOKEN)


class HttpError(Exception):
    """An answer other than 200: status, a short machine-readable code, index of the guilty text.

    `after`: seconds after which to ask again, for Retry-After.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str = "",
        index: int | None = None,
        after: int | None = None,
    ) -> None:
        """`message` goes to the client: nothing internal belongs in it."""
        super().__init__(message or code)
        self.status, self.code, self.message, self.index = status, code, message, index
        self.after = 1 if after is None and status in (429, 503) else after

    def reply(self) -> "Reply":
        """As JSON."""
        body = {"error": self.code, "message": self.message, "index": self.index}
        return Reply(json_body(body), self.status, after=self.after)


@dataclass(frozen=True)
class Reply:
    """What goes back."""

    body: bytes
    status: int = 200
    kind: str = "application/json"
    after: int | None = None  # Retry-After, seconds


@dataclass(frozen=True)
class Head:
    """Request line and headers; the names of headers in lower case."""

    method: str
    target: str
    minor: int  # of the version, HTTP/1.x
    fields: dict[str, list[str]]

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    @property
    def keep(self) -> bool:
        """Whether the client wants to ask again on this connection."""
        words = ",".join(self.fields.get("connection", [])).lower().split(",")
        return self.minor == 1 and "close" not in [word.strip() for word in words]

    def one(self, name: str) -> str | None:
        """The header's value if it was sent exactly once."""
        values = self.fields.get(name, [])
        return values[0] if len(values) == 1 else None

    def length(self) -> int:
        """Bytes of the body. Raises HttpError 411 where they are not told in the one way taken."""
        told = self.fields.get("content-length", [])
        chunked = "transfer-encoding" in self.fields
        if not told and not chunked and self.method != "POST":
            return 0
        if chunked or len(told) != 1 or not re.fullmatch(r"[0-9]{1,12}", told[0]):
            reason = "exactly one Content-Length and no Transfer-Encoding"
            raise HttpError(411, "length_required", reason)
        return int(told[0])


@dataclass(frozen=True)
class Request:
    """A whole request."""

    head: Head
    body: bytes
    gone: Callable[[], bool]  # whether its client has left


def parse_head(data: bytes) -> Head:
    """The head, given without the empty line that ends it. Raises HttpError 400 for any defect."""
    first, *lines = data.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(first)
    if match is None:
        raise HttpError(400, "bad_request", "the request line is not METHOD TARGET HTTP/1.1")
    if len(lines) > MAX_FIELDS:
        raise HttpError(431, "too_many_headers", f"at most {MAX_FIELDS} headers")
    fields: dict[str, list[str]] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise HttpError(400, "bad_request", "a header line is not NAME: VALUE")
        name, value = (part.decode("latin-1") for part in field.groups())
        fields.setdefault(name.lower(), []).append(value.strip(" \t"))
    method, target, minor = (part.decode("ascii") for part in match.groups())
    if target.lower().startswith("http://"):  # absolute: its name counts, not Host's
        name, slash, rest = target[len("http://") :].partition("/")
        target, fields["host"] = slash + rest, [name] * len(fields.get("host", [""]))
    head = Head(method, target, int(minor), fields)
    if len(fields.get("host", [])) != 1 and head.minor == 1:
        raise HttpError(400, "bad_request", "exactly one Host")
    return head


def reply_bytes(reply: Reply, keep: bool, without_body: bool = False) -> bytes:
    """A reply as it goes over the wire."""
    lines = [
        f"HTTP/1.1 {reply.status} {responses.get(reply.status, '')}",
        f"Content-Type: {reply.kind}",
        f"Content-Length: {len(reply.body)}",
    ]
    if reply.after is not None:
        lines.append(f"Retry-After: {reply.after}")
    if reply.status == 401:
        lines.append("WWW-Authenticate: Bearer")
    if not keep:
        lines.append("Connection: close")
    head = "\r\n".join([*lines, "", ""]).encode("ascii")
    return head if without_body else head + reply.body


def json_body(value: Any) -> bytes:
    """JSON without NaN or Infinity (ValueError), which are not JSON."""
    return json.dumps(value, allow_nan=False).encode()
