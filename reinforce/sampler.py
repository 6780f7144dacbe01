"""Batched sampling with a key-value cache: prompts in, `Rollout` out.

    y_t ~ softmax(logits / temperature)

Each row draws from a random generator of its own, seeded by a hash of (seed, step, prompt, k), so
what it draws does not depend on its neighbours, the batch size or the number of ranks, and there is
no random state to save. A prompt runs through the model once and its K responses start from
copies of its cache; rows that have ended leave the batch. Which tokens belong to a response is kept
as a length, never read back from token ids: the pad token may well be an end token.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reinforce.kv_cache import give_room
from reinforce.logprobs import policy_logits
from reinforce.rollout import Rollout, join, positions

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sampling:
    """How to sample. Training never sets `top_k` or `top_p`: their distribution is not scored."""

    max_new_tokens: int
    end_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    min_new_tokens: int = 0
    end_strings: tuple[str, ...] = ()
    decode: Callable[[Sequence[int]], str] | None = None  # token ids -> text, for end strings
    greedy: bool = False
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for what cannot be sampled."""
        if self.temperature <= 0 or self.max_new_tokens < 1 or isinstance(self.end_strings, str):
            raise ValueError(
                f"temperature {self.temperature} must be above 0, max_new_tokens "
                f"{self.max_new_tokens} at least 1, end_strings {self.end_strings!r} a tuple"
            )
        if self.end_strings and self.decode is None:
            raise ValueError("end_strings need decode")


def row_seed(seed: int, step: int, prompt: int, k: int) -> int:
    """Seed of one row, the same on every machine and in every process.

    Steps below 0 are no training steps: -1 validation, -2 recipes/evaluate.py, -3 and -4
    recipes/compare.py. Prompt -1 is the order of the prompts.

    It has 63 bits, of which PyTorch's generator on a CPU takes the lower 32.

    >>> row_seed(0, 0, 0, 0) == row_seed(0, 0, 0, 0) != row_seed(0, 0, 0, 1)
    True
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{prompt}/{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_coins(seeds: Sequence[int], steps: int, vocabulary: int) -> Tensor:
    """Uniforms in [0, 1), (B, steps, ceil(log2 V)), each row from its own generator on the CPU."""
    levels = math.ceil(math.log2(vocabulary))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.rand(steps, levels, generator=g) for g in generators])


def sample_token(probs: Tensor, coins: Tensor) -> Tensor:
    """Draw one token a row -> token ids (B,).

    probs (B, V) have any positive scale; coins (B, ceil(log2 V)) are uniform in [0, 1). The draw
    walks down a binary tree of partial sums, one coin a level: it goes right if
    coin * (left + right) >= left. It is exact up to the 24 bits of a float32 coin, and a token of
    probability 0 is never drawn.

    A rounding error moves a draw only if it moves one of log2 V branch points across its coin.
    Inverting a running sum over the whole vocabulary is far more sensitive, and
    `torch.multinomial` draws V numbers a row.

    >>> sample_token(torch.tensor([[0.5, 0.0, 0.5]]), torch.tensor([[0.9, 0.3]]))
    tensor([2])
    """
    levels = math.ceil(math.log2(probs.shape[1]))
    if probs.ndim != 2 or coins.shape != (probs.shape[0], levels):
        got = f"{tuple(probs.shape)}, {tuple(coins.shape)}"
        raise ValueError(f"expected probs (B, V) and coins (B, {levels}), got {got}")
    tree = [nn.functional.pad(probs, (0, 2**levels - probs.shape[1]))]  # (B, 2^levels)
    while tree[-1].shape[1] > 1:
        pairs = tree[-1].unflatten(1, (-1, 2))  # (B, n, 2)
        tree.append(pairs[..., 0] + pairs[..., 1])
    node = torch.zeros(len(probs), 1, dtype=torch.long, device=probs.device)  # (B, 1)
    for level, coin in zip(reversed(tree[:-1]), coins.T, strict=True):
        left, right = level.gather(1, 2 * node), level.gather(1, 2 * node + 1)  # (B, 1)
        goes_right = (coin[:, None] * (left + right) >= left) & (right > 0)  # (B, 1)
        node = 2 * node + goes_right
    return node[:, 0]


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Mask logits (B, V) but those of the `top_k` likeliest tokens (0: all) within `top_p`.

    `top_p`: the fewest tokens whose probability reaches it, as a share of the `top_k`'s.
    """
    ordered, index = logits.sort(-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    probability = ordered.softmax(-1)  # (B, V)
    # a GPU adds up in no fixed order, which --deterministic refuses
    summing = CPU if torch.are_deterministic_algorithms_enabled() else logits.device
    reached = probability.to(summing).cumsum(-1).to(logits.device)  # (B, V)
    likelier = reached - probability  # (B, V), mass of the likelier ones
    drop = (likelier >= top_p) | (ordered == -torch.inf)
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)


def cache_name(out: Any) -> str:
    """The name of the cache in a model's output: `cache` from transformers 5.24 on."""
    return "cache" if getattr(out, "cache", None) is not None else "past_key_values"


