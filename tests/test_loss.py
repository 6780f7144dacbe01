"""The surrogate loss: what it divides by, and what it does not read."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from reinforce.loss import clipped_loss, clipped_tokens, normaliser, reinforce_loss, token_weights
from reinforce.rollout import micro_batches


def case(seed=0, rows=7, width=5):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=draw, dtype=torch.float64).requires_grad_()
    length = torch.randint(1, width + 1, (rows,), generator=draw)
    return logits, torch.randn(rows, generator=draw, dtype=torch.float64), torch.arange(width) < length[:, None], length


@given(st.integers(0, 1000), st.integers(1, 7), st.sampled_from(["sequence", "token", "length"]))
def test_gradient_does_not_depend_on_the_micro_batch_and_a_wrong_divisor_would_show(seed, size, norm):
    """Dividing by a micro-batch's own count gives tokens of short micro-batches more weight; the check below must see it."""
    x, advantage, mask, length = case(seed)
    weight, n = token_weights(mask, norm), normaliser(length, torch.ones(len(length), dtype=torch.bool), norm)
    whole = torch.autograd.grad(reinforce_loss(torch.tanh(x), advantage, weight, n), x)[0]

    def in_parts(divisor):
        return sum(
            torch.autograd.grad(reinforce_loss(torch.tanh(x)[rows], advantage[rows], weight[rows], divisor(rows)), x)[0]
            for rows in micro_batches(length.tolist(), [0] * len(length), size, 10**6)
        )

    torch.testing.assert_close(in_parts(lambda rows: n), whole, rtol=0, atol=1e-12)
    if size < len(length):
        local = in_parts(lambda rows: normaliser(length[rows], torch.ones(len(rows), dtype=torch.bool), norm))
        assert (local - whole).norm() > 0.05 * whole.norm()
    assert (in_parts(lambda rows: n / 2) - whole).norm() == pytest.approx(whole.norm().item())


def test_tokens_outside_the_response_get_no_gradient_and_are_never_read():
    x, advantage, mask, _ = case()
    poisoned = torch.where(mask, x, torch.nan)
    loss = reinforce_loss(poisoned, advantage, mask, 7)
    assert torch.isfinite(loss)
    grad = torch.autograd.grad(loss, x)[0]
    assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
    torch.testing.assert_close(grad[mask], (-advantage[:, None] / 7).expand_as(x)[mask])


def test_duplicating_the_batch_leaves_the_gradient_unchanged():
    x, advantage, mask, length = case()
    twice = lambda t: torch.cat([t, t])  # noqa: E731
    one = torch.autograd.grad(reinforce_loss(x, advantage, mask, len(length)), x)[0]
    two = torch.autograd.grad(reinforce_loss(twice(x), twice(advantage), twice(mask), 2 * len(length)), x)[0]
    torch.testing.assert_close(two, one)


def test_normalisers_count_what_their_names_say():
    length, valid = torch.tensor([[2, 5], [1, 4]]), torch.tensor([[True, False], [True, True]])
    assert [normaliser(length, valid, norm) for norm in ("sequence", "token", "length")] == [3, 7, 3]
    assert torch.equal(token_weights(torch.tensor([[True, False]]), "sequence"), torch.tensor([[1.0, 0.0]]))


def test_a_step_without_valid_rows_has_no_loss():
    x, advantage, mask, _ = case()
    with pytest.raises(ValueError, match="divisor must be positive"):
        reinforce_loss(x, advantage, mask, 0)


@given(st.integers(0, 100))
def test_loss_functions_do_not_write_to_their_inputs(seed):
    x, advantage, mask, _ = case(seed)
    inputs = (x.detach().clone(), advantage.clone(), mask.clone())
    reinforce_loss(x, advantage, mask, 3)
    clipped_loss(x, x.detach() - 0.1, advantage, mask, 3, 0.2)
    token_weights(mask, "length")
    assert all(torch.equal(a, b) for a, b in zip(inputs, (x, advantage, mask), strict=True))


def test_clipped_loss_stops_the_gradient_where_the_ratio_has_gone_far_enough():
    old = torch.zeros(4, 1)
    logp = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    grad = torch.autograd.grad(clipped_loss(logp, old, advantage, torch.ones(4, 1), 4, 0.2), logp)[0].flatten()
    assert (grad == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("bad", [dict(advantage=torch.zeros(2)), dict(weight=torch.ones(1, 3)), dict(logp=torch.zeros(3))])
def test_other_shapes_are_refused(bad):
    good = dict(logp=torch.zeros(3, 2), advantage=torch.zeros(3), weight=torch.ones(3, 2), divisor=3)
    with pytest.raises(ValueError, match="expected logp"):
        reinforce_loss(**{**good, **bad})


def test_clipped_tokens_are_those_whose_gradient_is_zero():
    old = torch.zeros(4, 2)
    logp = torch.tensor([[0.5, 0.5], [-0.5, 0.1], [0.5, 0.1], [-0.5, -0.5]], requires_grad=True)
    advantage, weight = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([[1.0, 0.0]] * 4)
    grad = torch.autograd.grad(clipped_loss(logp, old, advantage, weight, 4, 0.2), logp)[0]
    assert clipped_tokens(logp, old, advantage, weight, 0.2) == ((grad == 0) & (weight != 0)).sum() == 2


def test_clipped_loss_never_reads_a_token_of_weight_0():
    logp, old = torch.tensor([[-1.0, torch.nan]], requires_grad=True), torch.tensor([[-1.0, -torch.inf]])
    loss = clipped_loss(logp, old, torch.ones(1), torch.tensor([[True, False]]), 1, 0.2)
    assert loss == -1 and torch.autograd.grad(loss, logp)[0].tolist() == [[-1.0, 0.0]]
