"""Many small requests -> few forward passes: one worker thread owns the model.

A request waits at most 2 ms for company. Its items are scored sorted by size, `batch_size` at a time; they come back in its
own order. What goes wrong for one request is that request's error alone.
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
from dataclasses import dataclass, field
from typing import Any

import torch

LINGER = 0.002  # seconds to wait for more requests


class NotFiniteError(Exception):
    """The model gave NaN or infinity for an item of this request."""


@dataclass
class _Request:
    items: Sequence[Any]
    deadline: float
    future: "Future[list[float]]" = field(default_factory=Future)


class Batcher:
    """`score(items) -> floats` behind a bounded queue."""

    def __init__(
        self,
        score: Callable[[list[Any]], list[float]],
        size: Callable[[Any], int],
        batch_size: int,
        queue_size: int = 256,
    ) -> None:
        """`size(item)` orders the items of a batch, so that short ones are not padded to long ones."""
        self._score, self._size, self._batch_size = score, size, batch_size
        self._queue: queue.Queue[_Request] = queue.Queue(queue_size)
        self.beat = time.monotonic()
        self.forwards = self.scored = 0
        self.busy = False
        threading.Thread(target=self._run, daemon=True, name="batcher").start()

    def submit(self, items: Sequence[Any], deadline: float) -> "Future[list[float]]":
        """Queue one request; `deadline` is a time.monotonic() after which it is dropped. Raises queue.Full."""
        request = _Request(items, deadline)
        self._queue.put_nowait(request)
        return request.future

    def _run(self) -> None:
        try:
            while True:
                self.beat = time.monotonic()
                self.busy = not self._queue.empty()
                try:
                    batch = [self._queue.get(timeout=1.0)]
                except queue.Empty:
                    continue
                self.busy = True
                self._collect(batch)
                self._serve(
                    [
                        r
                        for r in batch
                        if r.deadline > time.monotonic() and r.future.set_running_or_notify_cancel()
                    ]
                )
        except BaseException:
            traceback.print_exc()
            os._exit(
                70
            )  # without its worker the server would accept requests for ever and answer none

    def _collect(self, batch: list[_Request]) -> None:
        end = time.monotonic() + LINGER
        while sum(len(r.items) for r in batch) < self._batch_size:
            try:
                batch.append(self._queue.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                return

    def _serve(self, batch: list[_Request]) -> None:
        """Score all items of the requests together; if that fails, each request alone, so that only the guilty one fails."""
        try:
            scores = self._ordered([item for r in batch for item in r.items])
        except Exception as error:
            if len(batch) > 1:
                for request in batch:
                    self._serve([request])
                return
            if not isinstance(error, torch.OutOfMemoryError):
                print(
                    "".join(traceback.format_exception(error)).encode("unicode_escape").decode(),
                    file=sys.stderr,
                )
            for request in batch:
                request.future.set_exception(error)
            return
        for request in batch:
            own, scores = scores[: len(request.items)], scores[len(request.items) :]
            if all(math.isfinite(s) for s in own):
                request.future.set_result(own)
            else:
                request.future.set_exception(NotFiniteError())

    def _ordered(self, items: list[Any]) -> list[float]:
        order = sorted(range(len(items)), key=lambda i: self._size(items[i]))
        scores = [math.nan] * len(items)
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            for i, value in zip(part, self._forward([items[i] for i in part]), strict=True):
                scores[i] = value
        return scores

    def _forward(self, items: list[Any]) -> list[float]:
        """Scores of the items; out of memory halves the batch until a single item does not fit."""
        try:
            self.forwards += 1
            scores = self._score(items)
        except torch.OutOfMemoryError:
            if len(items) == 1:
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            middle = len(items) // 2
            return self._forward(items[:middle]) + self._forward(items[middle:])
        self.scored += len(items)
        self.beat = time.monotonic()
        return scores
