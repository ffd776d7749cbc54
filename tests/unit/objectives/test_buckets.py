"""Targets of a few tokens: equal to the whole where nothing is left out, unbiased where tokens are drawn."""

from itertools import pairwise

import pytest
import torch

from tests.unit.objectives.dense import dense, divergence
from trainer.config.distill import DistillLossConfig
from trainer.knowledge import Head, LogitTargets, SparseTargets
from trainer.objectives.fused import Distilled, fused_distillation

POSITIONS, WIDTH, VOCABULARY = 6, 5, 15
LABELS = torch.tensor([3, -100, 0, 14, 7, -100])


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and the teacher's logits, in fp64."""
    generator = torch.Generator().manual_seed(11)
    hidden, weight, y = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((POSITIONS, WIDTH), (VOCABULARY, WIDTH), (POSITIONS, VOCABULARY))
    )
    return hidden.requires_grad_(), weight.requires_grad_(), 2 * y


def top_of(y: torch.Tensor, kept: int) -> SparseTargets:
    values, ids = torch.log_softmax(y, -1).topk(kept)
    return SparseTargets(ids, values, "top")


def learned(
    targets: SparseTargets | LogitTargets, options: DistillLossConfig, vocabulary: int | None = None
) -> tuple[Distilled, torch.Tensor]:
    hidden, weight, _ = example()
    result = fused_distillation(hidden, Head(weight), LABELS, targets, options, vocabulary=vocabulary)
    (gradient,) = torch.autograd.grad(result.total, weight)
    return result, gradient


