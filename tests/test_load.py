"""The endpoint under load: a thousand clients, slow and idle ones, clients that leave, long texts, and the signals that end it."""

import contextlib
import json
import os
import resource
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, small_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import FINGERPRINT, ask, connect, lengths, live, read_reply, request
from test_server import serving

from reinforce.rm_client import RewardClient, pause_before
from reinforce.rm_connection import RewardError
from reinforce.serving import body, connection, server
from reinforce.serving.batcher import Batcher
from reinforce.serving.cut import last_tokens
from reinforce.serving.line import Line, Request
from reinforce.serving.protocol import Text


def query(*texts):
    return request(json.dumps({"query": list(texts)}).encode())


def rewards(reply):
    head, data = reply
    assert head.startswith(b"HTTP/1.1 200"), (head, data)
    return json.loads(data)["rewards"]


def health(port):
    """Status of /health, and how long it took."""
    start = time.monotonic()
    head, _ = ask(port, request(path="/health"), wait=5)
    return head.split(b" ")[1], time.monotonic() - start


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """serve_rm.py with a function that gives the length of a text; (port, process)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))  # for a thousand clients
    folder = tmp_path_factory.mktemp("load")
    (folder / "f.py").write_text("def f(prompts, completions, labels):\n    return [float(len(c)) for c in completions]\n")
    with serving(folder, "--reward-fn", f"{folder}/f.py:f") as (_, port, started):
        yield port, started


# -- the worker


class Gate:
    """A scoring function that records its batches and waits for `open` before the first one."""

    def __init__(self):
        self.batches, self.open = [], threading.Event()

    def __call__(self, items):
        self.batches.append(items)
        self.open.wait(10)
        return [float(len(item)) for item in items]


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


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


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


# -- connections


def test_health_answers_within_a_second_with_300_slow_and_300_idle_sockets_and_threads_are_bounded(process):
    port, started = process
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(port)) for _ in range(300)]
        slow = [stack.enter_context(connect(port)) for _ in range(300)]
        for n in range(5):
            for one in slow:
                one.send(b"GET /health HTTP/1.1\r\nX: y"[n : n + 1])
            status, took = health(port)
            assert status == b"200" and took < 1.0
        assert rewards(ask(port, query("abc"))) == [3.0]
        if (tasks := Path(f"/proc/{started.pid}/task")).exists():
            assert len(list(tasks.iterdir())) < 32
        idle[0].sendall(request(path="/health"))
        assert read_reply(idle[0])[0].startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"GET /he", request(b"{}")[:-1], request(b"")[:-9]], ids=["a head", "a body", "a header"])
def test_what_drips_is_ended_by_one_deadline(monkeypatch, sent):
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.4)
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.4)
    with live() as served, connect(served.server_port, wait=5) as slow:
        start = time.monotonic()
        for n in range(len(sent)):
            with contextlib.suppress(ConnectionError):
                slow.send(sent[n : n + 1])
            time.sleep(0.02 if n < 20 else 0.0)
        head, _ = read_reply(slow)
        assert head.startswith(b"HTTP/1.1 408") and slow.recv(1) == b""
        assert time.monotonic() - start < 5


def test_the_longest_idle_connection_gives_way_to_a_new_one(monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    with live() as served, connect(served.server_port) as oldest, connect(served.server_port) as other:
        for one in (other, oldest, other):
            one.sendall(request(path="/health"))
            assert b"200 OK" in read_reply(one)[0]
        served._limit = 2
        time.sleep(0.1)
        assert health(served.server_port)[0] == b"200"
        with contextlib.suppress(ConnectionResetError):
            assert oldest.recv(1) == b""
        other.sendall(request(path="/health"))
        assert b"200 OK" in read_reply(other)[0]


def together(port, count, rounds, keep):
    """Rewards of `count` clients that start at once, one text each, `rounds` times."""
    selector, waiting, got = selectors.DefaultSelector(), {}, []

    def begin(n, left, one=None):
        if one is None:
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(("127.0.0.1", port))
        waiting[one] = [n, left, b"", False]
        with contextlib.suppress(KeyError):
            selector.unregister(one)
        selector.register(one, selectors.EVENT_WRITE)

    for n in range(count):
        begin(n, rounds)
    end = time.monotonic() + 60
    while waiting and time.monotonic() < end:
        for key, event in selector.select(1):
            one = key.fileobj
            state = waiting[one]
            if event & selectors.EVENT_WRITE:
                one.send(query("x" * state[0]))
                selector.modify(one, selectors.EVENT_READ)
                continue
            state[2] += one.recv(1 << 16)
            head, found, data = state[2].partition(b"\r\n\r\n")
            if found and len(data) >= int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]):
                got.append((state[0], rewards((head, data))))
                selector.unregister(one)
                del waiting[one]
                if not keep or state[1] == 1:
                    one.close()
                if state[1] > 1:
                    begin(state[0], state[1] - 1, one if keep else None)
    assert not waiting
    return got


def test_a_thousand_clients_at_once_are_all_answered_and_none_is_reset(process):
    got = together(process[0], 1000, 1, keep=False)
    assert sorted(got) == [(n, [float(n)]) for n in range(1000)]


def test_128_clients_keep_their_connections_and_hold_nobody_up(process):
    """They took 15 s a step where 64 took 0.03 s."""
    start = time.monotonic()
    got = together(process[0], 128, 5, keep=True)
    assert len(got) == 640 and all(reward == [float(n)] for n, reward in got)
    assert time.monotonic() - start < 10


def test_a_full_line_is_429_with_retry_after_and_our_client_comes_back():
    gate = Gate()
    with live(gate, batch=1, most_texts=2) as served:
        first, second = connect(served.server_port), connect(served.server_port)
        first.sendall(query("a"))
        until(lambda: gate.batches)
        second.sendall(query("b", "c"))
        until(lambda: served.service.batcher.waiting == 2)
        head, _ = ask(served.server_port, query("d"))
        assert head.startswith(b"HTTP/1.1 429") and b"Retry-After: " in head
        threading.Timer(0.5, gate.open.set).start()
        assert RewardClient("127.0.0.1", served.server_port).rewards(query=["later"]) == [5.0]
        assert rewards(read_reply(second)) == [1.0, 1.0]
        first.close()
        second.close()


def test_a_pause_is_what_the_server_asks_for_with_jitter_and_never_long():
    asked = {pause_before(0, 1.0) for _ in range(100)}
    assert all(1.0 <= pause <= 1.5 for pause in asked) and max(asked) - min(asked) > 0.2
    assert all(pause_before(tries, 0.0) <= 4.0 for tries in range(200))


# -- framing


@pytest.mark.parametrize("line", [
    b"Bad header", b": x", b"X : y", b" X: y", b"X: y\r\n folded", b"X\x00: y", b"X: \x00", b"X: a\rb", b"X: a\nY: b", b"X(: y",
    b"\xffX: y", b"X: \x7f", b"Host: other", b"X: y\r\n\tz", b"Content-Length\t: 5",
])  # fmt: skip
def test_any_defect_in_a_header_line_is_400_and_ends_the_connection(line):
    with live() as served, connect(served.server_port, wait=5) as one:
        hidden = b"Transfer-Encoding: chunked\r\n"
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n" + hidden + b"\r\n" + request(path="/info"))
        data = b""
        while part := one.recv(1 << 16):
            data += part
        assert data.startswith(b"HTTP/1.1 400") and data.count(b"HTTP/1.1 ") == 1 and b"fingerprint" not in data


@pytest.mark.parametrize("line", [b"GET /health", b"GET  /health HTTP/1.1", b"GET /health HTTP/2.0", b"\x16\x03\x01", b"PRI * HTTP/2.0",
                                  b"GET /he alth HTTP/1.1", b"G\xc3\x84T / HTTP/1.1"])  # fmt: skip
def test_what_is_no_request_line_is_400(line):
    with live() as served:
        head, _ = ask(served.server_port, line + b"\r\nHost: localhost\r\n\r\n", wait=5)
        assert head.startswith(b"HTTP/1.1 400") and b"Connection: close" in head


@pytest.mark.parametrize(("host", "status"), [
    ("localhost", b"200"), ("LOCALHOST:1", b"200"), ("127.0.0.1:80", b"200"), ("127.9.9.9", b"200"), ("[::1]:5", b"200"),
    ("evil.example", b"421"), ("10.0.0.1", b"421"), ("127.0.0.1.evil.example", b"421"), ("", b"421"), ("[::2]", b"421"),
])  # fmt: skip
def test_a_name_that_only_points_to_this_machine_is_refused(host, status):
    """DNS rebinding: a page of evil.example reads a server on loopback through its visitor's browser."""
    with live() as served:
        data = f"GET /info HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        assert ask(served.server_port, data, wait=5)[0].split(b" ")[1] == status
        served.token = "s3cret"
        data = data.replace(b"\r\n\r\n", b"\r\nAuthorization: Bearer s3cret\r\n\r\n")
        assert ask(served.server_port, data, wait=5)[0].split(b" ")[1] == b"200"


