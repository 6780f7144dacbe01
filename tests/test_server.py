"""serve_rm.py as a process, spoken to over real sockets: the contract, and what strangers send."""

import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment, script

from reinforce import device as devices
from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.serving.config import ServeConfig
from reinforce.serving.reward_model import load_reward_model, query_ids, score
from serve_rm import serve

FUNCTION = """
def length(prompts, completions, labels):
    return [float(len(c)) + (label or 0) for c, label in zip(completions, labels)]

def echo(prompts, completions, labels):
    global last
    last = (prompts, completions, labels)
    return [float("nan") if "poison" in c else 1.0 for c in completions]

def broken(prompts, completions, labels):
    raise RuntimeError("secret detail")
"""


@contextlib.contextmanager
def serving(tmp_path, *flags, before="", **extra):
    """A running server; yields (host, port, process). `before` is code that its process runs first."""
    ready = tmp_path / f"ready-{time.monotonic_ns()}"
    main = ["-c", f"import serve_rm\n{before}\nserve_rm.main()"] if before else [str(ROOT / "serve_rm.py")]
    command = [sys.executable, *main, "--ready-file", str(ready), *map(str, flags)]
    with (tmp_path / "server.log").open("w+") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT if before else None, env=environment(**extra))
        try:
            end = time.monotonic() + 60
            while not ready.exists():
                assert server.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()
                time.sleep(0.05)
            host, port = ready.read_text().split()
            yield host, int(port), server
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="module")
def model_server(small, tmp_path_factory):
    with serving(tmp_path_factory.mktemp("model"), "--reward-model", small / "reward_model", "--reward-mean", 0.5, "--reward-std", 2,
                 "--reward-clip", 3) as (host, port, _):  # fmt: skip
        yield host, port


@pytest.fixture(scope="module")
def function_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("function")
    (folder / "rewards.py").write_text(FUNCTION)
    with serving(folder, "--reward-fn", f"{folder}/rewards.py:length") as (host, port, _):
        yield host, port


def call(address, method, path, payload=None, headers=None, raw=None):
    connection = http.client.HTTPConnection(*address, timeout=30)
    body = raw if raw is not None else None if payload is None else json.dumps(payload)
    connection.request(
        method, path, body, {"Content-Type": "application/json"} | (headers or {}) if body is not None else headers or {}
    )
    response = connection.getresponse()
    data = response.read()
    connection.close()
    kind = response.getheader("Content-Type")
    return response.status, json.loads(data) if kind == "application/json" else data.decode()


def raw(address, data, wait=5.0):
    """What comes back for these bytes, until the server closes."""
    with socket.create_connection(address, timeout=wait) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        out = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while part := s.recv(65536):
                out += part
        return out


def test_rewards_over_http_equal_scores_in_process(model_server, small):
    texts = ["<s> anna on the pizza in rome : the crust was superb . </s>", "anna on the pizza in rome : the", "the crust"]
    status, reply = call(model_server, "POST", "/get_reward", {"query": texts, "id": "a7"})
    model, tokenizer = load_reward_model(str(small / "reward_model"), torch.device("cpu"))
    expected = score(model, [query_ids(tokenizer, t) for t in texts], tokenizer.pad_token_id)
    assert status == 200 and reply["id"] == "a7" and reply["model"] == "reward_model"
    torch.testing.assert_close(torch.tensor(reply["scores"]), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(reply["rewards"]), ((expected - 0.5) / 2).clamp(-3, 3), rtol=0, atol=1e-5)


def test_a_reward_depends_on_whether_the_response_ended(model_server):
    _, reply = call(model_server, "POST", "/get_reward", {"query": ["the crust was superb .", "the crust was superb . </s>"]})
    assert abs(reply["rewards"][0] - reply["rewards"][1]) > 1e-4


def test_info_health_and_metrics_tell_how_it_is(model_server):
    status, info = call(model_server, "GET", "/info")
    assert status == 200 and len(info["fingerprint"]) == 64 and info["max_texts"] > 0 and "/" not in info["model"]
    assert call(model_server, "GET", "/health")[0] == 200
    assert "rm_requests_total{code=" in call(model_server, "GET", "/metrics")[1]


@pytest.mark.parametrize(("payload", "status"), [
    ({}, 400), ({"query": ["a"], "messages": []}, 400), ({"query": "a"}, 400), ({"query": [1]}, 400), ([], 400), ({"query": [["a"]]}, 400),
    ({"query": ["a"], "prompts": []}, 400), ({"query": ["a"], "finished": ["yes"]}, 400), ({"messages": [[]]}, 400),
    ({"query": ["a"], "id": "\N{SNOWMAN}" * 256}, 200), ({"query": ["a"], "id": "a" * 257}, 400), ({"query": ["a"], "id": ["a" * 253]}, 400),
    ({"query": [""]}, 200), ({"query": []}, 200), ({"query": ["the crust"] * 1025}, 413),
    ({"messages": [[{"role": "user", "content": "hi"}]]}, 422),
])  # fmt: skip
def test_requests_of_another_shape_get_their_status(model_server, payload, status):
    got, reply = call(model_server, "POST", "/get_reward", payload)
    assert got == status, reply
    assert set(reply) == (
        {"rewards", "scores", "extra_logs", "id", "model", "fingerprint", "truncated"}
        if status == 200
        else {"error", "message", "index"}
    )


