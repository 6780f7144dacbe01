"""The reward endpoint: a reward model, or a plain function, behind POST /get_reward.

    python serve_rm.py --reward-model FOLDER --port 5567
    python serve_rm.py --reward-fn rewards.py:politeness --port 5567

    curl -s localhost:5567/get_reward -H 'Content-Type: application/json' -d '{"query": ["a prompt and its response"]}'

GET /health, /info and /metrics tell how it is. The wire format is OpenRLHF's `--remote_rm_url`. It answers on loopback;
on any other address it wants a token. Left out: TLS, several models, several processes.
"""

import errno
import hashlib
import importlib.util
import ipaddress
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers.utils import cached_file

from reinforce import device as devices
from reinforce.batcher import Batcher, NotFiniteError
from reinforce.config import ServeConfig, parse
from reinforce.errors import ConfigError
from reinforce.http import MAX_BODY, Handler, HttpError, Server, json_body, read_token
from reinforce.records import is_chat
from reinforce.reward_model import fingerprint, load_reward_model, messages_ids, query_ids, score

MAX_TEXTS = 1024  # of one request; /info asks for fewer, so that a slow model answers in time
ANSWER_SECONDS = 50.0  # below the client's 60 s a try
STALE_SECONDS = 60.0  # a worker silent for longer is taken for dead


@dataclass(frozen=True)
class Reward:
    """What is served: how a text becomes an item, how items become scores, and what /info tells."""

    encode: Callable[["Text"], Any]
    score: Callable[[list[Any]], list[float]]
    size: Callable[[Any], int]
    example: Any  # scored once before the server calls itself ready; None: nothing to warm up
    model: str
    fingerprint: str
    mean: float
    std: float
    max_length: int | None = None


@dataclass(frozen=True)
class Text:
    """One text of a request."""

    query: str | None
    messages: list[dict[str, str]] | None
    prompt: str | None
    completion: str | None
    label: Any
    finished: bool


def model_reward(config: ServeConfig, name: str) -> Reward:
    """A one-label sequence classifier from a folder or the hub. Raises ConfigError."""
    device = devices.pick(config.device)
    model, tokenizer = load_reward_model(name, device)
    bf16 = devices.use_bf16(config.precision, device, sum(p.numel() for p in model.parameters()))
    hf = cast(Any, model).config
    longest = config.max_length or getattr(hf.get_text_config(), "max_position_embeddings", None) or 4096
    lock = threading.Lock()  # a fast tokenizer is not safe to share between threads

    def encode(text: Text) -> list[int]:
        if text.messages is not None and tokenizer.chat_template is None:
            raise ValueError("messages, but the reward model has no chat template")
        with lock:
            if text.messages is None:
                ids = query_ids(tokenizer, cast(str, text.query))
            else:
                ids = messages_ids(tokenizer, text.messages, text.finished)
        if not ids:
            raise ValueError("an empty text")
        return ids[-longest:]  # the response is at the end

    @torch.inference_mode()
    def run(items: list[list[int]]) -> list[float]:
        with devices.autocast(device, bf16):
            return cast(list[float], score(model, items, tokenizer.pad_token_id or 0).tolist())

    folder = name if Path(name).is_dir() else str(Path(cast(str, cached_file(name, "config.json"))).parent)
    mean = config.reward_mean if config.reward_mean is not None else getattr(hf, "reward_mean", 0.0)
    std = config.reward_std if config.reward_std is not None else getattr(hf, "reward_std", 1.0)
    label = Path(name).resolve().name if Path(name).is_dir() else name
    return Reward(encode, run, len, [1] * min(8, longest), label, fingerprint(folder), mean, std, longest)


