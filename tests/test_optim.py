"""The optimizer's schedule, groups and clipping."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from reinforce.optim import adamw, clip, learning_rate


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_schedule_warms_up_falls_and_ends_at_the_minimum(total, warmup, constant, lr, share):
    rates = [learning_rate(s, total, lr, share * lr, warmup, constant) for s in range(total)]
    assert all(0 < r <= lr * (1 + 1e-12) or (share * lr == 0 and r >= 0) for r in rates)
    rising = rates[: min(warmup, total)]
    assert rising == sorted(rising)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if total >= warmup + constant and constant:
        assert rates[-constant:] == [pytest.approx(share * lr)] * constant


def test_a_minimum_equal_to_the_peak_is_a_constant_rate():
    assert {learning_rate(s, 10, 0.1, 0.1, 0, 9) for s in range(10)} == {0.1}


def test_weight_decay_is_for_matrices():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    groups = adamw(model, 1.0, (0.9, 0.95), 0.1).param_groups
    assert [(g["weight_decay"], sorted(p.ndim for p in g["params"])) for g in groups] == [(0.1, [2]), (0.0, [1, 1, 1])]


def test_clipping_returns_the_length_before_and_zero_means_never():
    model = nn.Linear(2, 1, bias=False)
    for limit, after in ((1.0, 1.0), (0.0, 5.0), (9.0, 5.0)):
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert clip(model, limit) == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(after, rel=1e-5)


def test_the_length_of_a_large_gradient_is_exact_to_float32():
    """PyTorch's own, summed in float32 on a CPU, comes out about 5e-4 short of so many numbers."""
    model = nn.Linear(2**12, 2**12, bias=False)
    model.weight.grad = torch.rand(2**12, 2**12, generator=torch.Generator().manual_seed(0))
    exact = model.weight.grad.double().norm().item()
    assert clip(model, 1.0) == pytest.approx(exact, rel=2e-7)
    assert model.weight.grad.double().norm().item() == pytest.approx(1.0, rel=1e-6)
