"""Whether a model gives the same log pi and gradients when a prompt runs once for its responses.

Asked once, at the start, by `guard.inspect`; `shared_prompt` says what is shared.
"""

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from reinforce.errors import first_line
from reinforce.logprobs import Scorer
from reinforce.policy import OUT_OF_MEMORY
from reinforce.rollout import Rollout
from reinforce.sampler import cache_name


def why_whole_sequences(model: nn.Module, rollout: Rollout, logp: Tensor, gap: float) -> str | None:
    """Why `shared_prompt` must not run this model; None where it may.

    It gives the scorer's logp (B, T) within `gap`, and the same length of each parameter's
    gradient. Texts are short here, so what shows on long ones alone is read from the model.
    """
    shared = Scorer(model, plain=True, shares_prompt=True).to(logp.device)
    try:
        if _forgets(model, rollout):
            return "a layer does not see all earlier tokens"
        rows = (rollout.prompt, rollout.prompt_mask, rollout.response, rollout.mask)
        again: Tensor = shared(*rows)  # (B, T)
        if float((again - logp).detach().abs().nan_to_num(torch.inf).max()) > gap:
            return "log pi of a token changes"
        expected, found = _gradient_lengths(model, logp), _gradient_lengths(model, again)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # a layer that is no such attention: the model raises what it likes
        return f"shared_prompt.py: {first_line(error)}"
    longest = max(expected.values(), default=0.0)
    same = expected.keys() == found.keys() and all(
        abs(found[name] - value) <= 1e-3 * value + 1e-5 * longest
        for name, value in expected.items()
    )
    return None if same else "a gradient changes"


def _forgets(model: nn.Module, rollout: Rollout) -> bool:
    """Whether a layer keeps a window of the last tokens, or chooses among them.

    Its cache says so. Llama 4 tells a token's place from its column, which is another in a line.
    """
    hf = cast(Any, model)
    with torch.no_grad():
        out = hf.base_model(input_ids=rollout.prompt, use_cache=True)
    layers = getattr(out, cache_name(out)).layers
    by_column = getattr(hf.config.get_text_config(), "attn_temperature_tuning", False)
    return bool(by_column) or any(type(layer) is not DynamicLayer for layer in layers)


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
