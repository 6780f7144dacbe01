"""The prompt once per group, and no padding: real tokens alone, one after the other in one line.

    | prompt 1 | prompt 2 | response to 1 | response to 2 | response to 1 | ...      N tokens

Causal attention makes a prompt's keys and values the same for all its responses, so a prompt runs
once and its gradients, one from each response, are added. Everything but attention treats a token
like any other, so the line is the model's input as it stands. Attention, and it alone, puts tokens
back into rows: a prompt sees itself, a response its prompt and itself. The result is that of whole
sequences up to rounding; `guard.inspect` compares the two at load. It holds where the model hands
its keyword arguments on to its attention and each of its layers sees all earlier tokens.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from reinforce.rollout import distinct

# query, key, value, mask -> (B, Q, H, D); without a mask a token sees itself and all before it
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
SHORT = 32  # responses up to this length attend together; beyond, those within a factor of two


def response_states(
    body: Any, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states that predict the n response tokens of `mask`, (n, H).

    `body` is a Hugging Face base model whose attention is `attention.attend`; prompt and its mask
    (b, S) are padded left, response and its mask (b, T) right. A prompt has one token at least.
    Raises RuntimeError where not every layer attends once: in another kind of layer the tokens of
    one sequence would mix with those of the next.
    """
    unique, group = distinct(prompt, prompt_mask)  # (U, S), (b,)
    real = unique >= 0  # (U, S)
    line = SharedPrompts(real.sum(1), group, mask)
    ids = torch.cat([unique[real], response[line.order][mask[line.order]]])  # (N,)
    out = body(
        input_ids=ids[None],
        position_ids=line.positions[None],
        # four dimensions: transformers passes it on; empty: what uses it all the same will raise
        attention_mask=mask.new_ones(1, 1, 0, 0),
        use_cache=False,
        shared_prompts=line,
    )
    if line.attended != body.config.get_text_config().num_hidden_layers:
        raise RuntimeError(f"{type(body).__name__}: not all its layers attend by attention.py")
    return _copies(out.last_hidden_state[0], line.before)


class SharedPrompts:
    """Where the tokens of U prompts and of b responses stand in one line of N tokens.

    order (b,): the responses, the shortest first. positions (N,): of each token in its sequence.
    before (n,): where the token before each response token stands, in the order of the mask.
    attended: how many layers have asked, to be read after the forward pass.
    """

    def __init__(self, length: Tensor, group: Tensor, mask: Tensor) -> None:
        """length (U,) of the prompts, group (b,) each response's prompt, mask (b, T) its tokens."""
        self.attended = 0
        tokens = mask.sum(1)  # (b,)
        self.order = tokens.argsort(stable=True)
        widths = 2 ** tokens[self.order].clamp(min=SHORT).log2().ceil().long()  # (b,)
        runs = self.order.split(widths.unique_consecutive(return_counts=True)[1].tolist())
        self._prompts = _Rows(length)
        self._responses = [_Responses(tokens[run], group[run], length) for run in runs]
        blocks = [self._prompts, *self._responses]
        self._sizes = [len(block.at) for block in blocks]
        self.positions = torch.cat([block.positions for block in blocks])

        end = torch.cat([length, tokens[self.order]]).cumsum(0) - 1  # (U + b,) last tokens' places
        start = torch.empty_like(tokens)
        start[self.order] = end[len(length) :] - tokens[self.order] + 1  # (b,)
        step = torch.arange(mask.shape[1], device=mask.device)  # (T,)
        before = torch.where(step == 0, end[group, None], start[:, None] + step - 1)  # (b, T)
        self.before = before[mask]

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (1, H, N, D), key and value (1, H/G, N, D) -> (1, N, H, D)."""
        self.attended += 1
        parts = [x[0].transpose(0, 1).split(self._sizes) for x in (query, key, value)]  # (m, H, D)
        (q, k, v), *rest = zip(*parts, strict=True)
        q, k, v = (self._prompts.to_rows(x) for x in (q, k, v))  # (U, H, S, D)
        out = [self._prompts.to_tokens(attention(q, k, v, None))]
        for block, own in zip(self._responses, rest, strict=True):
            own_q, own_k, own_v = (block.to_rows(x) for x in own)  # (r, H, T, D)
            keys = torch.cat([_copies(k, block.group), own_k], 2)  # (r, H/G, S + T, D)
            values = torch.cat([_copies(v, block.group), own_v], 2)
            out.append(block.to_tokens(attention(own_q, keys, values, block.mask)))
        return torch.cat(out)[None]


class _Rows:
    """r sequences that attend together: their m tokens <-> r rows, padded right to T.

    What is padded right is after every token, so a causal mask hides it.
    """

    def __init__(self, length: Tensor) -> None:
        """length (r,): tokens of each."""
        self.step = torch.arange(max(1, int(length.max())), device=length.device)  # (T,)
        self._real = self.step < length[:, None]  # (r, T)
        self.at = self._real.flatten().nonzero()[:, 0]  # (m,)
        self.positions = self.step.expand_as(self._real)[self._real]  # (m,)

    def to_rows(self, x: Tensor) -> Tensor:
        """(m, H, D) -> (r, H, T, D), 0 where padded."""
        r, t = self._real.shape
        rows: Tensor = cast(Any, _Put).apply(x, self.at, r * t)
        return rows.view(r, t, *x.shape[1:]).transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(r, T, H, D) -> (m, H, D)."""
        tokens: Tensor = cast(Any, _Take).apply(x.flatten(0, 1), self.at)
        return tokens


class _Responses(_Rows):
    """Rows that also see their prompts, `group` (r,) of the U prompts."""

    def __init__(self, length: Tensor, group: Tensor, prompt_length: Tensor) -> None:
        """length and group (r,); prompt_length (U,)."""
        super().__init__(length)
        self.group, step = group, self.step
        theirs = prompt_length[group]  # (r,)
        self.positions = self.positions + theirs[:, None].expand_as(self._real)[self._real]
        column = torch.arange(int(prompt_length.max()), device=length.device)  # (S,)
        shared = (column < theirs[:, None])[:, None, None].expand(-1, 1, len(step), -1)
        own = (step <= step[:, None]).expand(len(group), 1, -1, -1)  # (r, 1, T, T)
        self.mask = torch.cat([shared, own], 3)  # (r, 1, T, S + T)


class _Take(torch.autograd.Function):
    """x (m, ...) -> x[at] (n, ...); `at` holds no number twice, so nothing is added backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor) -> Tensor:
        ctx.save_for_backward(at)
        ctx.size = len(x)
        return x.index_select(0, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size, *grad.shape[1:]).index_copy_(0, at, grad), None


class _Put(torch.autograd.Function):
    """The other way: x (n, ...) -> (m, ...) with x at `at` and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(at)
        padded = x.new_zeros(size, *x.shape[1:])
        return padded.index_copy_(0, at, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (at,) = ctx.saved_tensors
        return grad.index_select(0, at), None, None


class _Copies(_Take):
    """The same where `at` may hold a number often: the gradients of copies add up in float32."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (at,) = ctx.saved_tensors
        exact = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.size, *grad.shape[1:], dtype=exact)
        return total.index_add_(0, at, grad.to(exact)).to(grad.dtype), None


def _copies(x: Tensor, at: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, _Copies).apply(x, at))
