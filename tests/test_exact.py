"""Estimators against the gradient they estimate, by enumeration of a tiny language: no sampling error, no tolerance for luck."""

import pytest
import torch
from tiny import (
    BETA,
    FINISHED,
    GROUPS,
    MASK,
    RESPONSES,
    K,
    N,
    cosine,
    expected_gradient,
    logp_table,
    objective,
    probability,
    random_problem,
    true_gradient,
)

from reinforce import baselines
from reinforce.kl import abs_k1, exact_kl, k1, k2, k3, per_response
from reinforce.loss import clipped_loss, reinforce_loss
from reinforce.sampler import sample_token

SEEDS = range(3)


def greedy_index(logits):
    """Index of the response that takes the likeliest token each time."""
    response = ()
    while len(response) < 3 and 0 not in response:
        prefixes = [y[: len(response) + 1] for y in RESPONSES if y[: len(response)] == response]
        chance = probability(logits)
        step = {p: sum(chance[i] for i, y in enumerate(RESPONSES) if y[: len(p)] == p) for p in prefixes}
        response = max(step, key=step.get)
    return RESPONSES.index(response)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["none", "ema", "rloo", "remax"])
def test_unbiased_baselines_have_exactly_the_gradient_of_reward_minus_kl(name, seed):
    logits, ref, reward = random_problem(seed)
    r = objective(logits, ref, reward)
    groups = r[GROUPS]
    if name == "ema":
        ema = baselines.Ema(0.9)
        ema(torch.full((1, 2), 5.0))  # a past rollout
        assert ema.value == pytest.approx(0.5)
        advantage = ema(groups)
    elif name == "remax":
        advantage = baselines.remax(groups, r[greedy_index(logits)].expand(len(groups)))
    else:
        advantage = getattr(baselines, name)(groups)
    torch.testing.assert_close(expected_gradient(logits, advantage), true_gradient(logits, ref, reward), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_group_mean_shrinks_the_gradient_by_k_minus_one_over_k_and_nothing_else(seed):
    logits, ref, reward = random_problem(seed)
    got = expected_gradient(logits, baselines.group_mean(objective(logits, ref, reward)[GROUPS]))
    torch.testing.assert_close(got, true_gradient(logits, ref, reward) * (K - 1) / K, rtol=0, atol=1e-12)


def test_kl_in_the_reward_is_exact_only_as_k1_summed_over_the_response():
    logits, ref, reward = random_problem(0)
    true = true_gradient(logits, ref, 0 * reward)  # of -beta * KL alone
    logp, ref_logp = logp_table(logits), logp_table(ref)

    def estimated(kl):
        return expected_gradient(logits, baselines.none((-BETA * kl)[GROUPS]))

    exact = estimated(per_response(k1(logp, ref_logp), MASK))
    torch.testing.assert_close(exact, true, rtol=0, atol=1e-12)
    for wrong in (per_response(abs_k1(logp, ref_logp), MASK), per_response(k3(logp, ref_logp), MASK),
                  per_response(k2(logp, ref_logp), MASK), per_response(k1(logp, ref_logp), MASK, "mean")):  # fmt: skip
        assert cosine(estimated(wrong), true) < 0.999


def test_penalising_unfinished_responses_is_part_of_the_reward():
    logits, ref, reward = random_problem(1)
    penalised = reward - 0.7 * ~FINISHED
    got = expected_gradient(logits, baselines.rloo(objective(logits, ref, penalised)[GROUPS]))
    torch.testing.assert_close(got, true_gradient(logits, ref, penalised), rtol=0, atol=1e-12)


def test_weighting_a_response_by_one_over_its_length_is_another_gradient():
    logits, ref, reward = random_problem(0)
    weight = MASK / MASK.sum(1, keepdim=True)
    advantage = baselines.rloo(objective(logits, ref, reward)[GROUPS])
    true = true_gradient(logits, ref, reward)
    assert cosine(expected_gradient(logits, advantage, weight), true) < 0.999
    assert cosine(expected_gradient(logits, advantage), true) > 1 - 1e-12


def test_the_score_function_has_mean_zero():
    logits, _, _ = random_problem(2)
    ones = torch.ones(N, 1, dtype=torch.float64)
    assert expected_gradient(logits, ones, groups=torch.arange(N)[:, None]).abs().max() < 1e-15


def test_loss_gradient_agrees_with_finite_differences_of_the_expected_reward():
    logits, _, reward = random_problem(3)
    everything = torch.arange(N)[:, None]
    got = expected_gradient(logits, reward[:, None], groups=everything)

    def mean_reward(x):
        return (probability(x) * reward).sum()

    for i, j in ((0, 1), (3, 2), (6, 0)):
        step = torch.zeros_like(logits)
        step[i, j] = 1e-5
        assert ((mean_reward(logits + step) - mean_reward(logits - step)) / 2e-5 - got[i, j]).abs() < 1e-9


def train_to_the_end(ref, reward, kl, steps=1200):
    """Follow the exact expected gradient of K = 1 REINFORCE with this KL estimate in the reward; return KL(pi || pi*)."""
    logits = ref.clone()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    everything = torch.arange(N)[:, None]
    for _ in range(steps):
        r = reward - BETA * kl(logp_table(logits), logp_table(ref))
        mean = (probability(logits) * r).sum()  # a constant baseline: no bias, a better-behaved step
        logits.grad = -expected_gradient(logits, (r - mean)[:, None], groups=everything)
        optimizer.step()
        decay.step()
    best = (probability(ref).log() + reward / BETA).log_softmax(0)
    return exact_kl(probability(logits).log(), best).item()


def test_k1_in_the_reward_reaches_the_known_optimum_and_other_estimates_do_not():
    """pi* is proportional to pi_ref * exp(r / beta), so it is known without any training."""
    _, ref, reward = random_problem(1)
    assert train_to_the_end(ref, reward, lambda a, b: per_response(k1(a, b), MASK)) < 1e-4
    assert train_to_the_end(ref, reward, lambda a, b: per_response(abs_k1(a, b), MASK)) > 0.05
    assert train_to_the_end(ref, reward, lambda a, b: per_response(k1(a, b), MASK, "mean")) > 0.05
    assert train_to_the_end(ref, reward, lambda a, b: per_response(k1(a, b), MASK) * 0) > 0.05


def test_sampled_gradient_has_the_true_mean():
    """The same check with the sampler in the loop: 200,000 sampled rows, and a z-test on every coordinate."""
    logits, ref, reward = random_problem(4)
    n, draw = 200_000, torch.Generator().manual_seed(0)
    prefix, alive, index = torch.zeros(n, 0, dtype=torch.long), torch.ones(n, dtype=torch.bool), torch.zeros(n, 3, dtype=torch.long)
    for t in range(3):
        probs = torch.zeros(n, 3, dtype=torch.float64)
        for code, place in ((y[:t], p) for p, y in enumerate([(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]) if len(y) == t):
            probs[(prefix == torch.tensor(code, dtype=torch.long)).all(1)] = logits[place].softmax(-1)
        probs[~alive] = 1.0
        token = sample_token(probs, torch.rand(n, 2, generator=draw)).masked_fill(~alive, 0)
        index[:, t], alive = token, alive & (token != 0)
        prefix = torch.cat([prefix, token[:, None]], 1)
    table = {(*y, *[0] * (3 - len(y))): i for i, y in enumerate(RESPONSES)}
    rows = torch.tensor([table[tuple(row)] for row in index.tolist()])
    r = objective(logits, ref, reward)
    leaf = logits.clone().requires_grad_()
    score = torch.stack([torch.autograd.grad((logp_table(leaf) * MASK)[i].sum(), leaf)[0].flatten() for i in range(N)])  # (N, 21)
    estimates = baselines.rloo(r[rows].reshape(-1, 4)).flatten()[:, None] * score[rows]  # (n, 21)
    groups = estimates.reshape(-1, 4, estimates.shape[1]).mean(1)
    z = (groups.mean(0) - true_gradient(logits, ref, reward).flatten()) / (groups.std(0) / len(groups) ** 0.5)
    assert z.abs().max() < 5


def test_clipped_form_at_ratio_one_has_the_pure_gradient_and_clips_nothing():
    logits, ref, reward = random_problem(0)
    leaf = logits.clone().requires_grad_()
    logp = logp_table(leaf)
    advantage = baselines.rloo(objective(logits, ref, reward)[None])[0]
    pure = torch.autograd.grad(reinforce_loss(logp, advantage, MASK, N), leaf, retain_graph=True)[0]
    clipped = torch.autograd.grad(clipped_loss(logp, logp.detach(), advantage, MASK, N, clip=1e-9), leaf)[0]
    torch.testing.assert_close(clipped, pure, rtol=0, atol=1e-15)
