"""What is looked after while a run trains, and what it goes back to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.section import NonNegativeInt, PositiveFloat, PositiveInt, Section


class SnapshotConfig(Section):
    """Copies of the training state in host memory, to go back to inside the running job."""

    every: PositiveInt | None = 25
    """Steps between snapshots. None: none; a rollback then goes to a checkpoint on disk."""
    keep: PositiveInt = 3
    """Snapshots kept: each costs 12 bytes a parameter over the ranks (weights in fp32 and Adam's moments)."""
    audit: bool = True
    """Look through each snapshot for values that no training step can produce (a flipped bit in a weight or in a
    moment)."""


class GuardConfig(Section):
    """What happens when a gradient, a loss or the state of a rank is not what it should be."""

    mode: Literal["act", "watch", "off"] = "act"
    """`act`: the whole ladder. `watch`: alarms are said and nothing is done about them but leaving out gradients that
    are not finite. `off`: only that."""
    spike: PositiveFloat = 8.0
    """Sudden alarm: robust standard deviations by which the loss or the gradient norm exceeds what is usual
    (docs/detector.md)."""
    drift: PositiveFloat = 10.0
    """Slow alarm: height of the CUSUM of the loss, in robust standard deviations."""
    replay: bool = True
    """Compute an alarming gradient once more before deciding: tells a fault of the hardware from the data."""
    max_consecutive_skips: NonNegativeInt = 24
    """Batches that are left out in a row. Then a new level is accepted where it is finite and consistent, else the run
    halts."""
    max_rollbacks: NonNegativeInt = 4
    """Rollbacks within one incident, each deeper and wider than the one before; then the run halts with a
    diagnosis."""
    max_incidents: PositiveInt = 20
    """Incidents with a rollback within any `incident_window` steps; then the run halts: it does not get on."""
    incident_window: PositiveInt = 1000
    """See `max_incidents`."""
    clean_steps: PositiveInt = 10
    """A snapshot is healthy once so many steps without an alarm followed it."""
    quarantine_before: NonNegativeInt = 2
    """Batches before the alarming one that a rollback leaves out with it: the update that did the harm came before."""
    cool: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor on the learning rate after a rollback that left data out. 1: no cooling."""
    rewarm: PositiveInt = 50
    """Steps over which the learning rate comes back from there, linearly."""
    reset_moments: bool = False
    """Start Adam's moments anew after a rollback that left data out."""
    verify: PositiveInt = 20
    """Accepted steps after which an incident is closed, if their mean loss is back on its trajectory."""
    checksum_every: PositiveInt | None = 25
    """Steps between comparisons of the weights that all ranks hold alike. None: never."""
    revisit: bool = False
    """Train on the quarantined batches in the last steps of the run, instead of new ones: most such data is harmless
    from another state."""