def test_requests_that_come_in_one_piece_are_answered_in_their_order():
    with live() as served, connect(served.server_port, wait=10) as one:
        one.sendall(b"".join(query("x" * n) for n in range(1, 30)) + request(path="/health") + query("end"))
        text = b""
        while text.count(b"HTTP/1.1 ") < 31 or not text.endswith(b"}"):
            text += one.recv(1 << 16)
        got = [part.split(b"]")[0] for part in text.split(b'"rewards": [')[1:]]
        assert [float(value) for value in got] == [*range(1, 30), 3]


# -- bodies and texts


def test_a_body_of_lists_is_refused_before_it_is_parsed_and_health_answers_meanwhile():
    """16 MB of `[],` held Python's lock for seconds, four of them for 12."""
    lists = b'{"query": ["a"], "labels": [' + b"[]," * 5_000_000 + b"[]]}"
    replies = []
    with live() as served:
        threads = [threading.Thread(target=lambda: replies.append(ask(served.server_port, request(lists)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            status, took = health(served.server_port)
            assert status == b"200" and took < 1.0
        assert all(head.startswith(b"HTTP/1.1 413") for head, _ in replies) and len(replies) == 4
        brackets = "[" * (body.MAX_CONTAINERS + 1)
        assert rewards(ask(served.server_port, query(brackets))) == [len(brackets)], "in a text they are text"


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "9" * 5000])
def test_numbers_that_json_cannot_send_back_are_400(value):
    with live() as served:
        data = request(b'{"query": ["a"], "id": %s}' % value.encode())
        assert ask(served.server_port, data)[0].startswith(b"HTTP/1.1 400")


def test_only_as_many_characters_are_tokenized_as_the_last_tokens_may_need():
    asked = []

    def ids_of(text):
        asked.append(len(text.query))
        return [ord(c) for c in text.query if c != " "]

    def cut(text, longest=4):
        asked.clear()
        return last_tokens(Text(text, None, None, None, None, True), longest, ids_of)

    assert cut("abcdef" * 100_000) == ([ord(c) for c in "cdef"], True) and asked == [64]
    assert cut("abcd") == ([ord(c) for c in "abcd"], False) and asked == [4]
    assert cut("abc" + " " * 500) == ([ord(c) for c in "abc"], False), "spaces are no tokens here: more characters are taken"
    assert asked == [64, 256, 503]
    with pytest.raises(ValueError, match="empty"):
        cut("   ")


def test_a_cut_text_is_told_and_counted_by_the_client(server_port, capsys):
    client = RewardClient("127.0.0.1", server_port)
    client.rewards(query=["the crust", "the crust " * 5000, "the " * 5000])
    client.rewards(query=["the crust " * 5000])
    assert client.truncated == 3
    assert capsys.readouterr().err.count("cuts texts") == 1
    _, data = ask(server_port, query("the " * 5000, "the"))
    assert json.loads(data)["truncated"] == [0]


def test_metrics_tell_of_queue_batches_tokens_waits_and_failures():
    with live(lambda texts: [float("nan") if t == "poison" else 1.0 for t in texts]) as served:
        rewards(ask(served.server_port, query("abc", "de")))
        ask(served.server_port, query("poison"))
        text = ask(served.server_port, request(path="/metrics"))[1].decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert (
        float(values["rm_texts_total"]) == 3
        and float(values["rm_tokens_total"]) == 11
        and float(values["rm_non_finite_total"]) == 1
    )
    assert float(values["rm_forwards_total"]) == 2 and float(values["rm_queued_texts"]) == 0
    for name in ("rm_forward_seconds_total", "rm_wait_seconds_total", "rm_out_of_memory_total", "rm_dropped_texts_total",
                 "rm_batch_texts", "rm_connections", 'rm_requests_total{code="200"}'):  # fmt: skip
        assert name in values, text


# -- ends


def test_after_sigterm_every_reward_that_was_computed_is_delivered(tmp_path):
    (tmp_path / "f.py").write_text(
        "import time\n"
        "def f(prompts, completions, labels):\n"
        "    time.sleep(0.02)\n"
        f"    open({str(tmp_path / 'scored')!r}, 'a').write('x' * len(prompts))\n"
        "    return [1.0] * len(prompts)\n"
    )
    answers = []

    def one_client(port):
        with contextlib.suppress(ConnectionError), connect(port) as one:
            while True:
                one.sendall(query("a"))
                head, data = read_reply(one)
                if not head:
                    return
                answers.append((head.split(b" ")[1], data))

    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", "--inference-micro-batch-size", 4) as (_, port, started):
        threads = [threading.Thread(target=one_client, args=(port,)) for _ in range(48)]
        for thread in threads:
            thread.start()
        time.sleep(1.0)
        started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 0
        for thread in threads:
            thread.join(10)
    good = [json.loads(data)["rewards"] for status, data in answers if status == b"200"]
    assert good and all(reward == [1.0] for reward in good)
    assert len(good) == len((tmp_path / "scored").read_text())
    assert {status for status, _ in answers} <= {b"200", b"503"}


FUNCTION = """
import multiprocessing, os, signal, threading, time

def square(n):
    return float(n * n)

def late(number, frame):
    raise TimeoutError

def f(prompts, completions, labels):
    assert threading.current_thread() is threading.main_thread()
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except TimeoutError:
        pass
    with multiprocessing.get_context("fork").Pool(2) as pool:
        values = pool.map(square, [len(c) for c in completions])
    if any("hang" in c for c in completions):
        time.sleep(1000)
    return values
"""


def test_a_reward_function_may_use_a_fork_pool_and_signal_alarm_and_one_that_hangs_ends_the_process(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTION)
    code = (
        "import sys, serve_rm\nfrom reinforce.serving import watch\nwatch.HANG_SECONDS = 2.0\n"
        f"sys.argv[1:] = ['--reward-fn', {str(tmp_path / 'f.py') + ':f'!r}, '--ready-file', {str(tmp_path / 'ready')!r}]\nserve_rm.main()\n"
    )
    with (tmp_path / "log").open("w+") as log:
        started = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            until(lambda: (tmp_path / "ready").exists() or started.poll() is not None, 60)
            port = int((tmp_path / "ready").read_text().split()[1])
            for _ in range(3):
                assert rewards(ask(port, query("abc", "de"))) == [9.0, 4.0]
            assert started.poll() is None, "the end of the pool's processes is not ours"
            hung = connect(port)
            hung.sendall(query("hang"))
            assert started.wait(30) == 70, (tmp_path / "log").read_text()
            hung.close()
        finally:
            started.kill()
            started.wait()
    assert "a forward took over 2 s" in (tmp_path / "log").read_text()
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", port))


def test_a_parent_that_ends_during_the_imports_is_noticed(tmp_path):
    (tmp_path / "f.py").write_text("import time\ntime.sleep(60)\nf = len\n")
    start = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, *sys.argv[1:]]); print(p.pid, flush=True); time.sleep(0.5)"
    words = [str(ROOT / "serve_rm.py"), "--reward-fn", f"{tmp_path}/f.py:f", "--exit-with-parent"]
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.run(
            [sys.executable, "-c", start, *words], env=environment(), text=True, stdout=subprocess.PIPE, stderr=log
        )
    child = int(parent.stdout)

    def gone():
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        state = Path(f"/proc/{child}/stat")
        return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"  # where nobody buries orphans

    try:
        until(gone, 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_signal_while_it_loads_ends_it_with_code_0(tmp_path):
    (tmp_path / "f.py").write_text(f"import time\nopen({str(tmp_path / 'loading')!r}, 'w')\ntime.sleep(60)\n")
    started = subprocess.Popen([sys.executable, str(ROOT / "serve_rm.py"), "--reward-fn", f"{tmp_path}/f.py:f"], env=environment())
    until(lambda: (tmp_path / "loading").exists(), 60)
    started.send_signal(signal.SIGTERM)
    assert started.wait(20) == 0


def test_a_client_goes_on_within_five_seconds_of_the_return_of_a_killed_server(tmp_path):
    """Killed in the middle of a request; the new one takes three seconds to warm up, in which it answers 503."""
    slow = (
        "import time\n{}def f(prompts, completions, labels):\n    time.sleep({})\n    return [float(len(c)) for c in completions]\n"
    )
    (tmp_path / "f.py").write_text(slow.format("", 5))
    got = []
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, started):
        client = RewardClient("127.0.0.1", port)
        client.connect()
        asking = threading.Thread(target=lambda: got.append((client.rewards(query=["abc", "de"]), time.monotonic())))
        asking.start()
        time.sleep(0.5)
        started.kill()
        started.wait()
    (tmp_path / "f.py").write_text(slow.format("", 5).replace("sleep(5)", "sleep(0)"))
    client._fingerprint = client._info = None  # the file is another one, which is not what is tested here
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", "--port", port):
        ready = time.monotonic()
        asking.join(20)
    assert got and got[0][0] == [3.0, 2.0] and got[0][1] - ready < 5.0


