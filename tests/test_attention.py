"""Attention of one new token: the packed form against the plain formula, and where it is not taken."""

import pytest
import torch

from reinforce import attention

B, HEADS, KEYS, L, D = 3, 6, 2, 11, 8


def inputs(queries=1):
    draw = torch.Generator().manual_seed(0)
    shapes = (B, HEADS, queries, D), (B, KEYS, L, D), (B, KEYS, L, D)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def plain(query, key, value, mask, scale):
    key, value = (x.repeat_interleave(HEADS // KEYS, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


class Layer(torch.nn.Module):
    """What transformers' function asks of the layer that calls it."""

    num_key_value_groups = HEADS // KEYS
    is_causal = True


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_packed_by_key_head_is_the_plain_formula(masked):
    query, key, value = inputs()
    mask = None
    if masked:
        mask = torch.arange(L) >= torch.tensor([0, 3, 7])[:, None, None, None]  # (B, 1, 1, L)
    out, weights = attention.attend(Layer(), query, key, value, mask, scaling=0.3, dropout=0.0)
    assert out.shape == (B, 1, HEADS, D) and weights is None
    torch.testing.assert_close(out, plain(query, key, value, mask, 0.3))


def test_several_queries_one_head_a_key_and_masks_or_biases_of_a_head_are_left_to_transformers(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **how: seen.append(how) or (None, None))
    query, key, value = inputs()
    attention.attend(Layer(), inputs(queries=4)[0], key, value, None)
    attention.attend(Layer(), query, key.repeat(1, 3, 1, 1), value.repeat(1, 3, 1, 1), None)
    attention.attend(Layer(), query, key, value, torch.ones(B, HEADS, 1, L, dtype=torch.bool))
    attention.attend(Layer(), query, key, value, None, position_bias=torch.zeros(1, HEADS, 1, L))
    attention.attend(Layer(), query, key, value, None, softcap=50.0)
    assert len(seen) == 5 and seen[-1] == {"softcap": 50.0}
    attention.attend(Layer(), query, key, value, None, softcap=None, position_bias=None)
    assert len(seen) == 5


def test_a_loaded_policy_samples_through_it(small, monkeypatch):
    """With the plain function in its place the tokens and their logp are the same."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    from reinforce.policy import load_policy, load_tokenizer
    from reinforce.sampler import Sampling, sample

    called = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *a, **how: called.append(1) or attend(*a, **how))
    tokenizer = load_tokenizer(str(small / "policy"))
    load_policy(str(small / "policy"), tokenizer, torch.device("cpu"))
    try:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, initializer_range=0.3, **shape)).eval()
        out = sample(model, [[3, 4, 5], [6]], range(4), Sampling(5, (), 0))
        assert len(called) >= 5
    finally:
        AttentionInterface.register("sdpa", attention.sdpa_attention_forward)
    again = sample(model, [[3, 4, 5], [6]], range(4), Sampling(5, (), 0))
    assert torch.equal(out.response, again.response)
    torch.testing.assert_close(out.logp, again.logp)
    AttentionInterface.register("sdpa", attend)
