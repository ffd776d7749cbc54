"""Whose knowledge can be kept, and where the teacher is that predicts it."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.schema import RunConfig
from trainer.config.teaching import distill_of, writing
from trainer.errors import ConfigError

SERVER = {"url": "http://localhost/v1", "model": "big", "top": 20}


def config_with(distill: dict[str, Any] | None, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "small",
            "data": {"sources": ({"stdlib": True},)},
            "model": {"config": {"model_type": "llama"}},
            "batch": {"samples": 8, "micro": 2},
            "optim": {"lr": 1e-3},
            "schedule": {"duration": 10},
            "distill": distill,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("teacher", "sharded", "place"),
    [
        ({"place": "cache", "pretrained": "x"}, False, "replica"),
        ({"place": "cache", "pretrained": "x", "server": SERVER}, False, "replica"),
        ({"place": "cache", "server": SERVER}, False, "server"),
        ({"place": "server", "server": SERVER}, False, "server"),
        ({"place": "zero3", "pretrained": "x"}, False, "zero3"),
        ({"place": "replica", "pretrained": "x"}, True, "zero3"),
        ({"place": "cache", "pretrained": "x"}, True, "zero3"),
    ],
)
def test_who_predicts(teacher: dict[str, Any], sharded: bool, place: str) -> None:
    config = config_with({"teacher": teacher, "cache": {"top": 20}, "hidden": {}, "relations": {}})
    distill = distill_of(writing(config, sharded=sharded))
    assert distill.teacher.place == place
    assert distill.teacher.pretrained == teacher.get("pretrained")
    assert distill.hidden is None
    assert distill.relations is None
    assert distill.cache == distill_of(config).cache


REFUSED: dict[str, tuple[dict[str, Any] | None, dict[str, Any], str]] = {
    "no teacher": (None, {}, "distill: is not given"),
    "masked": ({"teacher": {"pretrained": "x"}}, {"objective": {"kind": "masked"}}, "at every visit others: no cache"),
    "other tokenizer": ({"teacher": {"pretrained": "x"}, "vocabulary": "uld"}, {}, "reads other tokens"),
    "nobody": ({"teacher": {"place": "cache"}}, {}, "distill.teacher.pretrained: is not given: who is to teach?"),
    "nowhere": ({"teacher": {"place": "server"}}, {}, "distill.teacher.server: is not given"),
    "draws of a server": (
        {"teacher": {"place": "server", "server": SERVER}, "cache": {"targets": "sampled"}},
        {},
        "distill.cache.targets: a server tells its most probable tokens",
    ),
    "more than a server tells": (
        {"teacher": {"place": "server", "server": SERVER}, "cache": {"top": 21}},
        {},
        "distill.cache.top: 21 tokens are to be kept, and distill.teacher.server.top asks for fewer (20)",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_kept(which: str) -> None:
    distill, changes, text = REFUSED[which]
    with pytest.raises(ConfigError) as refused:
        writing(config_with(distill, **changes), sharded=False)
    assert text in str(refused.value)
