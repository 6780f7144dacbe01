"""What is served, as texts -> items -> scores; and a plain Python function as such a reward."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from reinforce.serving.config import ServeConfig
from reinforce.serving.function import FunctionError, load_function
from reinforce.serving.protocol import Text


@dataclass(frozen=True)
class Reward:
    """What is served: how a text becomes an item, how items become scores, and what /info tells.

    `encode` tells as well whether the text was cut.
    """

    encode: Callable[["Text"], tuple[Any, bool]]
    score: Callable[[list[Any]], list[float]]
    size: Callable[[Any], int]
    model: str
    fingerprint: str
    mean: float
    std: float
    max_length: int | None = None


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
        labels = copy.deepcopy(labels)  # a function may write to them, and be called again
        scores = function(prompts=prompts, completions=completions, labels=labels)
        return numbers_of(scores, len(items), function.shown)

    mean = 0.0 if config.reward_mean is None else config.reward_mean
    std = 1.0 if config.reward_std is None else config.reward_std
    return Reward(encode, run, lambda item: len(item[1]), named.name, named.digest, mean, std)


def numbers_of(scores: Any, count: int, spec: str) -> list[float]:
    """What a reward function returned, if it is one number for each completion.

    A list, tuple, array or 1-D tensor of them. Raises FunctionError.
    """
    values = _plain(scores)
    # of a dict the keys, of a string the digits would become rewards
    if not isinstance(values, (list, tuple)):
        raise FunctionError(f"{spec} returned a {type(scores).__name__}, not a list of numbers")
    if len(values) != count:
        raise FunctionError(f"{spec} returned {len(values)} scores for {count} completions")
    numbers = []
    for value in values:
        number = _plain(value)
        while isinstance(number, list) and not isinstance(value, list) and len(number) == 1:
            number = number[0]  # a tensor of one number
        if not isinstance(number, (int, float)):
            raise FunctionError(f"{spec} returned {value!r:.80} as a score")
        try:
            numbers.append(float(number))
        except OverflowError as error:
            raise FunctionError(f"{spec} returned {number!r:.80} as a score") from error
    return numbers


def _plain(value: Any) -> Any:
    """Python's own numbers, or a list of them, of an array or a tensor.

    Anything else comes back as it is: a time, and what numpy has masked, are no numbers.
    """
    kind = getattr(getattr(value, "dtype", None), "kind", "f")  # numpy's; a tensor has none
    return value.tolist() if hasattr(value, "tolist") and kind in "biufO" else value
