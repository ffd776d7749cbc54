"""Options of sources that contradict each other or the objective, and those without effect."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.objective import TEXTS
from trainer.config.schema import RunConfig, SourceConfig
from trainer.config.section import is_set

Problem = tuple[str, str]

_LABELLED = (*TEXTS, "token_classification")
_ASKED = ("question_answering", "seq2seq")
_USED_BY = {
    "label": _LABELLED,
    "label_from_folder": ("classification",),
    "pair": TEXTS,
    "messages": ("causal",),
    "prompt": ("causal", *_ASKED),
    "answer": ("causal", *_ASKED),
}
"""Kinds of objectives that read an option of a source."""
_LABELS = {
    "classification": "of the class",
    "multi_label": "of the classes",
    "regression": "of the number",
    "token_classification": "of the tags",
}


def problems(config: RunConfig) -> Iterator[Problem]:
    """Contradictions."""
    sources = config.data.sources
    for index, source in enumerate(sources):
        path = f"data.sources.{index}"
        kinds = [kind for kind in ("stdlib", "files", "hub") if getattr(source, kind)]
        if len(kinds) != 1:
            found = " and ".join(f"`{kind}`" for kind in kinds) or "none of them"
            yield path, f"must have exactly one of `stdlib`, `files` and `hub`, but has {found}"
        if source.column is not None and source.template is not None:
            yield path, "has `column` and `template`; give the one that makes the text"
        tasks = [task.name for task in config.objective.tasks]
        if config.objective.kind == "several" and source.task not in tasks:
            said = "is missing" if source.task is None else f"is {source.task!r}"
            yield f"{path}.task", f"{said}; give one of objective.tasks: {', '.join(tasks) or 'none are named'}"
            continue
        kind = _kind(config, source)
        yield from _labels(path, source, kind)
        yield from _answers(path, source, kind)
    named = [source.name for source in sources if source.name is not None]
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield "data.sources", f"two sources are named {name!r}; give each its own name"
    if all(source.use == "held_out" for source in sources):
        yield "data.sources", "none is trained on: `use` is held_out everywhere"
    asks = [source.messages is not None or source.prompt is not None for source in sources]
    if config.objective.kind == "causal" and any(asks) and not all(asks):
        text = "has neither `messages` nor `prompt`, which other sources have: put it into a run of its own"
        yield f"data.sources.{asks.index(False)}", text


def without_effect(config: RunConfig) -> Iterator[Problem]:
    """Options of sources that nothing reads."""
    for index, source in enumerate(config.data.sources):
        yield from _without_effect(f"data.sources.{index}", source, _kind(config, source))
        if config.objective.kind != "several" and source.task is not None:
            yield f"data.sources.{index}.task", f"has no effect: objective.kind is {config.objective.kind}"


def _kind(config: RunConfig, source: SourceConfig) -> str:
    """What the texts of a source are for."""
    kind = config.objective.kind
    return next((task.kind for task in config.objective.tasks if task.name == source.task and kind == "several"), kind)


def _labels(path: str, source: SourceConfig, kind: str) -> Iterator[Problem]:
    if kind not in _LABELLED:
        return
    in_folder = source.label_from_folder and kind == "classification"
    if source.stdlib:
        text = "the standard library's files have no classes; use other sources, or another objective.kind"
        yield f"{path}.label", text
    elif source.label is None and not in_folder:
        yield f"{path}.label", f"is needed: name the column {_LABELS[kind]} (objective.kind is {kind})"
    elif source.label is not None and in_folder:
        yield path, "has `label` and `label_from_folder`; give one of them"
    if in_folder and source.hub is not None:
        yield (
            f"{path}.label_from_folder",
            "is for `files`; name the column of a hub dataset in `label`",
        )


def _answers(path: str, source: SourceConfig, kind: str) -> Iterator[Problem]:
    if kind in _ASKED:
        for name in ("prompt", "answer"):
            if getattr(source, name) is None:
                yield f"{path}.{name}", f"is needed: name the column (objective.kind is {kind})"
    elif kind == "causal":
        if (source.prompt is None) != (source.answer is None):
            missing = "answer" if source.answer is None else "prompt"
            yield f"{path}.{missing}", "is needed: `prompt` and `answer` go together"
        if source.messages is not None and source.prompt is not None:
            yield path, "has `messages` and `prompt`; give the one that makes the conversation"
    asks = source.messages is not None or source.prompt is not None
    for name in ("column", "template"):
        if asks and kind in ("causal", "seq2seq") and getattr(source, name) is not None:
            yield f"{path}.{name}", "makes a text, and the text of this source is made of what is asked and answered"
    if kind in ("token_classification", "question_answering") and source.template is not None:
        yield f"{path}.template", f"moves the places that labels name; give `column` (objective.kind is {kind})"


def _without_effect(path: str, source: SourceConfig, kind: str) -> Iterator[Problem]:
    for name, kinds in _USED_BY.items():
        if kind not in kinds and is_set(source, name):
            yield f"{path}.{name}", f"has no effect: objective.kind is {kind}"
    if source.classes and source.label is None and not source.label_from_folder:
        yield f"{path}.classes", "has no effect: it belongs to `label`"
    elif source.classes and kind in ("regression", "token_classification"):
        yield f"{path}.classes", f"has no effect: objective.kind is {kind}"
    for name in ("split", "hub_config"):
        if source.hub is None and is_set(source, name):
            yield f"{path}.{name}", "has no effect: it belongs to `hub`"
    for name in ("column", "template"):
        if source.stdlib and is_set(source, name):
            yield f"{path}.{name}", "has no effect: the standard library's files are text, not records"
