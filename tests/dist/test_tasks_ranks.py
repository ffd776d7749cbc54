"""Tasks under ZeRO: gradients, losses of samples and held-out sums against one process in double precision that sees
one text at a time, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moved import whole
from pool import RankPool
from torch import Tensor
from workload import make_config, weights

from trainer.config.schema import RunConfig
from trainer.engine.zero import Engine
from trainer.records import Batch, Classes

VOCABULARY, LENGTH, SAMPLES, HELD_OUT, NUM_CLASSES = 61, 12, 8, 5, 3
COUNTS = torch.tensor([5, 2, 1])
EPSILON, Z_LOSS, ALPHA = 0.1, 0.01, 0.7
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {
    "intermediate_size": 24,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 24}
SEVERAL_TASKS = (
    {"name": "films", "kind": "classification", "weight": 0.5},
    {"name": "tags", "kind": "multi_label", "weight": 2.0},
    {"name": "stars", "kind": "regression"},
)
SEVERAL_NAMES = ("films/a", "films/b", "films/c", "tags/x", "tags/y", "stars/value")
SEVERAL_COLUMNS = {"films": slice(0, 3), "tags": slice(3, 5), "stars": slice(5, 6)}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "classification": (BERT, {"label_smoothing": EPSILON, "class_weights": "balanced"}),
    "multi_label": (BERT, {"label_smoothing": EPSILON}),
    "regression": (BERT, {}),
    "token_classification": (BERT, {"label_smoothing": EPSILON, "class_weights": "balanced"}),
    "question_answering": (BERT, {}),
    "causal": (LLAMA, {"label_smoothing": EPSILON, "z_loss": Z_LOSS}),
    "seq2seq": (T5, {"label_smoothing": EPSILON}),
    "several": (BERT, {"label_smoothing": EPSILON, "tasks": SEVERAL_TASKS}),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(kind: str, stage: int, accumulation: int, **more: Any) -> RunConfig:
    fields, options = CASES[kind]
    base = make_config(
        zero={"stage": stage},
        objective={"kind": kind, **(more.pop("objective", None) or options)},
        batch={"samples": SAMPLES, "micro": SAMPLES // (2 * accumulation)},
    )
    return RunConfig.model_validate(base.model_dump() | {"model": {"config": fields | more}})


def samples_of(kind: str, number: int, batch_index: int) -> list[dict[str, Any]]:
    """Texts of unequal lengths, without padding."""
    generator = np.random.default_rng((5, batch_index))
    samples = []
    for place in range(number):
        length = 2 + (place * 5 + batch_index) % (LENGTH - 2)
        sample = {"input_ids": generator.integers(2, VOCABULARY, length)}
        draw = generator.integers(0, NUM_CLASSES, length)
        match kind:
            case "classification":
                sample["labels"] = np.int64(draw[0])
            case "multi_label":
                sample["labels"] = generator.integers(0, 2, NUM_CLASSES).astype(np.float32)
            case "regression":
                sample["labels"] = np.float32(generator.normal())
            case "token_classification":
                sample["labels"] = np.where(np.arange(length) % 3 == 1, -100, draw)
            case "question_answering":
                sample["labels"] = np.sort(generator.integers(0, length, 2))
            case "causal":
                sample["labels"] = np.where(np.arange(length) < length // 2, -100, generator.integers(2, 61, length))
            case "seq2seq":
                sample["labels"] = generator.integers(2, VOCABULARY, 1 + length // 2)
                sample["decoder_input_ids"] = np.concatenate([[0], sample["labels"][:-1]])
            case "several":
                sample["labels"] = labels_of_several(place, generator)
        samples.append(sample)
    return samples


def labels_of_several(place: int, generator: np.random.Generator) -> np.ndarray:
    """No text of the first half of a batch, all that a rank holds without accumulation, is of `stars`."""
    labels = np.full(len(SEVERAL_NAMES), np.nan, dtype=np.float32)
    task = ("films", "tags", "films", "films", "stars", "tags", "stars", "films")[place]
    match task:
        case "films":
            labels[SEVERAL_COLUMNS[task]] = np.eye(3)[generator.integers(0, 3)]
        case "tags":
            labels[SEVERAL_COLUMNS[task]] = generator.integers(0, 2, 2)
        case _:
            labels[SEVERAL_COLUMNS[task]] = generator.normal()
    return labels


def padded(kind: str, samples: list[dict[str, Any] | None]) -> dict[str, np.ndarray]:
    """A micro-batch; None: an empty place of an evaluation, which repeats another text without its labels."""
    present = [sample for sample in samples if sample is not None]
    filled = [sample or present[0] if present else samples_of(kind, 1, 0)[0] for sample in samples]
    columns = {
        name: max(len(sample[name]) for sample in filled)
        for name in filled[0]
        if (np.ndim(filled[0][name]) == 1 and kind not in ("multi_label", "question_answering", "several"))
        or name == "input_ids"
    }
    arrays: dict[str, np.ndarray] = {}
    for name in filled[0]:
        if name in columns:
            fill = -100 if name == "labels" else 0
            arrays[name] = np.stack(
                [np.pad(each[name], (0, columns[name] - len(each[name])), constant_values=fill) for each in filled]
            )
        else:
            arrays[name] = np.stack([each[name] for each in filled])
    lengths = np.array([len(sample["input_ids"]) for sample in filled])
    arrays["attention_mask"] = (np.arange(columns["input_ids"]) < lengths[:, None]).astype(np.int64)
    for row, sample in enumerate(samples):
        if sample is None:
            arrays["labels"][row] = np.nan if kind in ("regression", "several") else -100
    return arrays


def num_targets(kind: str, sample: dict[str, Any]) -> int:
    per_token = kind in ("token_classification", "causal", "seq2seq")
    return int((sample["labels"] >= 0).sum()) if per_token else 1


def batch_of(config: RunConfig, batch_index: int, rank: int, world_size: int) -> Batch:
    kind, micro = config.objective.kind, config.batch.micro
    samples = samples_of(kind, SAMPLES, batch_index)
    micro_batches = [
        padded(kind, list(samples[first : first + micro])) for first in range(rank * micro, SAMPLES, micro * world_size)
    ]
    total = sum(num_targets(kind, sample) for sample in samples)
    return Batch(batch_index, 0, np.arange(SAMPLES), total, tuple(micro_batches))


def held_out(config: RunConfig, rank: int, world_size: int) -> list[dict[str, np.ndarray]]:
    kind, micro = config.objective.kind, config.batch.micro
    places: list[dict[str, Any] | None] = [*samples_of(kind, HELD_OUT, 99)]
    places += [None] * (-len(places) % (micro * world_size))
    return [
        padded(kind, places[first : first + micro]) for first in range(rank * micro, len(places), micro * world_size)
    ]


def classes_of(config: RunConfig) -> Classes | None:
    if config.objective.kind == "several":
        return Classes(SEVERAL_NAMES, 0)
    names = (
        ("a", "b", "c") if config.objective.kind in ("classification", "multi_label", "token_classification") else ()
    )
    rates = (0.1, 0.4, 0.7) if config.objective.kind == "multi_label" else ()
    return None if config.objective.kind == "causal" else Classes(names, 0, rates)


def make(rank: int, world_size: int, config: RunConfig) -> Engine:
    from trainer.config.resolve import arithmetic, deepspeed_config
    from trainer.engine.ranks import Ranks
    from trainer.model.build import build_model
    from trainer.model.groups import parameter_facts, parameter_groups
    from trainer.objectives import make_objective
    from trainer.optim.build import build_optimizer

    zero3 = deepspeed_config(config, world_size, "cpu", "fp32") if config.zero.stage == 3 else None
    model = build_model(config, vocabulary=VOCABULARY, zero3=zero3, dtype=torch.float32, classes=classes_of(config))
    return Engine(
        model,
        build_optimizer(parameter_groups(model, config), config, "cpu"),
        make_objective(config.objective, classes=classes_of(config), class_counts=COUNTS),
        config=config,
        numbers=arithmetic(config, world_size),
        parameters=parameter_facts(model),
        ranks=Ranks(rank, world_size, rank),
        device="cpu",
        precision="fp32",
    )


def gradient_of(engine: Engine) -> list[tuple[str, int, np.ndarray]]:
    return [
        (fragment.name, fragment.start, part.float().numpy().copy())
        for fragment, part in zip(engine.shards.fragments, engine.shards.gradients(), strict=True)
    ]


def work(rank: int, world_size: int, config: RunConfig) -> dict[str, Any]:
    engine = make(rank, world_size, config)
    batch = batch_of(config, 0, rank, world_size)
    state = weights(engine)
    evaluation = engine.evaluate(held_out(config, rank, world_size))
    assert evaluation is not None
    losses = engine.sample_losses(batch)
    stats = engine.accumulate(batch, attempt=1, step=1)
    first = gradient_of(engine)
    engine.discard()
    again = engine.accumulate(batch, attempt=2, step=1)
    return {
        "weights": state,
        "evaluation": evaluation,
        "samples": losses,
        "stats": stats,
        "gradient": first,
        "same": again.loss == stats.loss
        and again.parts == stats.parts
        and all(np.array_equal(a, b) for (*_, a), (*_, b) in zip(first, gradient_of(engine), strict=True)),
    }


def alone(config: RunConfig) -> torch.nn.Module:
    from trainer.model.build import build_model

    return build_model(config, vocabulary=VOCABULARY, zero3=None, dtype=torch.float64, classes=classes_of(config))


def loss_of(kind: str, outputs: Any, labels: Tensor, *, trained: bool) -> tuple[Tensor, Tensor]:
    """(loss, z-loss) of one text, summed over its targets, by torch's own functions in fp64."""
    smoothing = EPSILON if trained else 0.0
    none = torch.zeros((), dtype=torch.float64)
    if kind == "question_answering":
        ends = zip((outputs.start_logits, outputs.end_logits), labels, strict=True)
        return sum((F.cross_entropy(logits[0], label) / 2 for logits, label in ends), none), none
    logits = outputs.logits[0]
    if kind == "regression":
        return (logits[0] - labels.double()).square(), none
    if kind == "several":
        return loss_of_several(logits, labels.double(), smoothing), none
    if kind == "multi_label":
        wanted = labels.double() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, wanted), none
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if trained and "class_weights" in CASES[kind][1]:
        losses = losses * (COUNTS.sum() / (NUM_CLASSES * COUNTS.double()))[labels]
    squared = Z_LOSS * logits.logsumexp(-1).square().sum() if trained and kind == "causal" else none
    return losses.sum(), squared


