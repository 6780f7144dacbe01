"""What a reward server's replies must be: checks, none of which lets an invented number pass."""

import json
from dataclasses import dataclass
from typing import Any

from reinforce.rm_connection import RewardError

LARGEST = (2 - 2**-23) * 2.0**127  # of float32, the loss's type


@dataclass(frozen=True)
class ServerInfo:
    """What GET /info says; without one (another project's server), nothing is pinned."""

    model: str = "unknown"
    fingerprint: str | None = None
    max_texts: int = 64
    max_body: int = 16 << 20  # bytes of one request


def parse_info(body: bytes) -> ServerInfo | None:
    """The body of GET /info; None if it is something else."""
    try:
        info = json.loads(body)
        texts, size = info["max_texts"], info.get("max_body", ServerInfo.max_body)
        if not all(type(limit) is int and limit > 0 for limit in (texts, size)):
            return None
        return ServerInfo(str(info["model"]), str(info["fingerprint"]), texts, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def rewards_of(
    reply: Any, url: str, expected: int, request_id: str | None, pinned: str | None
) -> list[float]:
    """The rewards of a reply, if it is exactly what was asked for. Raises RewardError.

    `request_id` None: the request had no id. `pinned`: the fingerprint of a server that shows one;
    such a server repeats the id as well.
    """
    rewards = reply.get("rewards") if isinstance(reply, dict) else None
    if not isinstance(rewards, list) or len(rewards) != expected:
        got = f"{len(rewards)} values" if isinstance(rewards, list) else type(rewards).__name__
        raise RewardError(f"{url} answered {got} as rewards for {expected} texts")
    shown = reply.get("fingerprint")
    if pinned is not None and shown != pinned:
        raise RewardError(
            f"reward server {url} now serves another model ({shown!a:.80} instead of {pinned})"
        )
    for i, value in enumerate(rewards):
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise RewardError(f"{url}: reward {i} is {value!a:.80}, not a finite number in float32")
    given = reply.get("id")
    if request_id is not None and given != request_id and (given is not None or pinned is not None):
        raise RewardError(
            f"{url} answered another request: id {given!a:.80} instead of {request_id!a}, which it "
            "must repeat or leave out"
        )
    return [float(value) for value in rewards]


def truncated_of(reply: dict[str, Any]) -> int:
    """How many texts the server has cut, by its own word."""
    truncated = reply.get("truncated")
    return len(truncated) if isinstance(truncated, list) else 0


def index_of(body: bytes, count: int) -> int | None:
    """The index that an error names, if it is one of the request's."""
    try:
        index = json.loads(body)["index"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return index if type(index) is int and 0 <= index < count else None


def message_of(body: bytes) -> str:
    """The message of an error in one line, or whatever else the body begins with."""
    try:
        message = json.loads(body)["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        message = None
    if not isinstance(message, str) or not message:
        return f"{body[:200].decode('utf-8', 'replace')!a}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:500])
