"""Weights laid out for sampling: the same tokens and log-probs, and nothing stays behind."""

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch import nn

from reinforce import lora
from reinforce.packed_weights import packed_weights
from reinforce.policy import blocks
from reinforce.sampler import Sampling, row_seed, sample

PROMPTS = [[1, 5, 9], [1, 7, 4, 4, 8]]
SEEDS = [row_seed(0, 0, i, k) for i in range(2) for k in range(3)]


def rollout(model, bf16=True):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), packed_weights(model, bf16):
        return sample(model, PROMPTS, SEEDS, Sampling(12, (2,), 0))


def plain(model):
    with torch.autocast("cpu", torch.bfloat16):
        return sample(model, PROMPTS, SEEDS, Sampling(12, (2,), 0))


def replaced(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Linear and "forward" in vars(m) and "lm_head" not in name]


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


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, biased, adapted])
def test_tokens_and_log_probs_are_those_of_plain_weights(make):
    model = make()
    a, b = rollout(model), plain(model)
    assert torch.equal(a.response, b.response) and torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.logp, b.logp, atol=1e-2, rtol=0)  # a product's sum may take another order


def test_the_layout_is_of_the_weights_as_they_are_and_goes_with_the_block():
    model = tiny_llama()
    with pytest.raises(KeyError), packed_weights(model, bf16=True):
        assert len(replaced(model)) == 7 * len(model.model.layers)
        raise KeyError
    assert not replaced(model)
    before = rollout(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    after = rollout(model)
    assert not torch.equal(before.response, after.response) and torch.equal(after.response, plain(model).response)


def test_float32_keeps_its_weights():
    model = tiny_llama()
    with packed_weights(model, bf16=False):
        assert not replaced(model)
