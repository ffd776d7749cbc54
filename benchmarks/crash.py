"""A run that is killed again and again: `python benchmarks/crash.py --write`.

A small run on two ranks, in ZeRO 1, 2 and 3, is started as a user starts it and killed (SIGKILL) at random instants,
from the launch of its ranks on: one rank, all ranks with their agent, or everything with `trimtab` itself; a share of
the kills waits for a checkpoint that is being written. What `trimtab run` does not start again itself, the same command
does, until the run is complete. Asserted, after every kill: it went on from the newest checkpoint that was there, or a
newer one; no damaged checkpoint was ever met. At the end of each run: the bits of its last checkpoint and the losses of
all of its steps are those of a run that nobody killed.

With `--folder` what was done is kept there, and the same command goes on with it. `--write`:
benchmarks/results/crash.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from launcher.local import children_of, process_state  # noqa: E402
from trainer.checkpoint.manifest import read_manifest, step_of  # noqa: E402
from trainer.config.files import RunFiles  # noqa: E402
from trainer.heartbeat import FOLDER_VARIABLE, read_beats  # noqa: E402
from trainer.telemetry.ledger import read_ledger, standing  # noqa: E402

SAVING_SHARE = 0.35
"""Of the kills: those that wait for a checkpoint that is being written."""
SECONDS_OF_TRAINING = 8.0
"""Within so many, after the time that a start takes, a kill at any instant comes: a run meets many of them."""
VICTIMS = ("rank", "rank", "ranks and agent", "everything")
DEAD_WITHIN_SECONDS = 30.0

CONFIG = """
seed: 3
precision: fp32
runs: {folder}/runs
data:
  sources: [{{files: ["{library}/json/*.py", "{library}/email/*.py"]}}]
  tokenizer: {{train: {{vocabulary: 384}}}}
  sequence_length: 32
  held_out: 0.1
  prepared: {folder}/data
model:
  config: {{model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 2, n_positions: 32}}
