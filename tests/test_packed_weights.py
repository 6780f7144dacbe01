"""Weights laid out for sampling: the same tokens and log-probs, and nothing stays behind."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch import nn

from reinforce import lora
from reinforce import packed_weights as packing
from reinforce.head import give_float32_logits, has_float32_logits
from reinforce.packed_weights import packed_weights
from reinforce.policy import blocks, store_frozen
from reinforce.sampler import Sampling, row_seed, sample

PROMPTS = [[1, 5, 9], [1, 7, 4, 4, 8]]
SEEDS = [row_seed(0, 0, i, k) for i in range(2) for k in range(3)]


@pytest.fixture(autouse=True)
def tiny_weights_too(monkeypatch):
    monkeypatch.setattr(packing, "SMALL", 0)


def rollout(model, bf16=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), packed_weights(model, bf16):
        return sample(model, PROMPTS, SEEDS, Sampling(12, (2,), 0))


def plain(model, bf16=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return sample(model, PROMPTS, SEEDS, Sampling(12, (2,), 0))


def replaced(model):
    """Names of the layers whose forward is neither PyTorch's nor head.py's."""
    linear = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear and "forward" in vars(m)]
    return [name for name, m in linear if not has_float32_logits(m)]


def with_head():
    """A LLaMA as train.py loads it."""
    return give_float32_logits(tiny_llama())


def biased():
    """A LLaMA whose layers have biases."""
    model = tiny_llama()
    for layer in blocks(model)[0].modules():
        if type(layer) is nn.Linear:
            layer.bias = nn.Parameter(torch.linspace(-0.1, 0.1, layer.out_features))
    return model


def adapted():
    """A LLaMA with adapters that change something."""
    model = tiny_llama()
    lora.add(model, lora.layers(blocks(model), model, ()), 2, None, 0)
    for adapter in lora.adapters(model).values():
        nn.init.normal_(adapter.B)
    return model


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, biased, adapted, with_head])
def test_tokens_and_log_probs_are_those_of_plain_weights(make, bf16):
    model = make()
    a, b = rollout(model, bf16), plain(model, bf16)
    assert torch.equal(a.response, b.response) and torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.logp, b.logp, atol=1e-2 if bf16 else 1e-5, rtol=0)  # a product's sum may take another order


@pytest.mark.parametrize("bf16", [True, False])
def test_the_layout_is_of_the_weights_as_they_are_and_goes_with_the_block(bf16):
    model = with_head()
    with pytest.raises(KeyError), packed_weights(model, bf16):
        assert len(replaced(model)) == 7 * len(model.model.layers) + 1  # the head
        raise KeyError
    assert not replaced(model) and has_float32_logits(model.lm_head)
    before = rollout(model, bf16)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    after = rollout(model, bf16)
    assert not torch.equal(before.response, after.response) and torch.equal(after.response, plain(model, bf16).response)


@pytest.mark.parametrize("make", [lambda: tiny_llama().double(), lambda: tiny_llama().bfloat16(), lambda: tiny_llama().to("meta")])
def test_weights_of_another_type_or_place_stay_as_they_are(make):
    with packed_weights(model := make(), bf16=False):
        assert not replaced(model)


def test_frozen_weights_in_bfloat16_below_adapters_are_laid_out_and_the_adapters_count():
    model, other = adapted(), adapted()
    store_frozen(model, torch.bfloat16)
    with packed_weights(model, bf16=True):
        assert len(replaced(model)) == 7 * len(model.model.layers) + 1
    a, b = rollout(model), plain(model)
    assert torch.equal(a.response, b.response)
    torch.testing.assert_close(a.logp, b.logp, atol=1e-2, rtol=0)
    for adapter in lora.adapters(other).values():
        nn.init.zeros_(adapter.B)
    assert not torch.equal(rollout(other).response, a.response)


def test_small_weights_stay_as_they_are(monkeypatch):
    model = with_head()
    monkeypatch.setattr(packing, "SMALL", model.lm_head.weight.numel())
    with packed_weights(model, bf16=False):
        assert replaced(model) == ["lm_head"], "the largest, of 50 tokens and 16 numbers each"
