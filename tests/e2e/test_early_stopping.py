"""A run that stops early: ends in order, exports its best checkpoint, and goes on rightly after a stop."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from workspace import Workspace

from trainer.checkpoint.assemble import whole_parameters
from trainer.errors import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

STEPS = 40
# a rate so high that the held-out loss soon gets worse
OPTIONS = (
    f"schedule.duration={STEPS}",
    "schedule.warmup=0",
    "schedule.kind=constant",
    "optim.lr=0.3",
    "guard.mode=off",
    "evaluation.every=2",
    "evaluation.best=loss",
    "evaluation.patience=2",
    "checkpoint.every=null",
    "checkpoint.keep=1",
    "cluster.ranks_per_node=1",
    "faults=['at(step=4, rank=0).terminate()']",
)


def losses(workspace: Workspace, name: str) -> dict[int, float]:
    records = [record for record in workspace.ledger(name) if record["kind"] == "evaluation"]
    return {int(record["step"]): float(record["loss"]) for record in records}  # type: ignore[call-overload,arg-type]


def test_stops_early_and_exports_the_best(prepared: Workspace) -> None:
    """Asked to stop where an evaluation is due: the next start makes up for it, and decides from all of them."""
    command = ("run", "config.yaml", *OPTIONS)
    code, output = prepared.trimtab(*command)
    assert code == ExitCode.STOPPED, output
    outcome = prepared.outcome("small")
    assert (outcome["reason"], outcome["step"]) == ("stopped", 4)
    assert list(losses(prepared, "small")) == [2]

    code, output = prepared.trimtab(*command)
    assert code == 0, output
    outcome, found, run = prepared.outcome("small"), losses(prepared, "small"), prepared.run_dir("small")
    best = min(found, key=lambda step: found[step])
    last = int(str(outcome["step"]))
    assert (outcome["reason"], outcome["exit_code"]) == ("completed", 0)
    assert last == best + 4 < STEPS
    evaluated = [record["step"] for record in prepared.ledger("small") if record["kind"] == "evaluation"]
    assert evaluated == list(range(2, last + 1, 2))
    assert all(loss > found[best] for step, loss in found.items() if step > best)
    message = str(outcome["message"])
    assert f"early stopping at step {last} of {STEPS} after 2 evaluations without a better one" in message
    assert f"best loss {found[best]:.4f} at step {best}" in message

    marked = sorted(path.parent.name for path in (run / "checkpoints").glob("step-*/best"))
    assert marked[-1] == f"step-{best:08d}"
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    exported, compared = load_file(run / "export" / "model.safetensors"), 0
    for name, value in whole_parameters(run / "checkpoints" / marked[-1]):
        if name in exported:
            assert torch.equal(exported[name], value), name
            compared += 1
    assert compared > 10
