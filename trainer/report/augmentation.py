"""What augmentation does to the texts of a run, by example: `augmentation.json`, and `augmentation.md` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from trainer.report.template import cell

_MAX_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Example:
    """One text, before and after."""

    sample: int
    before: str
    after: str


def to_json(said: str, lexicon: str | None, examples: Mapping[str, Sequence[Example]]) -> dict[str, object]:
    """What `augmentation.json` holds.

    Args:
        said: which changes are on, in one sentence.
        lexicon: digest of its files; None: there is none.
        examples: by kind of change.
    """
    return {
        "said": said,
        "lexicon": lexicon,
        "examples": {kind: [asdict(one) for one in found] for kind, found in examples.items()},
    }


def page(said: str, examples: Mapping[str, Sequence[Example]]) -> str:
    """The page, in Markdown."""
    lines = ["# Augmented texts", "", f"{cell(said)}.", ""]
    lines += ["Each kind of change by itself, at its rate, as training samples see it at one visit.", ""]
    for kind, found in examples.items():
        lines += [f"## {kind}", ""]
        if not found:
            lines += ["(none of the texts looked at was changed)", ""]
            continue
        lines += ["| sample | before | after |", "| --- | --- | --- |"]
        lines += [f"| {one.sample} | {_short(one.before)} | {_short(one.after)} |" for one in found]
        lines.append("")
    return "\n".join(lines)


def _short(text: str) -> str:
    return cell(text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…")