def test_a_lone_surrogate_is_named_by_its_index(model_server):
    status, reply = call(model_server, "POST", "/get_reward", raw=b'{"query": ["fine", "\\ud800"]}')
    assert status == 422 and reply["index"] == 1


def test_paths_methods_and_types_that_do_not_exist(model_server):
    assert call(model_server, "GET", "/../../etc/passwd")[0] == 404
    status, reply = call(model_server, "POST", "/reward", {"query": ["a" * 9000]})
    assert status == 404 and "/get_reward" in reply["message"], "not that the body is too large"
    assert call(model_server, "GET", "/get_reward")[0] == 405
    assert call(model_server, "POST", "/health", {})[0] == 405
    assert call(model_server, "PUT", "/get_reward", {})[0] == 405
    assert call(model_server, "POST", "/get_reward", raw="query=a", headers={"Content-Type": "text/plain"})[0] == 415
    for body in (b"{", b'{"query": [NaN]}', b"[" * 5000, b"\xff"):
        assert call(model_server, "POST", "/get_reward", raw=body)[0] == 400


@pytest.mark.parametrize("framing", [
    b"", b"Content-Length: -1\r\n", b"Content-Length: 1_0\r\n", b"Content-Length: 2\r\nContent-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
])  # fmt: skip
def test_ambiguous_framing_is_refused_and_nothing_after_it_runs(model_server, framing):
    head = b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + framing + b"\r\n"
    reply = raw(model_server, head + b"0\r\n\r\nGET /info HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 411") and b"fingerprint" not in reply and reply.count(b"HTTP/1.1") == 1


def test_a_body_over_the_cap_gets_its_answer(model_server):
    head = b"POST /get_reward HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20000000\r\n\r\n"
    with socket.create_connection(model_server, timeout=10) as s:
        s.sendall(head + b" " * 100_000)
        assert s.recv(100).startswith(b"HTTP/1.1 413")


def test_many_clients_at_once_are_all_answered_with_their_own_rewards(function_server):
    def ask(n):
        status, reply = call(function_server, "POST", "/get_reward", {"query": ["x" * n, "y" * (n + 1)]})
        return status, reply["rewards"] == [n, n + 1]

    with concurrent.futures.ThreadPoolExecutor(48) as pool:
        assert set(pool.map(ask, range(1, 49))) == {(200, True)}


def test_a_function_gets_plain_lists_of_prompts_completions_and_labels(function_server):
    chat = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "four"}]]
    assert call(function_server, "POST", "/get_reward", {"messages": chat})[1]["rewards"] == [4]
    request = {"query": ["ask: four"], "prompts": ["ask: "], "labels": [10]}
    assert call(function_server, "POST", "/get_reward", request)[1]["rewards"] == [14]
    request = {"query": ["ask: four</s>"], "prompts": ["ask: "], "completions": ["four"]}
    assert call(function_server, "POST", "/get_reward", request)[1]["rewards"] == [4]


