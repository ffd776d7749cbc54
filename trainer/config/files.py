"""Where the files of a run lie in its directory. Nothing here says that they exist."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunFiles:
    """Paths below a run directory."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def accelerate(self) -> Path:
        return self.root / "accelerate.yaml"

    @property
    def deepspeed(self) -> Path:
        return self.root / "deepspeed.json"

    @property
    def model(self) -> Path:
        return self.root / "model.json"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def teacher(self) -> Path:
        """Facts of the teacher of a distillation, as `model` has those of the student."""
        return self.root / "teacher.json"

    @property
    def teacher_scores(self) -> Path:
        """What the teacher of a distillation makes of the held-out data."""
        return self.root / "teacher-scores.json"

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.jsonl"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def submission(self) -> Path:
        """How the run was submitted to a scheduler."""
        return self.root / "submission.json"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.root / "train.sbatch"

    @property
    def jobs(self) -> Path:
        """What its jobs did, a JSON line each time one begins or ends."""
        return self.root / "jobs.jsonl"

    @property
    def logs(self) -> Path:
        """What its jobs printed."""
        return self.root / "logs"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def report(self) -> Path:
        """The page of a run that learned a task."""
        return self.root / "report.html"

    @property
    def incidents(self) -> Path:
        return self.root / "incidents"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def comparison(self) -> Path:
        """Teacher, student, and the same student without a teacher; `comparison.md` beside it says it to people."""
        return self.root / "comparison.json"
