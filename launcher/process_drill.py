"""Faults that kill, stop or starve processes: each in a run of its own, relaunched by what relaunches every run, and
compared with a clean one to the bit."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import start
from launcher.run_directory import write_atomically
from trainer.checkpoint.manifest import read_manifest
from trainer.config.files import RunFiles
from trainer.errors import CheckpointError, ExitCode, RunDirectoryError
from trainer.faults.catalogue import Exercise, save_every
from trainer.faults.process import STRUCK
from trainer.faults.sentence import OF_CHECKPOINT
from trainer.telemetry.ledger import Record, read_ledger

if TYPE_CHECKING:
    from rich.table import Table

    from launcher.plan import Plan
    from trainer.config.schema import RunConfig

FOLDER = "processes"
"""Of these runs, in the directory of a drill."""
OUTPUT = "output.txt"
"""What launcher and ranks of such a run said."""

MIN_HANG_SECONDS = 10.0
HANG_FACTOR = 3.0
"""A rank counts as hanging after so many times the longest wait of the clean run, starting included."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A run that was started as often as it needed to end."""

    root: Path
    outcomes: tuple[dict[str, Any], ...]
    """Of each command; one for all relaunches in between."""
    seconds: float

    @property
    def last(self) -> dict[str, Any]:
        return self.outcomes[-1]

    def records(self) -> list[Record]:
        with contextlib.suppress(RunDirectoryError):
            return list(read_ledger(RunFiles(self.root).ledger))
        return []

    def said(self) -> str:
        """All that ranks and launcher said, on the console and in the ledger."""
        texts = [str(record["text"]) for record in self.records() if record["kind"] == "message"]
        return "\n".join([(self.root / OUTPUT).read_text(encoding="utf-8", errors="replace"), *texts])

    def struck(self) -> dict[str, Any] | None:
        """The first fault that struck: `time`, `rank`, `step`, `fault`."""
        try:
            entry: dict[str, Any] = json.loads((self.root / STRUCK).read_text(encoding="utf-8").splitlines()[0])
        except (OSError, IndexError, ValueError):
            return None
        return entry

    def bits(self) -> dict[str, str]:
        """Hash of every file of tensors in the checkpoint that it ended with."""
        name = self.last.get("checkpoint")
        if not name:
            return {}
        try:
            manifest = read_manifest(self.root / name)
        except CheckpointError:
            return {}
        return {entry.name: entry.xxh3 for entry in manifest.files if entry.name.endswith(".safetensors")}


def process_config(config: RunConfig, steps: int, folder: Path) -> RunConfig:
    """`config`, which is a drill's, as a run in processes of its own: it saves every few steps.

    Args:
        folder: in which the runs of this kind lie.
    """
    every, checkpoint = save_every(steps), config.checkpoint
    changes = {
        "every": every,
        "keep": max(checkpoint.keep, 2),
        "keep_every": None,
        # the disk is full for two saves
        "max_failures": max(checkpoint.max_failures, 2),
        "memory_every": None if checkpoint.memory_every is None else max(1, every // 2),
    }
    return config.model_copy(update={"runs": str(folder), "checkpoint": checkpoint.model_copy(update=changes)})


def drill_processes(
    config: RunConfig, exercises: Sequence[Exercise], steps: int, root: Path, say: start.Say
) -> dict[str, Any]:
    """The clean run, and each exercise in a run of its own: what `drill.json` tells of them.

    Args:
        config: as :func:`process_config` gives it.
        root: directory of the drill.

    Raises:
        SystemExit: it ended early, and has said why.
    """
    folder = root / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    count = f"{len(exercises)} faults of the processes" if len(exercises) != 1 else "1 fault of the processes"
    say(f"{count}: {steps} steps once clean and once with each, in runs of their own; {folder}")
    clean, plan = _clean_run(config, folder, say)
    if clean.last["reason"] != "completed":
        say(f"the clean run {clean.last['reason']}: {clean.last['message']} ({clean.root / OUTPUT})")
        raise SystemExit(clean.last["exit_code"] or ExitCode.CRASHED)
    minutes = len(exercises) * 2 * clean.seconds / 60
    say(f"clean: {clean.seconds:.0f} s; each fault takes about twice that, all of them {max(1, round(minutes))} min")
    config = watched(config, clean)
    results = []
    for number, each in enumerate(exercises, 1):
        own = _with_fault(config, each)
        ran = _run(own, plan, clean.root, say, again=each.ends == "stopped")
        if ran.last["reason"] == "stopped" and (each.ends != "stopped" or ran.struck() is None):
            raise SystemExit(ExitCode.STOPPED)
        results.append(assess(each, ran, clean))
        say(f"{number}/{len(exercises)} {each.name}: {results[-1]['outcome']}, {ran.seconds:.0f} s")
    return {
        "before": 0,
        "steps": steps,
        "ranks": config.cluster.nodes * config.cluster.ranks_per_node,
        "stage": config.zero.stage,
        "clean": {"held_out_loss": clean.last["held_out_loss"], "seconds": clean.seconds, "alarms": []},
        "results": results,
    }


def _clean_run(config: RunConfig, folder: Path, say: start.Say) -> tuple[Ran, Plan]:
    config = config.model_copy(update={"name": "clean"})
    request = start.Request(config, folder / config.name, ())
    with start.entered(request, False, say) as lock:
        plan = start.make_ready(request, lock, say)
    return _run(config, plan, None, say), plan


def _with_fault(config: RunConfig, each: Exercise) -> RunConfig:
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in each.name)[:80]
    if each.fault.kinds & OF_CHECKPOINT:
        # a copy in memory would be used instead of the damaged files
        on_disk = config.checkpoint.model_copy(update={"memory_every": None})
        config = config.model_copy(update={"checkpoint": on_disk})
    return config.model_copy(update={"name": name, "faults": (str(each.fault),)})


