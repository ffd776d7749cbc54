"""Each divergence and its gradient against autograd in fp64, and where floating point ends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.objectives.dense import KINDS, divergence
from trainer.config.distill import DistillLossConfig
from trainer.objectives.divergence import diverge_, teacher_log_probabilities, tempered
from trainer.objectives.uld import uld_


def options_of(kind: str, **changes: float) -> DistillLossConfig:
    return DistillLossConfig(kind=kind, beta=0.3, alpha=0.2, **changes)


def closed_form(options: DistillLossConfig, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p, log_q = torch.log_softmax(y, -1), torch.log_softmax(x, -1)
    value = diverge_(options, log_p.exp(), log_p, log_q.exp(), log_q, torch.empty_like(x), gradient=True)
    return value, log_q


def by_autograd(options: DistillLossConfig, y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double().requires_grad_()
    value = divergence(options, torch.softmax(y.double(), -1), torch.softmax(x, -1))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def logits(seed: int, width: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(4, width, generator=generator), spread * torch.randn(4, width, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), width=st.integers(2, 40), spread=st.floats(0.01, 8.0))
@settings(max_examples=25, deadline=None)
def test_value_and_gradient_are_those_of_autograd(kind, seed, width, spread):
    y, x = logits(seed, width, spread)
    expected, gradient = by_autograd(options_of(kind), y, x)
    value, found = closed_form(options_of(kind), y, x)
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=5e-6)
    torch.testing.assert_close(found.double(), gradient, rtol=2e-5, atol=5e-6)

    # the formulas themselves, without the rounding of fp32
    value, found = closed_form(options_of(kind), y.double(), x.double())
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "total_variation"])  # it has a kink there
def test_equal_distributions_have_no_distance_and_no_pull(kind):
    y, _ = logits(1, 50)
    value, gradient = closed_form(options_of(kind), y, y + 7)
    assert value.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_are_zero_in_fp32_give_numbers(kind):
    y = torch.tensor([[0.0, -500.0, -500.0, 1.0], [300.0, 0.0, 0.0, 0.0]])
    x = torch.tensor([[-400.0, 0.0, -400.0, 1.0], [0.0, 300.0, 0.0, 0.0]])
    value, gradient = closed_form(options_of(kind), y, x)
    expected, of_expected = by_autograd(options_of(kind), y, x)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), of_expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation"])
def test_a_teacher_may_exclude_tokens(kind):
    """Logits of −inf: a divergence that is finite there stays finite."""
    y, x = logits(2, 12)
    y[:, 5:8] = -math.inf
    log_p = teacher_log_probabilities(y, y.argmax(-1, keepdim=True), torch.empty_like(y), may_be_normalised=False)
    log_q = torch.log_softmax(x, -1)
    value = diverge_(options_of(kind), log_p.exp(), log_p, log_q.exp(), log_q, torch.empty_like(x), gradient=True)
    expected, gradient = by_autograd(options_of(kind), y, x)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(log_q.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_is_not_hidden(kind):
    y, x = logits(3, 9)
    x[1, 2] = math.nan
    y[2, 0] = math.nan
    value, gradient = closed_form(options_of(kind), y, x)
    assert value.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, True, False]


def test_bounds():
    y, x = logits(4, 30, spread=20.0)
    value, _ = closed_form(options_of("total_variation"), y, x)
    assert (value >= 0).all()
    assert (value <= 1).all()
    value, _ = closed_form(options_of("js"), y, x)
    assert (value >= 0).all()
    assert (value <= -0.3 * math.log(0.3) - 0.7 * math.log(0.7) + 1e-6).all()
    value, _ = closed_form(options_of("skew_forward_kl"), y, x)
    assert (value <= -math.log(0.2) + 1e-6).all()


def test_log_probabilities_keep_their_bits():
    y, _ = logits(5, 3000)
    top = y.argmax(-1, keepdim=True)
    once = teacher_log_probabilities(y, top, torch.empty_like(y), may_be_normalised=True)
    assert torch.equal(once, torch.log_softmax(y, -1))
    twice = teacher_log_probabilities(once, top, torch.empty_like(y), may_be_normalised=True)
    assert torch.equal(once, twice)
    # whereas those that were rounded to 16 bits no longer add up to 1, and are normalised again
    rounded = once.half().float()
    again = teacher_log_probabilities(rounded, top, torch.empty_like(y), may_be_normalised=True)
    assert (again.exp().sum(-1) - 1).abs().max() < 1e-5


def test_temperature_divides_the_logits():
    y, _ = logits(6, 20)
    found = tempered(torch.log_softmax(y, -1), 2.5, torch.empty_like(y))
    torch.testing.assert_close(found, torch.log_softmax(y / 2.5, -1))


@pytest.mark.parametrize(("width", "teachers"), [(9, 9), (9, 14), (14, 9)])
def test_universal_distance_compares_ranks(width, teachers):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5, width, generator=generator, dtype=torch.float64).requires_grad_()
    p = torch.softmax(torch.randn(5, teachers, generator=generator, dtype=torch.float64), -1)
    q = torch.softmax(x, -1)
    longest = max(width, teachers)
    pad = torch.nn.functional.pad
    ranked = [pad(d, (0, longest - d.shape[1])).sort(-1, descending=True).values for d in (p, q)]
    expected = (ranked[0] - ranked[1]).abs().sum(-1)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    found = torch.empty_like(q)
    value = uld_(p, q.detach(), found, gradient=True)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(found, gradient)


def test_universal_distance_does_not_see_which_token_it_is():
    p = torch.softmax(torch.randn(3, 8, generator=torch.Generator().manual_seed(8)), -1)
    assert uld_(p, p.flip(-1), torch.empty_like(p), gradient=False).tolist() == [0.0, 0.0, 0.0]
