"""Options of the update against the gradient of J = E[r] - beta * KL, by enumeration: what each of them follows, exactly."""

import statistics

import pytest
import torch
from tiny import (
    BETA,
    FINISHED,
    GROUPS,
    MASK,
    PLACE,
    TOKEN,
    K,
    N,
    T,
    cosine,
    expected_gradient,
    logp_table,
    objective,
    probability,
    random_problem,
    true_gradient,
)

from reinforce import baselines
from reinforce.kl import abs_k1, exact_kl, k1, k3, per_response
from reinforce.logprobs import policy_logits
from reinforce.loss import clipped_loss, clipped_tokens, normaliser, reinforce_loss, token_weights

EVERYTHING = torch.arange(N)[:, None]
LENGTH = MASK.sum(1)
KLS = [(k1, "sum"), (k1, "mean"), (abs_k1, "sum"), (abs_k1, "mean")]


def gradient_of(value, logits):
    """Gradient of a scalar function of the logits, by autograd."""
    leaf = logits.detach().requires_grad_()
    return torch.autograd.grad(value(leaf), leaf)[0]


def chance(logits):
    """pi(y) with its graph, (N,)."""
    return (logp_table(logits) * MASK).sum(1).exp()


def moving(logits, ref, reward):
    """R with its graph, (N,): it depends on the policy through the KL."""
    return reward - BETA * ((logp_table(logits) - logp_table(ref)) * MASK).sum(1)


def given_finished(logits, ref, reward):
    """grad E[R | finished] + beta grad log P(finished)."""

    def value(x):
        finished = (chance(x) * FINISHED).sum()
        return (chance(x) * FINISHED * moving(x, ref, reward)).sum() / finished + BETA * finished.log()

    return gradient_of(value, logits)


@pytest.mark.parametrize(("estimate", "reduce"), KLS)
@pytest.mark.parametrize("seed", range(3))
def test_a_kl_in_the_reward_follows_the_gradient_of_its_mean_less_that_of_its_value(estimate, reduce, seed):
    """E[f grad log pi] = grad E[f] - E[grad f]; the last term is 0 for k1 summed, and for no other."""
    logits, ref, _ = random_problem(seed)
    ref_logp = logp_table(ref)

    def f(x):
        return per_response(estimate(logp_table(x), ref_logp), MASK, reduce)

    got = expected_gradient(logits, f(logits)[:, None], groups=EVERYTHING)
    missing = gradient_of(lambda x: (probability(logits) * f(x)).sum(), logits)
    torch.testing.assert_close(got, gradient_of(lambda x: (chance(x) * f(x)).sum(), logits) - missing, rtol=0, atol=1e-12)
    assert (missing.norm() < 1e-12) == (estimate is k1 and reduce == "sum")
    if (estimate, reduce) == (k1, "mean"):  # its missing term is that of the mean inverse length
        torch.testing.assert_close(missing, gradient_of(lambda x: (chance(x) / LENGTH).sum(), logits), rtol=0, atol=1e-12)


COSINES = {  # median, least and largest of 40 problems; docs/options.md, kl.py and grpo's docstring print them
    "k1 sum": (1.0, 1.0, 1.0),
    "k1 mean": (0.97, 0.35, 1.0),
    "abs_k1 sum": (0.77, -0.99, 0.99),
    "abs_k1 mean": (0.74, -0.99, 0.99),
    "k3 sum": (0.22, -0.94, 0.99),
    "length norm": (0.97, 0.89, 1.0),
    "grpo": (0.97, 0.36, 1.0),
}


def expected_with(option, logits, ref, reward):
    """The expected gradient with an option, and the true one; of a KL option those of the KL itself."""
    r = objective(logits, ref, reward)
    if option == "grpo":
        return expected_gradient(logits, baselines.grpo(r[GROUPS])), true_gradient(logits, ref, reward)
    if option == "length norm":
        weight = token_weights(MASK, "length").double()
        return expected_gradient(logits, baselines.rloo(r[GROUPS]), weight), true_gradient(logits, ref, reward)
    name, reduce = option.split()
    estimate = {"k1": k1, "abs_k1": abs_k1, "k3": k3}[name]
    f = per_response(estimate(logp_table(logits), logp_table(ref)), MASK, reduce)
    return expected_gradient(logits, f[:, None], groups=EVERYTHING), true_gradient(logits, ref, 0 * reward, beta=-1.0)


@pytest.mark.parametrize("option", COSINES)
def test_the_stated_cosines_of_the_biased_options(option):
    found = [cosine(*expected_with(option, *random_problem(seed))) for seed in range(40)]
    assert (statistics.median(found), min(found), max(found)) == pytest.approx(COSINES[option], abs=0.0051)


