"""A reward server in this process, real sockets and threads, around any scoring function of completions."""

import contextlib
import json
import socket
import threading
import time

from reinforce.serving.batcher import Batcher
from reinforce.serving.handler import RewardServer, Service
from reinforce.serving.protocol import Text
from reinforce.serving.reward import Reward

FINGERPRINT = "e" * 64


def lengths(texts):
    return [float(len(text)) for text in texts]


def encode(text: Text):
    return text.query, False


@contextlib.contextmanager
def live(score=lengths, batch=8, fingerprint=FINGERPRINT, **how):
    """The server; its worker ends with the block."""
    server = RewardServer(("127.0.0.1", 0))
    batcher = Batcher(score, len, batch, **how)
    server.service = Service(Reward(encode, score, len, "live", fingerprint, 0.0, 1.0), batcher, None, 64)
    server.start()
    worker = threading.Thread(target=batcher.run, daemon=True)
    worker.start()
    try:
        yield server
    finally:
        batcher.stop()
        server.close()
        worker.join(10)


def request(body=None, path="/get_reward", extra="", method=None):
    """The bytes of a request."""
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "Host: 127.0.0.1"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return ("\r\n".join(lines) + "\r\n" + extra + "\r\n").encode("latin-1") + (body or b"")


def read_reply(connection):
    """Head and body of one reply; both empty if the connection closed before it."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(1 << 16)
        if not part:
            return b"", data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        part = connection.recv(1 << 16)
        if not part:
            return head, body
        body += part
    return head, body


def connect(port, wait=20.0):
    return socket.create_connection(("127.0.0.1", port), timeout=wait)


def ask(port, data, wait=20.0):
    """The reply to a request on a connection of its own."""
    with connect(port, wait) as connection:
        connection.sendall(data)
        return read_reply(connection)


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


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


class Gate:
    """A scoring function that records its batches and waits for `open` before the first one."""

    def __init__(self):
        self.batches, self.open = [], threading.Event()

    def __call__(self, items):
        self.batches.append(items)
        self.open.wait(10)
        return [float(len(item)) for item in items]
