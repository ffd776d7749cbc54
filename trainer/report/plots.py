"""The pictures of an incident's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trainer.report.story import Story
from trainer.telemetry.names import group_by_layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_ALARM = "tab:red"
_SPREAD = 20.0
"""From this ratio of largest to smallest value on, an axis is logarithmic."""


def norms_by_layer(names: Sequence[str], norms: Sequence[float]) -> dict[str, float]:
    """L2 norm of each layer from those of its parameters ([parameters]); NaN or infinite where one of them is."""
    values = np.asarray(norms, dtype=np.float64)
    with np.errstate(over="ignore"):
        return {
            label: float(np.sqrt(np.square(values[indices]).sum()))
            for label, indices in group_by_layer(list(names)).items()
        }


def plot_norms(path: Path, usual: dict[str, float], spike: dict[str, float], step: int) -> None:
    """Gradient norm of each layer, usual and at the spike, on a log axis. `usual` may be empty."""
    figure, axes = _figure(height=1.2 + 0.22 * len(spike))
    labels = list(spike)
    places = np.arange(len(labels))
    now = np.array([spike[label] for label in labels])
    before = np.array([usual.get(label, np.nan) for label in labels])
    _points(axes, before, places, "usual", "tab:blue")
    _points(axes, now, places, f"at step {step}", _ALARM)
    both = np.isfinite(now) & np.isfinite(before)
    axes.hlines(places[both], before[both], now[both], color="lightgrey", zorder=1)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    visible = np.concatenate([now, before])
    if (visible[np.isfinite(visible)] > 0).any():
        axes.set_xscale("log")
    for place in places[~np.isfinite(now)]:
        axes.axhline(place, color="tab:red", linestyle=":", linewidth=1)
    title = "gradient norm by layer" + (" (dotted: not finite)" if not np.isfinite(now).all() else "")
    _finish(figure, axes, title, "L2 norm", path)


def plot_loss(path: Path, story: Story) -> None:
    """Loss around the incident: what stands, what was taken back, and attempts that were not applied."""
    figure, axes = _figure(height=3.6)
    standing = [(record["step"], record["loss"]) for record in story.standing]
    abandoned = [(record["step"], record["loss"]) for record in story.abandoned]
    dropped = [(record["step"], record["loss"]) for record in story.dropped]
    for points, label, style, colour in (
        (standing, "stands", "-", "tab:blue"),
        (abandoned, "rolled back", ".--", "tab:red"),
        (dropped, "not applied", "x", "black"),
    ):
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, np.where(np.isfinite(losses), losses, np.nan), style, color=colour, label=label)
    for step, loss in dropped:
        if not np.isfinite(loss):
            axes.axvline(step, color="tab:red", linestyle=":", linewidth=1)
    visible = np.array([loss for _, loss in [*standing, *abandoned, *dropped]])
    visible = visible[np.isfinite(visible) & (visible > 0)]
    if visible.size and visible.max() > _SPREAD * visible.min():
        axes.set_yscale("log")
    _finish(figure, axes, "loss around the incident (dotted: not finite)", "step", path)


def _figure(height: float) -> tuple[Figure, Axes]:
    # not pyplot: it keeps global state, and this runs in a thread
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, height), dpi=_DPI, layout="constrained")
    return figure, figure.add_subplot()


def _points(axes: Axes, values: NDArray[np.float64], places: NDArray[np.int64], label: str, colour: str) -> None:
    seen = np.isfinite(values) & (values > 0)
    filled = colour == _ALARM
    face = colour if filled else "none"
    axes.scatter(values[seen], places[seen], 16 if filled else 48, label=label, edgecolor=colour, facecolor=face)


def _finish(figure: Figure, axes: Axes, title: str, label: str, path: Path) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(which="both", labelsize=7)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)
    figure.savefig(path, format="png")
