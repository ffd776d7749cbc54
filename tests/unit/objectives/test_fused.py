"""The fused function against whole logits in fp64: values, gradients, what it leaves out, and what it never makes."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.objectives.dense import KINDS, dense, logits_of
from trainer.config.distill import DistillLossConfig
from trainer.knowledge import DenseTargets, Head, LogitTargets
from trainer.objectives import fused
from trainer.objectives.fused import Distilled, fused_distillation, measures_of

VOCABULARY = 23


@dataclass
class Example:
    hidden: Tensor
    head: Head
    teacher: DenseTargets
    labels: Tensor

    def parameters(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.head.weight, self.head.bias) if t is not None]

    def double(self) -> "Example":
        def twin(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

        def of_head(head: Head) -> Head:
            return replace(head, weight=twin(head.weight), bias=twin(head.bias))

        teacher = DenseTargets(twin(self.teacher.hidden), of_head(self.teacher.head))
        return Example(twin(self.hidden), of_head(self.head), teacher, self.labels)


def example(
    teachers: int = VOCABULARY,
    *,
    bias: bool = True,
    scale: float = 1.0,
    softcap: float | None = None,
    masked: bool = True,
    dtype: torch.dtype = torch.float64,
    of_teacher: torch.dtype | None = None,
    vocabulary: int = VOCABULARY,
    shape: tuple[int, ...] = (3, 7),
    seed: int = 0,
) -> Example:
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int, kind: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(kind)

    hidden, weight = random(*shape, 6, kind=dtype), random(vocabulary, 6, kind=dtype)
    of_student = random(vocabulary, kind=dtype).requires_grad_() if bias else None
    labels = torch.randint(0, vocabulary, shape, generator=generator)
    if masked:
        labels[0, 2:5] = -100
        labels[-1, 0] = -100
    kind = of_teacher or dtype
    teacher = DenseTargets(random(*shape, 4, kind=kind), Head(random(teachers, 4, kind=kind), scale=0.7, softcap=9.0))
    head = Head(weight.requires_grad_(), of_student, scale, softcap)
    return Example(hidden.requires_grad_(), head, teacher, labels)


def options_of(kind: str = "forward_kl", temperature: float = 1.0, chunk: int = 4) -> DistillLossConfig:
    return DistillLossConfig(
        kind=kind, temperature=temperature, weight=0.7, cross_entropy=0.3, beta=0.3, alpha=0.2, chunk=chunk
    )


def learned(one: Example, options: DistillLossConfig, **kwargs: object) -> Distilled:
    return fused_distillation(one.hidden, one.head, one.labels, one.teacher, options, **kwargs)


def gradients(total: Tensor, one: Example) -> tuple[Tensor, ...]:
    # a loss scale reaches every gradient
    return torch.autograd.grad(total * 3, one.parameters())


SHAPES = {
    "same": {},
    "masked, no bias": {"bias": False},
    "all targets": {"masked": False},
    "softcap and scale": {"softcap": 3.0, "scale": 1.7},
    "longer teacher": {"teachers": VOCABULARY + 5},
    "shorter teacher": {"teachers": VOCABULARY - 4, "softcap": 5.0},
    "one dimension": {"shape": (11,), "masked": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_whole_logits(kind, temperature, shape):
    one = example(**SHAPES[shape])
    x, y = logits_of(one.hidden, one.head), logits_of(one.teacher.hidden, one.teacher.head)
    for chunk in (1, 4, 100):
        options = options_of(kind, temperature, chunk)
        expected = dense(x, y, one.labels, options, z_loss=0.02)
        found = learned(one, options, z_loss=0.02)
        assert found.total.shape == ()
        torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=0)
        torch.testing.assert_close(found.cross_entropy, expected.cross_entropy.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.divergence, expected.divergence.detach(), rtol=1e-9, atol=1e-12)
        reference = torch.autograd.grad(expected.total * 3, one.parameters(), retain_graph=True)
        for ours, theirs in zip(gradients(found.total, one), reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "of_teacher", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-5),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.float32, 3e-2),
        (torch.bfloat16, torch.bfloat16, 3e-2),
        (torch.float16, torch.float16, 4e-3),
    ],
)
def test_low_precision_is_near(kind, dtype, of_teacher, tolerance):
    one = example(dtype=dtype, of_teacher=of_teacher, softcap=4.0, scale=1.3)
    twin = one.double()
    options = options_of(kind, 2.0)
    expected = dense(
        logits_of(twin.hidden, twin.head), logits_of(twin.teacher.hidden, twin.teacher.head), one.labels, options
    )
    found = learned(one, options)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), expected.total, rtol=tolerance, atol=0)
    reference = torch.autograd.grad(expected.total * 3, twin.parameters())
    for ours, theirs, tensor in zip(gradients(found.total, one), reference, one.parameters(), strict=True):
        assert ours.dtype == tensor.dtype
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < tolerance


def test_chunks_of_bf16_add_up_in_fp32():
    """Summed in bf16 the gradient of the weight would stop growing at 256 equal parts."""
    one = example(dtype=torch.bfloat16, shape=(1, 1), masked=False, bias=False)
    many = 400
    states = one.hidden.detach().expand(1, many, 6).clone()
    teacher = replace(one.teacher, hidden=one.teacher.hidden.expand(1, many, 4).clone())
    for chunk in (1, many):
        options = options_of(chunk=chunk)
        single = fused_distillation(one.hidden, one.head, one.labels, one.teacher, options)
        whole = fused_distillation(states, one.head, one.labels.expand(1, many), teacher, options)
        (of_one,) = torch.autograd.grad(single.total, one.head.weight)
        (of_all,) = torch.autograd.grad(whole.total, one.head.weight)
        assert (of_all.float() / many - of_one.float()).norm() < 0.02 * of_one.float().norm()


def test_small_probabilities_survive_fp16():
    """Each of a thousand gradients is zero in fp16, unless it is scaled before it gets there; their sum is not."""
    weight = torch.zeros(3, 2, dtype=torch.float16)
    weight[1, 0] = -17.0
    weight.requires_grad_()
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.float16).expand(1000, 2)
    labels = torch.zeros(1000, dtype=torch.int64)
    result = fused_distillation(hidden, Head(weight), labels, None, DistillLossConfig(cross_entropy=1.0))
    (result.total * 2.0**10).backward()
    assert weight.grad[1, 0].item() == pytest.approx(2**10 * 1000 * 0.5 * math.exp(-17), rel=0.01)


def test_sums_do_not_depend_on_the_chunk():
    one = example(dtype=torch.float32, shape=(4, 50))
    results = [learned(one, options_of(chunk=chunk)) for chunk in (1, 7, 64, 1000)]
    for other in results[1:]:
        torch.testing.assert_close(other.total, results[0].total, rtol=1e-6, atol=0)
        for name in measures_of():
            torch.testing.assert_close(other.measures[name], results[0].measures[name], rtol=1e-6, atol=0)


def test_tiles_do_not_show(monkeypatch):
    one = example(shape=(3, 40), teachers=VOCABULARY - 2)
    whole = learned(one, options_of(temperature=2.0, chunk=64))
    monkeypatch.setattr(fused, "tile_rows", lambda width, device: 3)
    tiled = learned(one, options_of(temperature=2.0, chunk=64))
    torch.testing.assert_close(tiled.total, whole.total)
    for ours, theirs in zip(gradients(tiled.total, one), gradients(whole.total, one), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_all_tokens_has_the_bits_of_the_teacher(kind, temperature):
    """Logits, their log-probabilities as a cache holds them, and hidden states: one result."""
    one = example(dtype=torch.float32, vocabulary=300, teachers=300, shape=(2, 30))
    with torch.no_grad():
        logits = one.teacher.hidden @ one.teacher.head.weight.T * one.teacher.head.scale
        logits = 9.0 * torch.tanh(logits / 9.0)
    options = options_of(kind, temperature, chunk=1000)
    online = learned(one, options)
    expected = gradients(online.total, one)
    for stored in (logits, torch.log_softmax(logits, -1)):
        again = fused_distillation(one.hidden, one.head, one.labels, LogitTargets(stored), options)
        assert torch.equal(again.total, online.total)
        assert torch.equal(again.divergence, online.divergence)
        for ours, theirs in zip(gradients(again.total, one), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("by", [-1, 1])
def test_labels_shifted_by_one_are_other_labels(by):
    """What the logits at t predict stands at t: the reference with labels moved by one is far away."""
    one = example(shape=(2, 40), masked=False)
    options = options_of()
    x, y = logits_of(one.hidden, one.head), logits_of(one.teacher.hidden, one.teacher.head)
    found = learned(one, options)
    torch.testing.assert_close(found.total, dense(x, y, one.labels, options).total)
    shifted = dense(x, y, one.labels.roll(by, dims=1), options)
    assert (found.cross_entropy - shifted.cross_entropy).abs().mean() > 0.5
    assert abs(found.total - shifted.total) > 1.0
    # and so is the teacher moved by one
    moved = dense(x, y.roll(by, dims=1), one.labels, options)
    assert (found.divergence - moved.divergence).abs().mean() > 0.5


def test_nothing_is_computed_where_there_is_no_target():
    one = example(dtype=torch.float32)
    clean = learned(one, options_of())
    ignored = one.labels < 0
    poisoned = one.hidden.detach().clone()
    poisoned[ignored] = torch.nan
    teacher = one.teacher.hidden.clone()
    teacher[ignored] = torch.inf
    shown: list[Tensor] = []
    poisoned.requires_grad_()
    found = fused_distillation(
        poisoned, one.head, one.labels, replace(one.teacher, hidden=teacher), options_of(), see=shown.append
    )
    found.total.backward()
    assert torch.equal(found.total, clean.total)
    assert sum(len(logits) for logits in shown) == int((~ignored).sum())
    assert poisoned.grad[ignored].abs().max() == 0
    assert found.cross_entropy[ignored].abs().max() == 0
    assert found.divergence[ignored].abs().max() == 0


def test_no_target_at_all_still_meets_the_others():
    one = example()
    entered = []

    @contextmanager
    def whole() -> Iterator[None]:
        entered.append(True)
        yield

    labels = torch.full_like(one.labels, -100)
    found = fused_distillation(one.hidden, one.head, labels, replace(one.teacher, whole=whole), options_of())
    assert entered == [True]
    assert found.total == 0
    for gradient, tensor in zip(gradients(found.total, one), one.parameters(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_a_sharded_teacher_has_its_shape_within_whole_only():
    one = example(teachers=VOCABULARY + 3)
    expected = learned(one, options_of()).total
    weight = one.teacher.head.weight
    values, weight.data = weight.data, torch.empty(0, dtype=weight.dtype)

    @contextmanager
    def whole() -> Iterator[None]:
        weight.data = values
        yield
        weight.data = torch.empty(0, dtype=weight.dtype)

    found = learned(replace(one, teacher=replace(one.teacher, whole=whole)), options_of())
    assert torch.equal(found.total, expected)


def test_the_weight_may_be_partitioned_before_the_backward_pass():
    one = example()
    expected = gradients(learned(one, options_of()).total, one)
    total = learned(one, options_of()).total
    weight = one.head.weight
    values, weight.data = weight.data, torch.empty(0, dtype=weight.dtype)
    weight.register_hook(lambda gradient: setattr(weight, "data", values))
    (total * 3).backward()
    for ours, theirs in zip((t.grad for t in one.parameters()), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_frozen_parts_get_no_gradient():
    one = example()
    total = learned(one, options_of()).total
    expected = gradients(total, one)
    one.head.weight.requires_grad_(False)
    with Allocations() as made:
        total = learned(one, options_of()).total
    assert (VOCABULARY, 6) not in made.shapes
    total.backward()
    assert one.head.weight.grad is None
    torch.testing.assert_close(one.hidden.grad * 3, expected[0])
    torch.testing.assert_close(one.head.bias.grad * 3, expected[2])


def test_a_second_backward_pass_is_refused():
    one = example()
    total = learned(one, options_of()).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


def test_evaluation_has_the_same_values_and_no_gradient():
    one = example(dtype=torch.float32, vocabulary=200, teachers=200)
    trained = learned(one, options_of(), z_loss=0.1)
    with torch.no_grad(), Allocations() as made:
        found = learned(one, options_of(), z_loss=0.1)
    assert not found.total.requires_grad
    assert (200, 6) not in made.shapes
    assert torch.equal(found.total, trained.total)
    assert torch.equal(found.divergence, trained.divergence)


class Allocations(TorchDispatchMode):
    """Every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(tensor.shape))
        return result

    @property
    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_tokens_times_vocabulary_never_exist(kind, temperature):
    positions, vocabulary, chunk = 256, 4096, 32
    one = example(
        dtype=torch.float32, vocabulary=vocabulary, teachers=vocabulary, shape=(1, positions), bias=False, softcap=20.0
    )
    with Allocations() as made:
        learned(one, options_of(kind, temperature, chunk)).total.backward()
    assert made.largest <= chunk * vocabulary
    with Allocations() as made:
        dense(
            logits_of(one.hidden, one.head),
            logits_of(one.teacher.hidden, one.teacher.head),
            one.labels,
            options_of(kind, temperature),
        ).total.backward()
    assert made.largest >= positions * vocabulary