batch: {{samples: 16, micro: 2}}
optim: {{lr: 3.0e-3}}
schedule: {{duration: {steps}, warmup: 10}}
evaluation: {{every: null}}
checkpoint: {{every: 5, keep: 3}}
snapshots: {{every: 10}}
supervision: {{restarts: 1000, backoff_seconds: 0.0, hang_seconds: 60.0}}
telemetry: {{tensorboard: false}}
cluster: {{ranks_per_node: 2, device: cpu, threads_per_rank: 1}}
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be killed, and when."""

    victim: str
    """rank · ranks and agent · everything"""
    seconds: float
    """After the launch of the agent; after the beginning of a save."""
    save: int | None = None
    """Not before the so many-th save of this start."""
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Kill:
    """One that was carried out."""

    victim: str
    phase: str
    """Of rank 0, from its last sign of life."""
    in_save: bool
    """A checkpoint was half written."""
    time: float
    """Unix seconds."""
    seconds: float
    """Since the launch of the agent."""
    newest: int
    """Step of the newest committed checkpoint."""


@dataclass(frozen=True, slots=True)
class Way:
    """The way back after a kill, from the ledger."""

    kill: Kill
    resumed: int
    """Step that the next start went on from."""
    lost: int | None
    """Steps that were done again; None: the killed start had done none."""
    noticing: float | None
    """Seconds from the kill until `trimtab` had ended what was left; None: it was not there to notice."""
    launching: float | None
    """From there until the ranks began to load."""
    loading: float | None
    """Finding, checking and loading the state."""
    stepping: float | None
    """From the first record of the start to its first step."""


def make_plan(seed: str, span: float, saving: float) -> Plan:
    """A kill at random.

    Args:
        span: seconds within which an instant lies.
        saving: seconds that a save takes.
    """
    chance = random.Random(seed)
    victim, rank = chance.choice(VICTIMS), chance.randrange(2)
    if chance.random() < SAVING_SHARE:
        return Plan(victim, chance.uniform(0, saving), chance.randint(1, 8), rank)
    return Plan(victim, chance.uniform(0, span), None, rank)


def endure(
    argv: Sequence[str],
    root: Path,
    plans: Iterable[Plan],
    *,
    output: Path,
    note: Callable[[Kill], None],
    cwd: Path | None = None,
) -> list[Kill]:
    """Give a command again and again, and kill what it starts as planned, one plan a start, until it exits with 0.

    Args:
        root: directory of the run.
        output: what the command says is appended to it.
        note: told of each kill.
    """
    kills: list[Kill] = []
    waiting = iter(plans)
    plan = next(waiting, None)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    while True:
        with output.open("ab") as file:
            trimtab = subprocess.Popen(
                argv, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        tried: set[int] = set()
        family: list[int] = []
        try:
            while trimtab.poll() is None:
                agent = agent_of(trimtab.pid)
                if plan is None or agent is None or agent in tried:
                    time.sleep(0.02)
                    continue
                tried.add(agent)
                kill, family = carry_out(plan, trimtab.pid, agent, root)
                if kill is not None:
                    note(kill)
                    kills.append(kill)
                    plan = next(waiting, None)
            await_death(family)
        finally:
            trimtab.kill()
            trimtab.wait()
        if trimtab.returncode == 0:
            return kills
        if trimtab.returncode != -signal.SIGKILL:
            raise SystemExit(f"{root} ended with exit code {trimtab.returncode}; see {output}")


def carry_out(plan: Plan, trimtab: int, agent: int, root: Path) -> tuple[Kill | None, list[int]]:
    """Wait for the planned instant and kill; None: that start ended before. Also the processes that were there."""
    began = time.monotonic()
    checkpoints = RunFiles(root).checkpoints
    before = partials(checkpoints)
    if plan.save is not None and not await_save(plan.save, agent, checkpoints):
        return None, []
    at = plan.seconds + (began if plan.save is None else time.monotonic())
    while (left := at - time.monotonic()) > 0:
        if not is_alive(agent):
            return None, []
        time.sleep(min(left, 0.01))
    if not is_alive(agent):
        return None, []
    phase = phase_of(agent)
    ranks = sorted(children_of(agent))
    newest = newest_step(checkpoints)
    victims = {"everything": [trimtab, agent, *ranks], "ranks and agent": [agent, *ranks]}.get(
        plan.victim, ranks[plan.rank : plan.rank + 1] or [agent]
    )
    now = time.time()
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    in_save = bool(partials(checkpoints) - before)
    kill = Kill(plan.victim, phase, in_save, now, time.monotonic() - began, newest)
    return kill, [agent, *ranks]


def await_save(number: int, agent: int, checkpoints: Path) -> bool:
    """Wait until the so many-th checkpoint of this start is being written; False: it ended before."""
    seen = partials(checkpoints)
    while number > 0:
        if not is_alive(agent):
            return False
        new = partials(checkpoints) - seen
        seen |= new
        number -= len(new)
        time.sleep(0.001)
    return True


def agent_of(trimtab: int) -> int | None:
    """The agent of the ranks that `trimtab` has started."""
    for pid in children_of(trimtab):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"trainer" in words:  # accelerate launch … -m trainer RUN
            return pid
    return None


def phase_of(agent: int) -> str:
    """What rank 0 does."""
    try:
        variables = dict(pair.partition(b"=")[::2] for pair in Path(f"/proc/{agent}/environ").read_bytes().split(b"\0"))
        beats = read_beats(Path(os.fsdecode(variables[FOLDER_VARIABLE.encode()])))
    except (OSError, KeyError):
        return "launching"
    return beats[0].phase if beats and beats[0].pid is not None else "launching"


def is_alive(pid: int) -> bool:
    return process_state(pid) not in (None, "Z")


def await_death(pids: Sequence[int]) -> None:
    """Nothing that was started is left behind."""
    deadline = time.monotonic() + DEAD_WITHIN_SECONDS
    while left := [pid for pid in pids if is_alive(pid)]:
        if time.monotonic() > deadline:
            raise SystemExit(f"processes {left} are still alive {DEAD_WITHIN_SECONDS:g} s after `trimtab` ended")
        time.sleep(0.05)


def names(checkpoints: Path) -> list[str]:
    try:
        return [path.name for path in checkpoints.iterdir()]
    except FileNotFoundError:
        return []


def partials(checkpoints: Path) -> set[str]:
    return {name for name in names(checkpoints) if ".partial-" in name}


def newest_step(checkpoints: Path) -> int:
    return max((step for name in names(checkpoints) if (step := step_of(name)) is not None), default=0)


def final_bits(root: Path) -> dict[str, str]:
    """Hash of every file of tensors in the newest checkpoint."""
    checkpoints = RunFiles(root).checkpoints
    newest = max((name for name in names(checkpoints) if step_of(name)), key=lambda name: step_of(name) or 0)
    files = read_manifest(checkpoints / newest).files
    return {f"{newest}/{entry.name}": entry.xxh3 for entry in files if entry.name.endswith(".safetensors")}


def losses(root: Path) -> list[tuple[int, float]]:
    """Of every step that stands."""
    return [(record["step"], record["loss"]) for record in standing(read_ledger(RunFiles(root).ledger))]


def ways_back(root: Path, kills: Sequence[Kill]) -> list[Way]:
    """What followed each kill.

    Raises:
        AssertionError: a start went on from an older checkpoint than there was.
    """
    records = [record for record in read_ledger(RunFiles(root).ledger) if record["kind"] in ("start", "attempt")]
    ways = []
    bounds = [0.0, *(kill.time for kill in kills), float("inf")]
    for kill, before, after in zip(kills, bounds, bounds[2:], strict=False):
        own = [record for record in records if before < record["time"] <= kill.time]
        steps = [record["step"] for record in own if record["kind"] == "attempt" and record["applied"]]
        following = [record for record in records if kill.time < record["time"]]
        start = next((record for record in following if record["kind"] == "start"), None)
        if start is None:
            # the run had completed: its processes were killed on their way out
            continue
        resumed = int(start["resumed_step"])
        assert resumed >= kill.newest, f"{root}: went on from step {resumed}, and step {kill.newest} was saved; {kill}"
        noticing = launching = loading = stepping = None
        told = start["relaunched"]
        own = [record for record in following if record["start"] == start["start"] and record["kind"] == "attempt"]
        first = own[0] if own else None
        if told and first and first["time"] < after:
            noticing = told["ended"] - kill.time
            loading = start["seconds_loading"]
            launching = start["time"] - told["ended"] - loading
            stepping = first["time"] - start["time"]
        lost = max(0, max(steps) - resumed) if steps else None
        ways.append(Way(kill, resumed, lost, noticing, launching, loading, stepping))
    return ways


def check(root: Path, reference: Path, output: Path) -> None:
    """
    Raises:
        AssertionError: the run is not the one that nobody killed, or met something half written.
    """
    checkpoints = RunFiles(root).checkpoints
    assert not [name for name in names(checkpoints) if "damaged" in name], f"{root} met a damaged checkpoint"
    assert "damaged" not in output.read_text(errors="replace"), f"{root} met a damaged checkpoint"
    assert losses(root) == losses(reference), f"{root}: the losses are not those of the uninterrupted run"
    assert final_bits(root) == final_bits(reference), f"{root}: the bits are not those of the uninterrupted run"


class Campaign:
    """Runs of one ZeRO stage, until enough was killed.

    Args:
        folder: of everything.
        say: told how it gets on.
    """

    def __init__(self, folder: Path, stage: int, steps: int, seed: int, say: Callable[[str], None]):
        self.folder, self.stage, self.seed, self._say = folder, stage, seed, say
        self.kills_file = folder / f"kills-{stage}.jsonl"
        self.config = folder / f"zero{stage}.yaml"
        self.config.write_text(
            CONFIG.format(folder=folder, library=Path(os.__file__).parent, steps=steps)
            + f"zero: {{stage: {stage}}}\nname: zero{stage}\n"
        )

    def root(self, run: int | str) -> Path:
        return self.folder / "runs" / f"zero{self.stage}-{run}"

    def carry_out(self, num_kills: int) -> list[Way]:
        """Kill so often, check every run, and tell the ways back."""
        span, saving = self._reference()
        ways: list[Way] = []
        for run in itertools.count():
            done = self._done()
            if run not in done and sum(len(kills) for kills in done.values()) >= num_kills:
                return ways
            if not (run in done and self._is_complete(run)):
                self._run(run, num_kills, span, saving)
            kills = self._done().get(run, [])
            check(self.root(run), self.root("reference"), self._output(run))
            ways += ways_back(self.root(run), kills)
            self._say(f"ZeRO {self.stage}, run {run}: complete after {len(kills)} kills, bits equal")
        return ways

    def _run(self, run: int, num_kills: int, span: float, saving: float) -> None:
        before = sum(len(kills) for kills in self._done().values())
        plans = (make_plan(f"{self.seed} {self.stage} {n}", span, saving) for n in range(before, num_kills))
        count = itertools.count(before + 1)

        def note(kill: Kill) -> None:
            with self.kills_file.open("a") as file:
                file.write(json.dumps({"run": run, **asdict(kill)}) + "\n")
            where = f"{kill.phase}{', in a save' if kill.in_save else ''}, {kill.seconds:.1f} s after the launch"
            self._say(f"ZeRO {self.stage}, kill {next(count)} of {num_kills}: {kill.victim}, {where}")

        endure(self._argv(run), self.root(run), plans, output=self._output(run), note=note)

    def _reference(self) -> tuple[float, float]:
        """Run it once without a kill. Seconds within which an instant may lie; seconds that a save takes."""
        root = self.root("reference")
        if not self._is_complete("reference"):
            endure(self._argv("reference"), root, (), output=self._output("reference"), note=lambda _: None)
        records = list(read_ledger(RunFiles(root).ledger))
        start = next(record for record in records if record["kind"] == "start")
        first = next(record for record in records if record["kind"] == "attempt")
        saves = [record["seconds_written"] for record in records if record["kind"] == "checkpoint"]
        starting = first["time"] - start["began"]
        self._say(f"ZeRO {self.stage}: first step {starting:.1f} s after the ranks began")
        # the agent itself takes a few seconds before there are ranks
        return 1.3 * starting + SECONDS_OF_TRAINING, statistics.median(saves)

    def _argv(self, run: int | str) -> list[str]:
        return [sys.executable, "-m", "launcher.cli", "run", str(self.config), f"name=zero{self.stage}-{run}"]

    def _output(self, run: int | str) -> Path:
        return self.folder / f"zero{self.stage}-{run}.txt"

    def _is_complete(self, run: int | str) -> bool:
        try:
            return bool(json.loads(RunFiles(self.root(run)).outcome.read_text())["reason"] == "completed")
        except (OSError, ValueError):
            return False

    def _done(self) -> dict[int, list[Kill]]:
        """The kills so far, by run."""
        done: dict[int, list[Kill]] = {}
        if self.kills_file.exists():
            for line in self.kills_file.read_text().splitlines():
                entry = json.loads(line)
                done.setdefault(entry.pop("run"), []).append(Kill(**entry))
        return done


def told(ways: dict[int, list[Way]]) -> list[str]:
    """Tables."""
    lines = ["| ZeRO | kills | of one rank | of ranks and agent | of everything | in a half-written checkpoint "
             "| steps done again, median (most) | resumed | bits |", "|" + "---|" * 9]  # fmt: skip
    for stage, own in ways.items():
        of = Counter(way.kill.victim for way in own)
        lost = [way.lost for way in own if way.lost is not None]
        again = f"{statistics.median(lost):g} ({max(lost)})" if lost else ""
        lines.append(
            f"| {stage} | {len(own)} | {of['rank']} | {of['ranks and agent']} | {of['everything']} "
            f"| {sum(way.kill.in_save for way in own)} | {again} | **{len(own)} of {len(own)}** | equal |"
        )
    everything = [way for own in ways.values() for way in own]
    phases = Counter(way.kill.phase for way in everything)
    lines += [
        "",
        "What rank 0 was doing: " + ", ".join(f"{name} {count}" for name, count in phases.most_common()) + ".",
    ]
    for victim in ("rank", "ranks and agent"):
        timed = [way for way in everything if way.kill.victim == victim and way.noticing is not None]
        if timed:
            lines += ["", f"From the kill of {'one rank' if victim == 'rank' else victim} to the next step, seconds, "
                      f"median (longest) of {len(timed)}:", ""]  # fmt: skip
            lines += ["| noticing | launching | loading | first step | together |", "|---|---|---|---|---|"]
            columns = [
                [getattr(way, name) for way in timed] for name in ("noticing", "launching", "loading", "stepping")
            ]
            columns.append([sum(values) for values in zip(*columns, strict=True)])
            cells = (f"{statistics.median(column):.2f} ({max(column):.2f})" for column in columns)
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(ways: dict[int, list[Way]], options: argparse.Namespace, minutes: float) -> str:
    machine = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, 2 ranks, seed {options.seed}"
    text = [
        "# Crash",
        "",
        f"{machine}, {options.steps} steps a run, a checkpoint every 5, {minutes:.0f} minutes.",
        f"Command: `python benchmarks/crash.py --kills {options.kills} --write`.",
        "",
        *told(ways),
        "",
        "Noticing: until `trimtab` had ended what was left. Launching: agent, imports, process groups, model. Loading:",
        "finding the newest checkpoint, comparing hashes, loading. No damaged checkpoint was met, no process was left.",
        "",
    ]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=102, help="over all stages")
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--steps", type=int, default=1000, help="of a run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep everything here, and go on with what is there")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/crash.md")
    options = parser.parse_args()
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{(time.monotonic() - began) / 60:5.1f} min  {text}", file=sys.stderr, flush=True)

    stages = [int(word) for word in options.stages.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        ways = {}
        for place, stage in enumerate(stages):
            share = options.kills // len(stages) + (place < options.kills % len(stages))
            ways[stage] = Campaign(folder, stage, options.steps, options.seed, say).carry_out(share)
    text = report(ways, options, (time.monotonic() - began) / 60)
    print(text)
    if options.write:
        (ROOT / "benchmarks/results/crash.md").write_text(text)


if __name__ == "__main__":
    main()