def left_pad(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both (P, S)."""
    s = max(len(p) for p in prompts)
    ids = [[pad_id] * (s - len(p)) + list(p) for p in prompts]
    real = [[False] * (s - len(p)) + [True] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def sample_in_batches(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    max_rows: int,
    device: torch.device = CPU,
) -> Rollout:
    """`sample`, at most `max_rows` rows at a time, in whole groups (at least one)."""
    k = len(seeds) // len(prompts)
    n = max(1, max_rows // k)
    parts = [
        sample(model, prompts[i : i + n], seeds[i * k : (i + n) * k], sampling, device)
        for i in range(0, len(prompts), n)
    ]
    return join(parts, sampling.pad_id)


@torch.no_grad()
def sample(
    model: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    device: torch.device = CPU,
) -> Rollout:
    """Sample len(seeds) / len(prompts) = K responses to each prompt; seeds in row order.

    `model` is a Hugging Face causal language model on `device`, or its forward method.

    Raises ValueError when the seeds are not a multiple of the prompts, or a prompt is empty.
    """
    if not prompts or len(seeds) % len(prompts) or not all(map(len, prompts)):
        shortest = min(map(len, prompts), default=0)
        raise ValueError(f"{len(prompts)} prompts of {shortest} tokens or more, {len(seeds)} seeds")
    prompt, prompt_mask = left_pad(prompts, sampling.pad_id, device)  # (P, S)
    out = model(
        input_ids=prompt,
        attention_mask=prompt_mask.long(),
        position_ids=positions(prompt_mask),
        use_cache=True,
        logits_to_keep=1,
    )
    k, b, t_max = len(seeds) // len(prompts), len(seeds), sampling.max_new_tokens
    cache_key = cache_name(out)
    cache = getattr(out, cache_key)
    cache.batch_repeat_interleave(k)
    give_room(cache)
    logits = out.logits[:, -1].repeat_interleave(k, 0)  # (B, V)
    prompt = prompt.repeat_interleave(k, 0)  # (B, S)
    prompt_mask = prompt_mask.repeat_interleave(k, 0)  # (B, S)
    coins = draw_coins(seeds, t_max, logits.shape[1]).to(device)  # (B, T, log2 V)

    response = torch.full((b, t_max), sampling.pad_id, device=device)  # (B, T)
    logp = torch.zeros(b, t_max, device=device)  # (B, T)
    length = torch.full((b,), t_max, device=device)  # (B,)
    finished = torch.zeros(b, dtype=torch.bool, device=device)  # (B,)
    end_ids = torch.tensor(sampling.end_ids, dtype=torch.long, device=device)
    end_strings, decode, least = sampling.end_strings, sampling.decode, sampling.min_new_tokens
    alive = torch.arange(b, device=device)  # (n,) rows not yet ended
    for t in range(t_max):
        at = torch.full_like(alive, t)  # (n,)
        logits = policy_logits(logits, at, sampling.temperature, end_ids, least)  # (n, V)
        if sampling.top_k or sampling.top_p < 1:
            logits = keep_likely(logits, sampling.top_k, sampling.top_p)
        token_logp = logits.log_softmax(-1)  # (n, V)
        if sampling.greedy:
            token = logits.argmax(-1)  # (n,)
        else:
            token = sample_token(token_logp.exp(), coins[alive, t])  # (n,)
        response[alive, t] = token
        logp[alive, t] = token_logp.gather(1, token[:, None])[:, 0]
        ended = torch.isin(token, end_ids)  # (n,)
        if end_strings and decode is not None and t + 1 >= least:
            tokens = torch.cat([prompt[alive, -1:], response[alive, : t + 1]], 1)  # (n, 1 + t)
            ended |= completes(tokens, end_strings, decode)
        length[alive] = t + 1
        finished[alive] = ended
        going = (~ended).nonzero()[:, 0]  # what a GPU is waited for, once a token
        if t + 1 == t_max or len(going) == 0:
            break
        if len(going) < len(alive):
            alive, token = alive[going], token[going]
            cache.batch_select_indices(going)
        own = torch.ones_like(response[alive, : t + 1], dtype=torch.bool)
        seen = torch.cat([prompt_mask[alive], own], 1)  # (n, S + t + 1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=seen.long(),
            position_ids=positions(seen)[:, -1:],
            use_cache=True,
            **{cache_key: cache},
        ).logits[:, -1]

    t = int(length.max())
    mask = torch.arange(t, device=device) < length[:, None]  # (B, T)
    return Rollout(prompt, prompt_mask, response[:, :t], mask, logp[:, :t], finished)


def completes(
    tokens: Tensor, end_strings: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> Tensor:
    """Which responses hold an end string that their last token completed, (n,) bool.

    tokens (n, 1 + t): the prompt's last token, then the response. The last few are decoded, and the
    first of these is context alone, since a tokenizer may drop the space before a text's first
    word: an end string must lie behind it.
    """
    window = max(len(s.encode()) for s in end_strings) + 2  # a token is at least one byte

    def said(ids: list[int]) -> str:
        return decode(ids)[len(decode(ids[:1])) :]

    tails = tokens[:, -window:].tolist()
    done = []
    for tail in tails:
        text, before = said(tail), said(tail[:-1])  # with the last token, and without
        n = len(before.rstrip("\N{REPLACEMENT CHARACTER}"))  # that stands for half a character
        done.append(any(s in text[max(0, n + 1 - len(s)) :] for s in end_strings))
    return torch.tensor(done, device=tokens.device)
