"""Is a model's log pi of a token the same however it is computed? Measured before anything trains.

    sampler and scorer                      token by token with a cache; in one pass
    a row in a batch and the row alone      log pi must not depend on the neighbours
    positions from 0 and the model's own    it must be trained as others will run it
    with and without checkpointing          where --gradient-checkpointing is given

A model that fails one of these would train another policy than the one that is sampled, and nothing
but the result would show it. Encoders, recurrent models without a usable cache and broken
checkpoints fail here, in one sentence. A gap counts if other prompts show it as well, since a
router may flip at a tie. Left out: lengths far beyond a few tokens.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from reinforce.errors import ConfigError, first_line
from reinforce.logprobs import Scorer
from reinforce.optim import length
from reinforce.policy import OUT_OF_MEMORY, blocks, checkpoint_blocks
from reinforce.rollout import Rollout
from reinforce.sampler import CPU, Sampling, row_seed, sample
from reinforce.sharing import why_whole_sequences

GAP = 0.01  # nats a token; rounding in float32 gives 1e-5
TOKENS = 3  # length of each response
LONGEST = 8  # tokens of a prompt at most
K = 2  # responses to each of two prompts
LARGE_LOGIT = 100.0  # for which a model that caps its logits is found out


@dataclass(frozen=True)
class Verdict:
    """The measurements of a model that may be trained."""

    plain: bool  # logits are the output head applied to the last hidden states
    whole: str | None  # why whole sequences run; None: a prompt once for its rows is the same
    sampling: float  # largest |sampler's - scorer's logp| of a token
    padding: float  # largest |logp in a batch - logp alone| of a token
    unused: tuple[str, ...]  # parameters that no gradient reaches, without those of routed experts
    rows: Rollout  # the rows measured, on the CPU, with the scorer's logp
    gradients: dict[str, float]  # by parameter, length of the gradient of their logp's sum
    seconds: float


def head_is_plain(model: nn.Module) -> bool:
    """Whether logits are the model's output head applied to its base model's last hidden state."""
    hf = cast(Any, model)
    if hf.base_model is model or type(hf.get_output_embeddings()) is not nn.Linear:
        return False
    ids = torch.arange(2, device=next(model.parameters()).device)[None]  # (1, 2)
    head = hf.get_output_embeddings()
    with torch.no_grad():
        hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != head.weight.shape[-1]:
            return False
        # a cap on logits shows only where they are large
        larger = LARGE_LOGIT / head(hidden).abs().max().clamp(min=1e-6)
        hook = head.register_forward_pre_hook(lambda _, x: (x[0] * larger,))
        try:
            logits = hf(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return torch.allclose(head(hidden * larger), logits, rtol=1e-4, atol=1e-3)


def inspect(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    pad_id: int,
    checkpointing: bool,
    name: str,
) -> Verdict:
    """The verdict on a model in float32, outside autocast. Raises ConfigError on a bad one.

    `prompts` are token ids. `name` stands for the model in errors: its flag and value.
    """
    start = time.monotonic()
    kind = type(model).__name__
    if checkpointing and not blocks(model):
        raise ConfigError(
            f"--gradient-checkpointing: {kind} names no blocks to checkpoint; leave the flag out"
        )
    try:
        _refuse_end_outside(model, end_ids, name)
        plain = head_is_plain(model)
        scorer = Scorer(model, plain).to(next(model.parameters()).device)
        rollout = _sampled(scorer, _two(prompts, 0), pad_id)
        logp, gaps = _gaps(scorer, rollout)
        if max(gaps.values()) > GAP:
            _, again = _gaps(scorer, _sampled(scorer, _two(prompts, 1), pad_id))
            _refuse_gaps(gaps, again, f"{name}: {kind}")
        whole = why_whole_sequences(model, rollout, logp, GAP) if plain else "its head is not plain"
        gradients = _gradients(scorer, rollout, logp, checkpointing, f"{name}: {kind}")
    except (ConfigError, *OUT_OF_MEMORY):
        raise
    except Exception as error:
        # a model that is no causal language model with a cache raises what it likes
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{name}: {kind} cannot be sampled and scored as a causal language model "
            f"({reason:.300})"
        ) from error
    sampling, padding, _ = gaps.values()
    trained = [parameter for parameter, w in model.named_parameters() if w.requires_grad]
    unused = [p for p in trained if p not in gradients and "expert" not in p]
    rows = dataclasses.replace(rollout, logp=logp.detach()).to(CPU)
    seconds = time.monotonic() - start
    return Verdict(plain, whole, sampling, padding, tuple(unused), rows, gradients, seconds)


def _refuse_end_outside(model: nn.Module, end_ids: Sequence[int], name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if max(end_ids) >= rows:
        raise ConfigError(
            f"{name}: end token {max(end_ids)} is outside the {rows} rows of the model's embeddings"
        )


def _refuse_gaps(gaps: dict[str, float], again: dict[str, float], name: str) -> None:
    """Raise ConfigError on a gap that both measurements show."""
    for cause, gap in again.items():
        if min(gap, gaps[cause]) > GAP:
            raise ConfigError(
                f"{name} cannot be trained here: {cause} changes log pi of a token by up to "
                f"{gap:.2g} nats"
            )


def _two(prompts: Sequence[Sequence[int]], turn: int) -> list[Sequence[int]]:
    """Two short prompts of different length; each turn takes other ones."""
    short, long = sorted((prompts[(2 * turn + i) % len(prompts)] for i in range(2)), key=len)
    long = long[:LONGEST]
    return [long, short[: max(1, len(long) // 2)]]


def _sampled(scorer: Scorer, prompts: Sequence[Sequence[int]], pad_id: int) -> Rollout:
    device = next(scorer.parameters()).device
    seeds = [row_seed(0, 0, i, k) for i in range(len(prompts)) for k in range(K)]
    return sample(scorer.decode, prompts, seeds, Sampling(TOKENS, (), pad_id), device)


def _logp(scorer: nn.Module, rollout: Rollout) -> Tensor:
    rows = rollout.prompt, rollout.prompt_mask, rollout.response, rollout.mask
    logp: Tensor = scorer(*rows)  # (B, T)
    return logp


def _gaps(scorer: Scorer, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
    """The scorer's logp (B, T), and its largest difference to three others, nats a token.

    They are the sampler's logp, the scorer's of a padded row without its neighbours, and for that
    row the model's own without any position.
    """
    logp = _logp(scorer, rollout)  # (B, T)
    with torch.no_grad():
        alone = _logp(scorer, rollout.take([K]))  # (1, T), the shorter prompt's first response
        gaps = {
            "sampling token by token": rollout.logp - logp,
            "a neighbour in the batch": logp[K] - alone,
            "counting positions from 0": _change_by_positions(scorer, rollout.take([K])),
        }
        largest = {c: float(gap.abs().nan_to_num(torch.inf).max()) for c, gap in gaps.items()}
    return logp, largest


def _change_by_positions(scorer: Scorer, row: Rollout) -> Tensor:
    """log pi (L, V) of a row without padding, with positions from 0 less with the model's own."""
    ids = torch.cat([row.prompt[row.prompt_mask], row.response[row.mask]])[None]  # (1, L)
    place = torch.arange(ids.shape[1], device=ids.device)[None]  # (1, L)
    given, own = (
        scorer.decode(input_ids=ids, use_cache=False, **options).logits[0].log_softmax(-1)
        for options in ({"position_ids": place}, {})
    )
    return cast(Tensor, given - own)


