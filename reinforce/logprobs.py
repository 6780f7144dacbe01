"""log pi of given responses: response positions only, in float32, a chunk of positions at a time.

Logits of every position, (B, S + T, V) floats, are by far the largest tensor of a naive update.
Here the base model gives hidden states, and the output head runs on the real response tokens alone,
in chunks. The first chunks' logits are kept for the backward pass, which computes the others again.
That is exact where logits = head(hidden states); `guard.head_is_plain` finds out, and other models
(Gemma-2 caps its logits, Cohere and Granite scale them) take their own forward pass.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reinforce.head import float32_product
from reinforce.rollout import positions
from reinforce.shared_prompt import response_states

CHUNK_FLOATS = 2**24  # logits computed at a time: 64 MiB
KEPT_CHUNKS = 4  # so many are kept for the backward pass: 256 MiB; the others are computed again


def policy_logits(
    logits: Tensor, t: Tensor, temperature: float, end_ids: Tensor, min_new_tokens: int
) -> Tensor:
    """Logits of the policy that is sampled, float32 (n, V).

    They are divided by the temperature, and end tokens are barred at positions before
    `min_new_tokens`. `t` (n,) is each row's response position. The sampler, the scorer and the
    reference all come through here: two of them with different temperatures or masks would be two
    different policies, and every ratio between them wrong.
    """
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if min_new_tokens:
        bar = torch.zeros(len(t), len(end_ids), device=t.device)  # (n, E)
        bar = bar.masked_fill((t < min_new_tokens)[:, None], -torch.inf)
        logits = logits.index_add(1, end_ids, bar)
    return logits


class _TokenLogp(torch.autograd.Function):
    """log softmax(logits) of one token a row: logits (n, V), token (n,) -> logp (n,).

        d logp / d logits = onehot(token) - softmax(logits)

    PyTorch's own gather and log_softmax would make four tensors of (n, V) on the way back.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, token: Tensor) -> Tensor:
        logp = logits.log_softmax(-1)  # (n, V)
        ctx.save_for_backward(logp, token)
        return logp.gather(1, token[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logp, token = ctx.saved_tensors
        change = logp.exp().mul_(-grad[:, None])  # (n, V)
        return change.scatter_add_(1, token[:, None], grad[:, None]), None


class Scorer(nn.Module):
    """A causal language model whose forward returns logp (B, T): what DDP and FSDP wrap."""

    def __init__(
        self,
        model: nn.Module,
        plain: bool = False,
        temperature: float = 1.0,
        end_ids: tuple[int, ...] = (),
        min_new_tokens: int = 0,
        shares_prompt: bool = False,
    ) -> None:
        """`model` is a Hugging Face causal language model; `guard.inspect` finds out the two flags.

        plain: the head applied to the last hidden states gives the logits. shares_prompt: a prompt
        runs once for all its rows, and no padding (shared_prompt.py). The others are the sampler's.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.min_new_tokens = min_new_tokens
        self.plain = plain
        self.shares_prompt = shares_prompt
        self.register_buffer("end_ids", torch.tensor(end_ids, dtype=torch.long), persistent=False)

    def forward(
        self, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor
    ) -> Tensor:
        """logp (B, T) of the response's tokens, 0 outside the mask.

        prompt, prompt_mask (B, S) are padded left, response, mask (B, T) right. Token t of the
        response is predicted at column S - 1 + t, one before its own.
        """
        hf, s = cast(Any, self.model), prompt.shape[1]
        # without a plain head the model's own forward gives logits, to be cast alone
        head = float32_product(hf.get_output_embeddings()) if self.plain else Tensor.float
        if self.shares_prompt:
            states = response_states(hf.base_model, prompt, prompt_mask, response, mask)  # (n, H)
        else:
            ids = torch.cat([prompt, response], 1)  # (B, S + T)
            seen = torch.cat([prompt_mask, mask], 1)  # (B, S + T)
            place = {"attention_mask": seen.long(), "position_ids": positions(seen)}
            if self.plain:
                out = hf.base_model(input_ids=ids, use_cache=False, **place)
                states = out.last_hidden_state[:, s - 1 : -1]  # (B, T, H)
            else:
                kept = response.shape[1] + 1
                out = hf(input_ids=ids, use_cache=False, logits_to_keep=kept, **place)
                states = out.logits[:, :-1]  # (B, T, V)
            states = states[mask]  # (n, H) or (n, V), n response tokens
        t = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)[mask]  # (n,)
        vocabulary = hf.config.get_text_config().vocab_size
        count = max(1, math.ceil(len(states) * vocabulary / CHUNK_FLOATS))
        chunks = zip(*(x.tensor_split(count) for x in (states, response[mask], t)), strict=True)
        parts = [
            self._token_logp(head, *chunk)
            if i < KEPT_CHUNKS
            else checkpoint(self._token_logp, head, *chunk, use_reentrant=False)
            for i, chunk in enumerate(chunks)
        ]
        logp = torch.zeros(mask.shape, device=mask.device)  # (B, T)
        return logp.masked_scatter(mask, torch.cat(parts))

    def decode(self, **inputs: Any) -> Any:
        """The model's own forward pass, for sampling.

        A sharded model is entered through here or through `forward`.
        """
        with torch.inference_mode():  # no_grad, and no bookkeeping of views and versions either
            return self.model(**inputs)

    def _token_logp(
        self, head: Callable[[Tensor], Tensor], states: Tensor, token: Tensor, t: Tensor
    ) -> Tensor:
        logits = policy_logits(
            head(states), t, self.temperature, cast(Tensor, self.end_ids), self.min_new_tokens
        )
        logp: Tensor = cast(Any, _TokenLogp).apply(logits, token)  # (n,)
        return logp
