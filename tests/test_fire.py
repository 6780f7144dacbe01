"""The endpoint and its client under fire: real sockets, half-read bodies, lying and dripping servers, another model behind one address."""

import contextlib
import json
import socket
import threading
import time

import live
import numpy as np
import pytest
import torch
from live import ask
from test_client import INFO, client, good, reply
from test_server import serving

from reinforce.errors import ConfigError
from reinforce.rm_client import RefusedError, RewardClient
from reinforce.rm_connection import RewardError, read_token
from reinforce.serving.config import ServeConfig
from reinforce.serving.handler import RewardServer
from reinforce.serving.reward import numbers_of


@pytest.fixture
def cold():
    """A server that is not warm yet, in this process."""
    server = RewardServer(("127.0.0.1", 0))
    server.start()
    yield server
    server.close()


def talk(port, data, wait=3.0):
    """All that comes back for these bytes, until the server closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as s:
        s.sendall(data)
        out = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := s.recv(1 << 16):
                out += part
        return out


def post(body, path=b"/get_reward", extra=b""):
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%s\r\n%s" % (
        path,
        len(body),
        extra,
        body,
    )


def test_a_body_that_is_answered_unread_is_never_run_as_the_next_request(cold):
    """503 before the server is warm, 404, 405, 415: the smuggled request stands in the body."""
    inner = b"GET /info HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for request in (
        post(inner),
        post(inner, b"/nowhere"),
        post(inner, b"/health"),
        post(inner).replace(b"application/json", b"text/plain"),
    ):
        got = talk(cold.server_port, request, wait=0.7)
        assert got.count(b"HTTP/1.1 ") == 1, got


def test_a_connection_is_kept_where_the_body_was_read_to_its_end_and_closed_where_it_was_not(cold):
    """A server that warms up: the client's next try goes over the same connection, and is no 400."""
    got = talk(cold.server_port, post(b'{"query": ["a"]}') + post(b'{"query": ["b"]}'), wait=0.7)
    assert got.count(b"HTTP/1.1 503") == 2 and b"Connection: close" not in got
    late = talk(cold.server_port, post(b"{}")[:-2] + post(b"{}"), wait=2.5)
    assert b"HTTP/1.1 503" in late
    chunked = (
        b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /info HTTP/1.1\r\n\r\n"
    )
    got = talk(cold.server_port, chunked, wait=0.7)
    assert got.count(b"HTTP/1.1 ") == 1 and b"Connection: close" in got


def test_strangers_cannot_fill_the_memory_that_requests_share(cold):
    """Neither by a body for /health, which needs no token, nor by requests whose replies they do not read."""
    cold.token = "s3cret"
    head = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert talk(cold.server_port, head + b"Content-Length: 16000000\r\n\r\n").startswith(b"HTTP/1.1 413")
    with socket.create_connection(("127.0.0.1", cold.server_port), timeout=1.0) as s:
        with contextlib.suppress(TimeoutError):
            for _ in range(100):
                s.sendall((head + b"\r\n") * 20_000)
        assert cold._held < 2 << 20


def test_one_empty_line_may_stand_before_a_request_and_no_more(cold):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    assert talk(cold.server_port, b"\r\n" + request, 0.5).startswith(b"HTTP/1.1 503")
    assert talk(cold.server_port, b"\r\n\r\n" + request, 0.5).startswith(b"HTTP/1.1 400")


def test_more_connections_than_files_leave_the_server_and_its_clients_alive(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, labels):\n    open(__file__).close()\n    return [1.0] * len(prompts)\n"
    )
    few = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))"
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f", before=few) as (_, port, started):
        mine = RewardClient("127.0.0.1", port)
        mine.connect()
        with contextlib.ExitStack() as held:
            for _ in range(400):
                s = held.enter_context(socket.socket())
                s.setblocking(False)
                s.connect_ex(("127.0.0.1", port))
            for _ in range(5):  # by a try or a few: after a second the idle ones give way
                assert mine.rewards(query=["a"]) == [1.0]
                time.sleep(0.3)
        assert started.poll() is None


