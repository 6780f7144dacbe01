"""Attention of one new token, where several query heads share each key head.

    q (B, H, 1, D), k and v (B, H/G, L, D):  H/G heads of G queries instead of H heads of one

The queries of a group see the same keys, so they may stand beside each other where a sequence's
queries stand. PyTorch's kernel reads the cache once for all of them then, instead of G times.
Everything else is transformers' own function. See "GQA", Ainslie et al. (2023, arXiv 2305.13245).
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention: (B, H, Q, D) and the keys of L tokens -> (B, Q, H, D)."""
    b, h, queries, d = query.shape
    shared = h // key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    more = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if queries > 1 or shared == 1 or not one_mask or more:
        rest: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return rest
    out = nn.functional.scaled_dot_product_attention(
        query.view(b, h // shared, shared, d),
        key,
        value,
        attn_mask=attention_mask,
        scale=options.get("scaling"),
    )
    return out.reshape(b, 1, h, value.shape[-1]), None


def use_for_models() -> None:
    """Let every model that asks transformers for "sdpa" attention have the function above."""
    AttentionInterface.register("sdpa", attend)
