"""TensorBoard as a view of the ledger. `python -m trainer.telemetry.tensorboard RUN` builds its files anew.

`RUN/tensorboard/main` shows what stands; attempts whose update was not applied go to `RUN/tensorboard/skipped` under
the same tags, so that a NaN is seen as a NaN beside the curve that it did not enter. TensorBoard sorts groups and tags
by name: the numbers put what matters first.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.errors import TrimtabError
from trainer.records import FloatArray
from trainer.telemetry.events import EventFile, layout_of
from trainer.telemetry.ledger import FILE_NAME, Record, notice, surviving
from trainer.telemetry.names import group_by_layer, group_by_part
from trainer.telemetry.writer import say

FOLDER = "tensorboard"
COMMAND = "tensorboard --logdir {folder} --samples_per_plugin scalars=100000"
"""What to type to see it. Without the option TensorBoard keeps 1000 points of a curve and drops the spikes between."""

LOSS = "1 stability/loss"
GRADIENT_NORM = "1 stability/gradient norm"
CLIP = "1 stability/gradient norm: limit"
NONFINITE = "1 stability/non-finite gradient elements"
SKIPPED = "1 stability/skipped attempts"
CLIPPED = "1 stability/updates clipped"
LOSS_SCALE = "1 stability/fp16 loss scale"
HELD_OUT_LOSS = "2 held-out/loss"
HELD_OUT_PERPLEXITY = "2 held-out/perplexity"
BY_LAYER = "3 gradients by layer"
BY_PART = "3 gradients by part"
WEIGHT_NORMS = "4 weight norms"
UPDATE_RATIOS = "4 update-to-weight ratios"
TOKENS_PER_SECOND = "5 throughput/tokens per second"
FLOP_UTILISATION = "5 throughput/FLOP utilisation"
SECONDS = "5 throughput/seconds of a step"
SECONDS_DATA = "5 throughput/seconds of a step: waiting for data"
MEMORY = "5 throughput/memory in GiB"
SECONDS_EVALUATION = "5 throughput/seconds of an evaluation"
SECONDS_CHECKPOINT = "5 throughput/seconds of a checkpoint"
LEARNING_RATE = "6 schedule/learning rate"
EPOCH = "6 schedule/epoch"
BATCH = "6 schedule/batch"


def _exactly(*tags: str) -> list[str]:
    return [f"{re.escape(tag)}$" for tag in tags]


def _all_of(group: str) -> list[str]:
    return [f"{re.escape(group)}/"]


_LAYOUT = {
    "stability": {
        "loss and held-out loss": _exactly(LOSS, HELD_OUT_LOSS),
        "gradient norm and its limit": _exactly(GRADIENT_NORM, CLIP),
        "gradient norm of each layer": _all_of(BY_LAYER),
        "gradient norm of each part": _all_of(BY_PART),
        "update-to-weight ratio of each layer": _all_of(UPDATE_RATIOS),
        "weight norm of each layer": _all_of(WEIGHT_NORMS),
    },
    "throughput": {
        "tokens per second": _exactly(TOKENS_PER_SECOND),
        "seconds of a step, and of it waiting for data": _exactly(SECONDS, SECONDS_DATA),
        "learning rate": _exactly(LEARNING_RATE),
    },
}
_GIB = 1 << 30


class _Groups:
    """Parameters by label, and the norm of each group from the norms of its members."""

    def __init__(self, members: Mapping[str, Sequence[int]]):
        self._labels = list(members)
        self._group_of = np.zeros(sum(map(len, members.values())), dtype=np.intp)
        for group, indices in enumerate(members.values()):
            self._group_of[list(indices)] = group

    def norms(self, prefix: str, norms: FloatArray) -> dict[str, float]:
        """L2 norm of each group, by tag; `norms` is [parameters]. A NaN or infinite member shows in its group only."""
        with np.errstate(over="ignore"):
            squares = np.bincount(self._group_of, weights=np.square(norms), minlength=len(self._labels))
        return {
            f"{prefix}/{label}": value for label, value in zip(self._labels, np.sqrt(squares).tolist(), strict=True)
        }


class TensorBoardView:
    """Writes event files into `folder` from ledger records, live or afterwards."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._main = EventFile(folder / "main")
        self._skipped: EventFile | None = None
        self._layers = _Groups({})
        self._parts = _Groups({})
        self._step = 0
        self._messages: list[str] = []
        self._step_of_messages = -1

    def update(self, record: Record) -> None:
        match record["kind"]:
            case "start":
                self._start(record)
            case "attempt":
                self._attempt(record)
            case "weights":
                self._weights(record)
            case "evaluation":
                self._evaluation(record)
            case "checkpoint":
                self._scalars({SECONDS_CHECKPOINT: record["seconds"]}, record)
            case _:
                pass  # shown by its notice, or a kind of a later version
        heard = notice(record)
        if heard:
            self._message(*heard, record["time"])

    def flush(self) -> None:
        self._main.flush()
        if self._skipped:
            self._skipped.flush()

    def close(self) -> None:
        self._main.close()
        if self._skipped:
            self._skipped.close()

    def _start(self, record: Record) -> None:
        names = record["parameter_names"]
        self._layers, self._parts = _Groups(group_by_layer(names)), _Groups(group_by_part(names))
        self._step = record["resumed_step"]
        if record["start"] > 1:
            self._main.resume(self._step, record["time"])
            if (self._folder / "skipped").exists():
                self._skipped = self._skipped or EventFile(self._folder / "skipped")
                self._skipped.resume(self._step, record["time"])
        self._main.layout(layout_of(_LAYOUT), record["time"])
        hidden = {"kind", "time", "parameter_names", "config"}
        facts = {key: value for key, value in record.items() if key not in hidden}
        self._main.text("1 run", _table(facts), self._step, record["time"])
        self._main.text("3 config", f"```yaml\n{record['config']}\n```", self._step, record["time"])

    def _attempt(self, record: Record) -> None:
        self._step = record["step"]
        values = {LOSS: record["loss"], GRADIENT_NORM: record["grad_norm"], NONFINITE: record["nonfinite"]}
        values |= {f"{LOSS}: {name}": value for name, value in record["parts"].items()}
        if "parameter_norms" in record:
            norms = np.asarray(record["parameter_norms"], dtype=np.float64)
            values |= self._layers.norms(BY_LAYER, norms) | self._parts.norms(BY_PART, norms)
        if not record["applied"]:
            self._skipped = self._skipped or EventFile(self._folder / "skipped")
            self._skipped.scalars(values, record["step"], record["time"])
            # the step that comes to stand at the same place shows the same count
            self._scalars({SKIPPED: record["num_skipped"]}, record)
            return
        if record["clip"]:
            values |= {CLIP: record["clip"], CLIPPED: record["num_clipped"]}
        if record["loss_scale"] != 1:
            values[LOSS_SCALE] = record["loss_scale"]
        if record["flop_utilisation"] is not None:
            values[FLOP_UTILISATION] = record["flop_utilisation"]
        self._scalars(
            values
            | {
                SKIPPED: record["num_skipped"],
                TOKENS_PER_SECOND: record["tokens_per_second"],
                SECONDS: record["seconds"],
                SECONDS_DATA: record["seconds_data"],
                MEMORY: record["memory_bytes"] / _GIB,
                LEARNING_RATE: record["lr"],
                EPOCH: record["epoch"],
                BATCH: record["batch"],
            },
            record,
        )

    def _weights(self, record: Record) -> None:
        norms = np.asarray(record["parameter_norms"], dtype=np.float64)
        changes = np.asarray(record["update_ratios"], dtype=np.float64) * norms
        weights = self._layers.norms(WEIGHT_NORMS, norms)
        updates = self._layers.norms(UPDATE_RATIOS, changes)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.array(list(updates.values())) / np.array(list(weights.values()))
        self._scalars(weights | dict(zip(updates, ratios.tolist(), strict=True)), record)

    def _evaluation(self, record: Record) -> None:
        loss = record["loss"]
        perplexity = math.inf if loss > 700 else math.exp(loss)
        values = {HELD_OUT_LOSS: loss, HELD_OUT_PERPLEXITY: perplexity, SECONDS_EVALUATION: record["seconds"]}
        self._scalars(values, record)

    def _message(self, level: str, text: str, time: float) -> None:
        """One card a step: of two values at one step TensorBoard shows only the later."""
        if self._step != self._step_of_messages:
            self._messages, self._step_of_messages = [], self._step
        self._messages.append(f"- **{level}** {text}")
        self._main.text("2 messages", "\n".join(self._messages), self._step, time)

    def _scalars(self, values: Mapping[str, float], record: Record) -> None:
        self._main.scalars(values, record["step"], record["time"])


