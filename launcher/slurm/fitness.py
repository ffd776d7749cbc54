"""Which nodes of an allocation ranks are started on: those that are fit, and as many of them as divide the batch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.preflight.examine import examine
from launcher.slurm import exclusion, scheduler
from launcher.slurm.allocation import free_port, usable
from launcher.slurm.submission import Submission
from trainer.config.files import RunFiles
from trainer.config.schema import RunConfig

Say = Callable[[str], None]

SRUN_GRACE_SECONDS = 10.0
"""For srun to end its processes, when they have had their time."""


class Fitness:
    """What this job knows of its nodes.

    Attributes:
        bad: node → why it is not used.
        trouble: what is wrong and no single node's fault.
        figures: what the last look measured, by name with its unit.
    """

    def __init__(self, submission: Submission, config: RunConfig, nodes: Sequence[str], say: Say):
        self._submission, self._config, self._nodes, self._say = submission, config, tuple(nodes), say
        self._runs = Path(submission.root).parent
        self.bad: dict[str, str] = {}
        self.trouble: tuple[str, ...] = ()
        self.figures: Mapping[str, float] = {}

    def choose(self) -> tuple[str, ...] | None:
        """The nodes to use, in the scheduler's order, after a look at them; None: too few are fit."""
        site = self._submission.site
        known = exclusion.excluded(self._runs, time.time())
        for node in self._nodes:
            if node in known:
                self.bad.setdefault(node, known[node].why)
        left = self._left()
        if site.preflight.enabled and left:
            self._look_at(left)
            left = self._left()
        if self.trouble:
            return None
        samples = self._config.batch.samples
        a_pass = self._config.batch.micro * self._submission.ranks_per_node
        number = usable(len(left), self._submission.nodes[0], lambda nodes: samples % (a_pass * nodes) == 0)
        if number is None:
            return None
        if number < len(left):
            self._say(f"{number} of {len(left)} nodes are used: the global batch does not divide over more")
        return tuple(left[:number])

    def answers(self, seconds: float) -> bool:
        """Whether a process can be started, within so long, on every node that is used."""
        nodes = self._left()
        return len(nodes) == 1 or self._srun(nodes, ["true"], {}, seconds) == 0

    def why_not(self) -> str:
        """Why `choose` found none, in words."""
        if self.trouble:
            return "; ".join(self.trouble)
        count = f"{len(self.bad)} of {len(self._nodes)} nodes are not fit" if self.bad else "the nodes do not fit"
        fewest = self._submission.nodes[0]
        return f"{count}, and the run needs {fewest}: {'; '.join(self.bad.values())}"

    def left_out(self) -> list[str]:
        """Nodes that the next job of the run must not be given."""
        return sorted({*self._submission.site.exclude, *exclusion.excluded(self._runs, time.time()), *self.bad})

    def leave_out(self, node: str, why: str) -> None:
        """Do not use a node for a while, in no run of this folder."""
        hours = self._submission.site.exclude_hours
        self._say(f"{why}; {node} is left out for {hours:g} hours")
        self.bad[node] = why
        exclusion.exclude(self._runs, node, why, self._submission.name, time.time(), hours)

    def _left(self) -> list[str]:
        return [node for node in self._nodes if node not in self.bad]

    def _look_at(self, nodes: list[str]) -> None:
        submission = self._submission
        findings = examine(
            nodes,
            self._srun,
            RunFiles(Path(submission.root)).root / "preflight",
            submission.site.preflight,
            submission.ranks_per_node if submission.device == "cuda" else 0,
            submission.python,
            scheduler.address(nodes[0]),
            free_port(),
        )
        self.trouble, self.figures = findings.trouble, findings.figures
        for text in findings.trouble:
            self._say(text)
        for node, sentences in findings.bad.items():
            self.leave_out(node, "; ".join(sentences))

    def _srun(self, nodes: Sequence[str], argv: Sequence[str], environment: Mapping[str, str], seconds: float) -> int:
        """One process on each node; the end of one does not end the others."""
        listed = f"--nodelist={','.join(nodes)}"
        step = ["srun", f"--nodes={len(nodes)}", listed, "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--overlap"]
        process = subprocess.Popen(  # noqa: S603 (a list, no shell)
            [*step, *argv], env={**os.environ, **self._submission.site.environment, **environment}
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            # killed at once it would leave its processes on the nodes
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SRUN_GRACE_SECONDS)
            process.kill()
            process.wait()
            return 124