def test_the_stated_cosine_of_clipping_gradients_one_group_at_a_time():
    """To a tenth of the mean length, so that nearly every one is cut; the median, least and largest of ten problems."""
    found = []
    for seed in range(10):
        logits, ref, reward = random_problem(seed)
        leaf = logits.clone().requires_grad_()
        total = (logp_table(leaf) * MASK).sum(1)
        score = torch.stack([torch.autograd.grad(one, leaf, retain_graph=True)[0].flatten() for one in total])  # (N, D)
        advantage = baselines.rloo(objective(logits, ref, reward)[GROUPS])  # (groups, K)
        gradient = (advantage[:, :, None] * score[GROUPS]).mean(1)  # (groups, D)
        chance_of = probability(logits)[GROUPS].prod(1)  # (groups,)
        length = gradient.norm(dim=1)
        limit = 0.1 * (chance_of * length).sum()
        clipped = gradient * (limit / length.clamp(min=limit))[:, None]
        true = true_gradient(logits, ref, reward)
        torch.testing.assert_close(chance_of @ gradient, true.flatten(), rtol=0, atol=1e-12)
        found.append(cosine(chance_of @ clipped, true))
    assert (statistics.median(found), min(found), max(found)) == pytest.approx((0.99, 0.84, 1.0), abs=0.0051)


def asymmetry(field, x, eps=1e-4):
    """How far the Jacobian of a field is from symmetric, as that of a gradient is; relative."""
    columns = []
    for i in range(x.numel()):
        e = torch.zeros(x.numel(), dtype=x.dtype).index_fill(0, torch.tensor(i), eps).view_as(x)
        columns.append((field(x + e) - field(x - e)).flatten() / (2 * eps))
    jacobian = torch.stack(columns, 1)
    return ((jacobian - jacobian.T).norm() / jacobian.norm()).item()


def test_grpo_follows_the_chance_of_success_where_rewards_are_0_and_1_and_no_objective_where_they_are_many():
    for seed in range(5):
        logits, ref, reward = random_problem(seed)
        success = (reward > 0).double()
        got = expected_gradient(logits, baselines.grpo(success[GROUPS]))
        assert cosine(got, true_gradient(logits, ref, success, beta=0.0)) > 1 - 1e-9
    logits, ref, reward = random_problem(0)
    three = (reward > -0.5).double() + (reward > 0.5)
    binary, some, many = (
        asymmetry(lambda x, r=r: expected_gradient(x, baselines.grpo(r[GROUPS])), logits)
        for r in ((reward > 0).double(), three, reward)
    )
    assert binary < 1e-6 and len(three.unique()) == 3 and some > 0.01 and many > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_length_norm_follows_the_reward_per_token(seed):
    """A response of n tokens counts 1/n: without a baseline grad E[R/n] + beta grad E[1/n], for R falls by beta log pi."""
    logits, ref, reward = random_problem(seed)
    r, weight = objective(logits, ref, reward), token_weights(MASK, "length").double()
    per_token = gradient_of(lambda x: (chance(x) * moving(x, ref, reward) / LENGTH).sum(), logits)
    inverse = gradient_of(lambda x: (chance(x) / LENGTH).sum(), logits)
    got = expected_gradient(logits, baselines.none(r[GROUPS]), weight)
    torch.testing.assert_close(got, per_token + BETA * inverse, rtol=0, atol=1e-7)
    mean = (probability(logits) * r).sum()
    got = expected_gradient(logits, baselines.rloo(r[GROUPS]), weight)
    torch.testing.assert_close(got, per_token - (mean - BETA) * inverse, rtol=0, atol=1e-7)
    assert cosine(got, true_gradient(logits, ref, reward)) < 0.999


def divisors(norm, valid):
    """N of each group as an optimizer step of its own, (groups,)."""
    return torch.tensor([float(normaliser(LENGTH[g], v, norm)) for g, v in zip(GROUPS, valid, strict=True)], dtype=torch.float64)


ALL = torch.ones_like(GROUPS, dtype=torch.bool)
ENDED = FINISHED[GROUPS]
DIVISORS = {("token", "keep"): divisors("token", ALL), ("sequence", "keep"): divisors("sequence", ALL),
            ("sequence", "drop"): divisors("sequence", ENDED)}  # fmt: skip


def with_norm(logits, advantage, norm, truncated="keep"):
    """Expected gradient when each group is an optimizer step of its own, divided by its own N; groups with N = 0 give 0."""
    n = DIVISORS[norm, truncated]
    valid = ENDED if truncated == "drop" else ALL
    return expected_gradient(logits, (advantage * valid).masked_fill((n == 0)[:, None], 0) * K / n.clamp(min=1)[:, None])