def watched(config: RunConfig, clean: Ran) -> RunConfig:
    """`config` with a time after which a rank hangs that suits the clean run, so that nobody waits ten minutes."""
    supervision = config.supervision
    if supervision.hang_seconds is None:
        return config
    steps = [record["time"] for record in clean.records() if record["kind"] == "attempt"]
    longest = max((later - earlier for earlier, later in itertools.pairwise(steps)), default=0.0)
    outside = clean.seconds - (steps[-1] - steps[0] if steps else 0.0)
    seconds = max(MIN_HANG_SECONDS, HANG_FACTOR * max(longest, outside))
    update = {"hang_seconds": min(supervision.hang_seconds, float(math.ceil(seconds)))}
    return config.model_copy(update={"supervision": supervision.model_copy(update=update)})


def _run(config: RunConfig, plan: Plan, template: Path | None, say: start.Say, *, again: bool = False) -> Ran:
    """Run `config` to its end; where it was asked to stop and `again`, give the command once more.

    Args:
        template: a run whose data and launcher files are used; None: they are there.
    """
    root = Path(config.runs) / config.name
    request = start.Request(config, root, ())
    with start.entered(request, False, say) as lock:
        if template is not None:
            for source in (RunFiles(template).data, RunFiles(template).model):
                shutil.copy2(source, root / source.name)
        for name, text in start.generated_files(config, plan).items():
            write_atomically(root / name, text)
        began = time.perf_counter()
        with output_to(root / OUTPUT):
            outcomes = [start.train(request, plan, lock, _tell)]
            if again and outcomes[0]["reason"] == "stopped" and (root / STRUCK).exists():
                outcomes.append(start.train(request, plan, lock, _tell))
    return Ran(root, tuple(outcomes), time.perf_counter() - began)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Put what this process and its children say meanwhile into a file.

    It goes there through a pipe: ranks whose disk is full on purpose could not write into a file themselves.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        # in a session of its own: Ctrl-C is for the others, and it ends when they have
        pipe = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=file, start_new_session=True)
    assert pipe.stdin is not None
    try:
        for standard in (1, 2):
            os.dup2(pipe.stdin.fileno(), standard)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for standard, before in zip((1, 2), kept, strict=True):
            os.dup2(before, standard)
            os.close(before)
        pipe.stdin.close()
        pipe.wait()


def assess(each: Exercise, ran: Ran, clean: Ran) -> dict[str, Any]:
    """What became of a fault: an element of `results` in `drill.json`."""
    records, struck, said = ran.records(), ran.struck(), ran.said()
    first, last = ran.outcomes[0], ran.last
    resumed = [int(record["resumed_step"]) for record in records if record["kind"] == "start"][1:]
    loss, reference = last.get("held_out_loss"), clean.last["held_out_loss"]
    same = bool(ran.bits()) and ran.bits() == clean.bits()
    problems = []
    if struck is None:
        problems.append("the fault never struck")
    if each.ends == "stopped" and (first["reason"], first["exit_code"]) != ("stopped", ExitCode.STOPPED):
        problems.append(f"asked to stop, it {first['reason']} with exit code {first['exit_code']}")
    if last["reason"] != "completed":
        problems.append(f"it ended {last['reason']}: {last['message']}")
    elif not same:
        problems.append("its final weights and moments are not those of the clean run to the bit")
    problems += [f"nobody said {word!r}" for word in each.says if word not in said]
    done = [] if each.ends != "stopped" else [f"saved, exit code {first['exit_code']}"]
    done += [f"resumed at step {step}" for step in resumed] or ["went on"]
    return {
        "name": each.name,
        "sentence": str(each.fault),
        "passed": not problems,
        "outcome": "failed" if problems else "resumed" if resumed else "went on",
        "why": "; ".join(problems),
        "detected_after": None,
        "rungs": done,
        "lost": max([struck["step"] - 1 - step for step in resumed] + [0]) if struck else 0,
        "seconds_recovering": _seconds_to_next_step(records, struck) if resumed else None,
        "seconds": ran.seconds,
        "held_out_loss": loss,
        "difference": None if loss is None else abs(loss - reference) / reference,
        "same_bits": "clean" if same else None,
        "quarantine": [],
        "starts": 1 + len(resumed),
        "exit_codes": [outcome["exit_code"] for outcome in ran.outcomes],
    }


def _seconds_to_next_step(records: Sequence[Record], struck: dict[str, Any] | None) -> float | None:
    """From the fault to the first update of a later start."""
    if struck is None:
        return None
    for record in records:
        if record["kind"] == "attempt" and record["start"] > 1 and record["applied"]:
            return float(record["time"]) - float(struck["time"])
    return None


def table(part: dict[str, Any]) -> Table:
    """Fault × outcome."""
    from rich.table import Table

    ranks = "1 rank" if part["ranks"] == 1 else f"{part['ranks']} ranks"
    title = f"{part['steps']} steps in processes of their own, ZeRO {part['stage']}, {ranks}"
    result = Table(title=title, title_justify="left", title_style="")
    for heading in ("fault", "outcome"):
        result.add_column(heading, no_wrap=True)
    for heading in ("starts", "steps lost", "seconds"):
        result.add_column(heading, justify="right")
    result.add_column("what was done")
    result.add_column("same bits as")
    for each in part["results"]:
        seconds = each["seconds_recovering"]
        result.add_row(
            each["name"],
            ("✓ " if each["passed"] else "✗ ") + each["outcome"],
            str(each["starts"]),
            str(each["lost"]),
            "" if seconds is None else f"{seconds:.1f}",
            ", ".join(each["rungs"]),
            "the clean run" if each["same_bits"] else "",
        )
    return result
