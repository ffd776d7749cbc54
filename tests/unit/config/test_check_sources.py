"""What sources say of tasks: each contradiction is one sentence at its path."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.check import check_config
from trainer.config.check_sources import problems, without_effect
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError

TASKS = (
    {"name": "films", "kind": "classification"},
    {"name": "tags", "kind": "multi_label"},
    {"name": "stars", "kind": "regression"},
)
SEVERAL = {"kind": "several", "tasks": TASKS}
FILMS = {"files": ("films.jsonl",), "label": "kind", "task": "films"}
TAGS = {"files": ("tags.jsonl",), "label": "tags", "task": "tags"}
STARS = {"files": ("stars.jsonl",), "label": "stars", "pair": "other", "task": "stars"}
PATH = "data.sources.1"


def config_of(sources: tuple[dict[str, Any], ...], objective: dict[str, Any] | None = None) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": {"sources": sources},
            "model": {"pretrained": "/models/encoder"},
            "objective": SEVERAL if objective is None else objective,
            "batch": {"samples": 8, "micro": 2},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": 8},
        }
    )


def changed(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (source | changes).items() if value is not None}


def test_tasks_of_every_kind_are_allowed() -> None:
    config = config_of((FILMS, TAGS, STARS, changed(FILMS, label=None, label_from_folder=True, use="train")))
    assert [*problems(config)] == []
    assert [*without_effect(config)] == []
    assert check_config(config) == []


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no task": (
        changed(TAGS, task=None),
        f"{PATH}.task",
        "is missing; give one of objective.tasks: films, tags, stars",
    ),
    "an unknown task": (
        changed(TAGS, task="tag"),
        f"{PATH}.task",
        "is 'tag'; give one of objective.tasks: films, tags, stars",
    ),
    "no classes": (
        changed(TAGS, label=None),
        f"{PATH}.label",
        "is needed: name the column of the classes (objective.kind is multi_label)",
    ),
    "no class": (
        changed(FILMS, label=None),
        f"{PATH}.label",
        "is needed: name the column of the class (objective.kind is classification)",
    ),
    "no number": (
        changed(STARS, label=None),
        f"{PATH}.label",
        "is needed: name the column of the number (objective.kind is regression)",
    ),
    "files without classes": (
        {"stdlib": True, "task": "films"},
        f"{PATH}.label",
        "the standard library's files have no classes; use other sources, or another objective.kind",
    ),
    "two kinds of label": (
        changed(FILMS, label_from_folder=True),
        PATH,
        "has `label` and `label_from_folder`; give one of them",
    ),
}


@pytest.mark.parametrize(("source", "path", "sentence"), WRONG.values(), ids=WRONG)
def test_a_source_says_what_its_task_needs(source: dict[str, Any], path: str, sentence: str) -> None:
    config = config_of((FILMS, source, TAGS, STARS))
    assert [*problems(config)] == [(path, sentence)]
    with pytest.raises(ConfigError) as refused:
        check_config(config)
    assert refused.value.problems == [(path, sentence)]


def test_several_without_tasks_is_said_at_both_places() -> None:
    with pytest.raises(ConfigError) as refused:
        check_config(config_of((changed(FILMS, task=None),), {"kind": "several"}))
    assert dict(refused.value.problems) == {
        "data.sources.0.task": "is missing; give one of objective.tasks: none are named",
        "objective.tasks": "names fewer than two tasks; name each with its kind, or set that objective.kind",
    }


IDLE: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "a task of one kind": (
        {"kind": "classification"}, FILMS, f"{PATH}.task", "has no effect: objective.kind is classification",
    ),
    "folders of no classes": (
        SEVERAL, changed(TAGS, label_from_folder=True), f"{PATH}.label_from_folder",
        "has no effect: objective.kind is multi_label",
    ),
    "classes of a number": (
        SEVERAL, changed(STARS, classes=("1", "2")), f"{PATH}.classes", "has no effect: objective.kind is regression",
    ),
    "a question": (
        SEVERAL, changed(TAGS, prompt="q"), f"{PATH}.prompt", "has no effect: objective.kind is multi_label",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("objective", "source", "path", "sentence"), IDLE.values(), ids=IDLE)
def test_options_that_a_task_does_not_read_are_told(
    objective: dict[str, Any], source: dict[str, Any], path: str, sentence: str
) -> None:
    first = FILMS if objective is SEVERAL else changed(FILMS, task=None)
    config = config_of((first, source, *((TAGS, STARS) if objective is SEVERAL else ())), objective)
    assert (path, sentence) in [*without_effect(config)]
    assert f"{path}: {sentence}" in check_config(config)
