"""Laws that every baseline obeys, on rewards that nobody chose."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from reinforce import baselines
from reinforce.baselines import Ema, group_mean, grpo, none, remax, rloo

settings.register_profile("tests", deadline=None, max_examples=100)
settings.load_profile("tests")
GROUP = (rloo, group_mean, grpo)
VALUE = st.floats(-1e3, 1e3, width=32)


@st.composite
def rewards(draw, min_k=2):
    """(P, K) float64."""
    p, k = draw(st.integers(1, 4)), draw(st.integers(min_k, 7))
    return torch.tensor(draw(st.lists(st.lists(VALUE, min_size=k, max_size=k), min_size=p, max_size=p)), dtype=torch.float64)


@st.composite
def masked_rewards(draw):
    """Rewards with some rows invalid, and NaN, infinite or huge where they are."""
    reward = draw(rewards())
    valid = torch.tensor(draw(st.lists(st.booleans(), min_size=reward.numel(), max_size=reward.numel()))).view_as(reward)
    junk = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
    return reward.masked_fill(~valid, junk), valid


def by_hand(name, row, valid):
    """One group by a plain loop."""
    out = []
    for i, r in enumerate(row):
        others = [x for j, x in enumerate(row) if valid[j] and j != i]
        everyone = [x for j, x in enumerate(row) if valid[j]]
        if not valid[i] or (name != "none" and len(everyone) < 2) or (name != "none" and max(everyone) == min(everyone)):
            out.append(r if name == "none" and valid[i] else 0.0)
        elif name == "none":
            out.append(r)
        elif name == "rloo":
            out.append(r - sum(others) / len(others))
        else:
            mean = sum(everyone) / len(everyone)
            std = math.sqrt(sum((x - mean) ** 2 for x in everyone) / (len(everyone) - 1))
            out.append(r - mean if name == "group_mean" else (r - mean) / (std + 1e-6))
    return out


@given(masked_rewards(), st.sampled_from(["none", "rloo", "group_mean", "grpo"]))
def test_every_baseline_matches_a_loop_that_never_reads_invalid_rows(case, name):
    reward, valid = case
    before = reward.clone()
    got = getattr(baselines, name)(reward, valid)
    expected = [by_hand(name, row, ok) for row, ok in zip(reward.tolist(), valid.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert torch.equal(before.nan_to_num(), reward.nan_to_num()), "wrote to its input"


@given(rewards())
def test_group_advantages_sum_to_zero(reward):
    for baseline in GROUP:
        assert baseline(reward).sum(1).abs().max() <= 1e-9 * (1 + reward.abs().max()) * 1e3


@given(rewards(), st.floats(-100, 100), st.floats(0.1, 10))
def test_group_advantages_ignore_a_constant_and_follow_a_scale(reward, constant, scale):
    for baseline in (rloo, group_mean):
        torch.testing.assert_close(baseline(reward + constant), baseline(reward), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(baseline(reward * scale), baseline(reward) * scale, rtol=1e-6, atol=1e-6)


@given(rewards(), st.randoms())
def test_permuting_a_batch_permutes_its_advantages(reward, rng):
    columns = list(range(reward.shape[1]))
    rng.shuffle(columns)
    for baseline in (*GROUP, none):
        torch.testing.assert_close(baseline(reward[:, columns]), baseline(reward)[:, columns], rtol=1e-6, atol=1e-6)


@given(rewards(), st.floats(0.5, 10))
def test_rloo_baseline_ignores_own_reward(reward, change):
    moved = reward.clone()
    moved[:, 0] += change
    b, b_moved = reward - rloo(reward), moved - rloo(moved)
    torch.testing.assert_close(b_moved[:, 0], b[:, 0], rtol=1e-9, atol=1e-9)
    mean, mean_moved = reward - group_mean(reward), moved - group_mean(moved)
    assert (mean_moved[:, 0] - mean[:, 0]).abs().min() > 0.01, "the group mean is the one that does see it"


@given(rewards())
def test_rloo_is_k_over_k_minus_one_times_group_mean(reward):
    k = reward.shape[1]
    torch.testing.assert_close(rloo(reward), group_mean(reward) * k / (k - 1), rtol=1e-9, atol=1e-9)


@given(VALUE, VALUE)
def test_two_responses_get_their_difference(a, b):
    got = rloo(torch.tensor([[a, b]], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor([[a - b, b - a]], dtype=torch.float64))


@given(VALUE, st.integers(2, 9))
def test_equal_rewards_give_exactly_zero_in_single_precision(value, k):
    for baseline in GROUP:
        assert torch.equal(baseline(torch.full((2, k), value)), torch.zeros(2, k))


@given(rewards())
def test_no_advantage_explodes(reward):
    k = reward.shape[1]
    assert grpo(reward).abs().max() <= (k - 1) / math.sqrt(k) + 1e-6
    assert rloo(reward).abs().max() <= (reward.amax(1) - reward.amin(1)).max() * (1 + 1e-9)


@given(masked_rewards())
def test_dropping_invalid_rows_leaves_a_smaller_group(case):
    reward, valid = case
    for row, ok in zip(reward, valid, strict=True):
        assume(ok.sum() >= 1)
        for baseline in GROUP:
            whole = baseline(row[None], ok[None])[0]
            torch.testing.assert_close(whole[ok], baseline(row[ok][None])[0], rtol=1e-6, atol=1e-6)
            assert torch.equal(whole[~ok], torch.zeros_like(whole[~ok]))


def test_a_group_that_becomes_one_row_gets_zero():
    valid = torch.tensor([[True, False, False]])
    for baseline in GROUP:
        assert torch.equal(baseline(torch.tensor([[5.0, math.nan, 1.0]]), valid), torch.zeros(1, 3))


@given(rewards(min_k=1), st.data())
def test_advantages_of_a_group_do_not_depend_on_the_other_groups(reward, data):
    i = data.draw(st.integers(0, len(reward) - 1))
    for baseline in (*GROUP, none):
        assert torch.equal(baseline(reward)[i], baseline(reward[i : i + 1])[0])


@given(rewards(min_k=1))
def test_remax_of_the_greedy_response_itself_is_exactly_zero(reward):
    greedy = reward[:, 0]
    assert torch.equal(remax(greedy[:, None].expand_as(reward), greedy), torch.zeros_like(reward))
    torch.testing.assert_close(remax(reward, greedy), reward - greedy[:, None])


@given(st.lists(rewards(min_k=1), min_size=1, max_size=5), st.floats(0, 0.99))
def test_ema_uses_the_past_only_and_starts_at_zero(batches, decay):
    ema, value = Ema(decay), 0.0
    for reward in batches:
        torch.testing.assert_close(ema(reward), reward - value)
        value = decay * value + (1 - decay) * reward.mean().item()
        assert ema.value == pytest.approx(value, abs=1e-9)


def test_ema_learns_nothing_from_a_batch_without_valid_rows():
    ema = Ema(0.5)
    ema(torch.ones(1, 2))
    ema(torch.full((1, 2), math.nan), torch.zeros(1, 2, dtype=torch.bool))
    assert ema.value == 0.5


@pytest.mark.parametrize("reward", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), torch.zeros(1, 2, 3)])
def test_other_shapes_and_types_are_refused(reward):
    for baseline in (none, *GROUP):
        with pytest.raises(ValueError, match=r"\(P, K\)"):
            baseline(reward)


def test_a_validity_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="valid must be bool"):
        rloo(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))


def test_rows_that_do_not_count_are_in_no_baseline_with_a_past_or_a_greedy_response():
    reward, valid = torch.tensor([[1.0, 3.0, math.nan]]), torch.tensor([[True, True, False]])
    ema = Ema(0.5)
    ema.value = 1.0
    assert ema(reward, valid).tolist() == [[0.0, 2.0, 0.0]] and ema.value == 0.5 * 1.0 + 0.5 * 2.0
    assert baselines.remax(reward, torch.tensor([2.0]), valid).tolist() == [[-1.0, 1.0, 0.0]]
