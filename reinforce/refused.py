"""Responses that the reward server refuses: which row it is, and how many of them a run may leave out.

A refusal (400, 413, 422, 500, 507) is a word on one text, and asking again would bring it again. By default it ends the run. A row
that is left out is treated as `--truncated drop` treats an unfinished one: not counted in any baseline or in N, and biased in
the same way, with "accepted" for "finished": with rloo the gradient of E[R | accepted], prompt by prompt.
"""

from typing import Any

from reinforce.rm_client import RefusedError, RewardClient
from reinforce.rm_connection import RewardError


class RefusedRowError(RewardError):
    """The server refuses a response; what the run folder is told of it."""

    def __init__(self, message: str, index: int, prompt: str, response: str) -> None:
        """`index` is the prompt's in its file; `message` the server's answer."""
        super().__init__(f"prompt {index + 1}, {prompt[-60:]!r}, response {response[:60]!r}: {message}")
        self.row = {"index": index, "prompt": prompt, "response": response, "answer": message}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.row["answer"], self.row["index"], self.row["prompt"], self.row["response"])


class Refusals:
    """How many responses a run has left out, over all ranks and all its parts."""

    def __init__(self, most: int) -> None:
        """`most` is --skip-refused."""
        self.most, self.total = most, 0

    @property
    def left(self) -> int:
        """How many more may be left out."""
        return max(0, self.most - self.total)

    def take(self, count: int) -> None:
        """Count some more. Raises RewardError beyond the most."""
        self.total += count
        if self.total > self.most:
            raise RewardError(f"the reward server has refused {self.total} responses of this run; --skip-refused is {self.most}")


def rewards_but_refused(client: RewardClient, request: dict[str, list[Any]], most: int) -> list[float | None]:
    """One reward for each text of the request, None for those that the server refuses, `most` at the most.

    Raises RefusedError with the index of the first one beyond.
    """
    columns = {name: list(column) for name, column in request.items()}
    rewards: list[float | None] = [None] * len(next(iter(columns.values())))
    kept, refused = list(range(len(rewards))), 0
    while kept:
        asked = {name: [column[i] for i in kept] for name, column in columns.items()}
        try:
            for i, value in zip(kept, client.rewards(**asked), strict=True):
                rewards[i] = value
            break
        except RefusedError as error:
            at = error.index if error.index is not None else _first_refused(client, asked)
            if at is None:  # each alone is taken: nothing to leave out
                raise
            if refused >= most:
                raise RefusedError(str(error), kept[at]) from error
            refused += 1
            del kept[at]
    return rewards


def _first_refused(client: RewardClient, columns: dict[str, list[Any]]) -> int | None:
    for i in range(len(next(iter(columns.values())))):
        try:
            client.rewards(**{name: [column[i]] for name, column in columns.items()})
        except RefusedError:
            return i
    return None
