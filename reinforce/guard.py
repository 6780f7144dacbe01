"""Is this model's log pi the same wherever it is asked? Asked once, at the start, of a few tokens, before anything trains.

    sampler against scorer       token by token with a cache, and in one pass: what is sampled is what is trained
    a padded row against itself  alone: log pi must not depend on the neighbours
    with checkpointing           if it is asked for, against without

A model that fails any of these would train another policy than the one that is sampled, and nothing
would show it but the result. Encoders, recurrent models without a usable cache and broken
checkpoints fail here, in one sentence. A gap is looked at twice, on other prompts, since a router
may flip at a tie. What it does not see: lengths far beyond a few tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from reinforce.errors import ConfigError
from reinforce.logprobs import Scorer
from reinforce.policy import OUT_OF_MEMORY, blocks, checkpoint_blocks, first_line
from reinforce.rollout import Rollout
from reinforce.sampler import Sampling, row_seed, sample
from reinforce.shared_prompt import cache_name

GAP = 0.01  # nats a token; rounding in float32 gives 1e-5
TOKENS = 3  # of each response
LONGEST = 8  # tokens of a prompt
K = 2


@dataclass(frozen=True)
class Verdict:
    """What was found of a model that may be trained."""

    plain: bool  # logits are the output head applied to the last hidden states
    shares_prompt: bool  # a prompt that runs once for all its rows gives the same
    sampling: float  # largest |sampler's - scorer's logp| of a token
    padding: float  # largest |logp in a batch - logp alone| of a token
    unused: tuple[str, ...]  # parameters that no gradient reaches, those of routed experts left out
    seconds: float


def head_is_plain(model: nn.Module) -> bool:
    """Whether the logits of this causal language model are its output head applied to the base model's last hidden state."""
    hf = cast(Any, model)
    if hf.base_model is model or type(hf.get_output_embeddings()) is not nn.Linear:
        return False
    ids = torch.arange(2, device=next(model.parameters()).device)[None]  # (1, 2)
    with torch.no_grad():
        logits = hf(input_ids=ids, use_cache=False).logits
        hidden = hf.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head = hf.get_output_embeddings()
        return hidden.shape[-1] == head.weight.shape[-1] and torch.allclose(
            head(hidden), logits, atol=1e-5
        )


def inspect(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    pad_id: int,
    checkpointing: bool,
    name: str,
) -> Verdict:
    """The verdict on a model in float32, outside autocast; `prompts` are token ids, `name` is how errors call it.

    Raises ConfigError if it must not be trained.
    """
    start = time.monotonic()
    kind = type(model).__name__
    if checkpointing and not blocks(model):
        raise ConfigError(
            f"--gradient-checkpointing: {kind} names no blocks to checkpoint; leave it out"
        )
    try:
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if max(end_ids) >= rows:
            raise ConfigError(
                f"{name}: end token {max(end_ids)} is outside the {rows} rows of the model's embeddings"
            )
        plain = head_is_plain(model)
        scorer = Scorer(model, plain).to(next(model.parameters()).device)
        rollout = _sampled(scorer, _two(prompts, 0), pad_id)
        logp, found = _gaps(scorer, rollout)
        if max(found.values()) > GAP:
            _, again = _gaps(scorer, _sampled(scorer, _two(prompts, 1), pad_id))
            for what, gap in again.items():
                if min(gap, found[what]) > GAP:
                    raise ConfigError(
                        f"{name}: {kind} cannot be trained here: {what} changes log pi of a token by up to {gap:.2g} nats"
                    )
        shares = plain and not checkpointing and _prompt_can_be_shared(model, rollout, logp)
        unused = _gradients(scorer, rollout, logp, checkpointing, f"{name}: {kind}")
    except (ConfigError, *OUT_OF_MEMORY):
        raise
    except (
        Exception
    ) as error:  # whatever a model raises that is no causal language model with a cache
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{name}: {kind} cannot be sampled and scored as a causal language model ({reason:.300})"
        ) from error
    gaps = tuple(found.values())
    return Verdict(plain, shares, gaps[0], gaps[1], unused, time.monotonic() - start)


