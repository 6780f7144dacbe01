"""A reward model, ready to be served."""

import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers.utils import cached_file

from reinforce import device as devices
from reinforce.errors import ConfigError, first_line
from reinforce.policy import OUT_OF_MEMORY, context_of, store_frozen
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
    written,
)


def model_reward(config: ServeConfig, name: str) -> Reward:
    """A one-label sequence classifier from a folder or the hub, warm. Raises ConfigError."""
    device = devices.pick(config.device, local_rank())
    size, options = config.tensor_model_parallel_size, {}
    if size > 1:
        tensor_parallel.check_model(name, size, device)
        options["distributed_config"] = tensor_parallel.split(size, processes() // size)
    before = written(name)
    model, tokenizer = load_reward_model(name, device, **options)
    bf16 = devices.use_bf16(config.precision, device, sum(p.numel() for p in model.parameters()))
    hf = cast(Any, model).config
    most = positions(model)
    # DeBERTa's third version has relative positions alone, so a longer text has a score as well
    fixed = most is not None and getattr(hf, "position_biased_input", True)
    if fixed and config.max_length is not None and config.max_length > cast(int, most):
        raise ConfigError(f"--max-length {config.max_length}: {name} has {most} positions")
    longest = config.max_length or most or 4096
    begin = frozenset(i for i in (tokenizer.bos_token_id, tokenizer.cls_token_id) if i is not None)
    lock = threading.Lock()  # a fast tokenizer is not safe to share between threads

    def ids_of(text: Text) -> list[int]:
        if text.messages is not None and tokenizer.chat_template is None:
            raise ValueError("messages, but the reward model has no chat template")
        with lock:
            if text.messages is None:
                return query_ids(tokenizer, cast(str, text.query))
            return messages_ids(tokenizer, text.messages, text.finished, config.date)

    rows = getattr(hf.get_text_config(), "vocab_size", sys.maxsize)  # of the embeddings
    pad = tokenizer.pad_token_id or 0
    pad = pad if pad < rows else 0  # a pad token of the tokenizer alone; no score depends on it

    def encode(text: Text) -> tuple[list[int], bool]:
        ids, cut = last_tokens(text, longest, ids_of, begin)
        if max(ids, default=0) >= rows:
            raise ValueError(
                f"it holds the token {max(ids)}, of the tokenizer alone: the model has {rows}"
            )
        return ids, cut

    @torch.inference_mode()
    def run(items: list[list[int]], autocast: bool = bf16) -> list[float]:
        with devices.autocast(device, autocast):
            return cast(list[float], score(model, items, pad).tolist())

    try:
        if hasattr(model, "score"):
            run([[1] * min(8, longest)])  # the first pass, which is slow
        else:
            check_pooling(lambda items: run(items, False), tokenizer, min(64, longest), name)
    except (ConfigError, *OUT_OF_MEMORY):
        raise
    except Exception as error:  # an encoder-decoder, say, looks for end tokens
        raise ConfigError(
            f"--reward-model {name}: a plain text has no score ({first_line(error)}); a model of "
            "this kind cannot be served"
        ) from error
    backbone = cast(Any, model).base_model
    if bf16 and size == 1 and backbone is not model:  # half the memory, for the same scores
        store_frozen(backbone, torch.bfloat16)
    folder = (
        name
        if Path(name).is_dir()
        else str(Path(cast(str, cached_file(name, "config.json"))).parent)
    )
    mean, std = standard(config, hf, name)
    label = Path(name).resolve().name if Path(name).is_dir() else name
    dated = "strftime_now" in str(tokenizer.chat_template)
    digest = fingerprint(folder) + ("/bf16" if bf16 else "") + (f"/{config.date}" if dated else "")
    if written(name) != before:
        raise ConfigError(
            f"--reward-model {name}: its files changed while it was loaded; try again"
        )
    return Reward(encode, run, len, label, digest, mean, std, longest)


def positions(model: Any) -> int | None:
    """How many tokens a text may have, so that its score is its own; None if unknown.

    RoBERTa's kind counts positions from after its pad token's id.
    """
    for name, table in model.named_modules():
        first, rows = (getattr(table, key, None) for key in ("padding_idx", "num_embeddings"))
        if name.endswith("position_embeddings") and first is not None and rows is not None:
            return cast(int, rows) - cast(int, first) - 1
    return context_of(model.config)


def check_pooling(
    run: Callable[[list[list[int]]], list[float]], tokenizer: Any, longest: int, name: str
) -> None:
    """A model that pools in its own way is served only if it finds a text's own last token.

    `run` scores in float32, texts of up to `longest` tokens. Raises ConfigError where a longer text
    beside it changes a score by more than rounding, or an end token does not change it.
    """
    special = set(tokenizer.all_special_ids)
    known = [i for i in range(len(tokenizer)) if i not in special]
    texts = [known[i : i + 3 + i] for i in range(6)]  # 3 to 8 tokens
    longer = (known * longest)[:longest]
    alone = [run([text])[0] for text in texts]
    beside = run([*texts, longer])[:-1]
    change, before, after = max((abs(a - b), a, b) for a, b in zip(alone, beside, strict=True))
    if change > 1e-3 * (max(alone) - min(alone)) + 1e-4 * abs(before):
        raise ConfigError(
            f"--reward-model {name}: the score of a text changes from {before:.4f} to {after:.4f} "
            "where a longer text is scored with it; a model of this kind cannot be served"
        )
    end, text = tokenizer.eos_token_id, texts[0]
    blind = end == tokenizer.pad_token_id and abs(run([[*text, end]])[0] - alone[0]) < 1e-4
    if blind:  # it takes the last token that is not the pad token
        raise ConfigError(
            f"--reward-model {name}: a text with its end token and one without get the same score; "
            "a model of this kind cannot be served"
        )


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