def test_an_id_goes_back_only_if_it_is_short(tmp_path):
    with live.live() as server:
        for length, status in ((200, b" 200 "), (2000, b" 400 ")):
            body = json.dumps({"query": ["a"], "id": "x" * length}).encode()
            assert status in ask(server.server_port, live.request(body))[0]


def test_a_server_that_warms_up_is_asked_again_up_to_the_deadline(cold, server):
    """It was ended with code 1 by the 400 that its own unread body caused."""
    s = server(good)
    c = client(s, deadline=2.0)
    c.connect()
    c._connection._address = ("127.0.0.1", cold.server_port)
    c._connection._close()
    with pytest.raises(Exception, match="no usable answer within 2 s"):
        c.rewards(query=["a"])


def test_expect_100_continue_is_answered_before_the_body_is_sent(tmp_path):
    (tmp_path / "f.py").write_text("def f(prompts, completions, labels):\n    return [1.0] * len(prompts)\n")
    with (
        serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, _p),
        socket.create_connection(("127.0.0.1", port), timeout=3) as s,
    ):
        body = b'{"query": ["a"]}'
        whole = post(body, extra=b"Expect: 100-continue\r\n")
        s.sendall(whole[: -len(body)])
        assert s.recv(100).startswith(b"HTTP/1.1 100 Continue")
        s.sendall(body)
        assert b"200 OK" in s.recv(1000)


def drip(*parts, pause=0.05, forever=b""):
    """An answer that comes piece by piece, and then goes on for ever."""

    def answer(request, connection):
        with contextlib.suppress(OSError):
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            while forever:
                connection.sendall(forever)
                time.sleep(pause)

    return answer


OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize("answer", [
    drip(forever=b"H"),
    drip(OK, forever=b"X"),
    drip(OK, forever=b"A: b\r\n"),
    drip(forever=b"HTTP/1.1 100 Continue\r\n\r\n"),
    drip(OK + b"Content-Length: 9999\r\n\r\n", forever=b" "),
    drip(OK + b"Transfer-Encoding: chunked\r\n\r\n5;", forever=b"x"),
    drip(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", forever=b"A: b\r\n"),
], ids=["status line", "a header", "endless headers", "100 Continue", "body", "chunk extension", "trailers"])  # fmt: skip
def test_no_exchange_outlives_its_deadline_by_a_second(server, answer):
    c = client(server(answer), timeout=0.6, deadline=1.2)
    start = time.monotonic()
    with pytest.raises(Exception, match=r"no usable answer|not taken"):
        c.rewards(query=["a"])
    assert time.monotonic() - start < 2.2


@pytest.mark.parametrize(("answer", "reason"), [
    (reply({"rewards": [1.0]}, extra=b"Transfer-Encoding: chunked\r\n"), "Transfer-Encoding"),
    (reply({"rewards": [1.0]}, extra=b"Content-Encoding: gzip\r\n"), "Content-Encoding"),
    (reply(b'{"fingerprint": "%s", "rewards": [1' % INFO["fingerprint"].encode() + b"0" * 400 + b"]}"), "not a finite number"),
    (reply({"rewards": [1.0]}), "now serves another model"),
    (reply({}, 429, extra="Retry-After: ²\r\n".encode("latin-1")), "no usable answer"),
    (reply(b"x", kind="\x1b[2Jtext/plain"), "not application/json"),
    (reply({"rewards": [1.0], "fingerprint": "0" * 64}), "now serves another model"),
])  # fmt: skip
def test_what_a_liar_sends_is_a_typed_error_and_nothing_of_it_reaches_the_terminal_raw(server, answer, reason):
    with pytest.raises(Exception, match=reason) as raised:
        client(server(answer), timeout=0.5, deadline=0.5).rewards(query=["a"])
    assert type(raised.value).__name__ in ("RewardError", "RetryError") and str(raised.value).isprintable()


def test_another_model_behind_the_same_address_is_found_by_the_reply_of_each_request(server):
    """Two replicas and Connection: close: each /info may be the right one's, and the reward the other's."""

    def other(request, connection):
        body = json.loads(good(request).split(b"\r\n\r\n")[1])
        connection.sendall(reply({**body, "fingerprint": "1" * 64}, extra=b"Connection: close\r\n"))
        connection.shutdown(socket.SHUT_RDWR)

    with pytest.raises(RewardError, match="another model"):
        client(server(other)).rewards(query=["a"])


def test_a_reconnect_whose_info_is_busy_once_is_checked_again(server):
    def cut(request, connection):
        connection.shutdown(socket.SHUT_RDWR)

    s = server(good, cut, good)
    c = client(s, deadline=10)
    assert c.rewards(query=["a"]) == [1.0]
    s.info = reply({}, 503)
    threading.Timer(0.6, lambda: setattr(s, "info", {**INFO, "fingerprint": "0" * 64})).start()
    with pytest.raises(RewardError, match="another model"):
        c.rewards(query=["a"])


def test_requests_are_split_by_their_bytes_too_and_one_text_too_long_is_refused_here(server):
    s = server(good, info={**INFO, "max_texts": 99, "max_body": 1000})
    assert client(s).rewards(query=["a" * 300] * 5) == [300.0] * 5
    assert [len(p["query"]) for p in s.posts] == [2, 1, 2] and all(len(json.dumps(p)) <= 1000 for p in s.posts)
    with pytest.raises(RefusedError, match="takes 1000") as refused:
        client(s).rewards(query=["a", "b" * 2000])
    assert refused.value.index == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [("s3cret1\ns3cret2\n", "one line"), ("", "not empty"), ("s3cret one", "visible ASCII"), ("s3crét", "ASCII")],
)
def test_a_token_that_cannot_be_sent_is_refused_and_never_repeated(tmp_path, monkeypatch, content, reason):
    """An empty file opened the server, a line break put the token into exit.json."""
    (tmp_path / "token").write_text(content)
    monkeypatch.setenv("RM_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("RM_TOKEN", "another")
    with pytest.raises(ConfigError, match=reason) as refused:
        read_token()
    assert "s3cr" not in str(refused.value)


def test_the_kind_of_authorization_is_read_in_any_case(cold):
    cold.token = "s3cret"
    for header, status in (
        (b"bearer s3cret", b"503"),
        (b"BEARER s3cret", b"503"),
        (b"basic OnMzY3JldA==", b"503"),
        (b"bearer other", b"401"),
    ):
        got = talk(cold.server_port, b"GET /info HTTP/1.1\r\nHost: localhost\r\nAuthorization: %s\r\n\r\n" % header, wait=0.5)
        assert got.startswith(b"HTTP/1.1 " + status), got


@pytest.mark.parametrize("scores", [[1.0, 2.0], (1, 2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).numpy(), [True, 2],
                                    [torch.tensor(1.0), torch.tensor([2.0])], [torch.tensor([[1.0]]), np.array([[2.0]])], np.array([1, 2.0], object), list(torch.tensor([1.0, 2.0]).numpy())])  # fmt: skip
def test_a_reward_function_may_return_numbers_in_any_row(scores):
    assert numbers_of(scores, 2, "f.py:f") == [1.0, 2.0]


@pytest.mark.parametrize(
    "scores", [{1.0: "a", 2.0: "b"}, "12", {1.0, 2.0}, None, 3.0, [1.0], [1.0, "2"], [1.0, None], [[1.0], [2.0]], torch.ones(2, 1),
               [1.0, np.ma.masked], [1.0, 10**400], np.ma.array([1.0, 2.0], mask=[0, 1]), [1.0, np.timedelta64(5, "ns")], np.array([1, 2], "m8[ns]")]
)  # fmt: skip
def test_what_is_no_row_of_numbers_is_an_error_and_never_a_reward(scores):
    with pytest.raises(ValueError, match=r"f\.py:f returned"):
        numbers_of(scores, 2, "f.py:f")


@pytest.mark.parametrize(
    "flags", [{"reward_mean": float("nan")}, {"reward_mean": float("inf")}, {"reward_std": float("inf")}, {"reward_std": 0.0}]
)
def test_a_scale_that_is_no_number_is_refused(flags):
    with pytest.raises(ConfigError, match="--reward-"):
        ServeConfig(reward_fn="f.py:f", **flags).check()
