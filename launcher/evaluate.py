"""`trimtab evaluate`: the verb, and the process that it starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    models: Annotated[
        list[Path], typer.Argument(metavar="RUN_OR_MODEL...", help="Directories of runs, or of transformers models.")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Of two or more: differences, intervals and tests, and prediction flips.")
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A run's YAML (its held-out data), csv, tsv, jsonl or parquet."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the text. Default: text.")] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of what is true: class, number, tags, answers, text.")
    ] = None,
    second: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of a second text, or of the question.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(metavar="NAME", help="A checkpoint of the run. Default: the best, else the newest.")
    ] = None,
    noise: Annotated[
        str | None, typer.Option(metavar="NAME=RATE,...", help="Also with noise: typos=0.05,delete=0.1,swap=0.05.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of resamples and noise. Default: 0.")] = None,
    resamples: Annotated[int | None, typer.Option(min=1, metavar="N", help="For intervals. Default: 1000.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many texts, taken evenly. Default: all.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Texts at a time. Default: the run's batch.micro, else 16.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=8, metavar="N", help="Tokens of a text. Default: what the model takes.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Tokens that are written at most. Default: 64.")
    ] = None,
    errors: Annotated[int | None, typer.Option(min=0, metavar="N", help="Worst errors to show. Default: 5.")] = None,
    look: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Look inside: tokens that matter and attention, of the worst errors."),
    ] = None,
    sentence: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Also look into this text; may be given again.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write all of it there.")] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASKS", help="Also run these tasks of lm-eval, if installed.")
    ] = None,
) -> None:
    """Scores of a run or of any model, with intervals, worst errors, and how they hold under noise."""
    from launcher import local

    given: dict[str, str | int | Path | None] = {"text": text, "label": label, "second": second, "data": data}
    given |= {"checkpoint": checkpoint, "noise": noise, "seed": seed, "resamples": resamples, "samples": samples}
    given |= {"batch": batch, "length": length, "errors": errors, "json": json, "lm-eval": lm_eval, "look": look}
    given |= {"tokens": tokens}
    argv = [sys.executable, "-m", "trainer.evaluate", *map(str, models), *(["--compare"] if compare else [])]
    argv += [f"--{name}={value}" for name, value in given.items() if value is not None]
    argv += [f"--sentence={text}" for text in sentence or []]
    raise typer.Exit(local.supervise(argv, os.environ, stopping="stopping the evaluation").exit_code)
