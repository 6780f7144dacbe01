"""One reward model on several processes (ranks), started by torchrun. Rank 0 answers HTTP.

    a batch of texts -> scatter -> each rank's forward pass -> gather -> scores in their order

Several ranks may share one copy of the model (tensor_parallel.py); they get the same texts. Between
two batches a rank sleeps in the kernel until rank 0 has texts again. Beside the model a thread of
each rank waits for a word of its neighbours, which they only send when they leave; a connection
that closes without it is a rank that has died, and ends this process.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from reinforce.errors import ConfigError, first_line
from reinforce.serving.processes import processes, rank

T = TypeVar("T")
Items = list[Any]  # token ids of each text
Score = Callable[[Items], list[float]]
FOREVER = timedelta(days=365)  # for a server that nobody asks


def share(items: Sequence[T], copies: int) -> list[list[T]]:
    """Neighbours for each copy of the model, of like number; their lengths are alike as well.

    >>> share([1, 2, 3, 4, 5], 2)
    [[1, 2, 3], [4, 5]]
    >>> share([1], 2)
    [[1], []]
    """
    small, larger = divmod(len(items), copies)
    ends = [(i + 1) * small + min(i + 1, larger) for i in range(copies)]
    return [list(items[start:end]) for start, end in zip([0, *ends], ends, strict=False)]


class Ranks:
    """All processes of a server, seen from one of them."""

    def __init__(self, sharing: int) -> None:
        """Join the others; `sharing` neighbouring ranks hold one copy of the model."""
        self.sharing, self.copies = sharing, processes() // sharing
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        self._texts = dist.new_group(backend="gloo", timeout=FOREVER)
        self._lives = dist.new_group(backend="gloo", timeout=FOREVER)
        self._neighbours = list(range(1, processes())) if rank() == 0 else [0]
        self._watches = [
            threading.Thread(target=self._watch, args=(other,), daemon=True)
            for other in self._neighbours
        ]
        for watch in self._watches:
            watch.start()
        if rank() > 0:  # a signal ends rank 0 after its last answers, and the others with it
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def together(self, work: Callable[[], T]) -> T:
        """Call `work` on every rank. A ConfigError of any rank is raised on all of them."""
        result: Any = None
        error: ConfigError | None = None
        try:
            result = work()
        except ConfigError as raised:
            error = raised
        errors: list[Any] = [None] * processes()
        dist.all_gather_object(errors, error, group=self._texts)
        for error in filter(None, errors):
            self._leave()
            raise error
        return cast(T, result)

    def over(self, score: Score) -> Score:
        """`score` with the work of all ranks, for rank 0 to call."""

        def over_ranks(items: Items) -> list[float]:
            shares = share(items, self.copies)
            own = self._scatter([shares[r // self.sharing] for r in range(processes())])
            parts = self._gather(self._part(score, own))[:: self.sharing]  # one of each copy
            for part in parts:
                if isinstance(part, Exception):
                    raise part
            return [value for part in parts for value in part]

        return over_ranks

    def follow(self, score: Score) -> None:
        """Score this rank's part of each batch until rank 0 leaves."""
        while (items := self._scatter(None)) is not None:
            self._gather(self._part(score, items))
        self._leave()

    def stop(self) -> None:
        """Let the other ranks leave, and leave."""
        self._scatter([None] * processes())
        self._leave()

    def _part(self, score: Score, items: Items) -> list[float] | Exception:
        """Scores of this rank's items, or what went wrong."""
        try:
            return score(items) if items else []
        except Exception as error:
            if self.sharing > 1:  # the other ranks of this copy are in the middle of the pass
                _end(error)
            return error

    def _scatter(self, shares: list[Any] | None) -> Any:
        """Rank 0's word to this rank."""
        own: list[Any] = [None]
        try:
            dist.scatter_object_list(own, shares, src=0, group=self._texts)
        except RuntimeError as error:
            _end(error)
        return own[0]

    def _gather(self, part: Any) -> list[Any]:
        """The parts of all ranks on rank 0."""
        parts: list[Any] = [None] * processes()
        try:
            dist.gather_object(part, parts if rank() == 0 else None, dst=0, group=self._texts)
        except RuntimeError as error:
            _end(error)
        return parts

    def _watch(self, other: int) -> None:
        """End this process if another one ends without a word."""
        try:
            dist.recv(torch.zeros(1), other, group=self._lives)
        except RuntimeError:
            if rank() > 0:
                os._exit(0)  # the exit code of rank 0 is the server's
            print(f"serve_rm.py: rank {other} has ended, and the server with it", file=sys.stderr)
            os._exit(1)

    def _leave(self) -> None:
        """Say so to the neighbours, and wait for their word."""
        for other in self._neighbours:
            dist.send(torch.zeros(1), other, group=self._lives)
        for watch in self._watches:
            watch.join()
        dist.destroy_process_group()


def _end(error: Exception) -> NoReturn:
    """End this process, which is out of step with the others."""
    if "/gloo/" in str(error):  # a rank has died: a watching thread says which, and ends us
        time.sleep(60)
    reason = f"{type(error).__name__}: {first_line(error)}"
    print(f"serve_rm.py: rank {rank()}: {reason}", file=sys.stderr)
    os._exit(1)