def function_reward(config: ServeConfig, spec: str) -> Reward:
    """A plain Python function, FILE.py:NAME. Raises ConfigError."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--reward-fn {spec}: no file {path!r}; give FILE.py:NAME")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"--reward-fn {spec}: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name)
    except AttributeError as error:
        raise ConfigError(f"--reward-fn {spec}: no function {name!r} in {path}") from error
    except Exception as error:  # whatever the file does when it is imported
        raise ConfigError(f"--reward-fn {spec}: {type(error).__name__}: {error}") from error

    def encode(text: Text) -> tuple[str, str, Any]:
        if text.completion is not None:
            completion = text.completion
        elif text.messages is not None:
            completion = text.messages[-1]["content"]
        else:
            completion = cast(str, text.query).removeprefix(text.prompt or "")
        return text.prompt or "", completion, text.label

    def run(items: list[tuple[str, str, Any]]) -> list[float]:
        prompts, completions, labels = (list(column) for column in zip(*items, strict=True))
        scores = function(prompts=prompts, completions=completions, labels=labels)
        if len(scores) != len(items):
            raise ValueError(f"{spec} returned {len(scores)} scores for {len(items)} completions")
        return [float(s) for s in scores]

    digest = hashlib.sha256(f"{name}/".encode() + Path(path).read_bytes()).hexdigest()
    mean = 0.0 if config.reward_mean is None else config.reward_mean
    std = 1.0 if config.reward_std is None else config.reward_std
    return Reward(encode, run, lambda item: len(item[1]), None, name, digest, mean, std)


class RewardHandler(Handler):
    """The four routes."""

    reward: Reward
    batcher: Batcher
    clip: float | None
    advised_texts: int
    draining = False
    warm = False
    counts: dict[int, int]
    lock = threading.Lock()

    def route(self, method: str, path: str) -> tuple[int, str, bytes]:
        """Answer one request, counted by its status."""
        status = 500
        try:
            answer = self._route(method, path)
            status = answer[0]
            return answer
        except HttpError as error:
            status = error.status
            raise
        finally:
            with self.lock:
                self.counts[status] = self.counts.get(status, 0) + 1

    def _route(self, method: str, path: str) -> tuple[int, str, bytes]:
        routes = {"/health": "GET", "/info": "GET", "/metrics": "GET", "/get_reward": "POST"}
        if path not in routes:
            raise HttpError(404, "not_found", "try /get_reward, /health, /info or /metrics")
        if method != routes[path]:
            raise HttpError(405, "method_not_allowed", f"{path} takes {routes[path]}")
        if path == "/metrics" and self.warm:
            return 200, "text/plain; version=0.0.4", self._metrics()
        if path == "/get_reward" and self.warm:
            return 200, "application/json", self._get_reward()
        alive = self.warm and not self.draining and time.monotonic() - self.batcher.beat < STALE_SECONDS
        if not alive:
            raise HttpError(503, "not_ready")
        if path == "/health":
            return 200, "application/json", json_body({"status": "ok"})
        info = {"model": self.reward.model, "fingerprint": self.reward.fingerprint, "max_texts": self.advised_texts,
                "max_length": self.reward.max_length, "max_body": MAX_BODY, "reward_mean": self.reward.mean,
                "reward_std": self.reward.std, "reward_clip": self.clip}  # fmt: skip
        return 200, "application/json", json_body(info)

    def _get_reward(self) -> bytes:
        deadline = time.monotonic() + ANSWER_SECONDS
        request = self.read_json()
        items = []
        for index, text in enumerate(parse_request(request)):
            try:
                items.append(self.reward.encode(text))
            except Exception as error:
                reason = str(error) if isinstance(error, ValueError) else "the text cannot be encoded"
                raise HttpError(422, "bad_text", reason, index) from error
        scores = self._scores(items, deadline) if items else []
        rewards = [(s - self.reward.mean) / self.reward.std for s in scores]
        if self.clip is not None:
            rewards = [max(-self.clip, min(self.clip, r)) for r in rewards]
        reply = {"rewards": rewards, "scores": scores, "extra_logs": {}, "id": request.get("id"), "model": self.reward.model}
        return json_body(reply)

    def _scores(self, items: list[Any], deadline: float) -> list[float]:
        if self.draining:
            raise HttpError(503, "draining")
        try:
            return self.batcher.submit(items, deadline).result(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Full as error:
            raise HttpError(429, "busy", "the queue is full") from error
        except FutureTimeoutError as error:
            raise HttpError(504, "deadline", f"no score within {ANSWER_SECONDS:g} s") from error
        except NotFiniteError as error:
            raise HttpError(500, "non_finite", "the reward model gave NaN or infinity") from error
        except torch.OutOfMemoryError as error:
            raise HttpError(507, "out_of_memory", "one text alone does not fit the device") from error
        except Exception as error:
            raise HttpError(500, "failed", "the reward model failed; see the server's log") from error

    def _metrics(self) -> bytes:
        with self.lock:
            lines = [f'rm_requests_total{{code="{code}"}} {n}' for code, n in sorted(self.counts.items())]
        lines += [f"rm_forwards_total {self.batcher.forwards}", f"rm_texts_total {self.batcher.scored}"]
        return ("# TYPE rm_requests_total counter\n" + "\n".join(lines) + "\n").encode()


def parse_request(request: Any) -> list[Text]:
    """The texts of a request. Raises HttpError 400 for a wrong shape, 413 for too many, 422 for a text that is no text."""
    if not isinstance(request, dict) or ("query" in request) == ("messages" in request):
        raise HttpError(400, "bad_request", 'an object with exactly one of "query" and "messages"')
    key = "query" if "query" in request else "messages"
    items = request[key]
    if not isinstance(items, list):
        raise HttpError(400, "bad_request", f'"{key}" must be a list')
    if len(items) > MAX_TEXTS:
        raise HttpError(413, "too_many", f"at most {MAX_TEXTS} texts a request")
    shaped = _is_text if key == "query" else is_chat
    for index, item in enumerate(items):
        if not shaped(item):
            raise HttpError(400, "bad_request", f'"{key}" holds something of another shape', index)
        for text in [item] if key == "query" else [m["content"] for m in item]:
            if not _encodable(text):
                raise HttpError(422, "bad_text", "a lone surrogate is not text", index)
    columns = {name: _column(request, name, len(items)) for name in ("prompts", "completions", "labels", "finished")}
    return [
        Text(
            item if key == "query" else None, item if key == "messages" else None, prompt, completion, label, finished is not False
        )
        for item, prompt, completion, label, finished in zip(items, *columns.values(), strict=True)
    ]


def _column(request: dict[str, Any], name: str, count: int) -> Sequence[Any]:
    values = request.get(name)
    if values is None:
        return [None] * count
    kind = {"prompts": str, "completions": str, "finished": bool}.get(name, object)
    if not isinstance(values, list) or len(values) != count or not all(isinstance(v, kind) for v in values):
        raise HttpError(400, "bad_request", f'"{name}" must be a list of {count} values, as long as the texts')
    for index, value in enumerate(values):
        if kind is str and not _encodable(value):
            raise HttpError(422, "bad_text", "a lone surrogate is not text", index)
    return values


def _is_text(item: Any) -> bool:
    return isinstance(item, str)


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(config: ServeConfig) -> int:
    """Bind, load, warm up, answer until a signal; the exit code. Raises ConfigError."""
    parent = os.getppid()
    token = read_token()
    if token is None and not is_loopback(config.host):
        raise ConfigError(f"--host {config.host} can be reached by others: set RM_TOKEN or RM_TOKEN_FILE, or take 127.0.0.1")
    try:
        server = Server((config.host, config.port), RewardHandler)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(f"--host {config.host} --port {config.port}: {error.strerror}") from error
        print(f"serve_rm.py: --host {config.host} --port {config.port}: {error.strerror}", file=sys.stderr)
        return 1
    server.token = token
    RewardHandler.counts = {}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()  # 503 until warm
    try:
        reward = load_reward(config)
        batcher = Batcher(reward.score, reward.size, config.inference_micro_batch_size)
        if reward.example is not None:
            batcher.submit([reward.example], time.monotonic() + 600).result()
        RewardHandler.reward, RewardHandler.batcher, RewardHandler.clip = reward, batcher, config.reward_clip
        RewardHandler.advised_texts = min(MAX_TEXTS, 4 * config.inference_micro_batch_size)
        RewardHandler.warm = True
        announce(config, server.server_address[1], reward.model)
        wait_for_end(config, parent)
        RewardHandler.draining = True
        end = time.monotonic() + 20
        while batcher.busy and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        server.shutdown()
    return 0


def load_reward(config: ServeConfig) -> Reward:
    """What the flags ask for; its fingerprint covers all that changes a reward. Raises ConfigError."""
    if config.reward_fn is not None:
        reward = function_reward(config, config.reward_fn)
    else:
        from recipes.toy import prepare

        reward = model_reward(config, config.reward_model or str(prepare() / "reward_model"))
    settings = f"{reward.fingerprint}/{reward.mean}/{reward.std}/{config.reward_clip}/{reward.max_length}"
    return replace(reward, fingerprint=hashlib.sha256(settings.encode()).hexdigest())


def announce(config: ServeConfig, port: int, model: str) -> None:
    """Say where, on screen and in the ready file, which appears whole or not at all."""
    print(f"serving {model} at http://{config.host}:{port}", flush=True)
    if config.ready_file:
        partial = Path(f"{config.ready_file}.{os.getpid()}")
        partial.write_text(f"{config.host} {port}\n")
        partial.replace(config.ready_file)


def wait_for_end(config: ServeConfig, parent: int) -> None:
    """Until SIGTERM, SIGINT, or the end of the parent; a second signal ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(0)
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    while not stop.wait(0.5):
        if config.exit_with_parent and os.getppid() != parent:
            return


def main() -> None:
    """Command line: exit code 0 after a signal, 1 for a failure, 2 for your configuration."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        sys.exit(serve(parse(ServeConfig, __doc__)))
    except ConfigError as error:
        print(f"serve_rm.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
