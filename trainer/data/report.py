"""What preparing found, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def table(report: dict[str, Any]) -> Table:
    """`Prepared.report` as a table to print: a row a source, and under it a row for each repair and each rule.

    The names of a few of the removed documents are in `Prepared.manifest`; they would not fit beside the numbers.
    """
    from rich.table import Table
    from rich.text import Text

    before = f" of {report['vocabulary_before']:,}" if "vocabulary_before" in report else ""
    caption = f"vocabulary {report['vocabulary']:,}{before} · {_known(report)}"
    result = Table(box=None, caption=caption, caption_justify="left")
    result.add_column("source", no_wrap=True, min_width=34)
    for name in ("documents", "characters", "train\ntokens", "held-out\ntokens"):
        result.add_column(name, justify="right")
    for source in report["sources"]:
        train, held_out = source["train"], source["held_out"]
        # names come from file systems and hubs: never read as markup
        result.add_row(
            Text(source["name"], style="bold"),
            f"{source['documents']:,}",
            f"{source['characters']:,}",
            f"{train['tokens']:,}",
            f"{held_out['tokens']:,}",
        )
        for repair, count in source["repaired"].items():
            result.add_row(f"  {repair}", f"{count:,}")
        for rule, entry in source["removed"].items():
            result.add_row(f"  {rule}", f"−{entry['documents']:,}", f"−{entry['characters']:,}")
            for one, other in entry.get("pairs", ()):
                result.add_row(Text(f"    {one} = {other}", style="dim"))
        if train["unknown_tokens"] or held_out["unknown_tokens"]:
            unknown = (f"{split['unknown_tokens']:,}" for split in (train, held_out))
            result.add_row("  text that the vocabulary cannot express", "", "", *unknown)
        result.add_row("  kept", f"{train['documents'] + held_out['documents']:,}",
                       f"{train['characters'] + held_out['characters']:,}")  # fmt: skip
    if "classes" in report:
        _add_classes(result, report)
    return result


_LONG = {"cut": "cut", "window": "in windows", "leave_out": "left out"}
_SPLITS = ("train", "held_out")


def _add_classes(result: Table, report: dict[str, Any]) -> None:
    from rich.text import Text

    result.add_section()
    if report["classes"]:
        what = "words" if report.get("kind") == "token_classification" else "documents"
        result.add_row(Text("class", style="bold"), "", "", what, what)
        by_source = {split: [source[split]["classes"] for source in report["sources"]] for split in _SPLITS}
        counts = [[sum(numbers) for numbers in zip(*by_source[split], strict=True)] for split in _SPLITS]
        totals = [sum(of) for of in counts]
        if report.get("kind") == "multi_label":
            # a document may be of several
            totals = [sum(source[split]["documents"] for source in report["sources"]) for split in _SPLITS]
        for number, name in enumerate(report["classes"]):
            if report.get("kind") == "several":
                totals = _of_task(report, name.partition("/")[0])
            shares = (
                f"{of[number]:,} {of[number] / max(1, total):4.0%}" for of, total in zip(counts, totals, strict=True)
            )
            result.add_row(Text(f"  {name}"), "", "", *shares)
    if "cut" in report:
        long = f"  longer than {report['sequence_length']} tokens, {_LONG[report['too_long']]}"
        result.add_row(long, "", "", *_numbers(report["cut"]))
        result.add_row("  samples", "", "", *_numbers(report["samples"]))
    if "unreached" in report:
        result.add_row("  answers that no sample holds", "", "", *_numbers(report["unreached"]))


def _of_task(report: dict[str, Any], task: str) -> list[int]:
    """Documents of a task, by split."""
    own = [source for source in report["sources"] if source["task"] == task]
    return [sum(source[split]["documents"] for source in own) for split in _SPLITS]


def _numbers(by_split: dict[str, int]) -> list[str]:
    return [f"{by_split[split]:,}" for split in _SPLITS]


def _known(report: dict[str, Any]) -> str:
    has_held_out = any(source["held_out"]["documents"] for source in report["sources"])
    if "classes" not in report:
        entropy = report["unigram_entropy"]
        return f"unigram entropy {entropy:.3f} nats a token" if entropy is not None else "no held-out split"
    entropy = report["class_entropy"]
    known = [f"class entropy {entropy:.3f} nats a text"] if entropy is not None else []
    known += [] if has_held_out else ["no held-out split"]
    return " · ".join([*known, f"padding {report['padding']}"])
