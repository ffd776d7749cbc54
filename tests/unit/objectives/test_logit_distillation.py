"""Classifiers: whole logits, the same numbers."""

import pytest
import torch

from tests.unit.objectives.dense import KINDS, dense
from trainer.config.distill import DistillLossConfig
from trainer.knowledge import Head, LogitTargets, SparseTargets
from trainer.objectives.fused import fused_distillation
from trainer.objectives.logits import logit_distillation

LABELS = torch.tensor([3, 0, -100, 1, 4, 2, 2])


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(21)
    x, y = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), 2 * y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_value_and_gradient(kind, temperature, chunk):
    x, y = example()
    before = x.detach().clone(), y.clone()
    options = DistillLossConfig(kind=kind, temperature=temperature, weight=0.5, cross_entropy=0.5, chunk=chunk)
    expected = dense(x, y, LABELS, options)
    found = logit_distillation(x, LABELS, LogitTargets(y), options)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.divergence, expected.divergence.detach())
    (gradient,) = torch.autograd.grad(found.total * 3, x)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.total * 3, x)[0])
    assert torch.equal(x.detach(), before[0])
    assert torch.equal(y, before[1])


def test_the_same_record_as_from_hidden_states():
    x, y = example()
    options = DistillLossConfig(cross_entropy=0.5)
    from_logits = logit_distillation(x, LABELS, LogitTargets(y), options)
    head = Head(torch.eye(5, dtype=torch.float64))
    from_states = fused_distillation(x, head, LABELS, LogitTargets(y), options)
    assert torch.equal(from_logits.total, from_states.total)
    assert torch.equal(from_logits.cross_entropy, from_states.cross_entropy)
    assert from_logits.measures == from_states.measures
    assert from_logits.right == from_states.right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    x, y = example(dtype)
    options = DistillLossConfig(temperature=2.0, cross_entropy=0.5)
    expected = dense(x.detach().double(), y.double(), LABELS, options)
    found = logit_distillation(x, LABELS, LogitTargets(y), options)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), expected.total, rtol=1e-5, atol=0)
    found.total.backward()
    assert x.grad.dtype == dtype
    assert x.grad[2].abs().max() == 0


def test_evaluation_without_a_teacher():
    x, _ = example()
    with torch.no_grad():
        found = logit_distillation(x, LABELS, None, DistillLossConfig(cross_entropy=1.0))
    expected = torch.nn.functional.cross_entropy(x, LABELS, ignore_index=-100, reduction="sum")
    torch.testing.assert_close(found.total, expected.detach())
    assert found.right == (x.argmax(-1) == LABELS).sum()
    assert found.measures == {}


def test_other_classes_are_refused():
    x, y = example()
    with pytest.raises(ValueError, match="differ in shape"):
        logit_distillation(x, LABELS, LogitTargets(y[:, :4]), DistillLossConfig())
    targets = SparseTargets(LABELS[:, None], torch.zeros(7, 1), "top")
    with pytest.raises(ValueError, match="reverse_kl cannot be learned"):
        logit_distillation(x, LABELS, targets, DistillLossConfig(kind="reverse_kl"))
