"""Whether a model gives the same log pi and gradients when a prompt runs once for its responses.

Asked once, at the start, by `guard.inspect`; `shared_prompt` says what is shared.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from reinforce.logprobs import Scorer
from reinforce.policy import OUT_OF_MEMORY
from reinforce.rollout import Rollout
from reinforce.sampler import cache_name


def prompt_may_run_once(model: nn.Module, rollout: Rollout, logp: Tensor, gap: float) -> bool:
    """Whether `shared_prompt` gives the scorer's logp (B, T), within `gap`, and its gradients.

    Compared is the length of each parameter's gradient. A model that raises cannot, nor one whose
    cache forgets the beginning of a long text: the texts here are short.
    """
    shared = Scorer(model, plain=True, shares_prompt=True).to(logp.device)
    try:
        if _forgets(model, rollout):
            return False
        rows = (rollout.prompt, rollout.prompt_mask, rollout.response, rollout.mask)
        again: Tensor = shared(*rows)  # (B, T)
        if float((again - logp).detach().abs().nan_to_num(torch.inf).max()) > gap:
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
