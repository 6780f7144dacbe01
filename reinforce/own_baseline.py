"""A baseline from a file, `--baseline FILE.py:NAME`, tried on an example before any model loads.

    def median(R, valid):  # R (P, K) float64, valid (P, K) bool -> advantage (P, K)
        b = R.masked_fill(~valid, torch.nan).nanmedian(1, keepdim=True).values
        return (R - b).masked_fill(~valid, 0.0)

NAME is a function, or an object that can be called. Every rank calls it with the same rows of all
ranks, so it must be deterministic. If an object has an attribute `state`, a JSON value, each
checkpoint saves the state, and a run that goes on sets it again. What the baseline does to the
gradient is its author's business: a baseline is unbiased if it does not depend on the response
that it is subtracted for.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reinforce.baselines import BASELINES, Baseline
from reinforce.errors import ConfigError, FailedError
from reinforce.plugin import blame, load_named


def is_own(name: str) -> bool:
    """Whether a --baseline names a file's, and none of the table."""
    return name not in BASELINES


class OwnBaselineError(FailedError):
    """The baseline from a file failed in a step, on all ranks alike."""


@dataclass(frozen=True)
class OwnBaseline(Baseline):
    """A baseline from a file, whose result is checked in every step."""

    name: str = ""  # FILE.py:NAME, as on the command line

    def __call__(
        self, objective: Tensor, valid: Tensor, greedy_objective: Tensor | None = None
    ) -> Tensor:
        """objective, valid (P, K) -> advantage (P, K). Raises OwnBaselineError."""
        try:
            advantage = self.function(objective.clone(), valid.clone())
            json.dumps(self.state, allow_nan=False)
        except (Exception, SystemExit) as error:  # the file's code raises what it likes
            raise OwnBaselineError(
                f"--baseline {self.name}: {blame(error, Path(self.name.rpartition(':')[0]))}"
            ) from error
        if reason := flaw(advantage, valid):
            raise OwnBaselineError(f"--baseline {self.name}: {reason}")
        return advantage.detach()


def make(name: str, ema_decay: float) -> Baseline:
    """The estimator that --baseline names. Raises ConfigError."""
    if is_own(name):
        return OwnBaseline(load_named(name, "--baseline").value, name=name)
    return BASELINES[name](ema_decay)


def flaw(advantage: Any, valid: Tensor) -> str | None:
    """What is wrong with a baseline's result for valid (P, K); None if nothing is."""
    need = f"it must return a float tensor {tuple(valid.shape)}, and returned"
    if not isinstance(advantage, Tensor):
        return f"{need} {type(advantage).__name__}"
    if advantage.shape != valid.shape or not advantage.is_floating_point():
        return f"{need} {advantage.dtype} {tuple(advantage.shape)}"
    if not advantage.isfinite().all():
        return (
            "its advantages are not finite; rewards where valid is false may be NaN and must not "
            "be read"
        )
    if advantage[~valid].any():
        return "its advantages must be 0 where valid is false"
    return None


def identity(name: str) -> str:
    """What stands for a --baseline in a run's identity.

    A baseline from a file is its name and the text of its file, wherever the file is.
    """
    if not is_own(name):
        return name
    loaded = load_named(name, "--baseline")
    return f"{loaded.name} {loaded.digest[:16]}"


def check(name: str, k: int) -> None:
    """Try a baseline from a file on groups of K rows. Raises ConfigError with what is wrong."""
    if not is_own(name):
        return

    def refusal(reason: str) -> ConfigError:
        return ConfigError(
            f"--baseline {name}: {reason} (it is called as f(R (P, K) float64, valid (P, K) bool))"
        )

    if reason := _uncallable(load_named(name, "--baseline").value):
        raise refusal(reason)
    results = []
    for unread in (math.nan, 1e9):  # the reward of a row that does not count
        # loaded anew, so that a state starts as in the run
        function = load_named(name, "--baseline").value
        results.append(_advantages(function, k, unread, refusal))
        _check_state(function, refusal)
    if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
        raise refusal(
            "twice the same rows gave two results: it must be deterministic and read no reward "
            "where valid is false"
        )


def _uncallable(loaded: Any) -> str | None:
    """What is wrong with a value that cannot be called as a baseline; None if it can be."""
    if callable(loaded) and not isinstance(loaded, type):
        return None
    kind = f"a {type(loaded).__name__}"
    if isinstance(loaded, type):
        kind = "a class: name an object that it makes"
    return f"it must be a function or an object that can be called, and is {kind}"


def _example(k: int, unread: float) -> tuple[Tensor, Tensor]:
    """R and valid (4, K); `unread` stands where a row does not count."""
    reward = torch.linspace(-1.0, 2.0, 4 * k, dtype=torch.float64).sin().view(4, k)  # (4, K)
    valid = torch.ones(4, k, dtype=torch.bool)  # (4, K)
    reward[1] = 0.5  # equal rewards
    valid[2, 1:] = False  # one valid row
    valid[3] = False  # none
    return reward.masked_fill(~valid, unread), valid


def _advantages(
    function: Any, k: int, unread: float, refusal: Callable[[str], ConfigError]
) -> list[Tensor]:
    """The function's results for all groups of the example, then for the first one alone."""
    results = []
    for groups in (4, 1):
        kept, valid = (column[:groups] for column in _example(k, unread))
        given = kept.clone(), valid.clone()
        try:
            advantage = function(*given)
        except (Exception, SystemExit) as error:  # the file's code raises what it likes
            raise refusal(f"it raises {type(error).__name__}: {error}") from error
        same_reward = torch.equal(given[0].nan_to_num(), kept.nan_to_num())
        if not same_reward or not torch.equal(given[1], valid):
            raise refusal("it writes to its inputs")
        if reason := flaw(advantage, valid):
            raise refusal(reason)
        results.append(advantage.detach().clone())
    return results


def _check_state(function: Any, refusal: Callable[[str], ConfigError]) -> None:
    if not hasattr(function, "state"):
        return
    try:
        written = json.dumps(function.state, allow_nan=False)
        read = json.loads(written)
        same = read == function.state  # not of a tuple, or of a dictionary with numbers as keys
        function.state = read
        same = same and json.dumps(function.state) == written
    except Exception as error:  # a property may raise anything
        raise refusal(
            f"its state must be a JSON value that can be read and set ({error})"
        ) from error
    if not same:
        raise refusal("its state is another one after it was set to what was read")
