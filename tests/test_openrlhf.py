"""OpenRLHF in both directions, from its documented contract: its client against our server, our client against its server.

POST URL {"query": [...], "prompts": [...], "labels": [...]}, answered {"rewards": [...], "scores": [...], "extra_logs": {...}}.
"""

import http.server
import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from live import live
from test_server import serving

from reinforce.rm_client import RewardClient


def remote_rm(url, queries, prompts, labels, timeout=30):
    """What OpenRLHF's actors do with one batch: a request each, no token, one connection a request."""
    body = json.dumps({"query": queries, "prompts": prompts, "labels": labels}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as reply:
        return json.load(reply)


@pytest.mark.parametrize("size", [1, 7])
def test_its_client_gets_rewards_scores_and_logs_of_our_server(size):
    queries = [f"{'x' * i}prompt and response" for i in range(size)]
    with live() as server:
        got = remote_rm(f"http://127.0.0.1:{server.server_port}/get_reward", queries, [""] * size, [None] * size)
    assert got["rewards"] == got["scores"] == [float(len(q)) for q in queries] and got["extra_logs"] == {}


def test_many_of_its_workers_at_once_get_their_own_rewards():
    def ask(i):
        return remote_rm(f"http://127.0.0.1:{server.server_port}/get_reward", ["y" * i], ["y"], ["label"])["rewards"]

    with live() as server, ThreadPoolExecutor(64) as pool:
        assert list(pool.map(ask, range(1, 300))) == [[float(i)] for i in range(1, 300)]


def test_its_labels_reach_a_reward_function_and_a_completion_is_what_follows_the_prompt(tmp_path):
    (tmp_path / "f.py").write_text(
        "def f(prompts, completions, labels): return [float(c == l) for c, l in zip(completions, labels)]\n"
    )
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/f.py:f") as (_, port, _process):
        got = remote_rm(f"http://127.0.0.1:{port}/get_reward", ["1+1=2", "1+1=3"], ["1+1=", "1+1="], ["2", "2"])
    assert got["rewards"] == [1.0, 0.0]


class TheirServer(http.server.BaseHTTPRequestHandler):
    """Its serve_rm: one route, 404 with a JSON detail on every other."""

    protocol_version = "HTTP/1.1"

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(404, {"detail": "Not Found"})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        scores = [float(len(query)) for query in asked["query"]]
        self.answer(200, {"rewards": scores, "scores": scores, "extra_logs": {"dummy_scores": scores}})

    def log_message(self, *_):
        pass


def test_our_client_gets_the_rewards_of_its_server():
    """Without /info: one text is asked for, no model is pinned, no id comes back."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), TheirServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        client = RewardClient("127.0.0.1", server.server_port)
        info = client.connect()
        assert info.fingerprint is None
        texts = ["z" * i for i in range(1, 200)]
        assert client.rewards(query=texts) == [float(len(t)) for t in texts]
    finally:
        server.shutdown()
        server.server_close()
