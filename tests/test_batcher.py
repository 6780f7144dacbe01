"""The batcher: company for small requests, order kept, faults contained."""

import math
import queue
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from conftest import ROOT

from reinforce.serving.batcher import Batcher, LateError
from reinforce.serving.forward import NotFiniteError


@pytest.fixture
def started():
    """Batchers with a worker each, stopped when the test has ended."""
    made = []

    def start(score, **how):
        batcher = Batcher(score, size=int, **how)
        worker = threading.Thread(target=batcher.run, daemon=True)
        worker.start()
        made.append((batcher, worker))
        return batcher

    yield start
    for batcher, worker in made:
        batcher.stop()
        worker.join(10)


def soon():
    return time.monotonic() + 10


def test_requests_that_come_together_are_scored_together_sorted_by_size_and_answered_in_their_own_order(started):
    seen, gate = [], threading.Event()

    def score(items):
        gate.wait(10)
        seen.append(items)
        return [float(i) for i in items]

    batcher = started(score, batch_size=4)
    first = batcher.submit([9], soon())  # occupies the worker
    time.sleep(0.1)
    futures = [batcher.submit(items, soon()) for items in ([5, 1], [4], [2, 3, 0])]
    gate.set()
    assert first.result(10) == [9.0]
    assert [f.result(10) for f in futures] == [[5.0, 1.0], [4.0], [2.0, 3.0, 0.0]]
    assert seen[1:] == [[0, 1, 2, 3], [4, 5]]


def test_out_of_memory_halves_the_batch_and_fails_only_what_does_not_fit_alone(started):
    def score(items):
        if len(items) > 2 or 99 in items:
            raise torch.OutOfMemoryError
        return [float(i) for i in items]

    batcher = started(score, batch_size=8)
    assert batcher.submit(list(range(8)), soon()).result(10) == [float(i) for i in range(8)]
    with pytest.raises(torch.OutOfMemoryError):
        batcher.submit([99], soon()).result(10)
    assert batcher.submit([1], soon()).result(10) == [1.0]


def test_a_second_try_finds_the_memory_of_the_first_one_free(started):
    """An exception holds the frames that it came through, and they the activations of the pass that did not fit."""
    activations, held = [], []

    def score(items):
        held.append(sum(one() is not None for one in activations))
        states = torch.zeros(len(items))
        activations.append(weakref.ref(states))
        if len(items) > 1:
            raise torch.OutOfMemoryError
        return [float(i) for i in items]

    gate = threading.Event()
    batcher = started(lambda items: gate.wait(10) and score(items), batch_size=8)
    futures = [batcher.submit([i, i + 1], soon()) for i in range(0, 8, 2)]
    gate.set()
    assert [f.result(10) for f in futures] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
    assert len(held) > 8 and not any(held)


def test_a_lost_gpu_ends_the_process_since_it_answers_nothing_any_more():
    """It answered 500 to every text, and its /health went on to be 200."""
    lost = "import torch\ndef score(items):\n    raise torch.AcceleratorError('CUDA error: an illegal memory access was encountered')\n"
    asks = "import time\nbatcher = Batcher(score, int, 4)\nbatcher.submit([1], time.monotonic() + 10)\nbatcher.run()\n"
    code = f"{lost}from reinforce.serving.batcher import Batcher\n{asks}"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.returncode == 70 and out.stderr.endswith("serve_rm.py: the GPU is lost to this process, which ends\n")


def test_a_request_with_a_value_that_is_not_finite_fails_alone(started):
    batcher = started(lambda items: [math.nan if i == 7 else 1.0 for i in items], batch_size=8)
    good, bad = batcher.submit([1, 2], soon()), batcher.submit([3, 7], soon())
    assert good.result(10) == [1.0, 1.0]
    with pytest.raises(NotFiniteError):
        bad.result(10)


def test_an_exception_for_one_request_does_not_spoil_its_company(capsys, started):
    def score(items):
        if 7 in items:
            raise RuntimeError("no sevens")
        return [1.0] * len(items)

    batcher = started(score, batch_size=8)
    futures = [batcher.submit([i], soon()) for i in (1, 7, 2)]
    assert futures[0].result(10) == futures[2].result(10) == [1.0]
    with pytest.raises(RuntimeError, match="no sevens"):
        futures[1].result(10)


def test_a_full_queue_takes_a_whole_request_or_nothing_and_late_requests_are_not_scored(started):
    gate, scored = threading.Event(), []

    def score(items):
        gate.wait(10)
        scored.extend(items)
        return [0.0] * len(items)

    batcher = started(score, batch_size=1, most_texts=2)
    batcher.submit([0], soon())
    time.sleep(0.1)
    late = batcher.submit([1], time.monotonic() - 1)
    batcher.submit([2], soon())
    with pytest.raises(queue.Full):
        batcher.submit([3], soon())
    gate.set()
    time.sleep(0.3)
    assert scored == [0, 2] and isinstance(late.exception(), LateError)


def test_a_dead_worker_ends_the_process():
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from reinforce.serving.batcher import Batcher\n"
        "b = Batcher(lambda items: (_ for _ in ()).throw(SystemExit), size=int, batch_size=1)\n"
        "b.submit([1], time.monotonic() + 9); b.run()\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, timeout=60).returncode == 70
