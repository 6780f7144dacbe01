"""The endpoint under load: a thousand clients, slow and idle ones, defects of framing, long texts."""

import contextlib
import json
import resource
import selectors
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import Gate, ask, connect, health, live, query, read_reply, request, rewards, until
from test_server import serving

from reinforce.rm_client import RewardClient, pause_before
from reinforce.serving import body, connection, handler, server
from reinforce.serving.cut import last_tokens
from reinforce.serving.protocol import Text


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """serve_rm.py with a function that gives the length of a text; (port, process)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))  # for a thousand clients
    folder = tmp_path_factory.mktemp("load")
    (folder / "f.py").write_text("def f(prompts, completions, labels):\n    return [float(len(c)) for c in completions]\n")
    with serving(folder, "--reward-fn", f"{folder}/f.py:f") as (_, port, started):
        yield port, started


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


@pytest.mark.parametrize(("target", "status"), [
    ("http://localhost/info", b"200"), ("HTTP://127.0.0.1:80/info?a=b", b"200"), ("http://evil.example/info", b"421"),
    ("http://localhost@evil.example/info", b"421"), ("http:///info", b"421"), ("http://localhost", b"404"),
])  # fmt: skip
def test_the_name_in_an_absolute_target_counts_instead_of_hosts(target, status):
    """RFC 9112, 3.2.2: a server takes them, and ignores Host."""
    with live() as served:
        for host in ("localhost", "evil.example"):
            data = f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
            assert ask(served.server_port, data, wait=5)[0].split(b" ")[1] == status


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


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)), st.booleans())
def test_lists_and_objects_are_counted_without_those_in_texts(value, ascii):
    def count(x):
        return 1 + sum(map(count, x.values() if isinstance(x, dict) else x)) if isinstance(x, (list, dict)) else 0

    with mock.patch.object(body, "MAX_CONTAINERS", -1):
        assert body._containers(json.dumps(value, ensure_ascii=ascii).encode()) == count(value)


@pytest.mark.parametrize("part", [b'\\"', b'"', b'"\\', b"\\", b'"",', b'"\\""', b'"a\\\\'])
def test_no_body_is_counted_more_than_once(part):
    """What looked for the end of each string anew took half a minute for 40,000 quotes, and years for these."""
    assert body._containers(b"[" * (body.MAX_CONTAINERS + 1) + part * 1_000_000) > body.MAX_CONTAINERS


@pytest.mark.parametrize(("deep", "status"), [(62, b"200"), (63, b"400"), (400, b"400"), (900, b"400"), (100_000, b"413")])
def test_a_label_that_nests_too_deep_is_refused(deep, status, process):
    """The copy of one 400 lists deep overflowed the stack: 500, and 100 KB of traceback in the log for each request."""
    for label in (b"[" * deep + b"]" * deep, b'{"a": ' * deep + b"0" + b"}" * deep):
        data = request(b'{"query": ["a"], "labels": [%s]}' % label)
        assert ask(process[0], data)[0].split(b" ")[1] == status


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
        return last_tokens(Text(text, None, None, None, None, True), longest, ids_of, frozenset([ord("<")]))

    assert cut("abcdef" * 100_000) == ([ord(c) for c in "cdef"], True) and asked == [64, 32]
    assert cut("<" + "abcdef" * 100_000) == ([ord(c) for c in "<def"], True) and asked == [64, 32], "a begin token of a long text"
    assert cut(" " * 100 + "abcdef" * 100_000) == ([ord(c) for c in "cdef"], True), "what opens it has no token"
    assert cut("abcd") == ([ord(c) for c in "abcd"], False) and asked == [4]
    assert cut("abc" + " " * 500) == ([ord(c) for c in "abc"], False), "spaces are no tokens here: more characters are taken"
    assert asked == [64, 256, 503]
    assert cut("<abcdef") == ([ord(c) for c in "<def"], True), "a begin token stays"
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


def test_a_stuck_forward_too_many_requests_and_too_many_bytes_are_answered_at_once(monkeypatch):
    gate = Gate()
    with live(gate, batch=1) as served, connect(served.server_port) as busy:
        busy.sendall(query("a"))
        until(lambda: gate.batches)
        for place, name, limit, data, status in ((handler, "STALE_SECONDS", 0.0, request(path="/health"), b"503"),
                                                 (handler, "MAX_IN_FLIGHT", 1, query("b"), b"429"), (server, "MAX_HELD", 100, query("c" * 200), b"503")):  # fmt: skip
            with monkeypatch.context() as patch:
                patch.setattr(place, name, limit)
                assert ask(served.server_port, data)[0].split()[1] == status, name
        gate.open.set()
        assert rewards(read_reply(busy)) == [1.0]
