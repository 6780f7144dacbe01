"""What is served: a reward model, or a plain Python function, as texts -> items -> scores."""

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import cached_file

from reinforce import device as devices
from reinforce.serving import distributed, tensor_parallel
from reinforce.serving.config import ServeConfig
from reinforce.serving.cut import last_tokens
from reinforce.serving.function import FunctionError, load_function
from reinforce.serving.protocol import Text
from reinforce.serving.reward_model import (
    fingerprint,
    load_reward_model,
    messages_ids,
    query_ids,
    score,
)


@dataclass(frozen=True)
class Reward:
    """What is served: how a text becomes an item, how items become scores, and what /info tells.

    `encode` tells as well whether the text was cut.
    """

    encode: Callable[["Text"], tuple[Any, bool]]
    score: Callable[[list[Any]], list[float]]
    size: Callable[[Any], int]
    example: Any  # scored once before the server calls itself ready; None: nothing to warm up
    model: str
    fingerprint: str
    mean: float
    std: float
    max_length: int | None = None


def model_reward(config: ServeConfig, name: str) -> Reward:
    """A one-label sequence classifier from a folder or the hub. Raises ConfigError."""
    device = devices.pick(config.device, distributed.local_rank())
    size, options = config.tensor_model_parallel_size, {}
    if size > 1:
        tensor_parallel.check_model(name, size, device)
        options["distributed_config"] = tensor_parallel.split(size, distributed.processes() // size)
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
    mean = config.reward_mean if config.reward_mean is not None else getattr(hf, "reward_mean", 0.0)
    std = config.reward_std if config.reward_std is not None else getattr(hf, "reward_std", 1.0)
    label = Path(name).resolve().name if Path(name).is_dir() else name
    dated = "strftime_now" in str(tokenizer.chat_template)
    digest = fingerprint(folder) + ("/bf16" if bf16 else "") + (f"/{config.date}" if dated else "")
    return Reward(encode, run, len, [1] * min(8, longest), label, digest, mean, std, longest)


def function_reward(config: ServeConfig, spec: str) -> Reward:
    """A plain Python function, FILE.py:NAME. Raises ConfigError."""
    function = load_function(spec)
    named = function.named

    def encode(text: Text) -> tuple[tuple[str, str, Any], bool]:
        if text.completion is not None:
            completion = text.completion
        elif text.messages is not None:
            completion = text.messages[-1]["content"]
        else:
            completion = cast(str, text.query).removeprefix(text.prompt or "")
        return (text.prompt or "", completion, text.label), False

    def run(items: list[tuple[str, str, Any]]) -> list[float]:
        prompts, completions, labels = (list(column) for column in zip(*items, strict=True))
        scores = function(prompts=prompts, completions=completions, labels=labels)
        return numbers_of(scores, len(items), function.shown)

    mean = 0.0 if config.reward_mean is None else config.reward_mean
    std = 1.0 if config.reward_std is None else config.reward_std
    return Reward(encode, run, lambda item: len(item[1]), None, named.name, named.digest, mean, std)


def numbers_of(scores: Any, count: int, spec: str) -> list[float]:
    """What a reward function returned, if it is one number for each completion.

    A list, tuple, array or 1-D tensor of them. Raises FunctionError.
    """
    values = scores.tolist() if hasattr(scores, "tolist") else scores
    # of a dict the keys, of a string the digits would become rewards
    if not isinstance(values, (list, tuple)):
        raise FunctionError(f"{spec} returned a {type(scores).__name__}, not a list of numbers")
    if len(values) != count:
        raise FunctionError(f"{spec} returned {len(values)} scores for {count} completions")
    plain = [value.item() if hasattr(value, "item") else value for value in values]
    for value in plain:
        if not isinstance(value, (int, float)):
            raise FunctionError(f"{spec} returned {value!r:.80} as a score")
    return [float(value) for value in plain]


def load_reward(config: ServeConfig) -> Reward:
    """What the flags ask for. Raises ConfigError.

    Its fingerprint covers all that changes a reward.
    """
    if config.reward_fn is not None:
        reward = function_reward(config, config.reward_fn)
    else:
        reward = model_reward(config, str(config.reward_model))
    settings = (
        f"{reward.fingerprint}/{reward.mean}/{reward.std}/{config.reward_clip}/{reward.max_length}"
    )
    return replace(reward, fingerprint=hashlib.sha256(settings.encode()).hexdigest())
