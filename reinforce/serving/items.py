"""From the body of a request to the items that a reward scores."""

from dataclasses import dataclass
from typing import Any

from reinforce.serving.body import read_json
from reinforce.serving.http import HttpError, Request
from reinforce.serving.protocol import parse_request
from reinforce.serving.reward import Reward


@dataclass(frozen=True)
class Asked:
    """A request for rewards."""

    id: Any
    items: list[Any]
    truncated: list[int]  # texts that were cut


def read(reward: Reward, request: Request) -> Asked:
    """The items of a request for rewards. Raises HttpError."""
    wanted = read_json(request)
    items, truncated = [], []
    for index, text in enumerate(parse_request(wanted)):
        try:
            item, cut = reward.encode(text)
        except Exception as error:
            known = isinstance(error, ValueError)
            reason = str(error) if known else "the text cannot be encoded"
            raise HttpError(422, "bad_text", reason, index) from error
        items.append(item)
        if cut:
            truncated.append(index)
    return Asked(wanted.get("id"), items, truncated)
