"""Scores over ranks are those of one process, to the last digit, for numbers of samples that do not divide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pool import RankPool

from trainer.config.objective import ObjectiveConfig, TaskConfig

VOCABULARY, LENGTH, CLASSES = 61, 16, 3
NAMES = {
    "classification": ("a", "b", "c"),
    "multi_label": ("a", "b", "c"),
    "regression": (),
    "token_classification": ("O", "B-X", "I-X"),
    "question_answering": (),
    "causal": (),
    "several": ("films/a", "films/b", "films/c", "tags/x", "tags/y", "stars/value"),
}
TASKS = (
    TaskConfig(name="films", kind="classification"),
    TaskConfig(name="tags", kind="multi_label"),
    TaskConfig(name="stars", kind="regression"),
)


def model_of(kind: str) -> Any:
    import torch
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
    )

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels={"regression": 1, "several": len(NAMES["several"])}.get(kind, CLASSES),
        is_decoder=kind == "causal",
        initializer_range=0.5,
    )
    torch.manual_seed(4)
    if kind == "token_classification":
        return BertForTokenClassification(config).eval()
    if kind == "question_answering":
        config.num_labels = 2
        return BertForQuestionAnswering(config).eval()
    if kind == "causal":
        return BertLMHeadModel(config).eval()
    return BertForSequenceClassification(config).eval()


def sample(kind: str, number: int) -> tuple[np.ndarray, Any]:
    """Tokens [2 … 16] and the label of one sample."""
    generator = np.random.default_rng((9, number))
    length = int(generator.integers(2, LENGTH + 1))
    tokens = generator.integers(1, VOCABULARY, length)
    label: Any
    match kind:
        case "classification":
            label = generator.integers(0, CLASSES)
        case "multi_label":
            label = generator.integers(0, 2, CLASSES).astype(np.float32)
        case "regression":
            label = np.float32(generator.normal())
        case "several":
            label = np.full(len(NAMES[kind]), np.nan, dtype=np.float32)
            task = number * 7 % 4
            if task == 0:
                label[5] = generator.normal()
            elif task == 1:
                label[3:5] = generator.integers(0, 2, 2)
            else:
                label[:3] = np.eye(3)[generator.integers(0, 3)]
        case "question_answering":
            label = np.sort(generator.integers(0, length, 2))
        case _:
            label = np.full(LENGTH, -100)
            label[:length] = generator.integers(0, CLASSES, length)
            label[1:length:3] = -100
    return tokens, label


def micro_batches(
    kind: str, num_samples: int, micro: int, rank: int, ranks: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """As `evaluation_batches` makes them: what is left over repeats the last sample, without labels."""
    from trainer.data.labelled import trimmed
    from trainer.stages.scoring import EMPTY, held_out_ids

    for ids in held_out_ids(num_samples, micro=micro, rank=rank, ranks=ranks):
        rows = [sample(kind, number if number != EMPTY else num_samples - 1) for number in ids.tolist()]
        tokens = np.zeros((micro, LENGTH), dtype=np.int64)
        mask = np.zeros_like(tokens)
        for row, (text, _) in enumerate(rows):
            tokens[row, : len(text)], mask[row, : len(text)] = text, 1
        labels = np.stack([label for _, label in rows])
        labels[ids == EMPTY] = np.nan if kind in ("regression", "several") else -100
        yield ids, trimmed({"input_ids": tokens, "attention_mask": mask, "labels": labels}, kind)  # type: ignore[arg-type]


def text_columns(ids: np.ndarray) -> np.ndarray:
    """All but the first token of each window."""
    return np.array([[1, len(sample("question_answering", number)[0])] for number in ids.tolist()])


def scored(rank: int, world_size: int, kind: str, num_samples: int, micro: int, alone: bool) -> Any:
    """Predictions and scores; `alone`: of each rank by itself, over all samples."""
    from trainer.stages.scoring import Keeper, gathered, predictions
    from trainer.stages.scoring import _sorted as in_order

    place = (0, 1) if alone else (rank, world_size)
    tasks = TASKS if kind == "several" else ()
    objective, model = ObjectiveConfig(kind=kind, tasks=tasks), model_of(kind)  # type: ignore[arg-type]
    columns = text_columns if kind == "question_answering" else None
    own = predictions(model, objective, micro_batches(kind, num_samples, micro, *place), columns, names=NAMES[kind])
    ids = (ids for ids, _ in micro_batches(kind, num_samples, micro, *place))
    keeper = Keeper(objective, ids, columns, NAMES[kind])
    arrays = (arrays for _, arrays in micro_batches(kind, num_samples, micro, *place))
    with keeper.watching(model):
        for each in keeper.seen(arrays):
            import torch

            model(**{name: torch.from_numpy(value) for name, value in each.items() if name != "labels"})
    kept = keeper.predictions()
    np.testing.assert_array_equal(kept.ids, own.ids)
    np.testing.assert_equal(kept.predictions, own.predictions)
    whole = in_order(own) if alone else gathered(own)
    if whole is None:
        assert rank != 0
        return None
    # answers are scored where their text is known
    values = {"windows": 1.0} if kind == "question_answering" else whole.scores(NAMES[kind]).values
    return whole.ids.tolist(), whole.predictions, whole.truths, values


@pytest.mark.parametrize("kind", NAMES)
def test_two_ranks_as_one(two_ranks: RankPool, kind: str) -> None:
    compare(two_ranks, kind, 23, 4)


@pytest.mark.parametrize("kind", ["classification", "several"])
@pytest.mark.parametrize(("num_samples", "micro"), [(23, 2), (3, 1), (2, 4), (24, 2), (17, 3)])
def test_four_ranks_as_one(four_ranks: RankPool, num_samples: int, micro: int, kind: str) -> None:
    """Also where a rank has no sample at all."""
    compare(four_ranks, kind, num_samples, micro)


def test_each_task_is_scored_over_its_own_texts(two_ranks: RankPool) -> None:
    _, predictions, truths, scores = two_ranks(scored, kind="several", num_samples=23, micro=4, alone=False)[0]
    np.testing.assert_allclose(predictions[:, :3].sum(axis=1), 1, rtol=1e-6)
    films = ~np.isnan(truths[:, 0])
    right = predictions[films, :3].argmax(axis=1) == truths[films, :3].argmax(axis=1)
    assert scores["films/accuracy"] == right.mean()
    stars = ~np.isnan(truths[:, 5])
    assert scores["stars/mae"] == pytest.approx(np.abs(predictions[stars, 5] - truths[stars, 5]).mean())
    assert {name.split("/")[0] for name in scores} == {"films", "tags", "stars"}


def compare(pool: RankPool, kind: str, num_samples: int, micro: int) -> None:
    arguments = {"kind": kind, "num_samples": num_samples, "micro": micro}
    together, *others = pool(scored, alone=False, **arguments)
    assert others == [None] * len(others)
    for alone in pool(scored, alone=True, **arguments):
        np.testing.assert_equal(together, alone)
    ids, predictions, truths, scores = together
    assert ids == list(range(num_samples))
    assert len(predictions) == len(truths) == num_samples
    assert scores


def test_another_micro_batch_agrees_within_rounding(two_ranks: RankPool) -> None:
    arguments = {"kind": "classification", "num_samples": 23, "alone": False}
    first, other = (two_ranks(scored, micro=micro, **arguments)[0] for micro in (3, 8))
    np.testing.assert_allclose(first[1], other[1], rtol=1e-5, atol=1e-7)
    assert first[3]["accuracy"] == other[3]["accuracy"]


def test_ids_are_those_of_the_batches() -> None:
    from trainer.stages.scoring import EMPTY, held_out_ids

    for ranks in (1, 2, 3):
        found = [list(held_out_ids(10, micro=2, rank=rank, ranks=ranks, max_samples=7)) for rank in range(ranks)]
        assert len({len(each) for each in found}) == 1
        flat = np.concatenate([np.concatenate(each) for each in found])
        # spread evenly, each once
        assert sorted(flat[flat != EMPTY].tolist()) == [0, 1, 2, 4, 5, 7, 8]
