"""Contradictions in augmentation and early stopping."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from trainer.config.check_finetune import problems, without_effect
from trainer.config.objective import Kind
from trainer.config.schema import RunConfig
from trainer.config.scores import SCORES, names_of, smaller_is_better


def config_of(**changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "small",
        "data": {"sources": ({"files": ("rows.jsonl",), "label": "label"},), "held_out": 0.1},
        "model": {"config": {"model_type": "bert"}},
        "objective": {"kind": "classification"},
        "batch": {"samples": 8, "micro": 2},
        "optim": {"lr": 1e-3},
        "schedule": {"duration": 8},
    }
    for name, value in changes.items():
        base[name] = {**base.get(name, {}), **value}
    return RunConfig.model_validate(base)


def test_every_kind_has_its_scores() -> None:
    assert set(SCORES) == set(get_args(Kind))


def test_errors_are_better_the_smaller_they_are() -> None:
    assert smaller_is_better("loss")
    assert smaller_is_better("films/log_loss")
    assert not smaller_is_better("films/f1_macro")


def several(*names: str) -> dict[str, Any]:
    """Tasks, each with a source of its own."""
    sources = tuple({"name": name, "files": (f"{name}.jsonl",), "label": "label", "task": name} for name in names)
    tasks = tuple(
        {"name": name, "kind": kind} for name, kind in zip(names, ("classification", "regression"), strict=True)
    )
    return {"data": {"sources": sources}, "objective": {"kind": "several", "tasks": tasks}}


@pytest.mark.parametrize("kind", SCORES)
def test_names_are_those_that_evaluations_give(kind: Any) -> None:
    base = several("films", "stars") if kind == "several" else {"objective": {"kind": kind}}
    names = names_of(config_of(**base).objective)
    assert kind != "several" or {"films/accuracy", "stars/pearson"} < set(names)
    for name in names:
        config = config_of(**base, evaluation={"best": name, "patience": 3})
        assert [*problems(config)] == []


def several_with(tasks: tuple[dict[str, Any], ...] | None = None, **data: Any) -> dict[str, Any]:
    """Two tasks with a source each, and what is wrong with them."""
    base = several("films", "stars")
    if tasks is not None:
        base["objective"]["tasks"] = tasks
    return {**base, "data": {**base["data"], **data}}


FILMS, STARS = {"name": "films", "kind": "classification"}, {"name": "stars", "kind": "regression"}
LEARNED, KEPT_BACK = ({"files": ("a.jsonl",), "label": "label", "use": use} for use in ("train", "held_out"))
WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such score": (
        {"evaluation": {"best": "f1-macro"}},
        "evaluation.best",
        "'f1-macro', which objective.kind classification does not have.*did you mean `f1_macro`",
    ),
    "of another kind": (
        {"evaluation": {"best": "bleu"}},
        "evaluation.best",
        "'bleu', which objective.kind classification does not have: loss, accuracy",
    ),
    "nothing held out": (
        {"evaluation": {"best": "loss"}, "data": {"held_out": 0.0}},
        "evaluation.best",
        "no held-out text",
    ),
    "no evaluations": (
        {"evaluation": {"best": "loss", "every": None, "patience": 1}},
        "evaluation.patience",
        "evaluation.every is null",
    ),
    "packed": (
        {"data": {"augment": {"delete": 0.1}}, "objective": {"kind": "causal"}},
        "data.augment",
        "objective.kind is causal",
    ),
    "words with labels": (
        {"data": {"augment": {"mask": 0.1}}, "objective": {"kind": "token_classification"}},
        "data.augment",
        "objective.kind is token_classification",
    ),
    "a cache": (
        {"data": {"augment": {"mask": 0.1}}, "distill": {"teacher": {"pretrained": "x", "place": "cache"}}},
        "data.augment",
        "which a cache cannot hold",
    ),
    "words mixed": (
        {"objective": {"kind": "token_classification", "mixup": 0.2}},
        "objective.mixup",
        "objective.kind is token_classification",
    ),
    "mixed twice": ({"objective": {"mixup": 0.2, "r_drop": 1.0}}, "objective.mixup", "r_drop"),
    "one text mixed": ({"objective": {"mixup": 0.2}, "batch": {"samples": 1, "micro": 1}}, "objective.mixup", "is 1"),
    "a mean weighed": (
        {"objective": {"adversarial": {"kind": "freelb", "weight": 0.5}}},
        "objective.adversarial.weight",
        "mean of its steps",
    ),
    "smoothed numbers": (
        {"objective": {"kind": "regression", "label_smoothing": 0.1}},
        "objective.label_smoothing",
        "has no meaning where objective.kind is regression",
    ),
    "windows of answers": (
        {"objective": {"kind": "seq2seq"}, "data": {"too_long": "window"}},
        "data.too_long",
        "a text and its answer",
    ),
    "numbers balanced": (
        {"objective": {"kind": "regression"}, "data": {"balance": "classes"}},
        "data.balance",
        "objective.kind is regression",
    ),
    "adapters of nothing": (
        {"model": {"config": {"model_type": "bert"}, "lora": {}}},
        "model.lora",
        "set model.pretrained",
    ),
    "tasks of one kind": (
        {"objective": {"tasks": (FILMS, STARS)}},
        "objective.tasks",
        "^has no effect: objective.kind is classification; set it to several$",
    ),
    "one task": (
        several_with((FILMS,), sources=(LEARNED | {"task": "films"},)),
        "objective.tasks",
        "^names fewer than two tasks; name each with its kind, or set that objective.kind$",
    ),
    "a task twice": (
        several_with((FILMS, STARS, FILMS)),
        "objective.tasks.2.name",
        "^is 'films' a second time; give each its own name$",
    ),
    "a task without a source": (
        several_with((FILMS, STARS, {"name": "tags", "kind": "multi_label"})),
        "objective.tasks.2",
        "^no source is to be learned from: give one `task: tags`$",
    ),
    "a task that is only held out": (
        several_with(sources=(LEARNED | {"task": "films"}, KEPT_BACK | {"task": "stars"})),
        "objective.tasks.1",
        "^no source is to be learned from: give one `task: stars`$",
    ),
    "a tokenizer of each task": (
        several_with(tokenizer={"path": "/words", "keep": "used"}),
        "data.tokenizer",
        "^the tasks share one tokenizer: name that of a model, and keep all of it$",
    ),
    "a tokenizer that is trained": (
        several_with(tokenizer={"train": {"vocabulary": 300}}),
        "data.tokenizer",
        "^the tasks share one tokenizer: name that of a model, and keep all of it$",
    ),
    "a score of no task": (
        several_with() | {"evaluation": {"best": "film/f1_macro"}},
        "evaluation.best",
        "'film/f1_macro', which objective.kind several does not have: loss, films/accuracy.*`films/f1_macro`",
    ),
    "a score without its task": (
        several_with() | {"evaluation": {"best": "accuracy"}},
        "evaluation.best",
        "'accuracy', which objective.kind several does not have",
    ),
    "several agree": (
        {**several_with(), "objective": {**several_with()["objective"], "r_drop": 1.0}},
        "objective.r_drop",
        "has no meaning where objective.kind is several",
    ),
    "several weighed by class": (
        {**several_with(), "objective": {**several_with()["objective"], "class_weights": "balanced"}},
        "objective.class_weights",
        "has no meaning where objective.kind is several",
    ),
    "several balanced": (several_with(balance="classes"), "data.balance", "objective.kind is several"),
    "nothing changed": ({"data": {"augment": {}}}, "data.augment", "changes nothing"),
    "all swapped": ({"data": {"augment": {"swap": 0.6}}}, "data.augment.swap", "at most 0.5"),
    "no lexicon": ({"data": {"augment": {"synonyms": 0.1}}}, "data.augment.lexicon", "is missing"),
    "lexicon gone": (
        {"data": {"augment": {"synonyms": 0.1, "lexicon": "/no/such"}}},
        "data.augment.lexicon",
        "/no/such does not exist",
    ),
}


@pytest.mark.parametrize(("changes", "path", "text"), WRONG.values(), ids=WRONG)
def test_contradictions_are_refused(changes: dict[str, Any], path: str, text: str) -> None:
    import re

    ((found, sentence),) = problems(config_of(**changes))
    assert found == path
    assert re.search(text, sentence)


def test_what_fits_is_allowed(tmp_path: Path) -> None:
    lexicon = tmp_path / "words.txt"
    lexicon.touch()
    augment = {"synonyms": 0.1, "lexicon": str(lexicon), "swap": 0.5}
    for kind in ("classification", "multi_label", "regression"):
        assert [*problems(config_of(objective={"kind": kind}, data={"augment": augment}))] == []
    assert [*problems(config_of())] == []
    assert [*problems(config_of(**several_with(too_long="window", augment={"mask": 0.1})))] == []
    idle = {path for path, is_idle, _ in without_effect(config_of(**several_with())) if is_idle}
    assert "data.temperature" not in idle
    idle = {path for path, is_idle, _ in without_effect(config_of(data={"augment": {"mask": 0.1}})) if is_idle}
    assert idle == {"evaluation.patience", "data.augment.lexicon", "data.stride", "data.temperature"}
