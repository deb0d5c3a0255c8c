"""Pictures of what balanced batches show of a classifier, in the form of figures 4 and 6 of Hajaj and Gillies, "Batch
Normalization and the impact of batch structure on the behavior of deep convolution networks" (2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fbn_plugin.analysis.canvas import new_figure, to_png

__all__ = ["plot_relabelling", "plot_walks"]

_TITLES = {"weak": "a weak image", "strong": "a strong image", "pairs": "two weak images"}
_WALKER, _RIGHT, _WRONG = "#f4c7c3", "#ffffff", "#cfd8ef"
_NUMBERED = 30  # classes whose numbers can be read


def plot_walks(walks: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes | None:
    """PNG of the first walk of each kind: a column for each step, the last one of the batch without walkers, a row for
    each class, in it the class that is predicted. None where nothing walks.

    Args:
        walks: of :meth:`fbn_plugin.analysis.batch_structure.WalkStudy.as_json`.
    """
    shown = {title: walks[kind][0] for kind, title in _TITLES.items() if walks.get(kind)}
    if not shown:
        return None
    figure, axes = new_figure(4.2 * len(shown) + 0.4, 4.6, ncols=len(shown), squeeze=False)
    for place, (title, walk) in zip(axes[0], shown.items()):
        rows = np.array(walk["rows"])
        kinds = (rows != np.arange(len(rows))[:, None]).astype(int)
        for step, walkers in enumerate(walk["walkers_at"]):
            kinds[walkers, step] = 2
        colors = np.array([[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in (_RIGHT, _WRONG, _WALKER)])
        place.imshow(colors[kinds], aspect="auto", interpolation="nearest")
        for row, column in np.ndindex(*rows.shape) if len(rows) <= _NUMBERED else ():
            place.text(column, row, str(rows[row, column]), ha="center", va="center", fontsize=8)
        place.set(title=title, xlabel="step (last: the batch as it was)", ylabel="class that the batch has here")
    figure.suptitle("Predicted class; red: a walker, blue: another image that is mistaken. Conditional.", fontsize=10)
    return to_png(figure)


def plot_relabelling(accuracies: Mapping[str, Sequence[float]]) -> bytes:
    """PNG of the error over rounds of balancing the batches by predictions.

    Args:
        accuracies: name -> top-1 accuracy in percent by standard inference, and after each round.
    """
    figure, axes = new_figure(6.4, 4)
    for name, values in accuracies.items():
        axes.plot(range(len(values)), 100 - np.array(values), marker="o", markersize=3, label=name)
    axes.set(xlabel="rounds of balancing by predictions (0: standard inference)", ylabel="top-1 error (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return to_png(figure)