def test_the_loss_scale_makes_no_copy_of_the_weight():
    one = example(dtype=torch.float32, vocabulary=500, teachers=500)
    total = learned(one, options_of()).total
    with Allocations() as made:
        (total * 1024.0).backward()
    assert (500, 6) not in made.shapes


def test_measures():
    one = example(shape=(4, 30))
    found = learned(one, options_of(temperature=2.0))
    is_target = one.labels >= 0
    x, y = (logits_of(*pair).detach()[is_target] for pair in ((one.hidden, one.head), _parts(one.teacher)))
    p, q = torch.softmax(y, -1), torch.softmax(x, -1)
    assert tuple(found.measures) == ("teacher_entropy", "agreement", "covered", "student_mass")
    torch.testing.assert_close(found.measures["teacher_entropy"], -(p * p.log()).sum())
    assert found.measures["agreement"] == (x.argmax(-1) == y.argmax(-1)).sum()
    assert found.measures["covered"] == is_target.sum()
    torch.testing.assert_close(found.measures["student_mass"], q.gather(-1, y.argmax(-1, keepdim=True)).sum())
    assert found.right == (x.argmax(-1) == one.labels[is_target]).sum()
    assert not any(value.requires_grad for value in found.measures.values())
    torch.testing.assert_close(found.z_loss, torch.zeros((), dtype=torch.float64))


