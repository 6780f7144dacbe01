"""The sampler: the right distribution, the right stops, and draws that depend on nothing but the row."""

import math

import hypothesis.strategies as st
import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from torch import nn
from transformers import TopKLogitsWarper, TopPLogitsWarper

from reinforce.rollout import join, micro_batches
from reinforce.sampler import Sampling, completes, draw_coins, keep_likely, row_seed, sample, sample_in_batches, sample_token

PROMPTS = [[1, 5, 9], [1, 7], [1, 4, 4, 8, 11, 3]]
HOW = Sampling(max_new_tokens=12, end_ids=(2,), pad_id=0)


def seeds(prompts, k, step=0):
    return [row_seed(0, step, i, j) for i in range(len(prompts)) for j in range(k)]


class Fixed(nn.Module):
    """A language model of fixed next-token logits whatever came before: (V,) or a function of the position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, logits_to_keep=0, **kwargs):
        class Cache:
            batch_repeat_interleave = batch_select_indices = lambda self, _: None

        class Output:
            past_key_values = Cache()
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output


@pytest.mark.parametrize("vocabulary", [2, 3, 7, 64, 100])
def test_sampled_tokens_follow_softmax(vocabulary):
    """Chi-square over 200,000 draws, below its 1 in 10,000 quantile (normal approximation)."""
    draw = torch.Generator().manual_seed(vocabulary)
    probs = torch.randn(vocabulary, generator=draw).softmax(0)
    n, levels = 200_000, math.ceil(math.log2(vocabulary))
    counts = sample_token(probs.expand(n, -1), torch.rand(n, levels, generator=draw)).bincount(minlength=vocabulary)
    chi = ((counts - n * probs).square() / (n * probs)).sum().item()
    assert chi < vocabulary - 1 + 3.8 * math.sqrt(2 * (vocabulary - 1)) + 10


@given(st.lists(st.sampled_from([0.0, 1e-30, 1e-8, 0.1, 1.0]), min_size=1, max_size=9), st.data())
def test_a_token_of_probability_zero_is_never_drawn(values, data):
    if not any(values):
        values[0] = 1.0
    levels = math.ceil(math.log2(len(values)))
    coins = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1 - 2**-24]), min_size=levels, max_size=levels))
    token = sample_token(torch.tensor([values]), torch.tensor([coins]).reshape(1, levels)).item()
    assert values[token] > 0


def test_draws_do_not_depend_on_the_batch_at_a_real_vocabulary():
    """50,000 tokens, fp32: rows alone, in a batch, and permuted, draw the same tokens from the same coins."""
    draw = torch.Generator().manual_seed(0)
    probs, coins = torch.randn(64, 50_000, generator=draw).softmax(-1), torch.rand(64, 16, generator=draw)
    whole = sample_token(probs, coins)
    order = torch.randperm(64, generator=draw)
    assert torch.equal(sample_token(probs[order], coins[order]), whole[order])
    assert torch.equal(torch.cat([sample_token(probs[i : i + 1], coins[i : i + 1]) for i in range(64)]), whole)
    assert len(whole.unique()) > 55


def test_a_branch_without_mass_is_not_taken_where_the_other_has_next_to_none():
    """0.9 of the smallest number is that number again."""
    probs = torch.tensor([[1e-45, 0.0, 1.0, 0.0]])
    assert sample_token(probs, torch.tensor([[0.0, 0.9]])).tolist() == [0]


def test_every_row_has_random_numbers_of_its_own_and_a_prefix_of_one_stream():
    coins = draw_coins(seeds(range(8), 4), steps=20, vocabulary=1000)
    assert len({tuple(row.flatten().tolist()) for row in coins}) == 32
    assert torch.equal(draw_coins(seeds(range(8), 4), steps=5, vocabulary=1000), coins[:, :5])
    assert row_seed(0, 1, 2, 3) == 8415226463665777121, "a stable hash, not Python's"


def test_rollouts_do_not_depend_on_the_micro_batch_or_on_neighbours(model):
    whole = sample(model, PROMPTS, seeds(PROMPTS, 4), HOW)
    for rows in (4, 8):
        parts = sample_in_batches(model, PROMPTS, seeds(PROMPTS, 4), HOW, rows)
        assert torch.equal(parts.response, whole.response) and torch.equal(parts.mask, whole.mask)
        torch.testing.assert_close(parts.logp, whole.logp, rtol=0, atol=1e-5)
    alone = sample(model, PROMPTS[1:2], seeds(PROMPTS, 4)[4:8], HOW)
    width = alone.response.shape[1]
    assert torch.equal(alone.response, whole.response[4:8, :width]) and torch.equal(alone.mask, whole.mask[4:8, :width])


def test_greedy_sampling_agrees_with_generate(model):
    model.generation_config.pad_token_id = 0
    out = sample(model, PROMPTS, seeds(PROMPTS, 1), Sampling(max_new_tokens=12, end_ids=(2,), pad_id=0, greedy=True))
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert out.response[i][out.mask[i]].tolist() == expected.tolist()


def test_greedy_sampling_ignores_the_seed_and_training_sampling_follows_the_step():
    model = tiny_llama()
    greedy = Sampling(max_new_tokens=12, end_ids=(2,), pad_id=0, greedy=True, temperature=3.0)
    assert torch.equal(sample(model, PROMPTS, seeds(PROMPTS, 1, 0), greedy).response,
                       sample(model, PROMPTS, seeds(PROMPTS, 1, 9), greedy).response)  # fmt: skip
    a, b = (sample(model, PROMPTS, seeds(PROMPTS, 4, step), HOW).response for step in (0, 1))
    assert a.shape != b.shape or not torch.equal(a, b)


def test_a_high_entropy_policy_gives_no_duplicates():
    rows = sample(Fixed(torch.zeros(64)), PROMPTS, seeds(PROMPTS, 16), Sampling(max_new_tokens=12, end_ids=(), pad_id=0)).response
    assert len({tuple(r) for r in rows.tolist()}) == 48


def test_pad_equal_to_the_end_token_keeps_exactly_one_end_token_per_finished_row():
    out = sample(tiny_llama(), PROMPTS, seeds(PROMPTS, 16), Sampling(max_new_tokens=30, end_ids=(2,), pad_id=2))
    assert out.finished.any() and not out.finished.all()
    for row, mask, finished in zip(out.response, out.mask, out.finished, strict=True):
        kept = row[mask].tolist()
        assert kept.count(2) == int(finished) and (not finished or kept[-1] == 2)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"max_new_tokens": 0}, {"end_strings": "abc"}, {"end_strings": ("a",)}])
def test_what_cannot_be_sampled_is_refused(options):
    with pytest.raises(ValueError, match=r"must be above 0|need decode"):
        Sampling(**{"max_new_tokens": 4, "end_ids": (2,), "pad_id": 0, **options})


def test_any_of_several_end_tokens_stops_a_row():
    how = Sampling(max_new_tokens=40, end_ids=(2, 3, 4), pad_id=0)
    out = sample(Fixed(torch.zeros(8)), PROMPTS, seeds(PROMPTS, 32), how)
    last = out.response.gather(1, out.length[:, None] - 1)[:, 0]
    assert set(last[out.finished].tolist()) == {2, 3, 4}
    body = out.mask & (torch.arange(out.mask.shape[1]) < out.length[:, None] - out.finished[:, None].long())
    assert not torch.isin(out.response[body], torch.tensor([2, 3, 4])).any()


def test_an_end_token_exactly_at_the_length_limit_counts_as_finished():
    logits = torch.full((5,), -30.0)
    logits[2] = 30.0
    out = sample(Fixed(logits), PROMPTS, seeds(PROMPTS, 1), Sampling(max_new_tokens=1, end_ids=(2,), pad_id=0))
    assert out.finished.all() and out.length.tolist() == [1, 1, 1]
    logits = logits.roll(1)
    out = sample(Fixed(logits), PROMPTS, seeds(PROMPTS, 1), Sampling(max_new_tokens=3, end_ids=(2,), pad_id=0))
    assert not out.finished.any() and out.length.tolist() == [3, 3, 3]


def test_no_end_token_comes_before_the_minimum():
    out = sample(Fixed(torch.zeros(4)), PROMPTS, seeds(PROMPTS, 32),
                 Sampling(max_new_tokens=20, min_new_tokens=6, end_ids=(2,), pad_id=0))  # fmt: skip
    assert out.length.min() == 7 and not (out.response[:, :6] == 2).any()
    torch.testing.assert_close(out.logp[:, :6], torch.full_like(out.logp[:, :6], math.log(1 / 3)))


def test_the_token_that_completes_an_end_string_ends_the_response_and_belongs_to_it():
    letters = "abcdefgh"
    decode = lambda ids: "".join(letters[i % 8] for i in ids)  # noqa: E731
    how = Sampling(max_new_tokens=200, end_ids=(), pad_id=0, end_strings=("ab", "ccc"), decode=decode)
    out = sample(Fixed(torch.zeros(8)), PROMPTS, seeds(PROMPTS, 16), how)
    for row, mask, finished in zip(out.response, out.mask, out.finished, strict=True):
        text = decode(row[mask].tolist())
        assert finished == text.endswith(("ab", "ccc")) and not any(s in text[:-1] for s in ("ab", "ccc"))
    assert completes(torch.tensor([[7, 0, 1], [7, 1, 0]]), ("ab",), decode).tolist() == [True, False]
    assert completes(torch.tensor([[0, 1]]), ("ab",), decode).tolist() == [False], "half of it is the prompt's"


def test_an_end_string_counts_though_it_stood_there_before():
    """With --min-new-tokens it may have come earlier; the next one ends the response, were it to overlap the last."""
    words = ["the ", "was ", "aa", "é"]
    decode = lambda ids: "".join(words[i] for i in ids)  # noqa: E731
    tails = torch.tensor([[0, 0, 1, 0, 1], [0, 1, 0, 1, 0], [2, 2, 2, 2, 2]])
    assert completes(tails, ("the was", "aaa"), decode).tolist() == [True, False, True]

    def halves(ids):  # 4 and 5 are the halves of one character, which alone is decoded to another
        pieces = {4: "\N{REPLACEMENT CHARACTER}" if ids[-1] == 4 else "", 5: "é"}
        return "".join(pieces.get(i, "x") for i in ids)

    assert completes(torch.tensor([[0, 0, 4, 5]]), ("é",), halves).tolist() == [True], "the second half of a character completes it"


def test_an_end_string_that_begins_with_a_space_is_seen_at_the_first_token():
    """A tokenizer of the SentencePiece kind decodes " end" alone as "end"."""
    words = {0: "▁the", 1: "▁end", 2: "▁cat"}
    decode = lambda ids: "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert completes(torch.tensor([[0, 1], [0, 2]]), (" end",), decode).tolist() == [True, False]


def test_top_k_and_top_p_keep_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda k, p: keep_likely(logits, k, p).isfinite()[0].tolist()  # noqa: E731
    assert kept(2, 1.0) == [True, True, False, False]
    assert kept(0, 0.6) == [True, True, False, False]
    assert kept(0, 0.01) == [True, False, False, False]
    assert kept(0, 1.0) == [True] * 4


def test_top_p_needs_no_operation_that_deterministic_refuses_on_a_gpu(monkeypatch):
    """A GPU has no deterministic running sum: the processor adds up then, to which nothing can be copied from "meta"."""
    logits = torch.randn(2, 30)
    plain = keep_likely(logits.clone(), 0, 0.5)
    assert keep_likely(logits.to("meta"), 0, 0.5).is_meta
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert torch.equal(keep_likely(logits.clone(), 0, 0.5), plain)
    with pytest.raises(NotImplementedError, match="meta"):
        keep_likely(logits.to("meta"), 0, 0.5)


@pytest.mark.parametrize(("k", "p"), [(3, 0.7), (20, 0.8), (5, 1.0), (0, 0.5)])
def test_top_k_with_top_p_is_that_of_generate(k, p):
    """First top k, then top p of what is left."""
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    theirs = TopKLogitsWarper(k)(None, logits) if k else logits
    theirs = TopPLogitsWarper(p)(None, theirs) if p < 1 else theirs
    assert torch.equal(keep_likely(logits.clone(), k, p), theirs)


def test_temperature_scales_the_logits_that_are_sampled():
    probs = (torch.arange(6.0) / 0.5).softmax(0)
    out = sample(Fixed(torch.arange(6.0)), [[1]], seeds([0], 4000), Sampling(1, (), 0, temperature=0.5))
    share = out.response.flatten().bincount(minlength=6) / 4000
    assert (share - probs).abs().max() < 0.03
    torch.testing.assert_close(out.logp[:, 0], probs.log()[out.response[:, 0]])


def test_taking_rows_cuts_padding_and_joining_puts_it_back():
    out = sample(tiny_llama(), PROMPTS, seeds(PROMPTS, 2), HOW)
    parts = [out.take([i]) for i in range(6)]
    assert [p.prompt.shape[1] for p in parts] == [3, 3, 2, 2, 6, 6]
    assert all(p.mask.all() for p in parts)
    again = join(parts, pad_id=0)
    for name in ("prompt", "prompt_mask", "response", "mask", "logp", "finished"):
        assert torch.equal(getattr(again, name), getattr(out, name)), name


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30), st.integers(1, 8), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_both_caps_of_what_is_really_padded(lengths, rows, tokens):
    """Padded is to the longest prompt and the longest response, which may be two rows: up to twice the longest sum."""
    prompt, response = zip(*lengths, strict=True)
    batches = micro_batches(prompt, response, rows, tokens)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    for b in batches:
        width = max(prompt[i] for i in b) + max(response[i] for i in b)
        assert len(b) <= rows and (len(b) == 1 or len(b) * width <= tokens)


def test_a_large_vocabulary_model_samples_the_same_alone_and_together():
    model = tiny_llama(vocabulary=50_000)
    whole = sample(model, PROMPTS, seeds(PROMPTS, 4), HOW)
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], seeds(PROMPTS, 4)[4 * i : 4 * i + 4], HOW)
        width = alone.response.shape[1]
        assert torch.equal(alone.response, whole.response[4 * i : 4 * i + 4, :width])


def test_top_k_or_top_p_alone_limits_what_is_sampled():
    model, drawn = Fixed(torch.tensor([0.5, 0.3, 0.15, 0.05]).log()), {}
    for name, value in (("top_p", 0.6), ("top_k", 1)):
        out = sample(model, [[1]], seeds([0], 300), Sampling(1, (), 0, **{name: value}))
        drawn[name] = set(out.response.flatten().tolist())
    assert drawn == {"top_p": {0, 1}, "top_k": {0}}


def test_an_end_string_ends_a_response_from_the_minimum_on():
    how = Sampling(9, (), 0, min_new_tokens=3, end_strings=("a",), decode=lambda ids: "a" * len(ids))
    assert sample(Fixed(torch.zeros(8)), [[1]], seeds([0], 1), how).length.tolist() == [3]


def test_the_longest_end_string_is_found_beside_a_short_one():
    said = lambda ids: "".join("abcdefgh"[i] for i in ids)  # noqa: E731
    assert completes(torch.tensor([[7, 0, 1, 2, 3, 4, 5]]), ("h", "abcdef"), said).tolist() == [True]
