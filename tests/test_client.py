"""The reward client against a server that misbehaves on purpose, byte by byte."""

import contextlib
import json
import socket
import threading
import time

import pytest

from reinforce import rm_connection
from reinforce.errors import ConfigError, RetryError
from reinforce.rm_client import RewardClient
from reinforce.rm_connection import RewardError
from reinforce.rm_reply import index_of

INFO = {"model": "m", "fingerprint": "f" * 64, "max_texts": 3}


def reply(body, status=200, kind="application/json", extra=b"", length=None):
    """Bytes of an HTTP answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    n = len(data) if length is None else length
    return b"HTTP/1.1 %d X\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n" % (status, kind.encode(), n, extra) + data


class BadServer:
    """Plays one scripted answer per POST (the last one again and again); /info is answered properly unless told otherwise."""

    def __init__(self, *answers, info=INFO):
        self.answers, self.info, self.posts = list(answers), info, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._talk, args=(self.socket.accept()[0],), daemon=True).start()

    def _talk(self, connection):
        with connection, contextlib.suppress(OSError):
            while True:
                head = b""
                while b"\r\n\r\n" not in head:
                    part = connection.recv(65536)
                    if not part:
                        return
                    head += part
                head, _, body = head.partition(b"\r\n\r\n")
                length = next((int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length")), 0)
                while len(body) < length:
                    body += connection.recv(65536)
                if head.startswith(b"GET"):
                    connection.sendall(self.info if isinstance(self.info, bytes) else reply(self.info))
                    continue
                self.posts.append(json.loads(body))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if callable(answer):
                    answer = answer(self.posts[-1], connection)
                if answer is None:
                    return
                connection.sendall(answer)

    def close(self):
        self.socket.close()


def client(server, **how):
    return RewardClient("127.0.0.1", server.port, **{"timeout": 1.0, "deadline": 3.0, **how})


def good(request, connection=None):
    rewards = [float(len(t)) for t in request["query"]]
    return reply({"rewards": rewards, "id": request["id"], "fingerprint": INFO["fingerprint"]})


def test_rewards_come_back_in_order_and_requests_are_split_to_the_servers_limit(server):
    s = server(good)
    assert client(s).rewards(query=["a" * n for n in range(1, 8)], finished=[True] * 7) == [1, 2, 3, 4, 5, 6, 7]
    assert [len(p["query"]) for p in s.posts] == [3, 3, 1] and [len(p["finished"]) for p in s.posts] == [3, 3, 1]


@pytest.mark.parametrize("late", [reply({"error": "late"}, 504), reply({}, 408), None], ids=["504", "408", "no answer"])
def test_a_request_that_is_not_answered_in_time_is_asked_in_halves(server, late):
    """A slow reward and many ranks: all would be late together, ask for the same again, and never get anything."""

    def slow(request, connection):
        if len(request["query"]) <= 2:
            return good(request)
        return late or time.sleep(0.7) or reply({})

    s = server(slow, info={**INFO, "max_texts": 99})
    c = client(s, timeout=0.3, deadline=3.0)
    assert c.rewards(query=["a" * n for n in range(1, 10)]) == [*range(1, 10)]
    assert [len(p["query"]) for p in s.posts] == [9, 4, 2, 2, 2, 1, 2], "and the others are as small from the beginning"


@pytest.mark.parametrize("rewards", [
    [], [1.0], [1.0, 2.0, 3.0], [[1.0], [2.0]], {"0": 1.0, "1": 2.0}, [1.0, None], [1.0, True], [1.0, "0.5"], "12", None,
])  # fmt: skip
def test_answers_of_another_shape_end_the_run_at_once(server, rewards):
    s = server(reply({"rewards": rewards, "fingerprint": INFO["fingerprint"]}))
    with pytest.raises(RewardError):
        client(s).rewards(query=["a", "b"])
    assert len(s.posts) == 1


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"3.5e38", b"-1e300"])
def test_numbers_that_are_not_finite_end_the_run(server, value):
    with pytest.raises(RewardError, match="not a finite number"):
        shown = INFO["fingerprint"].encode()
        client(server(reply(b'{"rewards": [1.0, %s], "fingerprint": "%s"}' % (value, shown)))).rewards(query=["a", "b"])


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 500, 507, 302])
def test_statuses_that_a_retry_cannot_cure_end_the_run_even_with_plausible_rewards(server, status):
    s = server(reply({"rewards": [1.0]}, status, extra=b"Location: http://127.0.0.1:1/\r\n"))
    with pytest.raises(RewardError, match=str(status)):
        client(s).rewards(query=["a"])
    assert len(s.posts) == 1


def test_a_request_that_is_too_large_in_a_way_that_no_limit_tells_is_halved(server):
    def at_most_two(request, connection=None):
        return good(request) if len(request["query"]) <= 2 else reply({"message": "too many lists"}, 413)

    s = server(at_most_two, info={**INFO, "max_texts": 8})
    assert client(s).rewards(query=["a" * n for n in range(1, 8)], labels=list(range(7))) == [1, 2, 3, 4, 5, 6, 7]
    assert [len(p["query"]) for p in s.posts] == [7, 3, 1, 2, 4, 2, 2] and s.posts[-1]["labels"] == [5, 6]
    s = server(reply({"message": "no"}, 413))
    with pytest.raises(RewardError, match="no"):
        client(s).rewards(query=["a", "b"])
    assert [len(p["query"]) for p in s.posts] == [2, 1], "the first text alone is refused"


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_statuses_that_may_pass_are_tried_again(server, status):
    s = server(reply({}, status), reply({}, status), good)
    assert client(s, deadline=10).rewards(query=["abc"]) == [3.0]
    assert len(s.posts) == 3 and s.posts[0] == s.posts[2]


def test_a_page_in_chunks_of_a_proxy_without_its_server_is_tried_again(server):
    page = b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n"
    s = server(page, good)
    assert client(s, deadline=10).rewards(query=["abc"]) == [3.0] and len(s.posts) == 2


def test_a_run_that_is_to_stop_does_not_wait_for_a_server_that_hangs(server, monkeypatch):
    """torchrun kills a job 30 s after a signal, and the finished steps are saved only when the loop is left."""
    monkeypatch.setattr("reinforce.rm_connection.GLANCE", 0.05)
    monkeypatch.setattr("reinforce.rm_connection.AFTER_STOP", 0.3)
    s = server(lambda request, connection: time.sleep(20))
    c = client(s, timeout=20.0, deadline=60.0)
    began = time.monotonic()
    c.stopped = lambda: time.monotonic() > began + 0.5
    with pytest.raises(RetryError, match="stopped while reward server"):
        c.rewards(query=["a", "b"])
    assert 0.7 < time.monotonic() - began < 10


def test_retry_after_is_honoured(server):
    s = server(reply({}, 429, extra=b"Retry-After: 1\r\n"), good)
    start = time.monotonic()
    client(s, deadline=10).rewards(query=["a"])
    assert time.monotonic() - start >= 1.0


@pytest.mark.parametrize("cut", [
    lambda r, c: None, lambda r, c: reply(b'{"rewards": [1', length=500)[:-1], lambda r, c: reply(b'{"rewards": [1')
])  # fmt: skip
def test_cut_answers_are_tried_again_and_then_given_up_with_code_75(server, cut):
    def once(request, connection):
        data = cut(request, connection)
        if data:
            connection.sendall(data)
        connection.shutdown(socket.SHUT_RDWR)

    assert client(server(once, good), deadline=10).rewards(query=["abc"]) == [3.0]
    with pytest.raises(RetryError, match="within"):
        client(server(once), deadline=1.0).rewards(query=["abc"])


def test_a_server_that_never_answers_or_drips_ends_at_the_deadline(server):
    def drip(request, connection):
        connection.sendall(reply(b"", length=1000))
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.1)

    for behaviour in (drip, lambda r, c: time.sleep(5)):
        start = time.monotonic()
        with pytest.raises(RetryError):
            client(server(behaviour), timeout=0.5, deadline=1.5).rewards(query=["a"])
        assert time.monotonic() - start < 4


def test_a_kept_connection_that_the_server_closed_is_opened_again_without_a_pause(server):
    def then_close(request, connection):
        connection.sendall(good(request))
        connection.shutdown(socket.SHUT_RDWR)

    c = client(server(then_close))
    assert [c.rewards(query=["ab"]) for _ in range(3)] == [[2.0]] * 3


def test_another_model_after_a_failure_ends_the_run(server):
    def close_once(request, connection):
        connection.shutdown(socket.SHUT_RDWR)

    def busy_once(request, connection):
        connection.sendall(reply({}, 503))
        connection.shutdown(socket.SHUT_RDWR)

    for failure in (close_once, busy_once):
        s = server(failure, good)
        c = client(s, deadline=10)
        c.connect()
        s.info = {**INFO, "fingerprint": "0" * 64}
        with pytest.raises(RewardError, match="another model"):
            c.rewards(query=["a"])
        assert len(s.posts) == 1, "the other model was never asked"


def test_a_server_that_no_longer_shows_its_model_ends_the_run_and_a_garbled_reply_does_not(server):
    def garbled(request, connection):
        connection.sendall(b"garbage\r\n\r\n")
        connection.shutdown(socket.SHUT_RDWR)

    s = server(garbled, good)
    c = client(s, deadline=10)
    assert c.rewards(query=["abc"]) == [3.0]
    c._connection._close()
    s.info = reply(b"<html>", 404, "text/html")
    with pytest.raises(RewardError, match="no longer shows"):
        c.rewards(query=["abc"])


def test_a_pinned_fingerprint_must_match_at_the_start(server):
    with pytest.raises(ConfigError, match="--rm-fingerprint"):
        client(server(good), fingerprint="0" * 64).connect()
    assert client(server(good), fingerprint="f" * 64).connect().model == "m"


def test_a_shuffled_id_is_another_requests_answer(server):
    with pytest.raises(RewardError, match="another request"):
        client(server(reply({"rewards": [1.0], "id": "other", "fingerprint": INFO["fingerprint"]}))).rewards(query=["a"])


def test_a_server_without_info_is_probed_by_one_text_and_a_foreign_service_refused(server, capsys):
    missing = reply(b"<html>", 404, "text/html")
    c = client(server(lambda r, _: reply({"rewards": [0.5] * len(r["query"])}), info=missing))
    assert c.rewards(query=["a"]) == [0.5]
    assert "not pinned" in capsys.readouterr().err
    start = time.monotonic()
    for answer in (reply(b"<html>", 501, "text/html"), reply({"choices": []})):
        with pytest.raises(ConfigError, match="not a reward server"):
            client(server(answer, info=missing)).connect(wait=60)
    with pytest.raises(ConfigError, match="not a reward server"):
        client(server(good, info=b"SSH-2.0-OpenSSH_9.2\r\n")).connect(wait=60)
    assert time.monotonic() - start < 5


def test_nobody_there_is_a_configuration_error_without_a_wait_and_a_retry_after_one():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(ConfigError, match="--rm-wait"):
        RewardClient("127.0.0.1", port).connect()
    with pytest.raises(RetryError, match="within 1 s"):
        RewardClient("127.0.0.1", port).connect(wait=1)


def test_a_server_that_comes_late_is_waited_for(server):
    with socket.create_server(("127.0.0.1", 0)) as placeholder:
        port = placeholder.getsockname()[1]
    late = []

    def start():
        time.sleep(1.0)
        made = BadServer.__new__(BadServer)
        made.answers, made.info, made.posts, made.port = [good], INFO, [], port
        made.socket = socket.create_server(("127.0.0.1", port))
        late.append(made)
        made._accept()

    threading.Thread(target=start, daemon=True).start()
    assert RewardClient("127.0.0.1", port).connect(wait=20).model == "m"
    late[0].close()


def test_a_proxy_in_the_environment_is_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert client(server(good)).rewards(query=["abc"]) == [3.0]


def test_columns_of_different_lengths_are_a_programming_error(server):
    with pytest.raises(ValueError, match="different lengths"):
        client(server(good)).rewards(query=["a"], prompts=[])
    with pytest.raises(ValueError, match="exactly one"):
        client(server(good)).rewards()


def test_each_request_has_the_whole_deadline_whatever_earlier_ones_have_cost(server):
    s = server(reply({}, 503), good, reply({}, 503), good)
    c = client(s, deadline=1.0)
    assert c.rewards(query=["a"]) == [1.0]
    time.sleep(1.1)
    assert c.rewards(query=["ab"]) == [2.0]


def test_a_pinned_model_is_not_taken_from_a_server_that_shows_none(server):
    answer, missing = (lambda r, _: reply({"rewards": [0.5] * len(r["query"])})), reply(b"<html>", 404, "text/html")
    with pytest.raises(ConfigError, match="--rm-fingerprint"):
        client(server(answer, info=missing), fingerprint="f" * 64).connect()


def test_a_reply_beyond_the_limit_is_given_up(server, monkeypatch):
    monkeypatch.setattr("reinforce.rm_connection.MAX_REPLY", 1000)
    with pytest.raises(RewardError, match="longer than 1000 bytes"):
        client(server(reply(b" " * 2000 + b'{"rewards": [1.0]}'))).rewards(query=["a"])


def test_a_server_that_wants_a_token_is_told_so(server):
    with pytest.raises(ConfigError, match="wants a token: set RM_TOKEN"):
        client(server(good, info=reply({"error": "unauthorized"}, 401))).connect()


def test_an_index_outside_the_request_is_none():
    assert [index_of(b'{"index": %d}' % i, 2) for i in (-1, 0, 1, 2)] == [None, 0, 1, None]


def test_a_refusal_ends_the_tries_of_its_request_and_not_those_of_a_later_one(server):
    s = server(reply({}, 503), reply({"error": "no"}, 422), good)
    c = client(s, deadline=1.0)
    with pytest.raises(RewardError, match="HTTP 422"):
        c.rewards(query=["a"])
    time.sleep(1.1)
    assert c.rewards(query=["ab"]) == [2.0]


def test_a_run_that_is_to_stop_sits_out_no_retry_after(server):
    c = client(server(reply({}, 429, extra=b"Retry-After: 20\r\n")), deadline=60.0)
    c.connect()
    began, stop = time.monotonic(), threading.Event()
    c.stopped = stop.is_set
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(RetryError, match="stopped while"):
        c.rewards(query=["a"])
    assert time.monotonic() - began < 5


def test_a_host_that_answers_no_connection_is_no_late_text(server, monkeypatch):
    """The connection times out, which halves no request and takes MOST_CONNECT at most."""
    s = server(good)
    c = client(s, timeout=60.0, deadline=0.5)
    c.connect()
    c._connection._close()

    def silent(self):
        assert self.timeout <= rm_connection.MOST_CONNECT
        raise TimeoutError("timed out")

    monkeypatch.setattr("http.client.HTTPConnection.connect", silent)
    with pytest.raises(RetryError, match="no answer to a connection"):
        c.rewards(query=["a", "b"])
    assert c._most > 2


@pytest.mark.parametrize("shows_its_model", [True, False])
def test_a_reply_that_comes_twice_is_not_taken_for_the_next_one(server, shows_its_model):
    """Other servers neither show a model nor repeat the id."""

    def twice(request, _):
        return 2 * (good(request) if shows_its_model else reply({"rewards": [float(len(text)) for text in request["query"]]}))

    c = client(server(twice, info=INFO if shows_its_model else reply(b"<html>", 404, "text/html")))
    c.connect()
    assert [c.rewards(query=[text]) for text in ("a", "bb", "ccc")] == [[1.0], [2.0], [3.0]]


def test_a_page_in_chunks_under_info_is_a_foreign_service(server):
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    with pytest.raises(ConfigError, match="is not a reward server"):
        client(server(good, info=page)).connect()