def _parts(teacher: DenseTargets) -> tuple[Tensor, Head]:
    return teacher.hidden, teacher.head


def test_cross_entropy_alone():
    one = example()
    found = fused_distillation(one.hidden, one.head, one.labels, None, DistillLossConfig(cross_entropy=1.0))
    expected = F.cross_entropy(
        logits_of(one.hidden, one.head).flatten(0, 1), one.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(found.total, expected)
    assert found.measures == {}
    for ours, theirs in zip(
        gradients(found.total, one), torch.autograd.grad(expected * 3, one.parameters()), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weights", list(itertools.product([0.0, 0.6], [0.0, 0.4], [0.0, 0.1])))
def test_parts_can_be_left_out(weights):
    weight, cross_entropy, z_loss = weights
    one = example()
    options = DistillLossConfig(weight=weight, cross_entropy=cross_entropy, chunk=5)
    x, y = logits_of(one.hidden, one.head), logits_of(one.teacher.hidden, one.teacher.head)
    expected = dense(x, y, one.labels, options, z_loss)
    found = learned(one, options, z_loss=z_loss)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(found.divergence, expected.divergence.detach())
    reference = torch.autograd.grad(expected.total * 3, one.parameters())
    for ours, theirs in zip(gradients(found.total, one), reference, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_the_student_wrote_has_no_cross_entropy(temperature):
    one = example()
    written = torch.zeros_like(one.labels, dtype=torch.bool)
    written[:, 3:] = True
    options = options_of(temperature=temperature)
    x, y = logits_of(one.hidden, one.head), logits_of(one.teacher.hidden, one.teacher.head)
    expected = dense(x, y, one.labels, options)
    total = expected.total - options.cross_entropy * expected.cross_entropy[written].sum()
    found = learned(one, options, written=written)
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.cross_entropy, expected.cross_entropy.detach())
    reference = torch.autograd.grad(total * 3, one.parameters())
    for ours, theirs in zip(gradients(found.total, one), reference, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 3, VOCABULARY + 100])
def test_real_tokens_only_count_in_the_divergence(vocabulary):
    one = example(teachers=VOCABULARY + 5)
    options = options_of("js")
    x, y = logits_of(one.hidden, one.head), logits_of(one.teacher.hidden, one.teacher.head)
    expected = dense(x, y, one.labels, options, common=vocabulary)
    with Allocations() as made:
        found = learned(one, options, vocabulary=vocabulary)
    assert not any(shape[1:] == (VOCABULARY + 5,) for shape in made.shapes)
    torch.testing.assert_close(found.total, expected.total)
    reference = torch.autograd.grad(expected.total * 3, one.parameters())
    for ours, theirs in zip(gradients(found.total, one), reference, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teachers", [VOCABULARY - 6, VOCABULARY, VOCABULARY + 6])
def test_another_tokenizer_by_ranks(teachers, temperature):
    one = example(teachers=teachers)
    options = options_of(temperature=temperature)
    x, y = logits_of(one.hidden, one.head), logits_of(one.teacher.hidden, one.teacher.head)
    longest = max(teachers, VOCABULARY)
    p, q = (
        F.pad(torch.softmax(logits / temperature, -1), (0, longest - logits.shape[-1])).sort(-1, descending=True).values
        for logits in (y, x)
    )
    value = temperature**2 * (p - q).abs().sum(-1)
    is_target = one.labels >= 0
    cross_entropy = dense(x, x, one.labels, options).cross_entropy
    total = (options.weight * value)[is_target].sum() + options.cross_entropy * cross_entropy.sum()
    found = learned(one, options, uld=True, vocabulary=5)
    torch.testing.assert_close(found.total, total)
    assert tuple(found.measures) == measures_of(uld=True)
    reference = torch.autograd.grad(total * 3, one.parameters())
    for ours, theirs in zip(gradients(found.total, one), reference, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_logits_are_shown_as_they_are():
    one = example(softcap=2.0)
    shown: list[Tensor] = []
    learned(one, options_of(), see=lambda logits: shown.append(logits.clone()))
    torch.testing.assert_close(torch.cat(shown), logits_of(one.hidden, one.head).detach()[one.labels >= 0])


def test_a_non_finite_state_at_a_target_is_seen():
    one = example()
    with torch.no_grad():
        one.hidden[1, 1, 0] = torch.nan
    found = learned(one, options_of())
    assert found.total.isnan()
    assert all(gradient.isnan().any() for gradient in gradients(found.total, one))


@pytest.mark.parametrize("what", ["labels", "written", "teacher"])
def test_shapes_that_do_not_fit_are_refused(what):
    one = example()
    labels, written, teacher = one.labels, None, one.teacher
    if what == "labels":
        labels = labels[:, 1:]
    elif what == "written":
        written = torch.zeros(3, dtype=torch.bool)
    else:
        teacher = replace(teacher, hidden=teacher.hidden[:, :-1])
    with pytest.raises(ValueError, match=r"fit|shape"):
        fused_distillation(one.hidden, one.head, labels, teacher, options_of(), written=written)
