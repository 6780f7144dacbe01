"""The worker: how requests share a forward pass, and who waits for whom."""

import socket
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Gate, connect, lengths, live, query, read_reply, rewards, until

from reinforce.serving.batcher import Batcher
from reinforce.serving.line import Line, Request


@pytest.fixture
def worker():
    """A batcher with the scoring function given, stopped when the test has ended."""
    made = []

    def start(score, batch_size=8, **how):
        made.append(Batcher(score, len, batch_size, **how))
        threading.Thread(target=made[-1].run, daemon=True).start()
        return made[-1]

    yield start
    for batcher in made:
        batcher.stop()


def later(seconds=20.0):
    return time.monotonic() + seconds


def test_a_lone_request_does_not_wait_for_company(worker):
    """2 ms of waiting were paid by every request; the fastest of 50 tells, whatever else the machine does."""
    batcher, times = worker(lengths), []
    for _ in range(50):
        start = time.perf_counter()
        batcher.submit(["a"], later()).result(10)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.0015


def test_while_a_forward_runs_the_next_one_gathers_by_itself(worker):
    gate = Gate()
    batcher = worker(gate)
    futures = [batcher.submit(["a"], later())]
    until(lambda: gate.batches)
    futures += [batcher.submit(["b" * n], later()) for n in (3, 1, 2)]
    gate.open.set()
    assert [f.result(10) for f in futures] == [[1.0], [3.0], [1.0], [2.0]]
    assert gate.batches == [["a"], ["b", "bb", "bbb"]]


def test_a_request_of_one_text_does_not_wait_for_one_of_256(worker):
    gate = Gate()
    batcher = worker(gate)
    first = batcher.submit(["x" * (n % 50 + 1) for n in range(256)], later())
    until(lambda: gate.batches)
    one = batcher.submit(["y" * 90], later())
    gate.open.set()
    assert one.result(10) == [90.0] and first.result(10)[49] == 50.0
    at = next(n for n, batch in enumerate(gate.batches) if "y" * 90 in batch)
    assert at <= 2 and len(gate.batches) == 33


@given(st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=20), min_size=1, max_size=20), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_every_text_is_taken_once_and_every_forward_serves_the_request_whose_turn_it_is(sizes, most):
    line, seen = Line(), []
    requests = [Request(row, row, 0.0, 0.0) for row in sizes]
    for one in requests:
        line.join(one)
    while line.texts:
        first, waiting = line._requests[0], line.texts
        batch = line.take(most)
        assert any(taken is first for taken, _ in batch), "the longest wait is served, always"
        assert len(batch) == min(most, waiting), "and a forward is as full as it can be"
        seen += [(id(taken), index) for taken, index in batch]
    assert sorted(seen) == sorted((id(one), index) for one in requests for index in range(len(one.items)))


def test_texts_whose_client_has_left_are_not_scored_and_one_that_only_half_closed_is_answered():
    gate = Gate()
    with live(gate, batch=1) as served:
        port = served.server_port
        with connect(port) as busy, connect(port) as half:
            busy.sendall(query("busy"))
            until(lambda: gate.batches)
            half.sendall(query("half"))
            half.shutdown(socket.SHUT_WR)
            for reset in (False, True):
                for n in range(10):
                    leaver = connect(port)
                    leaver.sendall(query(f"leaver {n}"))
                    until(lambda n=n, reset=reset: served.service.batcher.waiting >= 1 + n)
                    if reset:
                        leaver.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    leaver.close()
            time.sleep(0.2)
            gate.open.set()
            assert rewards(read_reply(busy)) == [4.0]
            half.settimeout(10)
            data = b""
            while part := half.recv(1 << 16):
                data += part
            assert b'"rewards": [4.0]' in data
            assert gate.batches == [["busy"], ["half"]]
            assert served.service.batcher.counts.dropped == 20
