"""Attention of one new token, and of short sequences on a CPU: against the plain formula, and where neither is taken."""

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


def test_one_head_a_key_and_masks_or_biases_of_a_head_are_left_to_transformers(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **how: seen.append(how) or (None, None))
    query, key, value = inputs()
    attention.attend(Layer(), query, key.repeat(1, 3, 1, 1), value.repeat(1, 3, 1, 1), None)
    attention.attend(Layer(), query, key, value, torch.ones(B, HEADS, 1, L, dtype=torch.bool))
    attention.attend(Layer(), query, key, value, None, position_bias=torch.zeros(1, HEADS, 1, L))
    attention.attend(Layer(), query, key, value, None, softcap=50.0)
    assert len(seen) == 4 and seen[-1] == {"softcap": 50.0}
    attention.attend(Layer(), query, key, value, None, softcap=None, position_bias=None)
    assert len(seen) == 4


@pytest.mark.parametrize("queries", [2, 7, L])
@pytest.mark.parametrize("masked", [False, True])
def test_short_sequences_on_a_cpu_have_the_values_and_gradients_of_the_plain_formula(queries, masked):
    """Cached keys with a mask, or all keys without one, where a query sees none after its own."""
    query, key, value = (x.requires_grad_() for x in inputs(queries))
    mask = torch.ones(queries, L, dtype=torch.bool).tril(L - queries if masked else 0)
    if masked:  # rows with padding on the left; every query sees one key at least
        mask = mask & (torch.arange(L) >= torch.tensor([0, 0, 1])[:, None, None, None])
        mask[2, :, 0, 1] = True
    out, _ = attention.attend(Layer(), query, key, value, mask if masked else None, scaling=0.3, dropout=0.0)
    assert type(out.grad_fn).__name__ == "CloneBackward0", "not the kernel"
    right = plain(query, key, value, mask, 0.3)
    torch.testing.assert_close(out, right)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (torch.autograd.grad((o * weight).sum(), (query, key, value)) for o in (out, right))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_short_sequences_attend_in_float32_and_padding_gives_no_nan():
    query, key, value = (x.bfloat16().requires_grad_() for x in inputs(4))
    mask = torch.ones(B, 1, 4, L, dtype=torch.bool)
    mask[1, :, 0] = False  # a query of padding sees nothing
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention.attend(Layer(), query, key, value, mask, scaling=None)
    exact = plain(query.float(), key.float(), value.float(), mask, D**-0.5)
    assert out.dtype == torch.bfloat16
    seen = torch.ones(B, 4, dtype=torch.bool)
    seen[1, 0] = False
    torch.testing.assert_close(out[seen], exact[seen].bfloat16())
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.float().sum(), (query, key, value)))


def test_a_float64_model_keeps_its_precision():
    query, key, value = (x.double() for x in inputs(4))
    out, _ = attention.attend(Layer(), query, key, value, torch.ones(B, 1, 4, L, dtype=torch.bool), scaling=0.3)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, plain(query, key, value, None, 0.3), rtol=1e-12, atol=1e-12)


def test_many_scores_other_masks_and_options_keep_the_kernel(monkeypatch):
    seen = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **how: seen.append(how) or (None, None))
    query, key, value = (x.requires_grad_() for x in inputs(4))
    attention.attend(Layer(), query, key, value, torch.zeros(B, 1, 4, L))  # a bias
    attention.attend(Layer(), query, key, value, None, dropout=0.1)
    attention.attend(Layer(), query, key, value, None, softcap=50.0)
    monkeypatch.setattr(attention, "FEW_SCORES", 4 * L - 1)
    attention.attend(Layer(), query, key, value, None)
    assert len(seen) == 4
    monkeypatch.setattr(attention, "FEW_SCORES", 4 * L)
    assert attention.attend(Layer(), query, key, value, None)[0].shape == (B, 4, HEADS, D) and len(seen) == 4


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


def test_a_line_of_tokens_is_refused_by_a_layer_with_a_window():
    query, key, value = inputs(4)
    with pytest.raises(ValueError, match="a window of the last tokens"):
        attention.attend(Layer(), query, key, value, None, shared_prompts=object(), sliding_window=2)
