"""Many small requests -> few forward passes. One thread, the one that calls `run`, owns the model.

It takes the texts that are there, whosever they are; while a forward runs the next one gathers by
itself. What goes wrong for one request is that request's error alone.
"""

import math
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.serving.line import Line, Request, Taken, nobody_left

MOST_TEXTS = 8192  # in the line
LINGER = 0.01  # seconds, at most a quarter of the last forward: for those who were just here


class NotFiniteError(Exception):
    """The model gave NaN or infinity for an item of this request."""


class LateError(Exception):
    """The deadline of this request has passed."""


@dataclass
class Counts:
    """What /metrics tells of the worker; sums since the start."""

    forwards: int = 0
    last_batch: int = 0  # texts of the last forward
    texts: int = 0
    size: int = 0  # tokens, or characters
    forward_seconds: float = 0.0
    wait_seconds: float = 0.0  # from a request's arrival to a text's forward, over texts
    dropped: int = 0  # texts whose client was gone, or whose deadline had passed
    out_of_memory: int = 0
    non_finite: int = 0


class Batcher:
    """`score(items) -> floats` behind a bounded line."""

    def __init__(
        self,
        score: Callable[[list[Any]], list[float]],
        size: Callable[[Any], int],
        batch_size: int,
        most_texts: int = MOST_TEXTS,
    ) -> None:
        """Items of a like `size(item)` go together, so that short ones are not padded to long ones."""
        self._score, self._size = score, size
        self._batch_size, self._most_texts = batch_size, most_texts
        self._line, self._news, self._stopping = Line(), threading.Condition(), False
        self._wanted, self._company = 1, 1  # requests to wake up for; requests of the last forward
        self._started: float | None = None
        self._ended = self._lasted = 0.0
        self.counts = Counts()

    @property
    def waiting(self) -> int:
        """Texts in the line."""
        return self._line.texts

    def forward_for(self) -> float:
        """Seconds since the present forward began; 0 between two."""
        started = self._started
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
                self._started = time.monotonic()
                self._serve(batch)
                self._ended, self._started = time.monotonic(), None
        except BaseException:
            traceback.print_exc()
            os._exit(70)  # without its worker the server would accept requests and answer none

    def _enough(self) -> bool:
        return len(self._line) >= self._wanted or self._line.texts >= self._batch_size

    def _next(self) -> Taken:
        """The texts of the next forward; none after `stop`."""
        with self._news:
            present = len(self._line) + self._company  # who was here during the last forward
            self._wanted, end = present, self._ended + min(LINGER, self._lasted / 4)
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
            _fail(request, LateError())

    def _serve(self, batch: Taken) -> None:
        """Score the texts together; if that fails, each request's alone: only the guilty one fails."""
        start = time.monotonic()
        try:
            scores = self._forward([request.items[index] for request, index in batch])
        except Exception as error:
            requests = dict.fromkeys(request for request, _ in batch)
            if len(requests) > 1:
                for request in requests:
                    self._serve([text for text in batch if text[0] is request])
                return
            if not isinstance(error, torch.OutOfMemoryError):
                report = "".join(traceback.format_exception(error))
                print(report.encode("unicode_escape").decode(), file=sys.stderr)
            _fail(batch[0][0], error)
            return
        self._lasted = time.monotonic() - start
        self.counts.forward_seconds += self._lasted
        for (request, index), score in zip(batch, scores, strict=True):
            self.counts.texts += 1
            self.counts.size += request.sizes[index]
            self.counts.wait_seconds += start - request.arrived
            if not math.isfinite(score):
                self.counts.non_finite += 1
                _fail(request, NotFiniteError())
            request.scores[index] = score
            if len(request.scores) == len(request.items):
                _finish(request)

    def _forward(self, items: list[Any]) -> list[float]:
        """Scores of the items; out of memory halves the batch until a single item does not fit."""
        try:
            self.counts.forwards += 1
            self.counts.last_batch = len(items)
            return self._score(items)
        except torch.OutOfMemoryError:
            self.counts.out_of_memory += 1
            if len(items) == 1:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(items) // 2
            return self._forward(items[:middle]) + self._forward(items[middle:])


def _fail(request: Request, error: Exception) -> None:
    if not request.future.done() and request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)


def _finish(request: Request) -> None:
    if not request.future.done() and request.future.set_running_or_notify_cancel():
        scores = request.scores
        request.future.set_result([scores[index] for index in range(len(scores))])