def bucketed(p: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    kept = p.gather(-1, ids)
    return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_forward_kl"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_tokens_are_the_whole(kind, temperature):
    options = DistillLossConfig(kind=kind, temperature=temperature, cross_entropy=0.4, chunk=2)
    y = example()[2]
    sparse, gradient = learned(top_of(y, VOCABULARY), options)
    whole, expected = learned(LogitTargets(y), options)
    torch.testing.assert_close(sparse.divergence, whole.divergence)
    torch.testing.assert_close(gradient, expected)
    for name in ("teacher_entropy", "agreement", "covered"):
        torch.testing.assert_close(sparse.measures[name], whole.measures[name])
    assert sparse.measures["student_mass"] == pytest.approx(4)


@pytest.mark.parametrize("kind", ["forward_kl", "skew_forward_kl"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kept", [1, 4])
def test_the_rest_is_one_more_token(kind, temperature, kept):
    """Gathered at temperature 1, then put at the temperature of the loss."""
    options = DistillLossConfig(kind=kind, temperature=temperature, alpha=0.3, weight=0.7, cross_entropy=0.2, chunk=3)
    hidden, weight, y = example()
    targets = top_of(y, kept)
    x = hidden @ weight.T
    p, q = (
        torch.softmax(bucketed(torch.softmax(logits, -1), targets.ids).log() / temperature, -1) for logits in (y, x)
    )
    value = temperature**2 * divergence(options, p, q)
    is_target = LABELS >= 0
    cross_entropy = torch.nn.functional.cross_entropy(x, LABELS, reduction="sum")
    total = 0.7 * value[is_target].sum() + 0.2 * cross_entropy
    (expected,) = torch.autograd.grad(total, weight)

    result, gradient = learned(targets, options)
    torch.testing.assert_close(result.total, total)
    torch.testing.assert_close(result.divergence, value.where(is_target, 0.0).detach())
    torch.testing.assert_close(gradient, expected)
    probabilities = torch.softmax(x, -1).gather(-1, targets.ids).sum(-1)[is_target].sum().detach()
    torch.testing.assert_close(result.measures["student_mass"], probabilities)
    torch.testing.assert_close(
        result.measures["covered"], targets.log_probabilities.exp().sum(-1)[is_target].sum().detach()
    )
    right = (x.argmax(-1) == y.argmax(-1))[is_target].sum()
    assert result.measures["agreement"] == right


def test_what_is_told_is_at_most_what_there_is():
    """Gathering into buckets makes no divergence greater (data-processing inequality); more tokens tell more."""
    y = example()[2]
    told = [learned(top_of(y, kept), DistillLossConfig())[0].divergence.sum() for kept in range(1, VOCABULARY + 1)]
    assert all(fewer <= more + 1e-12 for fewer, more in pairwise(told))


def test_drawn_tokens_are_unbiased():
    """The gradient of a single draw, weighed by its probability and summed over all draws there are, is that of the
    forward KL: so it is on average for any number of draws."""
    y = example()[2]
    p = torch.softmax(y, -1)
    hidden, weight, _ = example()
    mean = torch.zeros_like(weight)
    for token in range(VOCABULARY):
        ids = torch.full((POSITIONS, 3), -1)
        shares = torch.full((POSITIONS, 3), -torch.inf, dtype=torch.float64)
        ids[:, 0], shares[:, 0] = token, 0.0
        for position in range(POSITIONS):
            # all other positions without a target, so that one draw is one gradient
            labels = torch.full_like(LABELS, -100)
            labels[position] = LABELS[position]
            targets = SparseTargets(ids, shares, "sampled")
            total = fused_distillation(hidden, Head(weight), labels, targets, DistillLossConfig()).total
            (gradient,) = torch.autograd.grad(total, weight, allow_unused=True)
            mean += p[position, token] * gradient
    _, expected = learned(LogitTargets(y), DistillLossConfig())
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("sum_of_shares", [1.0, 0.995])
def test_drawn_tokens_give_the_kl_of_their_shares(sum_of_shares):
    """Shares leave no rest: what they lack to 1 was lost by rounding."""
    hidden, weight, _ = example()
    ids = torch.tensor([[2, 5, 9, -1]]).expand(POSITIONS, -1)
    shares = torch.tensor([[0.5, 0.3, 0.2, 0.0]], dtype=torch.float64).expand(POSITIONS, -1)
    result, gradient = learned(SparseTargets(ids, (sum_of_shares * shares).log(), "sampled"), DistillLossConfig())
    log_q = torch.log_softmax(hidden @ weight.T, -1).gather(-1, ids[:, :3])
    value = (shares[:, :3] * (shares[:, :3].log() - log_q)).sum(-1)[LABELS >= 0].sum()
    (expected,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(result.total, value)
    torch.testing.assert_close(gradient, expected)


def test_places_without_a_token_and_tokens_that_the_student_lacks():
    y = example()[2]
    p = torch.softmax(y, -1)
    common = 12
    kept = p[:, :3].clone()
    # three tokens; one place left empty; a token beyond the student's, whose mass is left out of both
    ids = torch.tensor([[0, 1, -1, 2, 13]]).expand(POSITIONS, -1)
    given = torch.cat([kept[:, :2], torch.zeros(POSITIONS, 1), kept[:, 2:], p[:, 13:14]], -1)
    result, gradient = learned(SparseTargets(ids, given.log(), "top"), DistillLossConfig(), vocabulary=common)

    hidden, weight, _ = example()
    rest = 1 - given.sum(-1, keepdim=True)
    of_teacher = torch.cat([kept, rest], -1) / (1 - given[:, -1:])
    q = torch.softmax((hidden @ weight.T)[:, :common], -1)
    value = divergence(DistillLossConfig(), of_teacher, bucketed(q, torch.tensor([[0, 1, 2]]).expand(POSITIONS, -1)))
    total = value[LABELS >= 0].sum()
    (expected,) = torch.autograd.grad(total, weight)
    torch.testing.assert_close(result.total, total)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", ["top", "sampled"])
def test_a_position_of_which_nothing_is_known_teaches_nothing(kind):
    ids = torch.full((POSITIONS, 4), -1)
    result, gradient = learned(
        SparseTargets(ids, torch.full((POSITIONS, 4), -torch.inf, dtype=torch.float64), kind), DistillLossConfig()
    )
    assert result.total == 0
    assert gradient.abs().max() == 0
    assert result.measures["covered"] == 0
    assert result.measures["agreement"] == 0


def test_a_rest_that_the_student_has_given_up_is_finite_in_fp32():
    hidden, weight = torch.eye(3)[:1] * 200, torch.randn(9, 3, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = torch.tensor([1.0] + [-1.0] * 8)
    weight.requires_grad_()
    targets = SparseTargets(torch.tensor([[0]]), torch.tensor([[-0.1]]), "top")
    result = fused_distillation(hidden, Head(weight), torch.tensor([0]), targets, DistillLossConfig())
    result.total.backward()
    assert torch.isfinite(result.total)
    assert torch.isfinite(weight.grad).all()


def test_16_bit_logarithms_are_near():
    options = DistillLossConfig(temperature=2.0)
    y = example()[2]
    exact, expected = learned(top_of(y, 6), options)
    stored = top_of(y, 6)
    rounded, gradient = learned(SparseTargets(stored.ids, stored.log_probabilities.half().float(), "top"), options)
    torch.testing.assert_close(rounded.total, exact.total, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-3)


def test_cross_entropy_is_not_touched_by_the_form():
    y = example()[2]
    hidden, weight, _ = example()
    result, _ = learned(top_of(y, 3), DistillLossConfig())
    reference = dense(hidden @ weight.T, y, LABELS, DistillLossConfig())
    torch.testing.assert_close(result.cross_entropy, reference.cross_entropy.detach())


@pytest.mark.parametrize(
    ("kind", "form", "temperature", "why"),
    [
        ("reverse_kl", "top", 1.0, "weighted by the student's probability"),
        ("js", "top", 1.0, "weighted by the student's probability"),
        ("skew_reverse_kl", "sampled", 1.0, "weighted by the student's probability"),
        ("total_variation", "top", 2.0, "every token"),
        ("skew_forward_kl", "sampled", 1.0, "bias"),
        ("forward_kl", "sampled", 2.0, "temperature 2 cannot be used"),
    ],
)
def test_what_a_few_tokens_cannot_tell_is_refused(kind, form, temperature, why):
    hidden, weight, y = example()
    stored = top_of(y, 3)
    targets = SparseTargets(stored.ids, stored.log_probabilities, form)
    options = DistillLossConfig(kind=kind, temperature=temperature)
    with pytest.raises(ValueError, match=why):
        fused_distillation(hidden, Head(weight), LABELS, targets, options)


def test_ranks_need_all_probabilities():
    hidden, weight, y = example()
    with pytest.raises(ValueError, match="all probabilities"):
        fused_distillation(hidden, Head(weight), LABELS, top_of(y, 3), DistillLossConfig(), uld=True)
