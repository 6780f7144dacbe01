"""A table of lying reward servers: each ends in a typed error or in the right numbers, in time, and in nothing else.

With the behaviours of test_client.py, test_fire.py and test_refused.py there are over a hundred and fifty.
"""

import contextlib
import json
import socket
import struct
import time

import pytest
from test_client import INFO, client, good, reply

from reinforce.errors import ConfigError, RetryError
from reinforce.rm_connection import RewardError

DEADLINE = 0.3
RIGHT = [2.0, 3.0]  # for these texts
TEXTS = ["ab", "abc"]


def says(raw=None, close=True, pause=0.0, reset=False, **fields):
    """An answer with the right id: these bytes, or a right reply with other fields."""

    def answer(request, connection):
        time.sleep(pause)
        body = {"rewards": RIGHT, "id": request["id"], "fingerprint": INFO["fingerprint"], **fields}
        data = reply({k: v for k, v in body.items() if v is not ...}) if raw is None else raw
        head, gap, text = data.rpartition(b"\r\n\r\n")
        told = text.replace(b"ID", request["id"].encode())
        head = head.replace(b"Content-Length: %d" % len(text), b"Content-Length: %d" % len(told))  # where it was right
        with contextlib.suppress(OSError):
            connection.sendall(head + gap + told)
            if reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()
            elif close:
                connection.shutdown(socket.SHUT_RDWR)

    return answer


def numbers(text):
    return says(reply(b'{"rewards": %s, %s}' % (text, MARKS)))


MARKS = b'"id": "ID", "fingerprint": "%s"' % INFO["fingerprint"].encode()
BODY = b'{"rewards": [2.0, 3.0], %s}' % MARKS
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"

