"""Prompts: what a record must be, their token ids, and the order they are taken in.

One prompt is `{"prompt": str}`, `{"text": str}` (the same thing, the seed's key) or `{"messages": [{"role", "content"}, ...]}`,
with an optional "label" for the reward; of a preference pair, `{"chosen", "rejected"}`, it is what both reply to. Which prompts
belong to step n is a function of (seed, n): a permutation per epoch, each prompt once, the last step of an epoch taking those
that remain.
"""

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch

from reinforce.errors import ConfigError
from reinforce.preferences import side
from reinforce.records import BadLineError, is_chat
from reinforce.sampler import row_seed

KEYS = ("prompt", "text", "messages")


@dataclass(frozen=True)
class Prompt:
    """One prompt: the text that the policy reads (rendered, if it came as messages), its token ids, and what came with it."""

    index: int
    text: str
    ids: tuple[int, ...]
    messages: list[dict[str, str]] | None = None
    label: Any = None


@dataclass(frozen=True)
class Data:
    """The prompts of a run, and the order they are taken in."""

    prompts: list[Prompt]
    held_out: list[Prompt]  # of validation
    per_step: int  # prompts of a step
    seed: int

    def prompts_of(self, step: int) -> list[Prompt]:
        """Those of a step, from 0: each once an epoch."""
        return [self.prompts[i] for i in step_prompts(len(self.prompts), self.per_step, self.seed, step)]

    def total_steps(self, max_steps: int | None, max_epochs: int | None) -> int:
        """Steps of a whole run."""
        return total_steps(len(self.prompts), self.per_step, max_steps, max_epochs)

    def epoch(self, step: int) -> int:
        """The epoch of a step, both from 0."""
        return step // steps_per_epoch(len(self.prompts), self.per_step)

    def prompts_seen(self, step: int) -> int:
        """How many prompts were taken up to the end of a step, again in each epoch."""
        place = step % steps_per_epoch(len(self.prompts), self.per_step)
        return self.epoch(step) * len(self.prompts) + min((place + 1) * self.per_step, len(self.prompts))


def check_record(record: Any) -> dict[str, Any]:
    """The record itself, if it is a prompt. Raises BadLineError with the reason."""
    if isinstance(record, dict) and "chosen" in record:
        record = {"messages": side(record, "chosen")[:-1], **({"label": record["label"]} if "label" in record else {})}
    if not isinstance(record, dict) or sum(key in record for key in KEYS) != 1:
        raise BadLineError('not an object with exactly one of "prompt", "text", "messages", or with "chosen" and "rejected"')
    key = next(key for key in KEYS if key in record)
    value = record[key]
    if key == "messages":
        if not is_chat(value) or value[-1]["role"] == "assistant":
            raise BadLineError('"messages" must be a list of {"role", "content"} strings that the assistant answers')
    elif not isinstance(value, str) or not value.strip():
        raise BadLineError(f'"{key}" must be a string that is not empty')
    return record


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text to be continued: one begin token if the tokenizer uses one, no end token of its own adding.

    A text that already starts with the begin token gets no second one.
    """
    own_begin = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not own_begin)["input_ids"]
    adds_end = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if adds_end and tokenizer.cls_token is None else ids


def render(tokenizer: Any, messages: list[dict[str, str]], where: str, **how: Any) -> str:
    """A conversation in the tokenizer's chat template. Raises ConfigError where the template refuses it."""
    try:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **how))
    except Exception as error:  # templates raise what they like
        raise ConfigError(f"{where}: the chat template refuses {messages!r:.200} ({error})") from error


def tokenize(records: list[dict[str, Any]], tokenizer: Any, max_length: int, flag: str) -> tuple[list[Prompt], int]:
    """Prompts of at most max_length tokens, and how many longer ones were dropped. Raises ConfigError."""
    prompts, dropped = [], 0
    for index, record in enumerate(records):
        messages = record.get("messages")
        if messages is not None and not tokenizer.chat_template:
            raise ConfigError(f'{flag} has "messages", but the tokenizer of --policy has no chat template; use "prompt"')
        if messages is None:
            text = record["prompt"] if "prompt" in record else record["text"]
        else:
            text = render(tokenizer, messages, f"{flag}, prompt {index + 1}", add_generation_prompt=True)
        ids = tuple(encode(tokenizer, text) if messages is None else tokenizer(text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ConfigError(f"{flag}: the tokenizer of --policy makes no tokens of prompt {index + 1}, {text!r}")
        if len(ids) > max_length:
            dropped += 1
        else:
            prompts.append(Prompt(index, text, ids, messages, record.get("label")))
    if not prompts:
        raise ConfigError(f"{flag}: every prompt is longer than --max-prompt-length {max_length} tokens")
    return prompts, dropped


def steps_per_epoch(prompts: int, per_step: int) -> int:
    """Steps that take each prompt once; the last may be short."""
    return -(-prompts // per_step)


def total_steps(prompts: int, per_step: int, max_steps: int | None, max_epochs: int | None) -> int:
    """Steps of a whole run: so many at most, so many epochs at most.

    >>> total_steps(5, 2, max_steps=100, max_epochs=2)
    6
    """
    return min(max_steps or sys.maxsize, (max_epochs or sys.maxsize) * steps_per_epoch(prompts, per_step))


def step_prompts(prompts: int, per_step: int, seed: int, step: int) -> list[int]:
    """Positions of the prompts of a step: a slice of that epoch's permutation.

    >>> sorted(step_prompts(5, 2, 0, 0) + step_prompts(5, 2, 0, 1) + step_prompts(5, 2, 0, 2))
    [0, 1, 2, 3, 4]
    """
    epoch, place = divmod(step, steps_per_epoch(prompts, per_step))
    order = torch.randperm(prompts, generator=torch.Generator().manual_seed(row_seed(seed, epoch, -1, -1)))
    return order[place * per_step : (place + 1) * per_step].tolist()
