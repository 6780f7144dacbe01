"""The prompt once per group: hidden states of K responses to one prompt, which runs once.

    prompts (U, S) -> keys and values -> a copy for each of their rows -> responses (b, T)

Causal attention makes a prompt's keys and values the same for all its responses, so they are
computed once and their gradients, one from each response, are added. The result is that of whole
sequences up to rounding; `guard.inspect` compares the two at load. It holds where the cache is
nothing but keys and values, and not together with gradient checkpointing, which runs a block again
when the cache has grown.
"""

from typing import Any

import torch
from torch import Tensor

from reinforce.rollout import distinct, positions


def cache_name(out: Any) -> str:
    """The name of the cache in a model's output: `cache` from transformers 5.24 on."""
    return "cache" if getattr(out, "cache", None) is not None else "past_key_values"


def response_states(
    body: Any, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states that predict each response token, (b, T, H).

    `body` is a Hugging Face base model; prompt and its mask (b, S) are padded left, response and
    its mask (b, T) right.
    """
    unique, row = distinct(prompt, prompt_mask)  # (U, S), (b,)
    real = unique >= 0  # (U, S)
    out = body(
        input_ids=unique.clamp(min=0),
        attention_mask=real.long(),
        position_ids=positions(real),
        use_cache=True,
    )
    name = cache_name(out)
    cache = getattr(out, name)
    cache.batch_select_indices(row)
    seen = torch.cat([real[row], mask], 1)  # (b, S + T)
    rest = body(  # always: ranks that share the parameters must make the same calls
        input_ids=response,
        attention_mask=seen.long(),
        position_ids=positions(seen)[:, unique.shape[1] :],
        use_cache=True,
        **{name: cache},
    )
    first: Tensor = out.last_hidden_state[:, -1:][row]  # (b, 1, H): predicts the first token
    return torch.cat([first, rest.last_hidden_state[:, :-1]], 1)
