"""A language small enough to enumerate: V = 3 with token 0 as the end token, at most 3 tokens, so 15 responses.

A policy is a table of logits per prefix. Expectations over all 15^K groups of responses are exact sums, so the expected
gradient of an estimator can be compared with the gradient of what it is meant to estimate, in float64.
"""

import itertools

import torch
from torch import Tensor

from reinforce.kl import k1, per_response
from reinforce.loss import reinforce_loss

V, T, K, BETA = 3, 3, 3, 0.5
PREFIXES = [p for n in range(T) for p in itertools.product((1, 2), repeat=n)]
RESPONSES = [(*p, 0) for p in PREFIXES] + list(itertools.product((1, 2), repeat=T))
N = len(RESPONSES)
PLACE = torch.tensor([[PREFIXES.index(y[:t]) if t < len(y) else 0 for t in range(T)] for y in RESPONSES])  # (N, T)
TOKEN = torch.tensor([[y[t] if t < len(y) else 0 for t in range(T)] for y in RESPONSES])  # (N, T)
MASK = torch.tensor([[t < len(y) for t in range(T)] for y in RESPONSES])  # (N, T)
FINISHED = torch.tensor([y[-1] == 0 for y in RESPONSES])
GROUPS = torch.tensor(list(itertools.product(range(N), repeat=K)))  # (N^K, K)


def random_problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy and of a reference (7, V), and a reward per response (N,), all float64."""
    draw = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    return make(len(PREFIXES), V), make(len(PREFIXES), V), make(N)


def logp_table(logits: Tensor) -> Tensor:
    """log pi of every token of every response, (N, T)."""
    return logits.log_softmax(-1)[PLACE, TOKEN]


def probability(logits: Tensor) -> Tensor:
    """pi(y) of every response, (N,), detached."""
    return per_response(logp_table(logits).detach(), MASK).exp()


def objective(logits: Tensor, ref: Tensor, reward: Tensor, beta: float = BETA) -> Tensor:
    """R of every response, (N,), as training computes it: no gradient through the KL."""
    return reward - beta * per_response(k1(logp_table(logits).detach(), logp_table(ref)), MASK)


def true_gradient(logits: Tensor, ref: Tensor, reward: Tensor, beta: float = BETA) -> Tensor:
    """Gradient of J = E[r] - beta * KL(pi || pi_ref), by autograd through the exact sum."""
    logits = logits.detach().requires_grad_()
    total = (logp_table(logits) * MASK).sum(1)
    gain = (total.exp() * (reward - beta * (total - (logp_table(ref) * MASK).sum(1)))).sum()
    return torch.autograd.grad(gain, logits)[0]


def expected_gradient(logits: Tensor, advantage: Tensor, weight: Tensor = MASK, groups: Tensor = GROUPS) -> Tensor:
    """E of minus the loss gradient over all groups of responses; advantage (number of groups, K)."""
    logits = logits.detach().requires_grad_()
    chance = probability(logits)[groups].prod(1, keepdim=True)  # (groups, 1)
    rows = groups.flatten()
    weighted = (advantage * chance).flatten()
    loss = reinforce_loss(logp_table(logits)[rows], weighted, weight[rows], divisor=groups.shape[1])
    return -torch.autograd.grad(loss, logits)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two gradients."""
    return (a.flatten() @ b.flatten() / (a.norm() * b.norm())).item()
