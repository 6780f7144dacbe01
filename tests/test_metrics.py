"""The metrics of a step, against numbers by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from reinforce.run.group import Group
from reinforce.run.metrics import speed, summarise, summarise_ratios, summarise_updates
from reinforce.run.run import Run


def test_metrics_of_a_step_by_hand():
    groups = [
        Group(0, "p", ["a", "b"], [1.0, None], [0.1, 0.3], [0.9, None], [True, False], [2, 4], [True, False], [-3.0, -6.0]),
        Group(1, "q", ["c", "d"], [2.0, 4.0], [0.2, 0.4], [1.8, 3.6], [True, False], [3, 1], [True, True], [-1.0, -2.0]),
        Group(2, "r", ["e", "f"], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [True, True], [1, 1], [True, True], [-1.0, -1.0]),
    ]
    assert summarise(groups, [0.0, 0.0, 0.0, 0.0, -1.0, 1.0]) == pytest.approx({
        "reward": 1.6, "reward_std": math.sqrt(2.3), "kl": 1 / 6, "objective": 1.46, "advantage_std": math.sqrt(0.4), "entropy": 14 / 12,
        "response_length": 2.0, "finished": 5 / 6, "valid": 4 / 6, "zero_signal": 2 / 3})  # fmt: skip
    assert summarise_updates(groups, [(1.0, 2.0, 3.0), (3.0, 1.0, 5.0)], 0.1) == pytest.approx(
        {"loss": 2.0, "grad_norm": 4.0, "lr": 0.1, "optimizer_steps": 2, "ratio_clipped": 3 / 7})  # fmt: skip
    assert summarise_ratios([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], 4, 8) == {
        "logprob_gap": 1.0,
        "ratio_distance": 0.5,
        "ratio_outside": 0.5,
    }
    assert speed(groups, 5, {"rollout": 2.0})["tokens"] == 17


def test_ratios_of_scorer_and_sampler_by_hand():
    rollout = SimpleNamespace(
        logp=torch.tensor([[-1.0, -2.0, 9.0]]), mask=torch.tensor([[True, True, False]]), length=torch.tensor([2])
    )
    batch = SimpleNamespace(logp_old=torch.tensor([[-0.95, -2.3, 0.0]]), rollout=rollout)
    made = SimpleNamespace(batch=batch, prompts=[None], advantage=torch.zeros(1, 1))
    distance = sum(math.exp(x) - 1 - x for x in (0.05, -0.3)) / 2
    assert Run._ratios(SimpleNamespace(_updates=[]), made) == pytest.approx(
        {"logprob_gap": 0.25, "ratio_distance": distance, "ratio_outside": 0.5}, rel=1e-4)  # fmt: skip


def test_equal_rewards_are_no_signal_though_their_kls_make_the_objectives_differ():
    equal = Group(0, "p", ["a", "b"], [1.0, 1.0], [0.1, 0.3], [0.99, 0.97], [True, True], [2, 4], [True, True], [-3.0, -6.0])
    assert summarise([equal], [0.02, -0.02])["zero_signal"] == 1.0
