"""Responses that the reward server refuses: which they are, and how many a run may leave out.

A refusal (400, 413, 422, 500, 507) is a word on one text, and asking again would bring it again. By
default it ends the run. A row that is left out is treated as `--truncated drop` treats an
unfinished one: not counted in any baseline or in N, and biased in the same way, with "accepted" for
"finished" (`objective.counted`).
"""

from collections.abc import Sequence
from typing import Any

from reinforce.rm_client import RefusedError, RewardClient
from reinforce.rm_connection import RewardError

Row = dict[str, Any]  # index of the prompt in its file, prompt, response, the server's answer, kind
SAMPLED, GREEDY, VALIDATION = (
    "response",
    "greedy response",
    "validation response",
)  # kinds; only the first may be left out


class RefusedRowError(RewardError):
    """The server refuses a response; what the run folder is told of it."""

    def __init__(self, row: Row) -> None:
        """`row` is what `Actor.ask` notes of the response; it goes to refused.jsonl."""
        super().__init__(
            f"prompt {row['index'] + 1}, {row['prompt'][-60:]!r}, "
            f"{row['kind']} {row['response'][:60]!r}: {row['answer']}"
        )
        self.row = row

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.row,)


class Refusals:
    """How many responses a run has left out, over all ranks and all its parts."""

    def __init__(self, most: int) -> None:
        """`most` is --skip-refused."""
        self.most, self.total = most, 0
        self.rows: list[Row] = []  # those of the step that is going on

    @property
    def left(self) -> int:
        """How many more may be left out."""
        return max(0, self.most - self.total)

    def take(self, rows: Sequence[Row]) -> None:
        """Count some more, of all ranks. Raises RefusedRowError with the first beyond the most."""
        if len(rows) > self.left:
            raise RefusedRowError(rows[self.left])
        self.total += len(rows)
        self.rows += rows


def rewards_but_refused(
    client: RewardClient, request: dict[str, list[Any]], most: int
) -> tuple[list[float | None], dict[int, str]]:
    """One reward for each text of the request, and the answers to those that were refused.

    The reward of a refused text is None.

    Raises RefusedError with the index of the first one beyond `most`.
    """
    columns = {name: list(column) for name, column in request.items()}
    rewards: list[float | None] = [None] * len(next(iter(columns.values())))
    kept, answers = list(range(len(rewards))), dict[int, str]()
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
            if len(answers) >= most:
                raise RefusedError(str(error), kept[at]) from error
            answers[kept.pop(at)] = str(error)
    return rewards, answers


def _first_refused(client: RewardClient, columns: dict[str, list[Any]]) -> int | None:
    for i in range(len(next(iter(columns.values())))):
        try:
            client.rewards(**{name: [column[i]] for name, column in columns.items()})
        except RefusedError:
            return i
    return None