LIES = {
    # numbers
    **{f"rewards {text.decode()}": numbers(text) for text in (
        b"[]", b"[2.0]", b"[2.0, 3.0, 4.0]", b"[2.0, null]", b"[null, null]", b"[2.0, NaN]", b"[2.0, Infinity]", b"[2.0, -Infinity]",
        b"[2.0, 1e400]", b"[2.0, -1e400]", b"[2.0, true]", b"[false, 3.0]", b'[2.0, "3.0"]', b'["2.0", "3.0"]', b"[[2.0], [3.0]]",
        b"[[2.0, 3.0]]", b'{"0": 2.0, "1": 3.0}', b'{"ab": 2.0, "abc": 3.0}', b'"23"', b"23", b"null", b"true", b"[2.0, {}]",
        b"[2.0, []]", b"[2.0, 1" + b"0" * 400 + b"]", b"[2.0, 1" + b"0" * 5000 + b"]", b"[2.0, 0x3]", b"[2.0, 3.]", b"[2.0, +3]",
        b"[2.0, 03]", b"[2.0, 3,0]", b"[2.0 3.0]", b"[2.0, 3.0,]", b"[2.0, - 3]",
    )},
    # ids, fingerprints, shapes
    "no id": says(id=...), "id null": says(id=None), "id of another": says(id="other"), "id a list": says(id=["ID"]), "id 0": says(id=0),
    "another fingerprint": says(fingerprint="0" * 64), "fingerprint a number": says(fingerprint=1), "fingerprint empty": says(fingerprint=""),
    "no fingerprint": says(fingerprint=...), "fingerprint null": says(fingerprint=None),
    "a list": says(reply([2.0, 3.0])), "a string": says(reply("rewards")), "a number": says(reply(5)), "null": says(reply(b"null")),
    "empty object": says(reply({})), "score for rewards": says(reply({"score": RIGHT})), "empty body": says(reply(b"")),
    "rewards nested": says(reply({"data": {"rewards": RIGHT}})), "an error": says(reply({"error": "failed"})),
    "two values": says(reply(BODY + BODY)), "a tail": says(reply(BODY + b"x")), "UTF-16": says(reply(BODY.decode().encode("utf-16"))),
    "not UTF-8": says(reply(b'{"rewards": "\xff"}')), "deep": says(reply(b"[" * 100_000)), "HTML": says(reply(b"<html>", kind="text/html")),
    "no type": says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), "text/plain": says(reply(BODY, kind="text/plain")),
    # statuses with plausible numbers
    **{f"status {status}": says(reply(BODY, status)) for status in (
        201, 202, 203, 204, 206, 226, 300, 301, 302, 303, 304, 307, 308, 400, 402, 403, 404, 405, 406, 408, 409, 410, 411, 412, 413, 414,
        415, 416, 417, 421, 422, 423, 425, 426, 428, 429, 431, 451, 500, 501, 502, 503, 504, 505, 507, 508, 511, 599, 999)},
    "Retry-After a day": says(reply({}, 429, extra=b"Retry-After: 86400\r\n")),
    "Retry-After a date": says(reply({}, 503, extra=b"Retry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n")),
    "Retry-After negative": says(reply({}, 503, extra=b"Retry-After: -1\r\n")), "Retry-After inf": says(reply({}, 503, extra=b"Retry-After: inf\r\n")),
    "Retry-After of 400 digits": says(reply({}, 503, extra=b"Retry-After: " + b"9" * 400 + b"\r\n")),
    # framing
    "length too long": says(HEAD + b"Content-Length: 500\r\n\r\n" + BODY),
    "length too short": says(HEAD + b"Content-Length: 10\r\n\r\n" + BODY), "length 0": says(HEAD + b"Content-Length: 0\r\n\r\n" + BODY),
    "length huge": says(HEAD + b"Content-Length: 99999999999\r\n\r\n" + BODY, close=False), "chunked": says(HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    "chunked and length": says(HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + BODY),
    "gzip": says(HEAD + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nabcde"), "deflate": says(HEAD + b"Content-Encoding: deflate\r\n\r\n" + BODY),
    "nothing": says(b""), "half a status line": says(b"HTTP/1.1 2"), "a status line alone": says(b"HTTP/1.1 200 OK\r\n"),
    "half a header": says(HEAD + b"Content-Le"), "HTTP/9.9": says(b"HTTP/9.9 200 OK\r\n\r\n"), "HTTP/0.9": says(BODY),
    "status of letters": says(b"HTTP/1.1 abc OK\r\n\r\n"), "status 0": says(b"HTTP/1.1 000 OK\r\n\r\n"), "status -1": says(b"HTTP/1.1 -1 OK\r\n\r\n"),
    "garbage": says(b"\x00\x01\x02\x03" * 50), "an SSH server": says(b"SSH-2.0-OpenSSH_9.2\r\n"), "TLS alert": says(b"\x15\x03\x01\x00\x02\x02\x28"),
    "a header of 1 MB": says(HEAD + b"X: " + b"y" * (1 << 20) + b"\r\n\r\n"), "a thousand headers": says(HEAD + b"X: y\r\n" * 1000 + b"\r\n"),
    "a header without colon": says(HEAD + b"Content-Length: 2\r\nnonsense\r\n\r\n{}"), "switching": says(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    "early hints": says(b"HTTP/1.1 103 Early Hints\r\n\r\n"), "processing": says(b"HTTP/1.1 102 Processing\r\n\r\n", close=False),
    # silence and ends
    "a reset": says(b"", reset=True), "a reset in the head": says(HEAD[:20], reset=True), "a reset in the body": says(HEAD + b"Content-Length: 99\r\n\r\n{", reset=True),
    "silence": says(b"", close=False), "late": says(pause=2.0), "silence in the head": says(HEAD, close=False), "silence in the body": says(HEAD + b"Content-Length: 99\r\n\r\n{", close=False),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_in_a_typed_error_in_time_and_nothing_of_it_is_printed_raw(server, lie):
    start = time.monotonic()
    with pytest.raises((RewardError, RetryError)) as raised:
        client(server(LIES[lie]), timeout=0.2, deadline=DEADLINE).rewards(query=TEXTS)
    assert time.monotonic() - start < DEADLINE + 1
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


TRUTHS = {
    "as it should be": says(close=False), "closed at once": says(), "integers": numbers(b"[2, 3]"), "exponents": numbers(b"[0.2e1, 30E-1]"),
    "white space": numbers(b"[ 2.0 ,\n\t3.0 ]"), "more fields": says(extra_logs={"x": [1]}, scores=[9, 9], rewards_sum=5),
    "a type with a charset": says(reply(BODY, kind="Application/JSON; charset=utf-8")), "a long header": says(reply(BODY, extra=b"X: " + b"y" * 5000 + b"\r\n")),
    "no length": says(HEAD + b"\r\n" + BODY), "length negative": says(HEAD + b"Content-Length: -5\r\n\r\n" + BODY),
    "length a word": says(HEAD + b"Content-Length: x\r\n\r\n" + BODY), "truncated nonsense": says(truncated="all"), "100 first": says(b"HTTP/1.1 100 Continue\r\n\r\n" + reply(BODY)),
    "a duplicate key": says(reply(b'{"rewards": [9, 9], "rewards": [2.0, 3.0], %s}' % MARKS)),
}  # fmt: skip


@pytest.mark.parametrize("odd", TRUTHS)
def test_an_odd_but_true_reply_gives_the_right_numbers_at_once(server, odd):
    s = server(TRUTHS[odd])
    assert client(s, timeout=2.0, deadline=5.0).rewards(query=TEXTS) == RIGHT
    assert len(s.posts) == 1


INFOS = {
    "no model": {"fingerprint": "f"}, "no fingerprint": {"model": "m", "max_texts": 3}, "max_texts 0": {**INFO, "max_texts": 0},
    "max_texts -1": {**INFO, "max_texts": -1}, "max_texts true": {**INFO, "max_texts": True}, "max_texts 1.5": {**INFO, "max_texts": 1.5},
    "max_texts a word": {**INFO, "max_texts": "3"}, "max_texts null": {**INFO, "max_texts": None}, "max_body 0": {**INFO, "max_body": 0},
    "max_body a word": {**INFO, "max_body": "x"}, "a list": [INFO], "a string": "info", "null": None, "deep": reply(b"[" * 100_000),
    "status 500": reply(INFO, 500), "status 302": reply(INFO, 302), "HTML": reply(b"<html>", kind="text/html"), "cut": reply(b'{"model": "m'),
}  # fmt: skip


@pytest.mark.parametrize("info", INFOS)
def test_an_info_that_makes_no_sense_pins_nothing_and_costs_no_reward(server, info):
    """As another project's server: probed by one text, and its replies are checked all the same."""
    told = INFOS[info]
    c = client(server(lambda r, _: reply({"rewards": [float(len(t)) for t in r["query"]]}), info=told), deadline=DEADLINE)
    assert c.rewards(query=TEXTS) == RIGHT and c.fingerprint is None
    with pytest.raises(ConfigError, match="not a reward server"):
        client(server(reply({"choices": []}), info=told), deadline=DEADLINE).rewards(query=TEXTS)


def test_a_server_that_lies_once_and_then_tells_the_truth_is_believed_where_trying_again_helps(server):
    for lie in ("status 503", "a reset", "nothing", "length too long", "half a header", "silence"):
        s = server(LIES[lie], good)
        assert client(s, timeout=0.3, deadline=10).rewards(query=TEXTS) == RIGHT, lie
        assert len(s.posts) >= 2 and json.dumps(s.posts[0]) == json.dumps(s.posts[-1]), lie