def _table(facts: Mapping[str, object]) -> str:
    def cell(value: object) -> str:
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
        return text.replace("|", "\\|")

    rows = [f"| {key.replace('_', ' ')} | {cell(value)} |" for key, value in facts.items()]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def rebuild(run_dir: Path) -> Path:
    """Writes the event files of a run anew from its ledger, without what was superseded; returns their folder.

    For a run that is not running: a live one goes on writing into the files that this replaces.

    Raises:
        RunDirectoryError: the run has no ledger.
    """
    folder, fresh = run_dir / FOLDER, run_dir / f"{FOLDER}.new"
    records = surviving(run_dir / FILE_NAME)
    shutil.rmtree(fresh, ignore_errors=True)
    view = TensorBoardView(fresh)
    for record in records:
        view.update(record)
    view.close()
    for part in ("main", "skipped"):
        shutil.rmtree(folder / part, ignore_errors=True)
        if (fresh / part).exists():
            folder.mkdir(exist_ok=True)
            (fresh / part).rename(folder / part)
    fresh.rmdir()
    return folder


def main(arguments: Sequence[str]) -> int:
    """The command line: `python -m trainer.telemetry.tensorboard RUN…`; returns the exit code."""
    if not arguments:
        say("usage: python -m trainer.telemetry.tensorboard RUN…")
        return 2
    try:
        for run in arguments:
            say(COMMAND.format(folder=shlex.quote(str(rebuild(Path(run))))))
    except TrimtabError as error:
        say(str(error))
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
