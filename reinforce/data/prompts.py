"""Prompts: what a record must be, their token ids, and the order they are taken in.

One prompt is `{"prompt": str}`, `{"text": str}` (the same thing, the seed's key) or `{"messages": [{"role", "content"}, ...]}`,
with an optional "label" for the reward; of a preference pair, `{"chosen", "rejected"}`, it is what both reply to. Which prompts
belong to step n is a function of (seed, n): a permutation per epoch, each prompt once, the last step of an epoch taking those
that remain.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.data.preferences import side
from reinforce.data.records import BadLineError
from reinforce.errors import ConfigError
from reinforce.sampler import row_seed
from reinforce.text import Prompt, encode, is_chat, render

KEYS = ("prompt", "text", "messages")


@dataclass(frozen=True)
class Data:
    """The prompts of a run, and the order they are taken in."""

    prompts: list[Prompt]
    held_out: list[Prompt]  # of validation
    per_step: int  # prompts of a step
    seed: int

    def prompts_of(self, step: int) -> list[Prompt]:
        """Those of a step, from 0: each once an epoch."""
        return [
            self.prompts[i] for i in step_prompts(len(self.prompts), self.per_step, self.seed, step)
        ]

    def total_steps(self, max_steps: int | None, max_epochs: int | None) -> int:
        """Steps of a whole run."""
        return total_steps(len(self.prompts), self.per_step, max_steps, max_epochs)

    def epoch(self, step: int) -> int:
        """The epoch of a step, both from 0."""
        return step // steps_per_epoch(len(self.prompts), self.per_step)

    def prompts_seen(self, step: int) -> int:
        """How many prompts were taken up to the end of a step, again in each epoch."""
        place = step % steps_per_epoch(len(self.prompts), self.per_step)
        return self.epoch(step) * len(self.prompts) + min(
            (place + 1) * self.per_step, len(self.prompts)
        )


def check_record(record: Any) -> dict[str, Any]:
    """The record itself, if it is a prompt. Raises BadLineError with the reason."""
    if isinstance(record, dict) and "chosen" in record:
        record = {
            "messages": side(record, "chosen")[:-1],
            **({"label": record["label"]} if "label" in record else {}),
        }
    if not isinstance(record, dict) or sum(key in record for key in KEYS) != 1:
        raise BadLineError(
            'not an object with exactly one of "prompt", "text", "messages", or with "chosen" and "rejected"'
        )
    key = next(key for key in KEYS if key in record)
    value = record[key]
    if key == "messages":
        if not is_chat(value) or value[-1]["role"] == "assistant":
            raise BadLineError(
                '"messages" must be a list of {"role", "content"} strings that the assistant answers'
            )
    elif not isinstance(value, str) or not value.strip():
        raise BadLineError(f'"{key}" must be a string that is not empty')
    for text in (
        [value]
        if isinstance(value, str)
        else [m[part] for m in value for part in ("role", "content")]
    ):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadLineError(
                f'"{key}" holds half of a surrogate pair, {error.object[error.start]!r}'
            ) from error
    return record


def tokenize(
    records: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    flag: str,
    date: str | None = None,
) -> tuple[list[Prompt], int]:
    """Prompts of at most max_length tokens, and how many longer ones were dropped; `date` as of `render`. Raises ConfigError."""
    prompts, dropped = [], 0
    for index, record in enumerate(records):
        messages = record.get("messages")
        if messages is not None and not tokenizer.chat_template:
            raise ConfigError(
                f'{flag} has "messages", but the tokenizer of --policy has no chat template; use "prompt"'
            )
        if messages is None:
            text = record["prompt"] if "prompt" in record else record["text"]
        else:
            text = render(
                tokenizer, messages, f"{flag}, prompt {index + 1}", date, add_generation_prompt=True
            )
        ids = tuple(
            encode(tokenizer, text)
            if messages is None
            else tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        if not ids:
            raise ConfigError(
                f"{flag}: the tokenizer of --policy makes no tokens of prompt {index + 1}, {text!r}"
            )
        if len(ids) > max_length:
            dropped += 1
        else:
            prompts.append(Prompt(index, text, ids, messages, record.get("label")))
    if not prompts:
        raise ConfigError(
            f"{flag}: every prompt is longer than --max-prompt-length {max_length} tokens"
        )
    return prompts, dropped


def steps_per_epoch(prompts: int, per_step: int) -> int:
    """Steps that take each prompt once; the last may be short."""
    return -(-prompts // per_step)


def total_steps(prompts: int, per_step: int, max_steps: int | None, max_epochs: int | None) -> int:
    """Steps of a whole run: so many at most, so many epochs at most.

    >>> total_steps(5, 2, max_steps=100, max_epochs=2)
    6
    """
    return min(
        max_steps or sys.maxsize, (max_epochs or sys.maxsize) * steps_per_epoch(prompts, per_step)
    )


def step_prompts(prompts: int, per_step: int, seed: int, step: int) -> list[int]:
    """Positions of the prompts of a step: a slice of that epoch's permutation.

    >>> sorted(step_prompts(5, 2, 0, 0) + step_prompts(5, 2, 0, 1) + step_prompts(5, 2, 0, 2))
    [0, 1, 2, 3, 4]
    """
    epoch, place = divmod(step, steps_per_epoch(prompts, per_step))
    order = torch.randperm(
        prompts, generator=torch.Generator().manual_seed(row_seed(seed, epoch, -1, -1))
    )
    return order[place * per_step : (place + 1) * per_step].tolist()
