"""The exercises of docs/exercises.md: each test passes when its exercise is done, and pytest does not collect them by itself.

python -m pytest tests/exercises.py -k reward_to_go
"""

import torch
from tiny import GROUPS, MASK, N, expected_gradient, logp_table, objective, probability, random_problem, true_gradient

from reinforce import baselines, kl


def variance(logits, advantage, weight=MASK, groups=GROUPS):
    """Trace of the covariance of the gradient estimate over groups of responses, exact; advantage (groups, K)."""
    leaf = logits.clone().requires_grad_()
    rows = [(logp_table(leaf)[i] * weight[i]).sum() for i in range(N)]
    score = torch.stack([torch.autograd.grad(r, leaf, retain_graph=True)[0].flatten() for r in rows])  # (N, parameters)
    chance = probability(logits)[groups].prod(1)  # (groups,)
    estimate = (advantage[:, :, None] * score[groups]).mean(1)  # (groups, parameters)
    mean = (chance[:, None] * estimate).sum(0)
    return (chance * (estimate - mean).square().sum(1)).sum().item()


def test_reward_to_go():
    """Exercise 1: kl.reward_to_go(kl (B, T), mask (B, T)) -> (B, T): each token's own KL and that of all later ones."""
    logits, ref, _ = random_problem(3)
    d = kl.k1(logp_table(logits), logp_table(ref))
    to_go = kl.reward_to_go(d, MASK)
    assert torch.equal(to_go[~MASK], torch.zeros_like(to_go[~MASK]))
    everything, ones = torch.arange(N)[:, None], torch.ones(N, 1, dtype=torch.float64)
    by_response = expected_gradient(logits, kl.per_response(d, MASK)[:, None], groups=everything)
    by_token = expected_gradient(logits, ones, weight=to_go, groups=everything)
    torch.testing.assert_close(by_token, by_response, rtol=0, atol=1e-12)
    assert variance(logits, ones, to_go, everything) < 0.9 * variance(logits, kl.per_response(d, MASK)[:, None], MASK, everything)


def test_leave_one_out_over_the_whole_batch():
    """Exercise 2: baselines.batch_rloo(reward (P, K), valid=None): the mean of all other valid rows of the batch; K = 1 is allowed."""
    reward = torch.tensor([[1.0, 2.0], [4.0, 9.0]], dtype=torch.float64)
    want = torch.tensor([[1 - 5.0, 2 - 14 / 3], [4 - 4.0, 9 - 7 / 3]], dtype=torch.float64)
    torch.testing.assert_close(baselines.batch_rloo(reward), want)
    torch.testing.assert_close(baselines.batch_rloo(reward[:1]), baselines.rloo(reward[:1]))
    valid = torch.tensor([[True, False], [True, True]])
    reward[0, 1] = torch.nan
    torch.testing.assert_close(
        baselines.batch_rloo(reward, valid), torch.tensor([[1 - 6.5, 0], [4 - 5.0, 9 - 2.5]], dtype=torch.float64)
    )
    logits, ref, r = random_problem(0)
    groups = objective(logits, ref, r)[GROUPS]  # a batch of K prompts with one response each
    advantage = torch.stack([baselines.batch_rloo(g[:, None])[:, 0] for g in groups])
    torch.testing.assert_close(expected_gradient(logits, advantage), true_gradient(logits, ref, r), rtol=0, atol=1e-12)


def test_best_constant():
    """Exercise 3: baselines.best_constant(reward (n,), score_norm (n,), chance (n,)): E[|grad log pi|^2 R] / E[|grad log pi|^2].

    score_norm is |grad log pi|^2 of each response, chance its probability; no constant baseline has less variance.
    """
    logits, ref, reward = random_problem(0)
    r = objective(logits, ref, reward)
    leaf = logits.clone().requires_grad_()
    rows = [(logp_table(leaf)[i] * MASK[i]).sum() for i in range(N)]
    norm = torch.stack([torch.autograd.grad(x, leaf, retain_graph=True)[0].square().sum() for x in rows])  # (N,)
    best = float(baselines.best_constant(r, norm, probability(logits)))
    everything = torch.arange(N)[:, None]
    mean = (probability(logits) * r).sum().item()
    spread = {b: variance(logits, (r - b)[:, None], MASK, everything) for b in (best, best - 0.05, best + 0.05, mean, 0.0)}
    assert min(spread, key=spread.__getitem__) == best