def test_a_small_request_is_answered_in_milliseconds(function_server):
    """Nagle's algorithm against delayed acknowledgements would make it 44 ms, every time."""
    connection = http.client.HTTPConnection(*function_server, timeout=10)
    times = []
    for _ in range(30):
        start = time.perf_counter()
        connection.request("POST", "/get_reward", '{"query": ["a"]}', {"Content-Type": "application/json"})
        connection.getresponse().read()
        times.append(time.perf_counter() - start)
    assert sorted(times)[len(times) // 2] < 0.03


def test_one_poisoned_text_spoils_its_own_request_only_and_errors_leak_nothing(function_server, tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTION)
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/rewards.py:echo") as (host, port, _), \
            concurrent.futures.ThreadPoolExecutor(8) as pool:  # fmt: skip
        texts = ["fine", "poison"] * 8
        replies = list(pool.map(lambda t: call((host, port), "POST", "/get_reward", {"query": [t]}), texts))
    for text, (status, reply) in zip(texts, replies, strict=True):
        assert (status, reply.get("error")) == ((200, None) if text == "fine" else (500, "non_finite"))
    status, reply = call(function_server, "POST", "/get_reward", {"query": ["a"], "labels": [{"not": "a number"}]})
    assert status == 500 and reply["message"].startswith("rewards.py line 3: TypeError: ")
    assert "/" not in reply["message"] and "Traceback" not in json.dumps(reply), "no folder of the server's"


def test_a_token_guards_every_route_but_health(tmp_path, small):
    with serving(tmp_path, "--reward-model", small / "reward_model", "--host", "0.0.0.0", RM_TOKEN="s3cret") as (_, port, _p):
        address = ("127.0.0.1", port)
        assert call(address, "GET", "/health")[0] == 200
        for header in ({}, {"Authorization": "Bearer s3cre"}, {"Authorization": "Bearer s3cretx"}, {"Authorization": "s3cret"}):
            for path in ("/info", "/metrics", "/nothing"):
                assert call(address, "GET", path, headers=header)[0] == 401
            assert call(address, "POST", "/get_reward", {"query": []}, headers=header)[0] == 401
        basic = base64.b64encode(b"anyone:s3cret").decode()
        for good in ("Bearer s3cret", f"Basic {basic}"):
            assert call(address, "POST", "/get_reward", {"query": ["the"]}, headers={"Authorization": good})[0] == 200
    assert "s3cret" not in (tmp_path / "server.log").read_text()


def test_an_open_address_without_a_token_is_refused():
    out = script("serve_rm.py", "--host", "0.0.0.0")
    assert out.returncode == 2 and "RM_TOKEN" in out.stdout and "Traceback" not in out.stdout


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        out = script("serve_rm.py", "--port", taken.getsockname()[1])
    assert out.returncode == 1 and "in use" in out.stdout and "Traceback" not in out.stdout


@pytest.mark.parametrize(("flags", "reason"), [
    (["--reward-fn", "nowhere.py:f"], "no file"), (["--reward-fn", "train.py:nothing"], "no function"),
    (["--reward-model", "a", "--reward-fn", "b:c"], "give one"), (["--reward-std", "0"], "positive"), (["--prot", "1"], "did you mean --port?"),
    (["--reward-model", "./nowhere"], "--reward-model ./nowhere"), (["--device", "cuda"], "GPU"),
    (["--host", "\udcff\udcfe", "--reward-fn", "recipes/rewards.py:length"], "is no address"),
    (["--device", "cuda:1"], "--device cuda:1: PyTorch sees no usable GPU"), (["--device", "cuda:x"], "auto, cpu, cuda or cuda:N"),
])  # fmt: skip
def test_bad_server_flags_are_one_sentence_and_exit_code_2(flags, reason, small, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("RM_TOKEN", "s3cret")  # else another host than this one is refused for that
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    extra = ["--reward-model", str(small / "reward_model")] if flags[0] == "--device" else []
    with pytest.raises(ConfigError) as refused:
        serve(parse(ServeConfig, "", [*flags, *extra]))
    assert reason in str(refused.value) and "\n" not in str(refused.value)


def test_a_signal_lets_the_request_in_flight_finish(tmp_path):
    (tmp_path / "rewards.py").write_text(
        "import time\ndef slow(prompts, completions, labels):\n    time.sleep(1.5)\n    return [1.0] * len(prompts)\n"
    )
    ready = {}
    with serving(tmp_path, "--reward-fn", f"{tmp_path}/rewards.py:slow") as (host, port, server), \
            concurrent.futures.ThreadPoolExecutor(1) as pool:  # fmt: skip
        answer = pool.submit(call, (host, port), "POST", "/get_reward", {"query": ["a"]})
        time.sleep(0.5)
        server.send_signal(signal.SIGTERM)
        ready = answer.result()
        assert server.wait(20) == 0
    assert ready[0] == 200 and ready[1]["rewards"] == [1.0]


def test_the_server_ends_with_its_parent(tmp_path):
    (tmp_path / "rewards.py").write_text(FUNCTION)
    start = "import subprocess, sys; p = subprocess.Popen([sys.executable, *sys.argv[1:]]); print(p.pid, flush=True); p.wait()"
    ready = tmp_path / "ready"
    parent = subprocess.Popen(
        [sys.executable, "-c", start, str(ROOT / "serve_rm.py"), "--reward-fn", f"{tmp_path}/rewards.py:length", "--ready-file",
         str(ready), "--exit-with-parent"], stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    child = int(parent.stdout.readline())
    end = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    while time.monotonic() < end:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent")


def test_a_gpu_is_taken_by_local_rank_or_by_its_number_and_settled(monkeypatch):
    """cuDNN's attention has given NaN gradients with a mask, and TF32 is no float32."""
    for name, value in (("is_available", True), ("device_count", 2), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high")
        assert [str(devices.pick(name, 1)) for name in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
        assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        for name, rank in (("cuda", 2), ("cuda:2", 0)):
            with pytest.raises(ConfigError, match="GPU"):
                devices.pick(name, rank)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.allow_tf32 = before[2]
    with pytest.raises(ConfigError, match="each has a GPU of its own"):
        ServeConfig(reward_model="a", device="cuda:1", data_parallel=True).check_processes(2)