def loss_of_several(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Of one text, by the columns that have labels."""
    (task,) = (task for task in SEVERAL_TASKS if not labels[SEVERAL_COLUMNS[task["name"]]].isnan().any())
    x, y = logits[SEVERAL_COLUMNS[task["name"]]], labels[SEVERAL_COLUMNS[task["name"]]]
    losses = {
        "classification": lambda: F.cross_entropy(x, y.argmax(), label_smoothing=smoothing),
        "multi_label": lambda: F.binary_cross_entropy_with_logits(x, y * (1 - smoothing) + smoothing / 2),
        "regression": lambda: (x - y).square().sum(),
    }
    return task.get("weight", 1.0) * losses[task["kind"]]()


def outputs_of(model: torch.nn.Module, sample: dict[str, Any]) -> Any:
    return model(**{name: torch.from_numpy(value)[None] for name, value in sample.items() if name != "labels"})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", CASES)
def test_two_ranks_equal_a_dense_reference(two_ranks: RankPool, kind: str, stage: int, accumulation: int) -> None:
    assert_equal_a_dense_reference(two_ranks, config_of(kind, stage, accumulation))


@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_of_which_each_lacks_a_task(four_ranks: RankPool, stage: int) -> None:
    assert_equal_a_dense_reference(four_ranks, config_of("several", stage, 2))


def assert_equal_a_dense_reference(pool: RankPool, config: RunConfig) -> None:
    kind = config.objective.kind
    results = pool(work, config=config)
    model = alone(config)
    for name, parameter in model.named_parameters():
        np.testing.assert_array_equal(results[0]["weights"][name], parameter.detach().float().numpy())
    samples = samples_of(kind, SAMPLES, 0)
    counts = np.array([num_targets(kind, sample) for sample in samples])
    found = [
        loss_of(kind, outputs_of(model, sample), torch.as_tensor(sample["labels"]), trained=True) for sample in samples
    ]
    loss, squared = (sum(each) / counts.sum() for each in zip(*found, strict=True))
    (loss + squared).backward()
    expected = {name: p.grad.flatten().numpy() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(np.abs(value).max() for value in expected.values())
    gradient = whole(results)
    for name, value in gradient.items():
        wanted = expected.get(name, np.zeros_like(value))
        np.testing.assert_allclose(value, wanted, rtol=2e-4, atol=2e-6 * largest, err_msg=name)
    with torch.no_grad():
        texts = samples_of(kind, HELD_OUT, 99)
        plain = [loss_of(kind, outputs_of(model, t), torch.as_tensor(t["labels"]), trained=False)[0] for t in texts]
    targets = sum(num_targets(kind, text) for text in texts)
    for result in results:
        assert result["same"]
        assert result["stats"].loss == pytest.approx(loss.item(), rel=1e-5)
        if kind == "causal":
            assert result["stats"].parts["z_loss"] == pytest.approx(squared.item(), rel=1e-5)
        np.testing.assert_allclose(result["samples"], [each.item() for each, _ in found] / counts, rtol=2e-5)
        assert result["evaluation"].num_targets == targets
        assert result["evaluation"].loss == pytest.approx(sum(plain).item() / targets, rel=1e-5)
    assert all(result["evaluation"] == results[0]["evaluation"] for result in results)


def divergence(kind: str, first: Tensor, second: Tensor, targets: Tensor) -> Tensor:
    """Σ over targets of (KL(p‖q) + KL(q‖p)) / 2 of log-probabilities [n, C]; of logits for `multi_label`."""
    if kind == "multi_label":
        p, q = first.sigmoid(), second.sigmoid()
        return ((p - q) * (first - second)).mean(-1)[targets].sum() / 2
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    both = F.kl_div(q, p, log_target=True, reduction="none") + F.kl_div(p, q, log_target=True, reduction="none")
    return both.sum(-1)[targets].sum() / 2


R_DROP = [
    *(("classification", stage, 2) for stage in (0, 1, 2, 3)),
    ("classification", 3, 1),
    ("multi_label", 2, 2),
    ("seq2seq", 3, 2),
]


@pytest.mark.parametrize(("kind", "stage", "accumulation"), R_DROP)
def test_r_drop_equals_a_dense_reference(two_ranks: RankPool, kind: str, stage: int, accumulation: int) -> None:
    from trainer.engine.zero import seed_everything

    dropout = {"dropout_rate": 0.2} if kind == "seq2seq" else {"hidden_dropout_prob": 0.2}
    config = config_of(kind, stage, accumulation, objective={"r_drop": ALPHA, "label_smoothing": EPSILON}, **dropout)
    results = two_ranks(work, config=config)
    model, micro = alone(config).train(), config.batch.micro
    losses, divergences = [], []
    for first in range(0, SAMPLES, micro):
        arrays = padded(kind, list(samples_of(kind, SAMPLES, 0)[first : first + micro]))
        tensors = {name: torch.from_numpy(np.concatenate([array, array])) for name, array in arrays.items()}
        labels = tensors.pop("labels")
        seed_everything(config.seed, 0, first, torch.device("cpu"))
        logits = model(**tensors).logits
        if kind == "multi_label":
            wanted = labels * (1 - EPSILON) + EPSILON / 2
            loss = F.binary_cross_entropy_with_logits(logits, wanted.double(), reduction="none").mean(-1).sum()
            targets = torch.ones(micro, dtype=torch.bool)
        else:
            logits = logits.reshape(-1, logits.shape[-1])
            options: dict[str, Any] = {"reduction": "sum", "ignore_index": -100, "label_smoothing": EPSILON}
            loss = F.cross_entropy(logits, labels.flatten(), **options)
            targets = labels[:micro].flatten() >= 0
        losses.append(loss / 2)
        divergences.append(ALPHA * divergence(kind, *logits.chunk(2), targets))
    total = sum(num_targets(kind, sample) for sample in samples_of(kind, SAMPLES, 0))
    loss, part = sum(losses) / total, sum(divergences) / total
    (loss + part).backward()
    assert part.item() > 1e-3 * loss.item()
    expected = {name: p.grad.flatten().numpy() for name, p in model.named_parameters() if p.grad is not None}
    largest = max(np.abs(value).max() for value in expected.values())
    for name, value in whole(results).items():
        wanted = expected.get(name, np.zeros_like(value))
        np.testing.assert_allclose(value, wanted, rtol=2e-4, atol=2e-6 * largest, err_msg=name)
    for result in results:
        assert result["same"]
        assert result["stats"].loss == pytest.approx(loss.item(), rel=1e-5)
        assert result["stats"].parts["r_drop"] == pytest.approx(part.item(), rel=1e-4)
        assert result["evaluation"].num_targets > 0
