"""Contradictions within a fine-tuning run: augmented texts, early stopping. The rules of `trainer.config.check`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from trainer.config.objective import EACH_ALONE, TEXTS, meaningless
from trainer.config.schema import RunConfig
from trainer.config.scores import names_of
from trainer.config.section import is_set

Problem = tuple[str, str]
Rule = tuple[str, bool, str]
"""(option, whether it is idle, why)"""

_CHANGES = ("delete", "swap", "mask", "typos", "synonyms")
_FEWEST_TASKS = 2
_MOST_SWAPPED = 0.5
"""A word that changes places with the next one takes that one's turn."""


def problems(config: RunConfig) -> Iterator[Problem]:
    """What contradicts what."""
    yield from _tasks(config)
    yield from _best(config)
    yield from _augment(config)
    yield from _moved(config)
    yield from _samples(config)
    yield from _trained(config)


def _tasks(config: RunConfig) -> Iterator[Problem]:
    tasks, kind = config.objective.tasks, config.objective.kind
    if kind != "several":
        if tasks:
            yield "objective.tasks", f"has no effect: objective.kind is {kind}; set it to several"
        return
    if len(tasks) < _FEWEST_TASKS:
        yield "objective.tasks", "names fewer than two tasks; name each with its kind, or set that objective.kind"
    names = [task.name for task in tasks]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield f"objective.tasks.{index}.name", f"is {name!r} a second time; give each its own name"
        if not any(source.use != "held_out" for source in config.data.sources if source.task == name):
            yield f"objective.tasks.{index}", f"no source is to be learned from: give one `task: {name}`"
    if config.data.tokenizer.keep != "all" or config.data.tokenizer.train is not None:
        text = "the tasks share one tokenizer: name that of a model, and keep all of it"
        yield "data.tokenizer", text


def _best(config: RunConfig) -> Iterator[Problem]:
    evaluation, kind = config.evaluation, config.objective.kind
    if evaluation.best is None:
        return
    names = names_of(config.objective)
    if evaluation.best not in names:
        near = difflib.get_close_matches(evaluation.best, names, 1)
        meant = f"; did you mean `{near[0]}`?" if near else ""
        text = f"is {evaluation.best!r}, which objective.kind {kind} does not have: {', '.join(names)}{meant}"
        yield "evaluation.best", text
    uses = {source.use for source in config.data.sources}
    if "held_out" not in uses and not ("both" in uses and config.data.held_out > 0):
        yield "evaluation.best", "compares evaluations, but there is no held-out text; raise data.held_out"
    if evaluation.patience is not None and evaluation.every is None:
        yield "evaluation.patience", "counts evaluations, but evaluation.every is null; set it"


def _augment(config: RunConfig) -> Iterator[Problem]:
    augment, kind, distill = config.data.augment, config.objective.kind, config.distill
    if augment is None:
        return
    if kind not in TEXTS:
        text = f"is for texts with one target each ({', '.join(TEXTS)}), but objective.kind is {kind}: "
        yield "data.augment", text + "there a changed text would have other targets"
    if distill is not None and distill.teacher.place == "cache":
        text = "gives other texts at every visit, which a cache cannot hold; set distill.teacher.place=replica"
        yield "data.augment", text
    if not any(getattr(augment, name) for name in _CHANGES):
        yield "data.augment", f"changes nothing: {', '.join(_CHANGES)} are 0; raise one of them, or leave it out"
    if augment.swap > _MOST_SWAPPED:
        text = (
            f"is {augment.swap:g}, but every swap takes two words: at most {_MOST_SWAPPED:g} can change with the next"
        )
        yield "data.augment.swap", text
    if augment.synonyms and augment.lexicon is None:
        yield "data.augment.lexicon", "is missing: `synonyms` takes words from it; name a file, or WordNet's folder"
    if augment.lexicon is not None and not Path(augment.lexicon).exists():
        yield "data.augment.lexicon", f"{augment.lexicon} does not exist; correct the path"


def _moved(config: RunConfig) -> Iterator[Problem]:
    objective, kind = config.objective, config.objective.kind
    if objective.mixup and kind not in TEXTS:
        text = f"mixes the targets of whole texts ({', '.join(TEXTS)}), but objective.kind is {kind}"
        yield "objective.mixup", text
    if objective.mixup and objective.r_drop:
        yield "objective.mixup", "does not go together with r_drop, which compares passes over one text; leave one out"
    if objective.mixup and config.batch.samples == 1:
        yield "objective.mixup", "needs two texts to mix, and batch.samples is 1"
    if (
        objective.adversarial is not None
        and objective.adversarial.kind == "freelb"
        and is_set(objective.adversarial, "weight")
    ):
        yield "objective.adversarial.weight", "has no place in freelb, which is the mean of its steps; leave it out"
    if config.distill is None:
        yield from meaningless(objective)


def _samples(config: RunConfig) -> Iterator[Problem]:
    data, kind = config.data, config.objective.kind
    pairs = any(source.pair is not None for source in data.sources)
    if data.too_long == "window" and (pairs or kind == "seq2seq"):
        what = "two texts together" if pairs else "a text and its answer"
        yield "data.too_long", f"window is for single texts, and a sample is {what}; use cut or leave_out"
    if data.balance == "classes" and kind != "classification":
        yield "data.balance", f"`classes` is for one class a text, but objective.kind is {kind}"


def _trained(config: RunConfig) -> Iterator[Problem]:
    if config.model.lora is not None and config.model.pretrained is None:
        yield "model.lora", "adapts a pretrained model: set model.pretrained, or leave it out"


def without_effect(config: RunConfig) -> list[Rule]:
    """Options that may be idle."""
    evaluation, augment = config.evaluation, config.data.augment
    alone = config.objective.kind in EACH_ALONE
    packed = f"texts are packed (objective.kind is {config.objective.kind})"
    rules: list[Rule] = [
        ("evaluation.patience", evaluation.best is None, "evaluation.best is null"),
        ("data.too_long", not alone, packed),
        ("data.temperature", config.objective.kind != "several", f"objective.kind is {config.objective.kind}"),
        ("data.stride", config.data.too_long != "window", f"data.too_long is {config.data.too_long}"),
    ]
    if augment is not None:
        rules.append(("data.augment.lexicon", not augment.synonyms, "data.augment.synonyms is 0"))
    return rules
