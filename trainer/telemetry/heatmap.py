"""Gradient norms as a picture: layers from top to bottom, steps from left to right, colour on a log scale."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.records import FloatArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDE, _HIGH_OF_A_ROW, _DPI = 9.0, 0.16, 100


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG image and its size in pixels."""

    png: bytes
    width: int
    height: int


@dataclass(slots=True)
class _Column:
    first: int
    """Step."""
    last: int
    norms: FloatArray
    """[rows]: the largest of its attempts; NaN where one was NaN."""


def load() -> None:
    """Load matplotlib now, before training begins: its first import holds up every thread for a moment."""
    import matplotlib.backends.backend_agg
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.font_manager  # noqa: F401


class HeatMap:
    """Norms by row and step in bounded memory: when full, neighbours become one column that shows the larger value, so
    that a spike is never averaged away. What is not finite has a colour of its own."""

    def __init__(self, num_columns: int = 512):
        self._num_columns = num_columns
        self._rows: list[str] = []
        self._columns: list[_Column] = []
        self._stride = 1

    def add(self, step: int, norms: Mapping[str, float]) -> None:
        """The norms by row of one attempt; several of one step count as one."""
        if list(norms) != self._rows:
            self._rows, self._columns, self._stride = list(norms), [], 1
        values = np.fromiter(norms.values(), dtype=np.float64, count=len(norms))
        if self._columns and step < self._columns[-1].first + self._stride:
            column = self._columns[-1]
            column.norms = np.maximum(column.norms, values)
            column.last = max(column.last, step)
            return
        self._columns.append(_Column(step, step, values))
        if len(self._columns) > self._num_columns:
            self._columns = [_merged(self._columns[at : at + 2]) for at in range(0, len(self._columns), 2)]
            self._stride *= 2

    def rewind(self, step: int) -> None:
        """Forgets what came after `step`."""
        self._columns = [column for column in self._columns if column.first <= step]

    @property
    def norms(self) -> FloatArray:
        """What is shown, [rows, columns]."""
        if not self._columns:
            return np.zeros((len(self._rows), 0))
        return np.stack([column.norms for column in self._columns], axis=1)

    def picture(self) -> Picture | None:
        """None while there is nothing to see: fewer than two columns, or no finite value above 0."""
        if len(self._columns) < 2:
            return None
        norms = self.norms
        visible = norms[np.isfinite(norms) & (norms > 0)]
        if not visible.size:
            return None
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        figure = Figure(figsize=(_WIDE, 1.2 + _HIGH_OF_A_ROW * len(self._rows)), dpi=_DPI)
        # laying it out by hand costs a third of what matplotlib's own layout does
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.11, right=1.0, bottom=0.5 / height, top=1 - 0.3 / height)
        axes = figure.add_subplot()
        low, high = float(visible.min()), float(visible.max())
        colours = colormaps["viridis"].with_extremes(bad="red")
        image = axes.imshow(
            np.ma.masked_invalid(np.where(norms <= 0, low, norms)),
            aspect="auto",
            interpolation="nearest",
            cmap=colours,
            norm=LogNorm(low, high if high > low else low * 10),
        )
        axes.set_yticks(range(len(self._rows)), self._rows, fontsize=7)
        ticks = np.unique(np.linspace(0, len(self._columns) - 1, 9).round().astype(int))
        axes.set_xticks(ticks, [str(self._columns[tick].last) for tick in ticks], fontsize=7)
        axes.set_xlabel("step", fontsize=8)
        axes.set_title("gradient norm by layer (red: not finite)", fontsize=8)
        figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize=7)
        return to_picture(figure, _DPI)


def to_picture(figure: Figure, dpi: int) -> Picture:
    """The figure as it is."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=dpi)
    png = target.getvalue()
    # width and height stand at fixed places in the first chunk of a PNG
    return Picture(png, int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big"))


def _merged(columns: list[_Column]) -> _Column:
    norms = columns[0].norms
    for column in columns[1:]:
        norms = np.maximum(norms, column.norms)
    return _Column(columns[0].first, columns[-1].last, norms)