def test_token_norm_is_exact_for_equal_lengths_and_nears_the_truth_otherwise():
    logits, ref, reward = random_problem(0)
    never = logits.clone()
    never[:, 0] = -40.0  # no response ends early
    endless = ref.clone()
    endless[:, 0] = -40.0
    advantage = baselines.rloo(objective(never, endless, reward)[GROUPS])
    torch.testing.assert_close(with_norm(never, advantage, "token"), true_gradient(never, endless, reward) / T, rtol=0, atol=1e-9)
    got = with_norm(logits, baselines.rloo(objective(logits, ref, reward)[GROUPS]), "token")
    assert 0.9 < cosine(got, true_gradient(logits, ref, reward)) < 0.9999


@pytest.mark.parametrize("seed", range(3))
def test_dropping_unfinished_responses_follows_another_objective_exactly(seed):
    """rloo: P(two or more of a group finish) (grad E[R | finished] + beta grad log P(finished)), none:
    P(one or more) / P(finished) (grad E[R 1{finished}] + beta grad P(finished)).
    """
    logits, ref, reward = random_problem(seed)
    r = objective(logits, ref, reward)
    valid, p = ENDED, (probability(logits) * FINISHED).sum()
    at_least = [sum(probability(logits)[GROUPS].prod(1) * (valid.sum(1) >= n)).item() for n in range(3)]
    given = given_finished(logits, ref, reward)
    got = with_norm(logits, baselines.rloo(r[GROUPS], valid), "sequence", "drop")
    torch.testing.assert_close(got, given * at_least[2], rtol=0, atol=1e-12)
    joint = gradient_of(lambda x: (chance(x) * FINISHED * (moving(x, ref, reward) + BETA)).sum(), logits)
    got = with_norm(logits, baselines.none(r[GROUPS], valid), "sequence", "drop")
    torch.testing.assert_close(got, joint * at_least[1] / p, rtol=0, atol=1e-12)
    for other in (given, joint):
        assert cosine(other, true_gradient(logits, ref, reward)) < 0.999


def test_a_minimum_length_is_part_of_the_policy_when_scorer_and_sampler_share_the_mask():
    logits, ref, reward = random_problem(2)
    possible = LENGTH > 1  # with --min-new-tokens 1 the first token is no end token

    def logp(x, barred):
        t, ends = torch.arange(T).expand(N, T).flatten(), torch.tensor([0])
        masked = policy_logits(x[PLACE].flatten(0, 1), t, 1.0, ends, barred).double().log_softmax(-1)
        return masked.gather(1, TOKEN.flatten()[:, None]).view(N, T)[possible], MASK[possible]

    def total(x, barred):
        value, mask = logp(x, barred)
        return (value * mask).sum(1)

    with torch.no_grad():
        pi, d = total(logits, 1).exp(), total(logits, 1) - total(ref, 1)
    assert pi.sum().item() == pytest.approx(1, abs=1e-6)
    r = reward[possible] - BETA * d
    leaf = logits.clone().requires_grad_()
    value, mask = logp(leaf, 1)
    got = torch.autograd.grad(reinforce_loss(value, -r * pi, mask, 1), leaf)[0]
    want = gradient_of(lambda x: (total(x, 1).exp() * (reward[possible] - BETA * (total(x, 1) - total(ref, 1)))).sum(), logits)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    score = gradient_of(lambda x: (pi * total(x, 1)).sum(), logits)
    assert score.abs().max() < 1e-6, "the score function of the policy that is sampled has mean 0"
    unmasked = gradient_of(lambda x: (pi * total(x, 0)).sum(), logits)
    assert unmasked.abs().max() > 0.05, "that of another policy has not"


def off_policy(old, new, ref, reward, clip, place=PLACE, token=TOKEN, mask=MASK):
    """Expected gradient of the clipped form at `new`, over responses that `old` sampled; R fixed when they were sampled."""
    logp_old = old.log_softmax(-1)[place, token]
    pi = (logp_old * mask).sum(1).exp()
    r = reward - BETA * ((logp_old - ref.log_softmax(-1)[place, token]) * mask).sum(1)
    leaf = new.clone().requires_grad_()
    logp = leaf.log_softmax(-1)[place, token]
    loss = clipped_loss(logp, logp_old, pi * r, mask, 1, clip)
    return -torch.autograd.grad(loss, leaf)[0], r, clipped_tokens(logp, logp_old, pi * r, mask, clip)


