"""The JSON body of a request, bounded before it is parsed.

The standard library's parser holds Python's lock from the first byte to the last, so nothing else
runs meanwhile, /health included. 16 MB of text take it 20 ms, 16 MB of `[],` several seconds, since
each list is an object that the garbage collector visits again and again.
"""

import json
import math
import re
from typing import Any

from reinforce.serving.http import HttpError, Request

MAX_BODY = 16 << 20  # bytes
LEAST_BODY = 1 << 20  # bytes that any server takes
BYTES_PER_TOKEN = 64  # of a request's text, escaped, in the three columns that may hold it
MAX_CONTAINERS = 100_000  # lists and objects of one request
MAX_DEPTH = 64  # of them in one another; a label is copied by a function that calls itself

_STRING = re.compile(rb'"[^"]*(?:"|\Z)')  # without escapes: one without an end goes to the end


def max_body(texts: int, max_length: int | None) -> int:
    """Bytes of one request that a server takes whose texts have at most `max_length` tokens."""
    if max_length is None:
        return MAX_BODY
    return max(LEAST_BODY, min(MAX_BODY, texts * max_length * BYTES_PER_TOKEN))


def read_json(request: Request) -> Any:
    """The value in a body. Raises HttpError 400, 413 or 415."""
    kind = (request.head.one("content-type") or "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "unsupported_media_type", "Content-Type must be application/json")
    if _containers(request.body) > MAX_CONTAINERS:
        raise HttpError(413, "too_large", f"at most {MAX_CONTAINERS} lists and objects")
    try:
        text = request.body.decode()
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise HttpError(400, "bad_json", "the body is not JSON") from error
    if _is_deep(value):
        raise HttpError(400, "bad_json", f"lists and objects nest {MAX_DEPTH} deep at most")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects nest deeper than `MAX_DEPTH`."""
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(MAX_DEPTH):
        inside = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inside for v in values if isinstance(v, list | dict)]
    return bool(level)


def _containers(body: bytes) -> int:
    """Lists and objects in a body; the text of strings is only looked at where it matters."""
    count = body.count(b"[") + body.count(b"{")
    if count <= MAX_CONTAINERS:
        return count
    # each of these goes through the body once, whatever is in it
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    bare = _STRING.sub(b"", unescaped)
    return bare.count(b"[") + bare.count(b"{")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits:.40} is not finite")
    return value
