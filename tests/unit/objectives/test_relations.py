"""MiniLMv2 relations against a dense fp64 reference, cut into blocks of every size."""

import math

import pytest
import torch

from trainer.errors import ConfigError
from trainer.knowledge import AttentionStates
from trainer.objectives import relations
from trainer.objectives.relations import relations_sum


def random_states(batch: int, length: int, widths: tuple[int, int, int], seed: int, dtype=torch.float64, grad=False):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, length, w, generator=generator, dtype=torch.float64).to(dtype) for w in widths]
    return AttentionStates(*(x.requires_grad_(grad) for x in made))


def relation(states: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    by_head = states.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = by_head @ by_head.transpose(-1, -2) / math.sqrt(by_head.shape[-1])
    return scores.masked_fill(mask[:, None, None, :] == 0, -math.inf).softmax(-1)


def dense(student, teacher, heads, weights, mask):
    total = 0.0
    for kind in ("query", "key", "value"):
        p, q = (relation(getattr(s, kind).double(), heads, mask) for s in (teacher, student))
        divergence = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(-1)
        total = total + (divergence.mean(1) * weights).sum()
    return total


def gradients(total: torch.Tensor, student: AttentionStates) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(total, (student.query, student.key, student.value))


WIDTHS = [((12, 12, 12), (24, 24, 24)), ((12, 6, 6), (18, 12, 12))]


@pytest.mark.parametrize(("ours", "theirs"), WIDTHS)
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("elements", [1, 20, 150, 1 << 22])
def test_value_and_gradient(ours, theirs, heads, padded, elements, monkeypatch):
    monkeypatch.setattr(relations, "MAX_ELEMENTS", elements)
    student = random_states(3, 7, ours, seed=0, grad=True)
    teacher = random_states(3, 7, theirs, seed=1)
    mask = torch.ones(3, 7)
    if padded:
        mask[1, 4:] = 0
        mask[2, 1:] = 0
    weights = mask * torch.linspace(0.5, 1.5, 7)
    value = relations_sum(student, teacher, heads, weights, mask if padded else None)
    expected = dense(student, teacher, heads, weights, mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    for a, b in zip(gradients(3 * value, student), gradients(3 * expected, student), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_in_fp32(dtype):
    student = random_states(2, 9, (8, 8, 8), seed=0, dtype=dtype, grad=True)
    teacher = random_states(2, 9, (16, 16, 16), seed=1, dtype=dtype)
    weights = torch.ones(2, 9)
    value = relations_sum(student, teacher, 4, weights)
    expected = dense(student, teacher, 4, weights, torch.ones(2, 9))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(gradients(value, student), gradients(expected, student), strict=True):
        assert a.dtype == dtype
        assert torch.allclose(a.double(), b.double(), atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_equal_models_cost_nothing():
    states = random_states(2, 5, (8, 8, 8), seed=0, grad=True)
    value = relations_sum(states, states, 2, torch.ones(2, 5))
    assert value.item() == pytest.approx(0, abs=1e-12)
    assert all(not g.abs().gt(1e-12).any() for g in gradients(value, states))


def test_padding_may_hold_anything():
    student, teacher = random_states(1, 6, (8, 8, 8), seed=0), random_states(1, 6, (8, 8, 8), seed=1)
    short = [AttentionStates(s.query[:, :4], s.key[:, :4], s.value[:, :4]) for s in (student, teacher)]
    for states in (student, teacher):
        for kind in ("query", "key", "value"):
            getattr(states, kind)[:, 4:] = torch.nan
    for states in (student, short[0]):
        for kind in ("query", "key", "value"):
            getattr(states, kind).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = relations_sum(student, teacher, 2, mask.float(), mask)
    whole = relations_sum(*short, 2, torch.ones(1, 4))
    assert padded.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(gradients(padded, student), gradients(whole, short[0]), strict=True):
        assert torch.allclose(a[:, :4], b, atol=1e-12)
        assert not a[:, 4:].any()


def test_never_holds_the_relations_of_a_long_text(monkeypatch):
    monkeypatch.setattr(relations, "MAX_ELEMENTS", 1 << 12)
    largest = 0
    log_relations = relations._log_relations

    def watching(*arguments):
        nonlocal largest
        result = log_relations(*arguments)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(relations, "_log_relations", watching)
    for length in (8, 64, 100, 1000):
        student = random_states(2, length, (8, 8, 8), seed=0, dtype=torch.float32, grad=True)
        relations_sum(student, student, 2, torch.ones(2, length)).backward()
    assert 1 << 11 < largest <= 1 << 12


def test_heads_that_do_not_fit_are_named():
    student, teacher = random_states(1, 2, (12, 6, 6), seed=0), random_states(1, 2, (24, 24, 24), seed=1)
    with pytest.raises(ConfigError) as caught:
        relations_sum(student, teacher, 4, torch.ones(1, 2))
    ((path, text),) = caught.value.problems
    assert path == "distill.relations.heads"
    assert text == ("4 heads do not divide the student's width of 6 (key), 6 (value); its widths divide by 1, 2, 3, 6")
    with pytest.raises(ConfigError, match="the teacher's width of 36"):
        relations_sum(teacher, random_states(1, 2, (24, 24, 36), seed=1), 24, torch.ones(1, 2))