def test_a_second_optimizer_step_is_exact_for_one_token_responses_and_biased_for_longer_ones():
    """A ratio per token corrects a response of one token; of longer ones it leaves out the ratios of the other tokens."""
    old, ref, reward = random_problem(0)
    new = old + 0.3 * random_problem(5)[0]
    place, token, mask = torch.zeros(3, 1, dtype=torch.long), torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.bool)
    got, r, cut = off_policy(old[:1], new[:1], ref[:1], reward[:3], 1e9, place, token, mask)
    torch.testing.assert_close(got, gradient_of(lambda x: (x.softmax(-1)[0] * r).sum(), new[:1]), rtol=0, atol=1e-12)
    assert cut == 0
    got, r, _ = off_policy(old, new, ref, reward, 1e9)
    assert 0.5 < cosine(got, gradient_of(lambda x: (chance(x) * r).sum(), new)) < 0.999
    tight, _, cut = off_policy(old, new, ref, reward, 0.05)
    assert cut > 0 and cosine(tight, got) < 0.99
    first, r, cut = off_policy(old, old, ref, reward, 0.05)
    torch.testing.assert_close(first, gradient_of(lambda x: (chance(x) * r).sum(), old), rtol=0, atol=1e-12)
    assert cut == 0


def test_kl_reward_to_go_has_the_same_expectation_as_the_sum_and_another_value_per_response():
    logits, ref, _ = random_problem(0)
    d = k1(logp_table(logits), logp_table(ref)) * MASK  # (N, T)
    to_go = d.flip(1).cumsum(1).flip(1)  # (N, T)
    ones = torch.ones(N, 1, dtype=torch.float64)
    by_token = expected_gradient(logits, ones, weight=MASK * to_go, groups=EVERYTHING)
    by_response = expected_gradient(logits, d.sum(1)[:, None], groups=EVERYTHING)
    torch.testing.assert_close(by_token, by_response, rtol=0, atol=1e-12)
    assert not torch.allclose(to_go[:, -1], d.sum(1))


def settle(ref, reward, gradient, among=None, steps=600):
    """KL(pi || pi*) after following a gradient from pi_ref; pi* = pi_ref exp(r / beta), normalised, is the known optimum.

    `among` (N,) bool: of the two given that the response is one of these.
    """
    logits = ref.clone()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        logits.grad = -gradient(logits)
        optimizer.step()
        decay.step()
    best, found = probability(ref).log() + reward / BETA, probability(logits).log()
    among = torch.ones(N, dtype=torch.bool) if among is None else among
    return exact_kl(found[among].log_softmax(0), best[among].log_softmax(0)).item()


def fixed_point(option, seed=1):
    """Where training with an option ends up, as KL(pi || pi*) in nats."""
    _, ref, reward = random_problem(seed)
    name, value = option

    def gradient(logits):
        estimate, reduce = value if name == "kl" else (k1, "sum")
        r = reward - BETA * per_response(estimate(logp_table(logits), logp_table(ref)), MASK, reduce)
        weight = token_weights(MASK, "length").double() if value == "length" else MASK
        if name == "kl" or value == "length":  # K = 1 with the mean as a constant baseline: the same expectation, fewer rows
            mean = (probability(logits) * r).sum()
            return expected_gradient(logits, (r - mean)[:, None], weight, EVERYTHING)
        valid = ENDED if value == "drop" else ALL
        advantage = getattr(baselines, value if name == "baseline" else "rloo")(r[GROUPS], valid)
        return with_norm(logits, advantage, "token" if value == "token" else "sequence", "drop" if value == "drop" else "keep")

    return settle(ref, reward, gradient, FINISHED.bool() if value == "drop" else None)


BIASED_ENDS = {  # nats: median, least and largest of eight problems; docs/options.md prints them
    ("kl", (k1, "mean")): (0.53, 0.11, 1.43),
    ("kl", (abs_k1, "sum")): (0.53, 0.10, 1.55),
    ("kl", (abs_k1, "mean")): (0.52, 0.10, 1.80),
}
ENDS = {
    ("kl", (k1, "sum")): 0.0,
    ("norm", "length"): 0.0,  # at the optimum every response has the same R, so every advantage is 0, however it is weighted
    ("norm", "token"): 0.0,
    ("truncated", "drop"): 0.0,  # among finished responses: how many finish is left to the optimizer
    ("baseline", "group_mean"): 0.0,
    ("baseline", "grpo"): 0.0,
}


def named(option):
    kind, value = option
    return f"{kind} {value}" if isinstance(value, str) else f"{kind} {value[0].__name__} {value[1]}"