# -- replicas


class Balancer:
    """A TCP balancer: each connection goes to the next address that takes it."""

    def __init__(self, *ports):
        self.ports, self.turn = list(ports), 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client = self.socket.accept()[0]
                for _ in self.ports:
                    self.turn += 1
                    with contextlib.suppress(OSError):
                        replica = socket.create_connection(("127.0.0.1", self.ports[self.turn % len(self.ports)]))
                        threading.Thread(target=self._pump, args=(client, replica), daemon=True).start()
                        threading.Thread(target=self._pump, args=(replica, client), daemon=True).start()
                        break
                else:
                    client.close()

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def test_two_replicas_behind_a_balancer_serve_one_run_and_the_loss_of_one_is_survived():
    with live() as first, contextlib.ExitStack() as stack:
        second = stack.enter_context(live())
        balancer = Balancer(first.server_port, second.server_port)
        clients = [RewardClient("127.0.0.1", balancer.port, deadline=20) for _ in range(4)]
        for client in clients:
            assert client.rewards(query=["a", "bb"]) == [1.0, 2.0]
        assert first.replies[200] > 0 and second.replies[200] > 0
        stack.close()
        for client in clients:
            assert client.rewards(query=["ccc"]) == [3.0]
        balancer.socket.close()


def test_a_replica_with_another_model_is_never_believed():
    with live() as first, live(fingerprint="d" * 64) as second:
        balancer = Balancer(second.server_port, first.server_port)
        client = RewardClient("127.0.0.1", balancer.port, deadline=5)
        assert client.rewards(query=["a"]) == [1.0] and client.fingerprint == FINGERPRINT
        client._connection._close()
        with pytest.raises(RewardError, match="another model"):
            client.rewards(query=["a"])
        assert second.service.batcher.counts.texts == 0
        balancer.socket.close()


