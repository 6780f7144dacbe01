"""The reward endpoint: a reward model, or a plain function, behind POST /get_reward.

    python serve_rm.py --reward-model FOLDER --port 5567
    python serve_rm.py --reward-fn rewards.py:politeness --port 5567

    curl -s localhost:5567/get_reward -H 'Content-Type: application/json' -d '{"query": ["a prompt and its response"]}'

GET /health, /info and /metrics tell how it is. The wire format is OpenRLHF's `--remote_rm_url`. It answers on loopback;
on any other address it wants a token. Left out: TLS, several models, several processes.
"""

import reinforce.prerequisites  # noqa: F401  # isort: skip

import dataclasses
import errno
import ipaddress
import os
import signal
import sys
import threading
import time
from pathlib import Path

import transformers

from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.rm_connection import read_token
from reinforce.serving.batcher import Batcher
from reinforce.serving.config import ServeConfig
from reinforce.serving.handler import RewardServer, Service
from reinforce.serving.protocol import MAX_TEXTS
from reinforce.serving.reward import load_reward


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
        raise ConfigError(
            f"--host {config.host} can be reached by others: set RM_TOKEN or RM_TOKEN_FILE, or take 127.0.0.1"
        )
    try:
        server = RewardServer((config.host, config.port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(
                f"--host {config.host} --port {config.port}: {error.strerror}"
            ) from error
        print(
            f"serve_rm.py: --host {config.host} --port {config.port}: {error.strerror}",
            file=sys.stderr,
        )
        return 1
    server.token = token
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    ).start()  # 503 until warm
    try:
        if config.reward_model is None and config.reward_fn is None:
            from recipes import toy

            config = dataclasses.replace(config, reward_model=str(toy.prepare() / "reward_model"))
        reward = load_reward(config)
        batcher = Batcher(reward.score, reward.size, config.inference_micro_batch_size)
        if reward.example is not None:
            batcher.submit([reward.example], time.monotonic() + 600).result()
        advised = min(MAX_TEXTS, 4 * config.inference_micro_batch_size)
        server.service = Service(reward, batcher, config.reward_clip, advised)
        announce(config, server.server_address[1], reward.model)
        wait_for_end(config, parent)
        server.draining = True
        end = time.monotonic() + 20
        while batcher.busy and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        server.shutdown()
    return 0


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