@pytest.mark.parametrize("option", ENDS, ids=named)
def test_which_options_reach_the_known_optimum(option):
    assert fixed_point(option) == pytest.approx(ENDS[option], abs=0.001)


@pytest.mark.parametrize("option", BIASED_ENDS, ids=named)
def test_how_far_off_the_other_options_end(option):
    found = [fixed_point(option, seed) for seed in range(8)]
    assert (statistics.median(found), min(found), max(found)) == pytest.approx(BIASED_ENDS[option], abs=0.0051)


def along_the_gradient(old, ref, reward, divergence):
    """The policy that a step along the true gradient of `old` reaches when KL(old || new) is `divergence` nats."""

    def kl(new):
        logp, moved = logp_table(old), logp_table(new)
        return ((logp * MASK).sum(1).exp() * ((logp - moved) * MASK).sum(1)).sum()

    direction, low, high = true_gradient(old, ref, reward), 0.0, 80.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(old + middle * direction) < divergence else (low, middle)
    return old + low * direction


@pytest.mark.parametrize(
    ("divergence", "clipped", "plain"), [(0.004, (0.998, 1.0), (0.997, 1.0)), (0.038, (0.4, 0.65), (0.97, 0.99))]
)
def test_the_clipped_ratio_bounds_a_later_optimizer_step_and_does_not_correct_it(divergence, clipped, plain):
    """Median cosine to the true gradient over 40 problems: 0.999 and 0.998 near the sampled policy, 0.51 and 0.98 further on."""
    found = {"clipped": [], "plain": []}
    for seed in range(40):
        old, ref, reward = random_problem(seed)
        new, pi = along_the_gradient(old, ref, reward, divergence), probability(old)
        r = objective(old, ref, reward)
        weighted, logp_old = pi * (r - (pi * r).sum()), logp_table(old)
        leaf = new.clone().requires_grad_()
        losses = {
            "clipped": clipped_loss(logp_table(leaf), logp_old, weighted, MASK, 1, 0.2),
            "plain": reinforce_loss(logp_table(leaf), weighted, MASK, 1),
        }
        for name, loss in losses.items():
            found[name].append(cosine(-torch.autograd.grad(loss, leaf)[0], true_gradient(new, ref, reward)))
    for name, (low, high) in {"clipped": clipped, "plain": plain}.items():
        assert low <= sorted(found[name])[20] <= high, (name, sorted(found[name])[20])


@pytest.mark.parametrize("kind", ["unfinished", "refused"])
def test_with_two_prompts_rows_that_are_left_out_also_make_their_prompt_weigh_less(kind):
    """rloo: w_x (grad E[R_x | counted] + beta grad log P(counted)), w_x = E[n_x 1{n_x >= 2} / N], N the counted rows of both; K = 2.

    Refused rows are left out by the same rule, with a reward of NaN.
    """
    k, groups = 2, torch.cartesian_prod(torch.arange(N), torch.arange(N))
    counts, given, got, shares = [], [], [], []
    problems = [random_problem(seed) for seed in (0, 1)]
    problems[1][0][:, 0] -= 2.0  # the second prompt's responses seldom end
    for logits, ref, reward in problems:
        r = objective(logits, ref, reward)
        valid = FINISHED[groups]  # (N^2, 2)
        p = (probability(logits) * FINISHED).sum().item()
        shares.append(p)
        counts.append([(1 - p) ** 2, 2 * p * (1 - p), p * p])
        given.append(given_finished(logits, ref, reward))
        rows = torch.where(valid, r[groups], torch.nan) if kind == "refused" else r[groups]
        advantage = baselines.rloo(rows, valid)  # (N^2, 2)
        got.append((logits, advantage, valid))
    weights = []
    for i, (logits, advantage, valid) in enumerate(got):
        other = counts[1 - i]
        n = valid.sum(1)  # (N^2,)
        inverse = sum(chance_j / (n + j).clamp(min=1).double() for j, chance_j in enumerate(other))  # E[1 / N] given this group
        estimate = expected_gradient(logits, advantage * inverse[:, None] * k, groups=groups)
        weight = counts[i][2] * 2 * sum(c / (2 + j) for j, c in enumerate(other))
        torch.testing.assert_close(estimate, weight * given[i], rtol=0, atol=1e-12)
        weights.append(weight)
    assert shares[0] > 2 * shares[1] and weights[0] / weights[1] > 2 * shares[0] / shares[1]
    whole = torch.cat([w * g for w, g in zip(weights, given, strict=True)])
    assert cosine(whole, torch.cat(given)) < 0.97
