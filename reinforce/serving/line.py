"""The waiting line: which texts the next forward takes. Plain data, no threads.

Requests take turns. A forward starts from the first text of the request that has waited longest
since its last turn, and takes along texts of other requests, one of each in turn, whose lengths go
with it. So a request of 256 texts delays a request of one text by a forward or two, and no text
waits for ever.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

WINDOW = 4  # batches: lengths are matched among so many texts


class LateError(Exception):
    """The deadline of this request has passed."""


def nobody_left() -> bool:
    """A client that always stays."""
    return False


@dataclass(eq=False)
class Request:
    """The texts of one client, each in a forward of its turn."""

    items: Sequence[Any]
    sizes: Sequence[int]
    deadline: float  # a time.monotonic(); no text is scored after it
    arrived: float
    gone: Callable[[], bool] = nobody_left
    future: "Future[list[float]]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.left = sorted(range(len(self.items)), key=self.sizes.__getitem__)  # shortest first
        self.scores: dict[int, float] = {}

    def dead(self, now: float) -> bool:
        """Nobody waits for the rest any more."""
        return self.future.done() or self.deadline < now or self.gone()

    def give(self, index: int, score: float) -> None:
        """One text is scored; the last one answers the client."""
        self.scores[index] = score
        if len(self.scores) == len(self.items) and self._is_wanted():
            self.future.set_result([self.scores[i] for i in range(len(self.items))])

    def fail(self, error: Exception) -> None:
        """The client hears of it, and no further text is scored."""
        if self._is_wanted():
            self.future.set_exception(error)

    def _is_wanted(self) -> bool:
        return not self.future.done() and self.future.set_running_or_notify_cancel()


Taken = list[tuple[Request, int]]  # texts of one forward: request, number of the text in it


class Line:
    """Requests with texts that no forward has taken yet, the next one first."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self.texts = 0

    def __len__(self) -> int:
        return len(self._requests)

    def join(self, request: Request) -> None:
        """Stand at the end."""
        self._requests.append(request)
        self.texts += len(request.left)

    def leave(self, dead: Callable[[Request], bool]) -> list[Request]:
        """Take out the dead ones and return them."""
        gone = [request for request in self._requests if dead(request)]
        if gone:
            self._requests = [request for request in self._requests if request not in gone]
            self.texts -= sum(len(request.left) for request in gone)
        return gone

    def take(self, most: int) -> Taken:
        """At most `most` texts of like length, among them the first of the line; sorted."""
        window = list(islice(self._turns(), WINDOW * most))
        order = sorted(range(len(window)), key=lambda i: _size(window[i]))
        start = order.index(0) // most * most
        start = max(0, min(start, len(window) - most))  # a whole batch where there are enough
        batch = [window[i] for i in order[start : start + most]]
        served = {request for request, _ in batch}
        for request, index in batch:
            request.left.remove(index)
        waiting = [request for request in self._requests if request not in served]
        self._requests = waiting + [r for r in self._requests if r in served and r.left]
        self.texts -= len(batch)
        return batch

    def _turns(self) -> Iterator[tuple[Request, int]]:
        """One text of each request, then the next one of each."""
        depth = 0
        while rows := [request for request in self._requests if len(request.left) > depth]:
            yield from ((request, request.left[depth]) for request in rows)
            depth += 1


def _size(text: tuple[Request, int]) -> int:
    request, index = text
    return request.sizes[index]
