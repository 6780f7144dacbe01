"""KL estimates: sign, direction, and means against the exact value."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from reinforce.kl import abs_k1, exact_kl, k1, k2, k3, per_response

PI, REF = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)


def test_kl_of_a_known_pair_has_the_right_sign_and_direction():
    assert exact_kl(PI.log(), REF.log()).item() == pytest.approx(0.3734, abs=5e-5)
    for estimate in (k1, k3):
        mean = (PI * estimate(PI.log()[None], REF.log()[None])[0]).sum().item()
        assert mean == pytest.approx(exact_kl(PI.log(), REF.log()).item(), abs=1e-12), "mean over samples of pi"


@given(st.lists(st.floats(-8, 0), min_size=3, max_size=6), st.lists(st.floats(-8, 0), min_size=6, max_size=6))
def test_k1_and_k3_are_unbiased_and_k2_and_k3_never_negative(a, b):
    logp = torch.tensor(a, dtype=torch.float64).log_softmax(0)[None]
    ref = torch.tensor(b[: len(a)], dtype=torch.float64).log_softmax(0)[None]
    exact = exact_kl(logp, ref).item()
    assert exact >= -1e-12
    for estimate in (k1, k3):
        assert (logp.exp() * estimate(logp, ref)).sum().item() == pytest.approx(exact, abs=1e-9)
    assert k2(logp, ref).min() >= 0 and k3(logp, ref).min() >= -1e-12
    assert torch.equal(abs_k1(logp, ref), k1(logp, ref).abs())


def test_a_policy_equal_to_its_reference_has_kl_exactly_zero():
    logp = torch.randn(4, 5)
    for estimate in (k1, abs_k1, k2, k3):
        assert torch.equal(estimate(logp, logp.clone()), torch.zeros(4, 5))


def test_exact_kl_allows_tokens_that_the_policy_never_takes():
    logp = torch.tensor([0.0, -torch.inf])
    assert exact_kl(logp, torch.tensor([0.5, 0.5]).log()).item() == pytest.approx(0.6931, abs=1e-4)
    assert exact_kl(logp, logp).item() == 0.0


def test_reduction_reads_only_the_response_and_divides_by_its_own_length():
    kl = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.inf, torch.nan]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert per_response(kl, mask).tolist() == [3.0, 3.0]
    assert per_response(kl, mask, "mean").tolist() == [1.5, 3.0]


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        k1(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="median"):
        per_response(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "median")