def _two(prompts: Sequence[Sequence[int]], turn: int) -> list[Sequence[int]]:
    """Two short prompts of different length, others at each turn."""
    short, long = sorted((prompts[(2 * turn + i) % len(prompts)] for i in range(2)), key=len)
    long = long[:LONGEST]
    return [long, short[: max(1, len(long) // 2)]]


def _sampled(scorer: Scorer, prompts: Sequence[Sequence[int]], pad_id: int) -> Rollout:
    device = next(scorer.parameters()).device
    seeds = [row_seed(0, 0, i, k) for i in range(len(prompts)) for k in range(K)]
    return sample(scorer.decode, prompts, seeds, Sampling(TOKENS, (), pad_id), device)


def _score(scorer: nn.Module, rollout: Rollout) -> Tensor:
    logp: Tensor = scorer(
        rollout.prompt, rollout.prompt_mask, rollout.response, rollout.mask
    )  # (B, T)
    return logp


def _gaps(scorer: Scorer, rollout: Rollout) -> tuple[Tensor, dict[str, float]]:
    """The scorer's logp (B, T), and the largest differences: to the sampler's, and of a padded row to the same row alone."""
    logp = _score(scorer, rollout)  # (B, T)
    with torch.no_grad():
        alone = _score(scorer, rollout.take([K]))  # (1, T), the shorter prompt's first
        gaps = {
            "sampling token by token": rollout.logp - logp,
            "a neighbour in the batch": logp[K] - alone,
        }
        return logp, {
            what: float(gap.abs().nan_to_num(torch.inf).max()) for what, gap in gaps.items()
        }


def _prompt_can_be_shared(model: nn.Module, rollout: Rollout, logp: Tensor) -> bool:
    """Whether `shared_prompt` gives the scorer's logp (B, T), and the same gradients.

    Compared is the length of each parameter's gradient. A model that raises cannot, nor one whose
    cache forgets the beginning of a long text: the texts here are short.
    """
    shared = Scorer(model, plain=True, shares_prompt=True).to(logp.device)
    try:
        if _forgets(model, rollout):
            return False
        again = _score(shared, rollout)  # (B, T)
        if float((again - logp).detach().abs().nan_to_num(torch.inf).max()) > GAP:
            return False
        expected, found = _gradient_lengths(model, logp), _gradient_lengths(model, again)
    except OUT_OF_MEMORY:
        raise
    except Exception:  # its cache is no plain one, and the model raises what it likes
        return False
    longest = max(expected.values(), default=0.0)
    return expected.keys() == found.keys() and all(
        abs(found[name] - value) <= 1e-3 * value + 1e-5 * longest
        for name, value in expected.items()
    )


def _forgets(model: nn.Module, rollout: Rollout) -> bool:
    """Whether a layer of the model's cache keeps a window of the last tokens alone."""
    with torch.no_grad():
        out = cast(Any, model).base_model(input_ids=rollout.prompt, use_cache=True)
    layers = getattr(out, cache_name(out)).layers
    return any(getattr(layer, "is_sliding", False) for layer in layers)


def _gradient_lengths(model: nn.Module, logp: Tensor) -> dict[str, float]:
    """Length of each parameter's gradient of sum logp; no gradient stays."""
    lengths: dict[str, float] = {}

    def note(name: str, w: Tensor) -> None:
        assert w.grad is not None
        lengths[name] = float(w.grad.norm())
        w.grad = None

    handles = [
        w.register_post_accumulate_grad_hook(partial(note, name))
        for name, w in model.named_parameters()
        if w.requires_grad
    ]
    try:
        logp.sum().backward(retain_graph=True)
    finally:
        for handle in handles:
            handle.remove()
    return lengths


def _gradients(
    scorer: Scorer, rollout: Rollout, logp: Tensor, checkpointing: bool, name: str
) -> tuple[str, ...]:
    """One backward pass, as training makes it; names of the parameters that it does not reach.

    `logp` (B, T) is the scorer's, without checkpointing.
    """
    reached: set[str] = set()
    trained = {parameter: w for parameter, w in scorer.model.named_parameters() if w.requires_grad}
    handles = [
        w.register_hook(lambda _, parameter=parameter: reached.add(parameter))
        for parameter, w in trained.items()
    ]
    handles += [w.register_post_accumulate_grad_hook(_drop) for w in trained.values()]
    forwards = {block: block.forward for block in blocks(scorer.model)}
    try:
        if checkpointing:
            checkpoint_blocks(scorer.model)
            again = _score(scorer, rollout)  # (B, T)
            gap = float((again - logp).detach().abs().max())
            if gap > GAP:
                raise ConfigError(
                    f"{name} cannot be trained with --gradient-checkpointing: log pi changes by {gap:.2g} nats a token"
                )
            logp = again
        logp.sum().backward()
    finally:
        for block, forward in forwards.items():
            block.forward = forward
        for handle in handles:
            handle.remove()
    return tuple(
        parameter for parameter in trained if parameter not in reached and "expert" not in parameter
    )


def _drop(weight: Tensor) -> None:
    weight.grad = None  # a whole gradient is as large as the model
