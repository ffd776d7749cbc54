"""The folder of each incident, `RUN/incidents/0001`: what happened, what it was decided from, what it cost."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from trainer.config.files import RunFiles
from trainer.records import Evidence, IncidentEvent
from trainer.report.page import context_of
from trainer.report.plots import norms_by_layer, plot_loss, plot_norms
from trainer.report.samples import Describe, Sample, offending, samples_of
from trainer.report.story import Story, caught_up, event_record, read_story
from trainer.report.template import render
from trainer.telemetry.ledger import Record, decode, encode

REPORT, EVIDENCE, SAMPLES = "report.md", "evidence.json", "samples.jsonl"
NORMS, LOSS = "norms.png", "loss.png"

_LEDGER_SECONDS = 5.0
"""The ledger is written in a thread of its own: so long a report waits for what it is about."""
_CLOSE_SECONDS = 120.0


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class IncidentReports:
    """Writes the folders of a run's incidents, in a thread of its own: what it is told is only noted. Rank 0 has one.

    A folder appears whole or not at all. It is written a little after the guard first acts, so that a run that dies in
    the middle of an incident leaves its evidence and the way back itself is not slowed, and again when the incident
    ends. What fails is said and costs nothing else.
    """

    def __init__(
        self,
        run_dir: Path,
        describe: Describe | None,
        parameter_names: Sequence[str],
        complain: Callable[[str], None] = _complain,
        calm_seconds: float = 15.0,
    ):
        """
        Args:
            describe: sample id → (source, document, text) of each of its documents; it is called in the thread.
            calm_seconds: from the guard's first act to the first writing.
        """
        self._files = RunFiles(run_dir)
        self._describe = describe
        self._names = tuple(parameter_names)
        self._complain = complain
        self._noted: dict[int, list[Record]] = {}
        self._kept: dict[int, list[Evidence]] = {}
        self._unfinished: set[int] = set()
        self._calm_seconds = calm_seconds
        self._due: dict[int, float] = {}
        """When the folder of an incident is written first, on the monotonic clock."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="incident reports", daemon=True)
        self._thread.start()

    def note(self, event: IncidentEvent) -> None:
        """A line of an incident's timeline."""
        if event.incident:
            self._jobs.put(lambda: self._note(event))

    def keep(self, evidence: Evidence) -> None:
        """What is to be kept of an alarm; its arrays may be used again at once."""
        kept = Evidence(
            evidence.incident,
            evidence.attempt,
            evidence.step,
            evidence.batch_index,
            evidence.sample_ids.copy(),
            evidence.sample_losses.copy(),
            evidence.parameter_norms.copy(),
            evidence.usual_norms.copy(),
        )
        self._jobs.put(lambda: self._kept.setdefault(kept.incident, []).append(kept))

    def finish(self, incident: int) -> None:
        """Writes the incident's folder anew, from what is known and from the newest part of the ledger."""
        self._jobs.put(lambda: self._finish(incident))

    def close(self) -> None:
        """Writes what is not finished, and waits for all of it. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._jobs.put(self._write_unfinished)
        self._jobs.put(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._complain(f"the incident reports in {self._files.incidents} took too long and may be missing")

    def _work(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            # plots take a second of computing: training comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        while (job := self._next()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - telling must never stop training
                self._complain(f"a report in {self._files.incidents} could not be written: {error!r}")

    def _next(self) -> Callable[[], None] | None:
        """What is asked for next, or what has become due; None: the end."""
        soonest = min(self._due, key=lambda incident: self._due[incident], default=None)
        if soonest is None:
            return self._jobs.get()
        try:
            return self._jobs.get(timeout=max(0.0, self._due[soonest] - time.monotonic()))
        except queue.Empty:
            return partial(self._write, soonest)

    def _note(self, event: IncidentEvent) -> None:
        self._noted.setdefault(event.incident, []).append(event_record(event))
        # the evidence of an examination comes before the incident has a number, where it is the first that is heard
        self._adopt(event)
        self._unfinished.add(event.incident)
        if event.phase == "acted" and sum(line["phase"] == "acted" for line in self._noted[event.incident]) == 1:
            self._due[event.incident] = time.monotonic() + self._calm_seconds

    def _adopt(self, event: IncidentEvent) -> None:
        orphans = self._kept.get(0, [])
        for evidence in [orphan for orphan in orphans if orphan.attempt == event.attempt]:
            orphans.remove(evidence)
            self._kept.setdefault(event.incident, []).append(evidence)

    def _finish(self, incident: int) -> None:
        self._write(incident)
        self._unfinished.discard(incident)

    def _write_unfinished(self) -> None:
        for incident in sorted(self._unfinished):
            self._write(incident)

    def _write(self, incident: int) -> None:
        self._due.pop(incident, None)
        noted = self._noted.get(incident, [])
        self._wait_for_ledger(max((line["attempt"] for line in noted), default=0))
        story = read_story(self._files.ledger, incident, noted)
        if story is None:
            return
        folder = self._files.incidents / f"{incident:04}"
        fresh, old = folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir(parents=True)
        self._fill(fresh, story, folder)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def _wait_for_ledger(self, attempt: int) -> None:
        deadline = time.monotonic() + _LEDGER_SECONDS
        while not caught_up(self._files.ledger, attempt) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _fill(self, folder: Path, story: Story, earlier: Path) -> None:
        kept = self._kept.get(story.incident, []) or _saved_evidence(earlier / EVIDENCE, story)
        chosen = offending(kept)
        samples = samples_of(chosen, self._describe) if chosen else []
        usual, spike, step = self._norms(story, chosen)
        if spike:
            plot_norms(folder / NORMS, usual, spike, step)
        plot_loss(folder / LOSS, story)
        _write_synced(folder / SAMPLES, b"".join(_strict(sample.to_json()) + b"\n" for sample in samples))
        _write_synced(folder / EVIDENCE, _pretty(self._evidence(story, kept)))
        _write_synced(folder / REPORT, render(context_of(story, samples, usual, spike)).encode())

    def _norms(self, story: Story, chosen: Evidence | None) -> tuple[dict[str, float], dict[str, float], int]:
        """Gradient norm by layer, usual and at the alarm, and the step of the alarm: from the evidence, else from the
        ledger, which holds the norms of every attempt that was not applied."""
        usual: Sequence[float] = []
        spike: Sequence[float] = []
        step = story.opened["step"]
        if chosen:
            usual, spike, step = chosen.usual_norms.tolist(), chosen.parameter_norms.tolist(), chosen.step
        elif alarm := next((record for record in story.dropped if "parameter_norms" in record), None):
            spike, step = alarm["parameter_norms"], alarm["step"]
        usual = usual or story.usual_norms()
        by_layer = [
            norms_by_layer(self._names, norms) if len(norms) == len(self._names) else {} for norms in (usual, spike)
        ]
        return by_layer[0], by_layer[1], step

    def _evidence(self, story: Story, kept: Sequence[Evidence]) -> Record:
        return {
            "incident": story.incident,
            "outcome": story.outcome,
            "events": story.events,
            "rewinds": story.rewinds,
            "batches_left_out": story.left_out,
            "steps_taken_back": len(story.abandoned),
            "seconds_lost": story.seconds_lost,
            "loss_before": story.loss_before,
            "loss_at": story.loss_at,
            "loss_after": story.loss_after,
            "parameter_names": list(self._names),
            "evidence": [
                {
                    "attempt": evidence.attempt,
                    "step": evidence.step,
                    "batch": evidence.batch_index,
                    "sample_ids": evidence.sample_ids.tolist(),
                    "sample_losses": evidence.sample_losses.tolist(),
                    "parameter_norms": evidence.parameter_norms.tolist(),
                    "usual_norms": evidence.usual_norms.tolist(),
                }
                for evidence in kept
            ],
            "attempts_not_applied": story.dropped,
        }


def read_evidence(path: Path) -> Record:
    """The content of an `evidence.json`, its NaNs and infinities as floats.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    return decode(json.dumps({"kind": "evidence"} | json.loads(path.read_bytes())).encode())


