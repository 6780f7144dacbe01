"""Attention where PyTorch's kernel is slow: one new token, and short sequences on a CPU.

    softmax(q k' / sqrt(D) + mask) v      q (B, H, Q, D), k and v (B, H/G, L, D)

G query heads share each key head, see the same keys, and so may stand beside each other: H/G heads
of G Q queries instead of H heads of Q. One new token (Q = 1) then has the cache read once for all
of them, instead of G times. Where a CPU has few scores to compute, it computes the formula in plain
float32 operations: in bfloat16 the kernel is faster forwards, but two to four times slower with the
backward pass (bench/attention.py). With gradient and without, so that policy and reference agree to
the last bit on the same rows. Everything else is transformers' own function. See "GQA", Ainslie et
al. (2023, arXiv 2305.13245).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FEW_SCORES = 2**15  # Q L of one head; with twice as many the kernel is faster


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention: (B, H, Q, D) and the keys of L tokens -> (B, Q, H, D).

    With `shared_prompts`, of shared_prompt.py, the tokens of many sequences come in one line, and
    the mask does not count. Raises ValueError for a layer with a window, which is not known there.
    """
    if (line := options.pop("shared_prompts", None)) is not None:
        if options.get("sliding_window") is not None:
            raise ValueError(f"{type(module).__name__} sees a window of the last tokens alone")

        def attend_rows(*tensors: Tensor) -> Tensor:
            return attend(module, *tensors, **options)[0]

        return line.attend(attend_rows, query, key, value), None
    b, h, queries, d = query.shape
    shared = h // key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    plain = one_mask and not any(options.get(name) for name in ("softcap", "dropout"))
    plain = plain and options.get("position_bias") is None
    scale = options.get("scaling") or d**-0.5
    few = queries > 1 and queries * key.shape[2] <= FEW_SCORES
    if plain and few and query.device.type == "cpu":
        mask = attention_mask
        causal = options.get("is_causal")
        if mask is None and (getattr(module, "is_causal", True) if causal is None else causal):
            mask = torch.ones(queries, key.shape[2], dtype=torch.bool).tril()
        if mask is None or mask.dtype == torch.bool:
            return float32_attention(query, key, value, mask, scale), None
    if plain and queries == 1 and shared > 1:
        out = nn.functional.scaled_dot_product_attention(
            query.view(b, h // shared, shared, d), key, value, attn_mask=attention_mask, scale=scale
        )
        return out.reshape(b, 1, h, value.shape[-1]), None
    rest: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return rest


def float32_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The formula at the top, in float32 at least -> (B, Q, H, D) of the query's type.

    mask (..., Q, L) bool, for all heads; True where a query sees a key. A query that sees none, as
    those of padding, gets the mean of all values, where -inf would give NaN.
    """
    (b, h, queries, d), (groups, keys) = query.shape, key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        packed = (query.to(dtype) * scale).reshape(b, groups, -1, d)  # (B, H/G, G Q, D)
        scores = packed @ key.to(dtype).transpose(2, 3)  # (B, H/G, G Q, L)
        if mask is not None:
            scores = scores.view(b, groups, -1, queries, keys)  # (B, H/G, G, Q, L)
            hidden = ~(mask if mask.ndim == 2 else mask.unsqueeze(1))
            scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
            scores = scores.view(b, groups, -1, keys)
        out = scores.softmax(-1) @ value.to(dtype)  # (B, H/G, G Q, D)
    out = out.view(b, h, queries, value.shape[-1]).to(query.dtype)
    return out.transpose(1, 2).contiguous()


def use_for_models() -> None:
    """Let every model that asks transformers for "sdpa" attention have the function above."""
    AttentionInterface.register("sdpa", attend)
