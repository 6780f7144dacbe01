"""A baseline of one's own: `--baseline FILE.py:NAME`, a function or an object, tried on a small example before any model loads.

    def median(R, valid):  # R (P, K) float64, valid (P, K) bool -> advantage (P, K)
        b = R.masked_fill(~valid, torch.nan).nanmedian(1, keepdim=True).values
        return (R - b).masked_fill(~valid, 0.0)

Every rank calls it with the same rows of all ranks, so it must be deterministic. An object with an
attribute `state`, a JSON value, has it saved in each checkpoint and set again when the run goes on.
What the baseline does to the gradient is its author's business: unbiased is one that does not
depend on the row's own response.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reinforce.baselines import BASELINES, Baseline
from reinforce.errors import ConfigError, FailedError
from reinforce.plugin import load_named


def is_own(name: str) -> bool:
    """Whether a --baseline is a file's and not one of the table."""
    return name not in BASELINES


class OwnBaselineError(FailedError):
    """A baseline of one's own failed in a step, on all ranks alike."""


@dataclass(frozen=True)
class OwnBaseline(Baseline):
    """A baseline of one's own, whose result is looked at in every step."""

    name: str = ""  # as on the command line

    def __call__(
        self, objective: Tensor, valid: Tensor, greedy_objective: Tensor | None = None
    ) -> Tensor:
        """objective, valid (P, K) -> advantage (P, K). Raises OwnBaselineError."""
        try:
            advantage = self.function(objective.clone(), valid.clone())
        except Exception as error:  # whatever one's own code raises
            raise OwnBaselineError(
                f"--baseline {self.name}: it raises {type(error).__name__}: {error}"
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
    """What is wrong with a result for valid (P, K); None if nothing is."""
    if (
        not isinstance(advantage, Tensor)
        or advantage.shape != valid.shape
        or not advantage.is_floating_point()
    ):
        got = (
            f"{advantage.dtype} {tuple(advantage.shape)}"
            if isinstance(advantage, Tensor)
            else type(advantage).__name__
        )
        return f"it must return a float tensor {tuple(valid.shape)}, and returned {got}"
    if not advantage.isfinite().all():
        return "its advantages are not finite; rewards where valid is false may be NaN and must not be read"
    if advantage[~valid].any():
        return "its advantages must be 0 where valid is false"
    return None


def identity(name: str) -> str:
    """What stands for a --baseline in a run's identity: of one's own, its name and its file's text, wherever the file is."""
    if not is_own(name):
        return name
    own = load_named(name, "--baseline")
    return f"{own.name} {own.digest[:16]}"


def check(name: str, k: int) -> None:
    """Try a baseline of one's own on groups of K rows. Raises ConfigError with what it must not do."""
    if not is_own(name):
        return

    def refuse(reason: str) -> ConfigError:
        return ConfigError(
            f"--baseline {name}: {reason} (it is called as f(R (P, K) float64, valid (P, K) bool))"
        )

    loaded = load_named(name, "--baseline").value
    if isinstance(loaded, type) or not callable(loaded):
        kind = (
            "a class: name an object that it makes"
            if isinstance(loaded, type)
            else f"a {type(loaded).__name__}"
        )
        raise refuse(f"it must be a function or an object that can be called, and is {kind}")
    reward = torch.linspace(-1.0, 2.0, 4 * k, dtype=torch.float64).sin().view(4, k)  # (4, K)
    valid = torch.ones(4, k, dtype=torch.bool)
    reward[1] = 0.5  # equal rewards
    valid[2, 1:] = False  # one valid row
    valid[3] = False
    results = []
    for unread in (math.nan, 1e9):  # what stands where a row does not count
        function = load_named(
            name, "--baseline"
        ).value  # anew, so that a state starts as in the run
        for rows in (slice(0, 4), slice(0, 1)):
            given = reward.masked_fill(~valid, unread)[rows], valid[rows].clone()
            kept = given[0].clone(), given[1].clone()
            try:
                advantage = function(*given)
            except Exception as error:  # whatever one's own code raises
                raise refuse(f"it raises {type(error).__name__}: {error}") from error
            if not torch.equal(given[0].nan_to_num(), kept[0].nan_to_num()) or not torch.equal(
                given[1], kept[1]
            ):
                raise refuse("it writes to its inputs")
            if reason := flaw(advantage, kept[1]):
                raise refuse(reason)
            results.append(advantage.detach().clone())
        _check_state(function, refuse)
    if not all(torch.equal(a, b) for a, b in zip(results[:2], results[2:], strict=True)):
        raise refuse(
            "twice the same rows gave two results: it must be deterministic and read no reward where valid is false"
        )


def _check_state(function: Any, refuse: Any) -> None:
    if not hasattr(function, "state"):
        return
    try:
        written = json.dumps(function.state, allow_nan=False)
        function.state = json.loads(written)
        same = json.dumps(function.state) == written
    except Exception as error:  # a property may raise anything
        raise refuse(
            f"its state must be a JSON value that can be read and set ({error})"
        ) from error
    if not same:
        raise refuse("its state is another one after it was set to what was read")
