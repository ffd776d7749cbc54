"""Values and gradients against dense fp64 references; bits against F.cross_entropy."""

import pytest
import torch
import torch.nn.functional as F

from trainer.config.objective import ObjectiveConfig
from trainer.objectives import make_objective
from trainer.objectives.objective import sum_of

BATCH, LENGTH, VOCABULARY = 3, 7, 11


def example(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(BATCH, LENGTH, VOCABULARY, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    labels[0, 2:5] = -100
    labels[2, 0] = -100
    return logits.requires_grad_(), labels


def dense_reference(logits: torch.Tensor, labels: torch.Tensor, weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sums in fp64 from the definition: one softmax a target, no ignore_index."""
    cross_entropy, squared = torch.zeros(2, dtype=torch.float64)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[b, t] >= 0:
                log_partition = logits[b, t].exp().sum().log()
                cross_entropy = cross_entropy + log_partition - logits[b, t, labels[b, t]]
                squared = squared + log_partition**2
    return cross_entropy, weight * squared


@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_terms_and_gradient_equal_the_dense_reference(z_loss, dtype, tolerance):
    logits, labels = example(dtype)
    terms = make_objective(ObjectiveConfig(z_loss=z_loss)).sums(logits, labels)
    (sum_of(terms) / 17.0).backward()

    dense = logits.detach().double().requires_grad_()
    cross_entropy, penalty = dense_reference(dense, labels, z_loss)
    ((cross_entropy + penalty) / 17).backward()

    assert list(terms) == (["loss", "z_loss"] if z_loss else ["loss"])
    assert all(term.dtype == torch.float32 and term.shape == () for term in terms.values())
    # the sums are made in fp32 whatever the logits' type, so their error does not grow with it
    torch.testing.assert_close(terms["loss"].double(), cross_entropy.detach(), rtol=2e-6, atol=0)
    if z_loss:
        torch.testing.assert_close(terms["z_loss"].double(), penalty.detach(), rtol=2e-6, atol=0)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), dense.grad, rtol=tolerance, atol=tolerance / 10)
    assert logits.grad[labels == -100].abs().max() == 0


def test_plain_total_has_the_bits_of_torch():
    logits, labels = example()
    count = int((labels >= 0).sum())
    (sum_of(make_objective(ObjectiveConfig()).sums(logits, labels)) / count).backward()

    twin = logits.detach().clone().requires_grad_()
    reference = F.cross_entropy(twin.float().view(-1, VOCABULARY), labels.view(-1), reduction="sum") / count
    reference.backward()
    assert torch.equal(sum_of(make_objective(ObjectiveConfig()).sums(logits, labels)) / count, reference)
    assert torch.equal(logits.grad, twin.grad)


def test_each_term_is_differentiable_alone():
    logits, labels = example()
    terms = make_objective(ObjectiveConfig(z_loss=0.3)).sums(logits, labels)
    (gradient,) = torch.autograd.grad(terms["loss"], logits)
    twin = logits.detach().double().requires_grad_()
    (reference,) = torch.autograd.grad(dense_reference(twin, labels, 0.0)[0], twin)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_no_target_means_no_loss_and_no_gradient(z_loss):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
    terms = make_objective(ObjectiveConfig(z_loss=z_loss)).sums(logits, torch.full((2, 3), -100))
    value = sum_of(terms)
    value.backward()
    assert value == 0
    assert torch.equal(logits.grad, torch.zeros(2, 3, 5))


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_a_non_finite_logit_at_a_target_is_seen(z_loss):
    logits, labels = example()
    with torch.no_grad():
        logits[1, 1, 3] = float("nan")
    terms = make_objective(ObjectiveConfig(z_loss=z_loss)).sums(logits, labels)
    assert all(torch.isnan(term) for term in terms.values())


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_micro_batches_add_up_to_the_batch(z_loss):
    logits, labels = example()
    objective = make_objective(ObjectiveConfig(z_loss=z_loss)).sums
    whole = objective(logits, labels)
    parts = [objective(logits[i : i + 1], labels[i : i + 1]) for i in range(BATCH)]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value)
