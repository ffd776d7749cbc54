"""What classes are taken for each other, as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.telemetry.heatmap import Picture, to_picture

_SIDE, _OF_A_CLASS, _DPI = 2.2, 0.34, 100
_WRITTEN = 12
"""Classes up to which counts are written into the cells."""


def confusion_picture(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Picture:
    """Rows are true classes, columns predicted ones; colour is the fraction of the row.

    Args:
        matrix: texts, [classes, classes].
    """
    from matplotlib.figure import Figure

    counts = np.asarray(matrix, dtype=np.float64)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = _SIDE + _OF_A_CLASS * len(names)
    figure = Figure(figsize=(side + 0.6, side), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(fractions, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    if len(names) <= _WRITTEN:
        for row, column in np.ndindex(*counts.shape):
            colour = "white" if fractions[row, column] > 0.5 else "black"
            text = f"{int(counts[row, column]):,}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
    return to_picture(figure, _DPI)