# -- fuzzing


@pytest.fixture(scope="module")
def fuzzed():
    with live() as served:
        yield served


HEADERS = st.lists(st.tuples(st.sampled_from(["Content-Length", "Transfer-Encoding", "Host", "Expect", "Connection", "X", "Content-Type"]),
                             st.one_of(st.text(max_size=10), st.integers(-2, 60).map(str), st.sampled_from(["chunked", "close", "x y"]))),
                   max_size=6)  # fmt: skip


def survives(served, data):
    """What comes back for these bytes; the server answers /health after it."""
    with connect(served.server_port, wait=10) as one:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        got = b""
        with contextlib.suppress(ConnectionError):
            while part := one.recv(1 << 16):
                got += part
    assert health(served.server_port)[0] == b"200"
    return got.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")


@given(st.one_of(st.binary(max_size=200), st.tuples(st.sampled_from(["GET", "POST", "PUT"]), st.sampled_from(["/get_reward", "/info", "/", "*"]),
                 HEADERS, st.binary(max_size=60))))  # fmt: skip
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_head_ends_the_server_or_gets_a_reward(fuzzed, drawn):
    if isinstance(drawn, tuple):
        method, path, headers, rest = drawn
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        drawn = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode() + rest
    assert b'"rewards"' not in survives(fuzzed, drawn)


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
                    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)), max_leaves=8)  # fmt: skip
