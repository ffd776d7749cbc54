"""Hidden-state losses against plain fp64, and a mean that does not know how the batch was cut."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.objectives.hidden import hidden_sum, spread_pairs, token_weights


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(student, teacher, pairs, kind, weights):
    """Token by token, in fp64."""
    total = 0.0
    for ours, theirs in pairs:
        for b, t in torch.nonzero(weights).tolist():
            x, y = student[ours][b, t].double(), teacher[theirs][b, t].double()
            distance = 1 - x @ y / (x.norm() * y.norm()) if kind == "cosine" else (x - y).square().mean()
            total = total + weights[b, t].double() * distance / len(pairs)
    return total


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("pairs", [[(2, 4)], [(0, 0), (1, 2), (2, 4)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient(kind, pairs, dtype):
    student = {n: states(2, 5, 6, seed=n, dtype=dtype).requires_grad_() for n in range(3)}
    teacher = {n: states(2, 5, 6, seed=10 + n, dtype=dtype).requires_grad_() for n in range(5)}
    weights = torch.tensor([[1.0, 1, 1, 0.5, 0], [0, 0.25, 1, 2, 1]])
    ours = hidden_sum(student, teacher, pairs, kind, weights)
    assert ours.dtype == torch.float32
    theirs = reference(student, teacher, pairs, kind, weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    used = [student[n] for n, _ in pairs]
    of_ours = torch.autograd.grad(ours, [*used, *teacher.values()], allow_unused=True)
    for a, b in zip(of_ours, torch.autograd.grad(theirs, used), strict=False):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert set(of_ours[len(used) :]) == {None}


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_what_does_not_count_may_be_anything(kind):
    student, teacher = states(1, 3, 4).requires_grad_(), states(1, 3, 4, seed=1)
    weights = torch.tensor([[1.0, 1.0, 0.0]])
    clean = hidden_sum({1: student}, {1: teacher}, [(1, 1)], kind, weights)
    broken_student, broken = student.detach().clone(), teacher.clone()
    broken_student[:, 2], broken[:, 2] = torch.nan, torch.inf
    broken_student.requires_grad_()
    dirty = hidden_sum({1: broken_student}, {1: broken}, [(1, 1)], kind, weights)
    assert torch.equal(clean, dirty)
    dirty.backward()
    clean.backward()
    assert torch.equal(student.grad, broken_student.grad)
    assert torch.equal(student.grad[:, 2], torch.zeros(1, 4))


def test_equal_states_cost_nothing_and_opposite_ones_two():
    x = states(2, 3, 4)
    weights = torch.ones(2, 3)
    assert hidden_sum({1: x}, {1: x}, [(1, 1)], "cosine", weights).item() == pytest.approx(0, abs=1e-6)
    assert hidden_sum({1: x}, {1: -3 * x}, [(1, 1)], "cosine", weights).item() == pytest.approx(12, abs=1e-5)
    assert hidden_sum({1: x}, {1: x}, [(1, 1)], "mse", weights).item() == 0
    assert torch.isfinite(hidden_sum({1: x * 0}, {1: x}, [(1, 1)], "cosine", weights))


def test_projections_know_their_pair():
    narrow, wide = states(1, 2, 3), states(1, 2, 5, seed=1)
    maps = [states(3, 5, seed=2), states(3, 5, seed=3)]
    ours = hidden_sum(
        {1: narrow}, {1: wide, 2: wide}, [(1, 1), (1, 2)], "mse", torch.ones(1, 2), lambda i, x: x @ maps[i]
    )
    expected = sum((narrow @ m - wide).square().mean(-1).sum() for m in maps) / 2
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)


@given(
    samples=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6), st.integers(0, 2**16)), min_size=1, max_size=6),
    cut=st.integers(0, 6),
)
def test_the_mean_does_not_know_the_cut(samples, cut):
    """Whole batch at once, or in two parts that are divided by the sum of both counts: the same mean."""
    length = 6
    mask = torch.tensor([[1] * tokens + [0] * (length - tokens) for tokens, _, _ in samples])
    labels = torch.full((len(samples), length), -100)
    for row, (tokens, targets, _) in enumerate(samples):
        labels[row, : min(tokens, targets)] = 7
    student, teacher = states(len(samples), length, 4), states(len(samples), length, 4, seed=1)

    def part(rows: slice) -> float:
        weights = token_weights(labels[rows], mask[rows])
        return hidden_sum({1: student[rows]}, {1: teacher[rows]}, [(1, 1)], "mse", weights).item()

    weights = token_weights(labels, mask)
    assert weights.sum().item() == pytest.approx(int((labels >= 0).sum()))
    assert not (weights * (mask == 0)).any()
    assert part(slice(None)) == pytest.approx(part(slice(cut)) + part(slice(cut, None)), rel=1e-5, abs=1e-6)


def test_tokens_count():
    assert torch.equal(token_weights(torch.tensor([[3, 4], [5, -100]])), torch.tensor([[1.0, 1.0], [0.5, 0.5]]))
    classes, mask = torch.tensor([2, 0, -100]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    assert torch.equal(
        token_weights(classes, mask), torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0, 0, 0, 0]])
    )
    assert torch.equal(token_weights(classes, length=2), torch.tensor([[0.5, 0.5], [0.5, 0.5], [0, 0]]))
    assert not token_weights(torch.tensor([[1, -100]]) * 0 - 100, torch.zeros(1, 2)).any()


@given(st.integers(1, 40), st.integers(0, 40))
def test_pairs_go_to_the_last(student, more):
    pairs = spread_pairs(student, student + more)
    assert [ours for ours, _ in pairs] == list(range(1, student + 1))
    theirs = [layer for _, layer in pairs]
    assert theirs == sorted(set(theirs))
    assert theirs[0] >= 1
    assert theirs[-1] == student + more
    if more == student:
        assert theirs == [2 * n for n in range(1, student + 1)]
