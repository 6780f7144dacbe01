"""A reward model, ready to be served."""

import math
import threading
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import cached_file

from reinforce import device as devices
from reinforce.errors import ConfigError
from reinforce.serving import tensor_parallel
from reinforce.serving.config import ServeConfig
from reinforce.serving.cut import last_tokens
from reinforce.serving.processes import local_rank, processes
from reinforce.serving.protocol import Text
from reinforce.serving.reward import Reward
from reinforce.serving.reward_model import (
    fingerprint,
    load_reward_model,
    messages_ids,
    query_ids,
    score,
)


def model_reward(config: ServeConfig, name: str) -> Reward:
    """A one-label sequence classifier from a folder or the hub. Raises ConfigError."""
    device = devices.pick(config.device, local_rank())
    size, options = config.tensor_model_parallel_size, {}
    if size > 1:
        tensor_parallel.check_model(name, size, device)
        options["distributed_config"] = tensor_parallel.split(size, processes() // size)
    model, tokenizer = load_reward_model(name, device, **options)
    bf16 = devices.use_bf16(config.precision, device, sum(p.numel() for p in model.parameters()))
    hf = cast(Any, model).config
    longest = (
        config.max_length or getattr(hf.get_text_config(), "max_position_embeddings", None) or 4096
    )
    lock = threading.Lock()  # a fast tokenizer is not safe to share between threads

    def ids_of(text: Text) -> list[int]:
        if text.messages is not None and tokenizer.chat_template is None:
            raise ValueError("messages, but the reward model has no chat template")
        with lock:
            if text.messages is None:
                return query_ids(tokenizer, cast(str, text.query))
            return messages_ids(tokenizer, text.messages, text.finished, config.date)

    def encode(text: Text) -> tuple[list[int], bool]:
        return last_tokens(text, longest, ids_of)

    @torch.inference_mode()
    def run(items: list[list[int]]) -> list[float]:
        with devices.autocast(device, bf16):
            return cast(list[float], score(model, items, tokenizer.pad_token_id or 0).tolist())

    folder = (
        name
        if Path(name).is_dir()
        else str(Path(cast(str, cached_file(name, "config.json"))).parent)
    )
    mean, std = standard(config, hf, name)
    label = Path(name).resolve().name if Path(name).is_dir() else name
    dated = "strftime_now" in str(tokenizer.chat_template)
    digest = fingerprint(folder) + ("/bf16" if bf16 else "") + (f"/{config.date}" if dated else "")
    return Reward(encode, run, len, [1] * min(8, longest), label, digest, mean, std, longest)


def standard(config: ServeConfig, hf: Any, name: str) -> tuple[float, float]:
    """By what mean and deviation scores are standardised: a flag's, or those of the model's config.

    Raises ConfigError on what is no mean or no deviation in the latter.
    """
    mean, std = getattr(hf, "reward_mean", 0.0), getattr(hf, "reward_std", 1.0)
    mean = mean if config.reward_mean is None else config.reward_mean
    std = std if config.reward_std is None else config.reward_std
    finite = all(isinstance(x, float | int) and math.isfinite(x) for x in (mean, std))
    if not finite or std <= 0:
        raise ConfigError(
            f"--reward-model {name}: its config.json has reward_mean {mean!r}, reward_std {std!r}; "
            "they must be finite, the deviation positive: give --reward-mean and --reward-std"
        )
    return mean, std