COLUMN = st.one_of(JSON, st.lists(st.text(max_size=8), max_size=4))


@given(st.dictionaries(st.sampled_from(["query", "messages", "prompts", "completions", "labels", "finished", "id"]), COLUMN, max_size=4)
       | st.fixed_dictionaries({"query": st.lists(st.text(max_size=8), max_size=4)}, optional={"id": JSON, "labels": JSON}))  # fmt: skip
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_body_ends_the_server_or_gets_a_wrong_number(fuzzed, value):
    got = survives(fuzzed, request(json.dumps(value).encode()))
    status = int(got.split(b" ")[1])
    assert status in (200, 400, 413, 422), got
    if status == 200:
        reply = json.loads(got.partition(b"\r\n\r\n")[2])
        assert reply["rewards"] == lengths(value.get("query", [])) and reply["id"] == value.get("id")


@pytest.mark.slow
def test_a_run_whose_server_is_killed_in_a_step_ends_bitwise_as_undisturbed(small, tmp_path):
    """The new server takes six seconds to warm up; in that time it answers 503, and the trainer waits."""
    late = tmp_path / "late"
    (tmp_path / "f.py").write_text(
        f"import os, time\nif os.path.exists({str(late)!r}):\n    time.sleep(6)\n"
        "def f(prompts, completions, labels):\n    time.sleep(0.3)\n    return [len(c) / 10 for c in completions]\n"
    )
    weights = []
    for name in ("undisturbed", "disturbed"):
        flags = [*small_flags(small, "PORT"), "--val-check-interval", "99", "--log-dir", tmp_path / name]
        with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, server):
            words = [str(port) if word == "PORT" else str(word) for word in flags]
            train = subprocess.Popen([sys.executable, ROOT / "train.py", *words], env=environment(OMP_NUM_THREADS=1),
                                     stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
            if name == "undisturbed":
                out, _ = train.communicate(timeout=120)
            else:
                log, end = tmp_path / name / "metrics.jsonl", time.monotonic() + 60
                while not log.exists() or not log.read_text():
                    assert train.poll() is None and time.monotonic() < end
                    time.sleep(0.02)
                server.kill()
                server.wait()
        if name == "disturbed":
            late.touch()
            with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", "--port", port):
                ready = time.monotonic()
                out, _ = train.communicate(timeout=120)
                assert time.monotonic() - ready < 30
        assert train.returncode == 0, out
        weights.append((tmp_path / name / "checkpoints/step-000003/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
