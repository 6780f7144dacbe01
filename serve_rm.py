"""The reward endpoint: a reward model, or a plain function, behind POST /get_reward.

    python serve_rm.py --reward-model FOLDER --port 5567
    python serve_rm.py --reward-fn rewards.py:politeness --port 5567

    torchrun --nproc-per-node 2 serve_rm.py --data-parallel --reward-model FOLDER --port 5567

    curl -s localhost:5567/get_reward -H 'Content-Type: application/json' \\
        -d '{"query": ["a prompt and its response"]}'

GET /health, /info and /metrics tell how it is. The wire format is OpenRLHF's `--remote_rm_url`. It
answers on loopback; on any other address it wants a token. The model or the function has the main
thread, HTTP another, and a third one ends the process after a signal or a forward that hangs. Of
several processes rank 0 does all this, and the others only compute. What needs PyTorch imports it
where it needs it, so that a function is served within a second. Left out: TLS, several models.
"""
# ruff: noqa: E402

import os

PARENT = os.getppid()  # before imports that take seconds, in which the parent may end

import reinforce.prerequisites  # noqa: F401  # isort: skip

import dataclasses
import errno
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from reinforce.errors import ConfigError
from reinforce.flags import parse
from reinforce.rm_connection import read_token, url_of
from reinforce.run.streams import unheard
from reinforce.serving.batcher import Batcher
from reinforce.serving.body import max_body
from reinforce.serving.config import ServeConfig
from reinforce.serving.gate import is_loopback
from reinforce.serving.handler import RewardServer, Service
from reinforce.serving.load import load_reward
from reinforce.serving.processes import processes, rank
from reinforce.serving.protocol import MAX_TEXTS
from reinforce.serving.reward import Reward
from reinforce.serving.watch import Watch, end_soon

if TYPE_CHECKING:
    from reinforce.serving.distributed import Ranks


def serve(config: ServeConfig) -> int:
    """Bind, load, warm up, answer until a signal; the exit code. Raises ConfigError."""
    config.check_processes(processes())
    if rank() > 0:
        return follow(config)
    token = read_token()
    if token is None and not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} can be reached by others: set RM_TOKEN or RM_TOKEN_FILE, "
            "or take 127.0.0.1"
        )
    where = f"--host {config.host} --port {config.port}"
    try:
        server = RewardServer((config.host, config.port))
    except (TypeError, UnicodeError) as error:  # bytes that are no text, or a label too long
        raise ConfigError(f"{where}: {config.host!a} is no address") from error
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(f"{where}: {error.strerror}") from error
        print(f"serve_rm.py: {where}: {error.strerror}", file=sys.stderr)
        return 1
    server.token = token
    server.start()  # 503 until warm
    try:
        ends_with_parent = config.exit_with_parent or processes() > 1  # the parent is torchrun
        with Watch(server, PARENT if ends_with_parent else None):
            ranks = join(config) if processes() > 1 else None
            batcher, service = load(config, ranks)
            server.service = service
            announce(config, server.server_port, service.reward.model)
            batcher.run()
            if ranks is not None:
                ranks.stop()
            end_soon()
    finally:
        server.close()
    return 0


def join(config: ServeConfig) -> "Ranks":
    """All processes of the server. Raises ConfigError."""
    from reinforce.serving.distributed import Ranks
    from reinforce.tensor_plan import refuse_version

    if config.tensor_model_parallel_size > 1:
        refuse_version(config.tensor_model_parallel_size)
    return Ranks(config.tensor_model_parallel_size)


def follow(config: ServeConfig) -> int:
    """Compute for rank 0 until that ends; the exit code. Raises ConfigError."""
    ranks = join(config)
    ranks.follow(ranks.together(lambda: warm_reward(config)).score)
    return 0


def load(config: ServeConfig, ranks: "Ranks | None") -> tuple[Batcher, Service]:
    """The reward, warm, and the worker that is to own it. Raises ConfigError."""
    batch = config.inference_micro_batch_size
    if ranks is None:
        reward = warm_reward(config)
        score = reward.score
    else:
        reward = ranks.together(lambda: warm_reward(config))
        score, batch = ranks.over(reward.score), batch * ranks.copies
    batcher = Batcher(score, reward.size, batch)
    texts = min(MAX_TEXTS, 4 * config.inference_micro_batch_size)
    most = max_body(texts, reward.max_length)
    return batcher, Service(reward, batcher, config.reward_clip, texts, most)


def warm_reward(config: ServeConfig) -> Reward:
    """The reward, of a model after its first pass, without chatter. Raises ConfigError."""
    if config.reward_fn is None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
    if config.reward_model is None and config.reward_fn is None:
        from recipes import toy

        config = dataclasses.replace(config, reward_model=str(toy.prepare() / "reward_model"))
    return load_reward(config)


def announce(config: ServeConfig, port: int, model: str) -> None:
    """Say where, on screen and in the ready file, which appears whole or not at all.

    Raises ConfigError if that cannot be written.
    """
    print(f"serving {model} at {url_of(config.host, port)}", flush=True)
    if config.ready_file:
        partial = Path(f"{config.ready_file}.{os.getpid()}")
        try:
            partial.write_text(f"{config.host} {port}\n")
            partial.replace(config.ready_file)
        except OSError as error:
            raise ConfigError(
                f"--ready-file {config.ready_file}: cannot be written ({error.strerror})"
            ) from error


def main() -> None:
    """Exit code 0 after a signal, 1 a failure, 2 your configuration, 70 a hang or a lost GPU."""
    sys.stdout, sys.stderr = unheard(sys.stdout), unheard(sys.stderr)
    try:
        sys.exit(serve(parse(ServeConfig, __doc__)))
    except ConfigError as error:
        if rank() > 0:  # its error is that of rank 0, whose exit code is the server's
            sys.exit(0)
        print(f"serve_rm.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
