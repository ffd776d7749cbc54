"""Starts the ranks of a run, and starts them again as long as that is worth it."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import local
from launcher.lookout import Death, Lookout, beats_folder, signal_in_words
from launcher.relaunch import Ending, Leave, Relaunch, decide
from launcher.run_directory import read_outcome, write_atomically
from trainer import starts
from trainer.checkpoint.manifest import name_of, step_of
from trainer.config.files import RunFiles
from trainer.config.schema import SupervisionConfig
from trainer.errors import SUPERVISED, ExitCode, RunDirectoryError
from trainer.heartbeat import FOLDER_VARIABLE, RELAUNCHED_VARIABLE

Outcome = dict[str, Any]
Say = Callable[[str], None]

GOES_ON = "the same command goes on from the last checkpoint"


@dataclass(frozen=True, slots=True)
class Job:
    """What is started, each time alike."""

    root: Path
    """Directory of the run."""
    argv: Sequence[str]
    """Of the agent that starts the ranks."""
    environment: Mapping[str, str]
    ranks: int
    """On this machine."""
    lock: int | None
    """Descriptor of the run's lock, which the ranks' agent holds too."""


def see_through(job: Job, config: SupervisionConfig, say: Say, requests: local.Requests | None = None) -> Outcome:
    """Start the ranks until the run has ended in a way that another start would not change, or gets no further.

    Requests to stop are held back over all starts and the waits between them. Must be called from the main thread.

    Args:
        requests: to stop; held back by the caller for longer than this lasts.

    Returns:
        The outcome of the last start, as `outcome.json` has it, or made up of what was seen of it.

    Raises:
        LaunchError: the agent cannot be started.
    """
    files = RunFiles(job.root)
    began_at = position(files)
    endings: list[Ending] = []
    relaunched: dict[str, Any] | None = None
    with contextlib.ExitStack() as stack:
        requests = requests or stack.enter_context(local.Requests())
        while True:
            ended, outcome, death = start_once(job, config, relaunched, requests, say)
            over = time.time()
            why = str(outcome["message"])
            endings.append(Ending(str(outcome["reason"]), position(files), ended.stop_requested is not None))
            decision = decide(began_at, endings, config)
            if isinstance(decision, Leave):
                return _noted(files, _final(outcome, decision.why))
            say(f"{why}: {_in_words(decision, position(files), config)}")
            if (request := requests.wait(decision.after_seconds)) is not None:
                return _stopped(f"stopped by {local.words_of(request)} before it was started again ({why}); {GOES_ON}")
            killed = None if death is None else death.time
            relaunched = {"reason": why, "killed": killed, "ended": over, "launched": time.time()}


def _final(outcome: Outcome, why: str) -> Outcome:
    """What the user is told of a crash that is not followed by another start."""
    if outcome["reason"] != "crashed":
        return outcome
    return outcome | {"message": "; ".join(text for text in (outcome["message"], why, GOES_ON) if text)}


def _noted(files: RunFiles, outcome: Outcome) -> Outcome:
    """The outcome; ranks that were killed could not write it down, so this does: else the run would seem to go on."""
    if outcome["reason"] == "crashed" and read_outcome(files.root) is None:
        step = position(files)
        about = {"step": step, "checkpoint": f"checkpoints/{name_of(step)}" if step else None, "held_out_loss": None}
        text = json.dumps({**outcome, **about, "start": starts.newest(files)}, indent=1, ensure_ascii=False)
        with contextlib.suppress(RunDirectoryError):
            write_atomically(files.outcome, text)
    return outcome


def _in_words(decision: Relaunch, step: int, config: SupervisionConfig) -> str:
    when = f"in {decision.after_seconds:g} s" if decision.after_seconds else "now"
    whence = f"from {name_of(step)}" if step else "from the beginning"
    budget = f" ({decision.fruitless} of {config.restarts} without a new checkpoint)" if decision.fruitless else ""
    return f"starting again {when} {whence}{budget}"


def start_once(
    job: Job, config: SupervisionConfig, relaunched: dict[str, Any] | None, requests: local.Requests, say: Say
) -> tuple[local.Ended, Outcome, Death | None]:
    """One start, from launching the agent to the end of the last process: how it ended, its outcome, and who of the
    ranks died first, if one did."""
    files = RunFiles(job.root)
    # so that what is read afterwards is of this start
    files.outcome.unlink(missing_ok=True)
    newest_before = starts.newest(files)
    with beats_folder(job.ranks) as beats:
        lookout = Lookout(beats, config.hang_seconds, files.root / "hangs")
        more = {FOLDER_VARIABLE: str(beats), SUPERVISED: "1"}
        if relaunched is not None:
            more[RELAUNCHED_VARIABLE] = json.dumps(relaunched)
        ended = local.supervise(
            job.argv,
            {**job.environment, **more},
            targets=local.children_of,
            inherit=() if job.lock is None else (job.lock,),
            stopping="finishing this step, then saving and stopping",
            say=say,
            watch=lookout,
            requests=requests,
        )
        return ended, _outcome_of(files, ended, lookout, newest_before), lookout.first_death


def _outcome_of(files: RunFiles, ended: local.Ended, lookout: Lookout, newest_before: int) -> Outcome:
    if by := _taken_over(files, lookout, newest_before):
        return {"reason": "superseded", "exit_code": int(ExitCode.SUPERSEDED), "message": by}
    outcome = read_outcome(files.root)
    if outcome is not None and outcome["reason"] != "crashed":
        return outcome
    if outcome is None and ended.stop_requested and not ended.killed:
        return _stopped("stopped before the first step; the same command starts again")
    crashed = outcome or {"reason": "crashed", "exit_code": int(ExitCode.CRASHED)}
    return crashed | {"message": _cause(ended, lookout.first_death, outcome)}


def _cause(ended: local.Ended, death: Death | None, outcome: Outcome | None) -> str:
    """Why a start crashed: what came first, not what it led to in other ranks."""
    if ended.alarm:
        return ended.alarm
    said = str(outcome["message"]) if outcome and outcome.get("message") else None
    if ended.stop_requested is None:
        if ended.exit_code > 128:
            return f"the agent of the ranks was killed by {signal_in_words(ended.exit_code - 128)}"
        if death and _could_not_say_so(death, said):
            return str(death)
    if said:
        return said
    how = "was killed before it could save" if ended.stop_requested else "died without saying why"
    return f"the run {how} (exit code {ended.exit_code})"


def _could_not_say_so(death: Death, said: str | None) -> bool:
    """Whether what an outcome says, if anything, is only that a rank misses the one that died."""
    if death.status is None:
        # of what is not known: what another rank says comes of it, unless it is what all know
        other = re.match(r"rank (\d+): ", said or "")
        return said is None or (other is not None and int(other[1]) != death.rank)
    # the agent ends the others with SIGTERM when one has failed
    return death.status < 0 and (death.status != -signal.SIGTERM or said is None)


def _stopped(message: str) -> Outcome:
    return {"reason": "stopped", "exit_code": int(ExitCode.STOPPED), "message": message}


def _taken_over(files: RunFiles, lookout: Lookout, newest_before: int) -> str | None:
    """Which other start has taken the run over, in words; None: none has."""
    newest = starts.newest(files)
    if newest > newest_before:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            record = json.loads((files.root / starts.FOLDER / f"{newest:04d}.json").read_bytes())
            host, pid = str(record["host"]), int(record["pid"])
            if (host, pid) != (socket.gethostname(), lookout.pid_of(0)):
                return f"start {newest} of the run has taken over (process {pid} on {host})"
    if ExitCode.SUPERSEDED in lookout.exit_codes:
        return "a newer start of the run has taken over"
    return None


def position(files: RunFiles) -> int:
    """The step that the run can be gone on with, as far as names tell: of the newest committed checkpoint, or the one
    that the newest start went on from, should that have been in memory."""
    steps = [0]
    with contextlib.suppress(OSError):
        steps += [step for path in files.checkpoints.iterdir() if (step := step_of(path.name)) is not None]
    resumed = sorted((files.root / starts.FOLDER).glob("*.resumed.json"))
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        steps.append(int(json.loads(resumed[-1].read_bytes())["step"]))
    return max(steps)
