"""Prompts: what a record must be, their token ids, and the order they are taken in.

One prompt is `{"prompt": str}`, `{"text": str}` (the same thing, the tutorial's key) or
`{"messages": [{"role", "content"}, ...]}`, with an optional "label" for the reward. A "prompt" that
is a list is messages. Of a preference pair, `{"chosen", "rejected"}`, the prompt is what both reply
to. Which prompts belong to step n is a function of (seed, n): a permutation per epoch, each prompt
once, the last step of an epoch taking those that remain.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch

from reinforce.data.preferences import side
from reinforce.data.records import BadLineError, columns, must_be_unicode
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


def check_record(
    record: Any, prompt_key: str | None = None, label_key: str | None = None
) -> dict[str, Any]:
    """A record as {"prompt": str} or {"messages": [...]}, with "label" if it has one.

    The keys name the columns of prompt and label; without them those are found by the names above.
    Raises BadLineError.
    """
    if not isinstance(record, dict):
        raise BadLineError('not an object, such as {"prompt": "..."}')
    key, value = prompt_of(record, prompt_key)
    checked = {"messages" if isinstance(value, list) else "prompt": value}
    if key == "messages" or isinstance(value, list):
        if not is_chat(value) or value[-1]["role"] == "assistant":
            raise BadLineError(
                f'"{key}" must be a list of {{"role", "content"}} that the assistant answers'
            )
    elif not isinstance(value, str) or not value.strip():
        raise BadLineError(f'"{key}" must be a string that is not empty, or a list of messages')
    must_be_unicode(key, value)
    must_be_json(key, value)  # a message may hold more than two texts
    if label_key is not None and record.get(label_key, "") == "":  # an empty cell of a table
        raise BadLineError(f'no "{label_key}" (--label-key), null or empty; {columns(record)}')
    label = label_key or "label"
    if label in record:
        checked["label"] = record[label]
        must_be_json(label, record[label])
    return checked


def prompt_of(record: dict[str, Any], prompt_key: str | None) -> tuple[str, Any]:
    """The name and the value, of any type, of a record's prompt. Raises BadLineError."""
    if prompt_key is None and "chosen" in record:
        return "messages", side(record, "chosen")[:-1]
    named = [key for key in ([prompt_key] if prompt_key else KEYS) if key in record]
    if len(named) > 1:
        both = " and ".join(f'"{key}"' for key in named)
        raise BadLineError(f"{both} in one record: --prompt-key says which is the prompt")
    if not named:
        wanted = f'"{prompt_key}"' if prompt_key else '"prompt", "text", "messages" or "chosen"'
        raise BadLineError(
            f"no {wanted}; {columns(record)}: --prompt-key names the column of the prompt"
        )
    return named[0], record[named[0]]


def must_be_json(key: str, value: Any) -> None:
    """Raise BadLineError on what cannot be sent to a reward server, in a prompt or a label.

    A date, say, or NaN.
    """
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise BadLineError(f'"{key}" is no JSON value ({error}); make it text') from error


def tokenize(
    records: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int,
    flag: str,
    date: str | None = None,
    limit: str = "--max-prompt-length",
) -> tuple[list[Prompt], int]:
    """Prompts of at most max_length tokens, and how many longer ones were dropped.

    `date` as of `render`; `limit` says where max_length is from. Raises ConfigError.
    """
    prompts, dropped = [], 0
    for index, record in enumerate(records):
        messages = record.get("messages")
        if messages is not None and not tokenizer.chat_template:
            raise ConfigError(
                f"{flag} has messages, but --policy's tokenizer has no chat template; give text"
            )
        if messages is None:
            text = record["prompt"]
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
        raise ConfigError(f"{flag}: every prompt is longer than {max_length} tokens ({limit})")
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
