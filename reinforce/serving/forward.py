"""One forward of texts of many requests. What goes wrong for one of them is its error alone."""

import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reinforce.serving.line import LateError, Taken
from reinforce.serving.memory import empty_cache, is_lost, is_out_of_memory
from reinforce.serving.report import report


class NotFiniteError(Exception):
    """The model gave NaN or infinity for an item of this request."""


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


class Forward:
    """`score(items) -> floats`, applied to texts."""

    def __init__(self, score: Callable[[list[Any]], list[float]]) -> None:
        self._score, self.counts, self.lasted = score, Counts(), 0.0
        self.started: float | None = None  # the present call of `score`, a time.monotonic()

    def __call__(self, batch: Taken) -> None:
        """Score the texts together; if that fails, each request alone: the guilty one fails."""
        start = time.monotonic()
        requests = dict.fromkeys(request for request, _ in batch)
        scores = None
        try:
            scores = self._halving([request.items[index] for request, index in batch])
        except Exception as error:
            if len(requests) == 1:
                batch[0][0].fail(error)
                if not is_out_of_memory(error):
                    report(ascii("".join(traceback.format_exception(error))))
                if is_lost(error):  # a replica that still lives, or the next start, can score
                    report("the GPU is lost to this process, which ends")
                    os._exit(70)
                return
        # behind the block of the error, which holds the tensors of the pass that failed
        if scores is None:
            for request in requests:
                texts = [text for text in batch if text[0] is request]
                if request.dead(time.monotonic()):
                    self.counts.dropped += len(texts)
                    request.fail(LateError())
                else:
                    self(texts)
            return
        self.lasted = time.monotonic() - start
        self.counts.forward_seconds += self.lasted
        for (request, index), score in zip(batch, scores, strict=True):
            self.counts.texts += 1
            self.counts.size += request.sizes[index]
            self.counts.wait_seconds += start - request.arrived
            if not math.isfinite(score):
                self.counts.non_finite += 1
                request.fail(NotFiniteError())
            request.give(index, score)

    def _halving(self, items: list[Any]) -> list[float]:
        """Scores of the items; out of memory halves the batch until a single item does not fit."""
        try:
            self.counts.forwards += 1
            self.counts.last_batch = len(items)
            self.started = time.monotonic()
            return self._score(items)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.counts.out_of_memory += 1
            if len(items) == 1:
                raise
        finally:
            self.started = None
        # behind the block of the error, as above
        empty_cache()
        middle = len(items) // 2
        return self._halving(items[:middle]) + self._halving(items[middle:])