def _gradients(
    scorer: Scorer, rollout: Rollout, logp: Tensor, checkpointing: bool, name: str
) -> dict[str, float]:
    """Lengths of the gradients of the parameters that one backward pass, as in training, reaches.

    `logp` (B, T) is the scorer's, without checkpointing. Raises ConfigError if it is another one
    with checkpointing.
    """
    lengths: dict[str, float] = {}

    def measure(weight: Tensor, parameter: str) -> None:
        lengths[parameter] = float(length(cast(Tensor, weight.grad)))
        weight.grad = None  # a whole gradient is as large as the model

    handles = [
        w.register_post_accumulate_grad_hook(functools.partial(measure, parameter=parameter))
        for parameter, w in scorer.model.named_parameters()
        if w.requires_grad
    ]
    forwards = {block: block.forward for block in blocks(scorer.model)}
    try:
        if checkpointing:
            checkpoint_blocks(scorer.model)
            again = _logp(scorer, rollout)  # (B, T)
            gap = float((again - logp).detach().abs().max())
            if gap > GAP:
                raise ConfigError(
                    f"{name} cannot be trained with --gradient-checkpointing: "
                    f"log pi changes by {gap:.2g} nats a token; leave the flag out"
                )
            logp = again
        logp.sum().backward()
    finally:
        for block, forward in forwards.items():
            block.forward = forward
        for handle in handles:
            handle.remove()
    return lengths
