"""The prompt once per group, and no padding: real tokens alone, one after the other in one row.

    | prompt 1 | prompt 2 | response to 1 | response to 2 | response to 1 | ...      N tokens

Causal attention makes a prompt's keys and values the same for all its responses, so a prompt runs
once and its gradients, one from each response, are added. Everything but attention treats a token
like any other, so the row is the model's input as it stands. Attention, and it alone, puts tokens
back into rows: a prompt sees itself, a response its prompt and itself. The result is that of whole
sequences up to rounding; `guard.inspect` compares the two at load. It holds where the model hands
its keyword arguments on to its attention and each of its layers sees all earlier tokens.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from reinforce.rollout import distinct

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # q, k, v, mask -> (B, Q, H, D)
SHORT = 32  # responses up to this length attend together; beyond, those within a factor of two


def response_states(
    body: Any, prompt: Tensor, prompt_mask: Tensor, response: Tensor, mask: Tensor
) -> Tensor:
    """Hidden states that predict the n response tokens of `mask`, (n, H).

    `body` is a Hugging Face base model whose attention is `attention.attend`; prompt and its mask
    (b, S) are padded left, response and its mask (b, T) right. Raises RuntimeError where a layer is
    something else, in which tokens of one sequence would mix with those of another.
    """
    unique, group = distinct(prompt, prompt_mask)  # (U, S), (b,)
    real = unique >= 0  # (U, S)
    row = SharedPrompts(real.sum(1), group, mask)
    ids = torch.cat([unique[real], response[row.order][mask[row.order]]])  # (N,)
    out = body(
        input_ids=ids[None],
        position_ids=row.positions[None],
        attention_mask=mask.new_ones(1, 1, 1, 1),  # of four dimensions: transformers makes none
        use_cache=False,
        shared_prompts=row,
    )
    if row.attended != body.config.get_text_config().num_hidden_layers:
        raise RuntimeError(f"{type(body).__name__}: not all its layers attend by attention.py")
    states: Tensor = out.last_hidden_state[0].index_select(0, row.before)
    return states


class SharedPrompts:
    """Where the tokens of U prompts and of b responses stand in one row of N tokens.

    order (b,): the responses, the shortest first. positions (N,): of each token in its sequence.
    before (n,): where the token before each response token stands, in the order of the mask.
    attended: how many layers have asked.
    """

    attended = 0

    def __init__(self, length: Tensor, group: Tensor, mask: Tensor) -> None:
        """length (U,) of the prompts, group (b,) each response's prompt, mask (b, T) its tokens."""
        tokens = mask.sum(1)  # (b,)
        self.order = tokens.argsort(stable=True)
        widths = 2 ** tokens[self.order].clamp(min=SHORT).log2().ceil().long()  # (b,)
        runs = self.order.split(widths.unique_consecutive(return_counts=True)[1].tolist())
        self._prompts = _Rows(length)
        self._responses = [_Rows(tokens[run], group[run], self._prompts) for run in runs]
        self._blocks = [self._prompts, *self._responses]
        self.positions = torch.cat([block.positions for block in self._blocks])

        end = torch.cat([length, tokens[self.order]]).cumsum(0) - 1  # (U + b,) last tokens' places
        start = torch.empty_like(tokens)
        start[self.order] = end[len(length) :] - tokens[self.order] + 1  # (b,)
        step = torch.arange(mask.shape[1], device=mask.device)  # (T,)
        before = torch.where(step == 0, end[group, None], start[:, None] + step - 1)  # (b, T)
        self.before = before[mask]

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (1, H, N, D), key and value (1, H/G, N, D) -> (1, N, H, D)."""
        self.attended += 1
        sizes = [len(block.at) for block in self._blocks]
        parts = [x[0].transpose(0, 1).split(sizes) for x in (query, key, value)]  # (m, H, D) each
        (q, k, v), *rest = zip(*parts, strict=True)
        q, k, v = (self._prompts.rows(x) for x in (q, k, v))  # (U, H, S, D)
        out = [self._prompts.tokens(attention(q, k, v, self._prompts.mask))]
        for block, own in zip(self._responses, rest, strict=True):
            own_q, own_k, own_v = (block.rows(x) for x in own)  # (r, H, T, D)
            keys = torch.cat([k.index_select(0, block.group), own_k], 2)  # (r, H/G, S + T, D)
            values = torch.cat([v.index_select(0, block.group), own_v], 2)
            out.append(block.tokens(attention(own_q, keys, values, block.mask)))
        return torch.cat(out)[None]


class _Rows:
    """r sequences that attend together: their m tokens <-> r rows, padded right to T."""

    def __init__(
        self, length: Tensor, group: Tensor | None = None, prompts: "_Rows | None" = None
    ) -> None:
        """length (r,); of responses also each one's prompt, group (r,), and the prompts' rows."""
        step = torch.arange(max(1, int(length.max())), device=length.device)  # (T,)
        self._real = step < length[:, None]  # (r, T)
        self.at = self._real.flatten().nonzero()[:, 0]  # (m,)
        self.group = length if group is None else group
        place = step.expand_as(self._real)  # (r, T)
        # a query of padding sees what is before it, too: a row of a softmax is never empty
        self.mask = (self._real[:, None] & (step <= step[:, None]))[:, None]  # (r, 1, T, T)
        if prompts is not None:
            shared = prompts._real[self.group]  # (r, S)
            place = place + shared.sum(1, keepdim=True)
            wide = shared[:, None, None].expand(-1, 1, len(step), -1)
            self.mask = torch.cat([wide, self.mask], 3)  # (r, 1, T, S + T)
        self.positions = place[self._real]  # (m,)

    def rows(self, x: Tensor) -> Tensor:
        """(m, H, D) -> (r, H, T, D), 0 where padded."""
        padded: Tensor = cast(Any, _Put).apply(x, self.at, self._real.numel())
        r, t = self._real.shape
        return padded.view(r, t, *x.shape[1:]).transpose(1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """(r, T, H, D) -> (m, H, D)."""
        taken: Tensor = cast(Any, _Take).apply(x.flatten(0, 1), self.at)
        return taken


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
