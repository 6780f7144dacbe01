"""Random heads and bodies: the server answers /health after each, and no wrong number comes back."""

import contextlib
import json
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import connect, health, lengths, live, request


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
