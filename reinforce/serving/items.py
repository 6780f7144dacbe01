"""From the body of a request to the items that a reward scores."""

import json
from dataclasses import dataclass
from typing import Any

from reinforce.serving.body import read_json
from reinforce.serving.http import HttpError, Request
from reinforce.serving.protocol import parse_request
from reinforce.serving.reward import Reward

LONGEST_ID = 256  # characters, of what is no text those of its JSON; it goes back with the rewards


@dataclass(frozen=True)
class Asked:
    """A request for rewards."""

    id: Any
    items: list[Any]
    truncated: list[int]  # texts that were cut


def read(reward: Reward, request: Request) -> Asked:
    """The items of a request for rewards. Raises HttpError."""
    wanted = read_json(request)
    texts = parse_request(wanted)
    given = wanted.get("id")
    if len(given if isinstance(given, str) else json.dumps(given)) > LONGEST_ID:
        raise HttpError(400, "bad_request", f"an id of more than {LONGEST_ID} characters")
    items, truncated = [], []
    for index, text in enumerate(texts):
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