def read_samples(path: Path) -> list[Record]:
    """The lines of a `samples.jsonl`, the worst sample first; none where there is no such file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [decode(json.dumps({"kind": "sample"} | json.loads(line)).encode()) for line in lines]


def _saved_evidence(path: Path, story: Story) -> list[Evidence]:
    """What an earlier start of the run kept of an incident that goes on in this one.

    An incident that a resume took back may have had the same number: the attempts tell them apart.
    """
    attempts = {record["attempt"] for record in [*story.dropped, *story.events]}
    try:
        saved = read_evidence(path)["evidence"]
    except (OSError, ValueError, KeyError):
        return []
    return [
        Evidence(
            story.incident,
            entry["attempt"],
            entry["step"],
            entry["batch"],
            np.array(entry["sample_ids"], dtype=np.int64),
            np.array(entry["sample_losses"], dtype=np.float64),
            np.array(entry["parameter_norms"], dtype=np.float64),
            np.array(entry["usual_norms"], dtype=np.float64),
        )
        for entry in saved
        if entry["attempt"] in attempts
    ]


def _strict(value: Record) -> bytes:
    return encode(value).rstrip(b"\n")


def _pretty(value: Record) -> bytes:
    return json.dumps(json.loads(_strict(value)), indent=1, ensure_ascii=False).encode() + b"\n"


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


__all__ = ["EVIDENCE", "REPORT", "SAMPLES", "IncidentReports", "Sample", "read_evidence", "read_samples"]
