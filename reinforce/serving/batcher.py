"""Many small requests -> few forward passes. One thread, the one that calls `run`, owns the model.

It takes the texts that are there, whosever they are; while a forward runs the next one gathers by
itself. It waits for those alone whom the last forward answered, since most of them ask again at
once: without it eight clients would take turns as one and seven.
"""

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from reinforce.serving.forward import Forward
from reinforce.serving.line import LateError, Line, Request, Taken, nobody_left
from reinforce.serving.report import report

MOST_TEXTS = 8192  # in the line
LINGER = 0.01  # seconds, at most a quarter of the last forward: for those who were just here


class Batcher:
    """`score(items) -> floats` behind a bounded line."""

    def __init__(
        self,
        score: Callable[[list[Any]], list[float]],
        size: Callable[[Any], int],
        batch_size: int,
        most_texts: int = MOST_TEXTS,
    ) -> None:
        """Items of a like `size(item)` go together: short ones are not padded to long ones."""
        self._forward, self._size = Forward(score), size
        self._batch_size, self._most_texts = batch_size, most_texts
        self._line, self._news, self._stopping = Line(), threading.Condition(), False
        self._wanted, self._company = 1, 1  # requests to wake up for; requests of the last forward
        self._ended = 0.0
        self.counts = self._forward.counts

    @property
    def waiting(self) -> int:
        """Texts in the line."""
        return self._line.texts

    @property
    def started(self) -> float | None:
        """When the present forward began, a time.monotonic(); None between two."""
        return self._forward.started

    def forward_for(self) -> float:
        """Seconds since the present forward began; 0 between two."""
        started = self.started
        return 0.0 if started is None else time.monotonic() - started

    def expected_wait(self) -> float:
        """Seconds until the texts that wait are scored, as fast as those before them."""
        return self.waiting * self.counts.forward_seconds / max(1, self.counts.texts)

    def submit(
        self, items: Sequence[Any], deadline: float, gone: Callable[[], bool] = nobody_left
    ) -> "Future[list[float]]":
        """Queue a request, whole or not at all: raises queue.Full.

        Texts are dropped after `deadline`, a time.monotonic(), once `gone()` is true, or when the
        future is cancelled.
        """
        sizes = [self._size(item) for item in items]
        request = Request(items, sizes, deadline, time.monotonic(), gone)
        with self._news:
            if self._line.texts and self._line.texts + len(items) > self._most_texts:
                raise queue.Full
            self._line.join(request)
            if self._enough():
                self._news.notify()
        return request.future

    def stop(self) -> None:
        """Let `run` return after the present forward."""
        with self._news:
            self._stopping = True
            self._news.notify()

    def run(self) -> None:
        """Score until `stop`; anything but an error of a request ends the process with code 70."""
        try:
            while batch := self._next():
                self._forward(batch)
                self._ended = time.monotonic()
        except BaseException as error:
            report("".join(traceback.format_exception(error)))
            os._exit(70)  # without its worker the server would accept requests and answer none

    def _enough(self) -> bool:
        return len(self._line) >= self._wanted or self._line.texts >= self._batch_size

    def _next(self) -> Taken:
        """The texts of the next forward; none after `stop`."""
        with self._news:
            present = len(self._line) + self._company  # who was here during the last forward
            self._wanted, end = present, self._ended + min(LINGER, self._forward.lasted / 4)
            while (
                not self._stopping and not self._enough() and (left := end - time.monotonic()) > 0
            ):
                self._news.wait(left)
            self._wanted = 1
            while not self._stopping:
                self._drop()
                if self._line.texts:
                    batch = self._line.take(self._batch_size)
                    self._company = len({request for request, _ in batch if not request.left})
                    return batch
                self._news.wait()
            return []

    def _drop(self) -> None:
        """Whoever has left, or is too late, costs no forward."""
        now = time.monotonic()
        for request in self._line.leave(lambda request: request.dead(now)):
            self.counts.dropped += len(request.left)
            request.fail(LateError())
