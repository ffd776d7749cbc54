"""Augmentation in a run: opened, said once, shown by example in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.config.files import RunFiles
from trainer.config.finetune import AugmentConfig
from trainer.config.schema import RunConfig
from trainer.data.augment import Augmentation
from trainer.data.prepared import Prepared
from trainer.data.samples import Samples
from trainer.errors import DataError
from trainer.report.augmentation import Example, page, to_json
from trainer.stages.prepare import write_whole

NOTE, PAGE = "augmentation.json", "augmentation.md"
"""In the run directory."""

_KINDS = ("delete", "swap", "mask", "typos", "synonyms")
_OF = {"typos": "of the characters", "mask": "of the tokens", "synonyms": "of the words that the lexicon knows"}
_NUM_EXAMPLES, _NUM_LOOKED_AT = 5, 64

Say = Callable[[Literal["info"], str], None]


def open_augmentation(
    files: RunFiles, config: RunConfig, prepared: Prepared, samples: Samples, *, is_first: bool, say: Say
) -> Augmentation | None:
    """What changes the training samples of a run; None: nothing does.

    Args:
        samples: of the training split.
        is_first: whether this rank writes the examples.

    Raises:
        DataError: the lexicon cannot be used, or is not the one that the run began with.
    """
    options = config.data.augment
    if options is None:
        return None
    augmentation = Augmentation.open(options, prepared, config.seed)
    digest = augmentation.lexicon.digest if augmentation.lexicon else None
    _check_lexicon(files.root / NOTE, options, digest, config.data.accept_changed)
    said = sentence(options, augmentation)
    say("info", said)
    if is_first:
        found = {kind: [*examples(options, kind, prepared, samples, config.seed)] for kind in _on(options)}
        write_whole(files.root / NOTE, json.dumps(to_json(said, digest, found), indent=1, ensure_ascii=False))
        write_whole(files.root / PAGE, page(said, found))
    return augmentation


def sentence(options: AugmentConfig, augmentation: Augmentation) -> str:
    """Which changes are on."""
    changes = ", ".join(f"{kind} {getattr(options, kind):.3g} {_OF.get(kind, 'of the words')}" for kind in _on(options))
    lexicon = augmentation.lexicon
    known = f" (lexicon of {len(lexicon)} words, {lexicon.digest})" if lexicon else ""
    return f"augmentation of {options.fraction:.0%} of the training samples: {changes}{known}"


def examples(options: AugmentConfig, kind: str, prepared: Prepared, samples: Samples, seed: int) -> Iterator[Example]:
    """Texts from all over the split that one kind of change, by itself, has changed."""
    off = {name: 0.0 for name in _KINDS if name != kind}
    alone = Augmentation.open(options.model_copy(update={**off, "fraction": 1.0}), prepared, seed)
    count = min(len(samples), _NUM_LOOKED_AT)
    ids = np.arange(count) * len(samples) // count
    before = samples.fetch(ids)
    after = alone(before, ids, np.zeros(count, dtype=np.int64))
    found = 0
    for row, sample in enumerate(ids.tolist()):
        if found < _NUM_EXAMPLES and not np.array_equal(before["input_ids"][row], after["input_ids"][row]):
            found += 1
            yield Example(sample, alone.text_of(before, row), alone.text_of(after, row))


def _on(options: AugmentConfig) -> list[str]:
    return [kind for kind in _KINDS if getattr(options, kind)]


def _check_lexicon(note: Path, options: AugmentConfig, digest: str | None, accept_changed: bool) -> None:
    try:
        before = json.loads(note.read_text(encoding="utf-8"))["lexicon"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if before is not None and digest != before and not accept_changed:
        raise DataError(
            f"data.augment.lexicon: {options.lexicon} is not what {note.parent} began with; restore it, or set "
            "data.accept_changed=true"
        )
