"""The model that is cut over ranks is the model that was measured whole.

transformers' plan says which weights a rank has, and the files' names which values: where one of
the two is wrong, the ranks train and save another model, and no number of theirs shows it. So a few
rows that `guard.inspect` has scored with the whole model are scored again, and differentiated, by
all ranks together. Medians are compared, since a router may flip at a tie.

A weight without a rule is whole on each rank of a team. If what it is applied to are the rank's own
heads or features, as in Apertus' activations, each rank has a part of its gradient, and so another
one than its neighbour: then the parts are added up, as those of the norms that have such a rule.
"""

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reinforce import device as devices
from reinforce.errors import ConfigError, first_line
from reinforce.guard import GAP, Verdict
from reinforce.logprobs import Scorer
from reinforce.optim import length
from reinforce.policy import OUT_OF_MEMORY
from reinforce.run import distributed, tensor_parallel

Lengths = dict[str, float]  # of gradients, by parameter

ROUNDED = 1.0  # nats; where FSDP casts blocks to bfloat16
SHARE, FLOOR = 0.02, 1e-5  # of a gradient's length, and of all of them together


def check(
    wrapped: nn.Module,
    scorer: Scorer,
    verdict: Verdict,
    device: torch.device,
    bf16: bool,
    name: str,
) -> None:
    """Raise ConfigError, on every rank, unless the ranks together compute what `verdict` holds.

    `wrapped` is the scorer as it is trained; its gradients are left as None. `bf16`: FSDP casts it.
    `name` stands for the model in errors: its flag and value.
    """
    kind = type(scorer.model).__name__
    sampled = scorer.temperature, scorer.min_new_tokens
    scorer.temperature, scorer.min_new_tokens = 1.0, 0  # as the guard's
    try:
        gap, lengths, apart = _measured(wrapped, scorer, verdict, device, bf16)
        if apart:
            tensor_parallel.add_gradients_up(scorer.model, apart)
            gap, lengths, apart = _measured(wrapped, scorer, verdict, device, bf16)
    except Exception as error:  # a plan that does not fit its model raises what it likes
        if isinstance(error, OUT_OF_MEMORY) or distributed.lost(error):
            raise
        raise ConfigError(
            f"{name}: cut over ranks this {kind} cannot be computed ({type(error).__name__}: "
            f"{first_line(error):.200}); give other flags of parallelism, or one process"
        ) from error
    finally:
        scorer.temperature, scorer.min_new_tokens = sampled
    other = None
    if gap > (ROUNDED if bf16 else GAP):
        other = f"log pi of a token changes by {gap:.2g} nats"
    elif apart:
        other = f"the ranks do not agree in the gradient of {apart[0]}"
    elif not bf16 and (change := _change(lengths, verdict.gradients)) > SHARE:
        other = f"the length of a gradient changes by {100 * change:.0f} %"
    if other is not None:
        raise ConfigError(
            f"{name}: cut over ranks this {kind} is another model: {other}; give other flags of "
            "parallelism, or one process"
        )


def _measured(
    wrapped: nn.Module, scorer: Scorer, verdict: Verdict, device: torch.device, bf16: bool
) -> tuple[float, Lengths, list[str]]:
    """How far log pi is off, nats; lengths of gradients; where the ranks differ in them."""
    rows = verdict.rows.to(device)
    weights = dict(scorer.model.named_parameters())
    with devices.autocast(device, bf16):
        logp: Tensor = wrapped(rows.prompt, rows.prompt_mask, rows.response, rows.mask)  # (B, T)
    distributed.backward(logp.sum())  # of every team the same
    lengths = {
        key: float(length(distributed.gather_tensor(weight.grad))) / distributed.teams()
        for key, weight in weights.items()
        if weight.grad is not None
    }
    for weight in weights.values():
        weight.grad = None
    gaps = (logp.detach() - rows.logp)[rows.mask].abs().nan_to_num(torch.inf)
    return float(gaps.median()), lengths, _apart(distributed.of_all(lengths))


def _apart(of_ranks: Sequence[Lengths]) -> list[str]:
    """Parameters whose gradients are not as long on every rank."""
    least = FLOOR * sum(value**2 for value in of_ranks[0].values()) ** 0.5
    found = []
    for key in of_ranks[0]:
        values = [lengths.get(key, 0.0) for lengths in of_ranks]
        if max(values) - min(values) > SHARE * max(values) + least:
            found.append(key)
    return found


def _change(lengths: Lengths, right: Lengths) -> float:
    """By how much of itself the median length is off; those of 0 do not count."""
    total = sum(value**2 for value in right.values()) ** 0.5
    changes = [
        abs(lengths.get(key, 0.0) - value) / value
        for key, value in right.items()
        if value > FLOOR * total
    ]
    return statistics.median(changes) if changes else 0.0
