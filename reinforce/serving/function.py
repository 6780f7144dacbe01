"""A reward function, `--reward-fn FILE.py:NAME`: looked at before the server is ready.

It is called as f(prompts=, completions=, labels=), three lists of the same length. What it raises
is told to whoever asked for the reward, with the function's file and line.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reinforce.errors import ConfigError
from reinforce.plugin import Named, blame, load_named
from reinforce.serving.memory import is_out_of_memory

FLAG = "--reward-fn"
GIVEN = ("prompts", "completions", "labels")
CALL = f"f({', '.join(f'{name}=' for name in GIVEN)})"


class FunctionError(ValueError):
    """What a reward function did wrong, for whoever asked for a reward: no folder, no traceback."""


@dataclass(frozen=True)
class RewardFunction:
    """A function that can be called."""

    named: Named

    @property
    def shown(self) -> str:
        """FILE.py:NAME without the folder."""
        return f"{self.named.file.name}:{self.named.name}"

    def __call__(self, prompts: list[str], completions: list[str], labels: list[Any]) -> Any:
        """Whatever the function returns. Raises FunctionError for whatever it raises."""
        try:
            return self.named.value(prompts=prompts, completions=completions, labels=labels)
        except BaseException as error:  # some libraries' time-outs and panics are no Exception
            if is_out_of_memory(error):
                raise
            raise FunctionError(blame(error, self.named.file)) from error


def load_function(spec: str) -> RewardFunction:
    """The function that a command line names. Raises ConfigError with the file and line."""
    named = load_named(spec, FLAG)
    if flaw := flaw_of(named.value):
        raise ConfigError(f"{FLAG} {spec}: {named.file.name}{_line(named.value)}: {flaw}")
    return RewardFunction(named)


def flaw_of(value: Any) -> str | None:
    """Why a value cannot be called as a reward function; None if it can.

    >>> flaw_of(lambda prompts, completions: [0.0])
    'it takes no: labels; it is called as f(prompts=, completions=, labels=)'
    """
    if isinstance(value, type):
        return "it is a class; name a function, or an object of the class"
    if not callable(value):
        return f"it is no function, but of type {type(value).__name__}"
    code = _code(value)
    if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        return "it is a coroutine (async def); write def, and asyncio.run inside it"
    if inspect.isgeneratorfunction(code):
        return "it is a generator (it has a yield); return a list of floats"
    try:
        parameters = inspect.signature(value, follow_wrapped=False).parameters.values()
    except ValueError:  # some written in C have none
        return None
    faults = _faults(list(parameters))
    return f"{' and '.join(faults)}; it is called as {CALL}" if faults else None


def _faults(parameters: list[inspect.Parameter]) -> list[str]:
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    placed = [p.name for p in parameters if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    rest = any(p.kind == p.VAR_KEYWORD for p in parameters)
    needed = [p.name for p in parameters if p.default is p.empty and p.name in named]
    lists = {
        "takes no": [name for name in GIVEN if name not in (*named, *placed) and not rest],
        "takes by position alone": placed,
        "needs as well": [name for name in needed if name not in GIVEN],
    }
    return [f"it {verb}: {', '.join(names)}" for verb, names in lists.items() if names]


def _code(value: Any) -> Callable[..., Any]:
    """The function that runs when a value is called."""
    if inspect.isroutine(value):
        return value
    inner = getattr(value, "func", None)  # of functools.partial
    return inner if inspect.isroutine(inner) else type(value).__call__


def _line(value: Any) -> str:
    made = value if isinstance(value, type) else _code(value)
    try:
        return f" line {inspect.getsourcelines(made)[1]}"
    except (OSError, TypeError):  # neither a class nor a function of a file
        return ""
