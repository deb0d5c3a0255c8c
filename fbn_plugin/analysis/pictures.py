"""The figures of the papers that show loss landscapes and the consistency of moments, as PNG.

Source: Horváth and Al-afandi, "Filtered Batch Normalization" (2020), Fig. 7, 9 and 11.
"""

import math
from collections.abc import Mapping, Sequence

from fbn_plugin.analysis.canvas import COLORS, new_figure, to_png
from fbn_plugin.analysis.landscape import Landscape
from fbn_plugin.analysis.moments import Distances

__all__ = ["draw_distances", "draw_landscapes", "draw_moments", "draw_steps"]

Curves = Mapping[str, Sequence[float]]

_LOSS, _CHANGE = "loss", "ℓ2 change of the gradient"
_MOMENTS = {"mean": "difference of the means", "var": "difference of the variances"}


def draw_landscapes(runs: Mapping[str, Curves], note: str = "") -> bytes:
    """Bands over the iterations of training: the range of the loss, and of the change of the gradient, along the
    gradient (Fig. 7 and 11).

    Args:
        runs: label -> curves of one length: ``iteration`` and the figures of
            :meth:`~fbn_plugin.analysis.landscape.Landscape.figures`; NaN leaves a gap.
        note: stands above the figure.
    """
    figure, axes = new_figure(11, 4, ncols=2)
    for panel, name, y_label in zip(axes, ("loss", "gradient"), (_LOSS, _CHANGE)):
        for color, (label, curves) in zip(_colors(runs), runs.items()):
            low, high = curves[f"{name}_min"], curves[f"{name}_max"]
            panel.fill_between(curves["iteration"], low, high, color=color, alpha=0.45, linewidth=0.4, label=label)
        panel.set(xlabel="iteration", ylabel=y_label, title=f"{name.capitalize()} landscape")
    return _finished(figure, axes, note)


def draw_steps(found: Mapping[str, Sequence[Landscape]], note: str = "") -> bytes:
    """Loss and gradient over the step size, at the weights of checkpoints: the mean over batches, and their range.

    Args:
        found: label -> landscapes on one batch or more, with the same steps.
        note: stands above the figure.
    """
    figure, axes = new_figure(11, 4, ncols=2)
    for color, (label, landscapes) in zip(_colors(found), found.items()):
        order = sorted(range(len(landscapes[0].steps)), key=landscapes[0].steps.__getitem__)
        steps = [0.0, *(landscapes[0].steps[i] for i in order)]
        losses = zip(*([each.loss, *(each.losses[i] for i in order)] for each in landscapes))
        changes = zip(*([0.0, *(each.changes[i] for i in order)] for each in landscapes))
        for panel, values in zip(axes, (list(losses), list(changes))):
            panel.fill_between(steps, [*map(min, values)], [*map(max, values)], color=color, alpha=0.2, linewidth=0)
            means = [sum(each) / len(each) for each in values]
            panel.plot(steps, means, marker="o", markersize=4, color=color, label=label)
    for panel, y_label in zip(axes, (_LOSS, _CHANGE)):
        panel.set(xlabel="step size along the gradient", ylabel=y_label)
        panel.locator_params(axis="x", nbins=5)
    return _finished(figure, axes, note)


def draw_moments(runs: Mapping[str, Mapping[str, Curves]], norms: Sequence[str], note: str = "") -> bytes:
    """Lines over the iterations of training: how far the moments of a part of the batch are from those of all of it, a
    row of panels for each run (Fig. 9).

    Args:
        runs: label -> spec of a norm -> curves of one length: ``iteration``, ``mean`` and ``var``.
        norms: the specs, in the order of their colours.
        note: stands above the figure.
    """
    figure, grid = new_figure(11, 3.6 * len(runs) + 0.3, nrows=len(runs), ncols=2, squeeze=False)
    for panels, (label, curves) in zip(grid, runs.items()):
        for panel, (moment, y_label) in zip(panels, _MOMENTS.items()):
            for color, spec in zip(_colors(norms), norms):
                if spec in curves:
                    panel.plot(curves[spec]["iteration"], curves[spec][moment], color=color, linewidth=1, label=spec)
            panel.set(xlabel="iteration", ylabel=y_label, title=label)
    return _finished(figure, grid.flat, note)


def draw_distances(found: Mapping[str, Sequence[Distances]], norms: Sequence[str], note: str = "") -> bytes:
    """The same at the weights of checkpoints, layer by layer, relative to the whole batch's deviation and variance: the
    mean over batches, and the range of them.

    Args:
        found: label -> distances on one batch or more.
        norms: the specs, in the order of their colours.
        note: stands above the figure.
    """
    figure, grid = new_figure(11, 3.6 * len(found) + 0.3, nrows=len(found), ncols=2, squeeze=False)
    for panels, (label, batches) in zip(grid, found.items()):
        layers = list(batches[0])
        places = range(len(layers))
        for panel, (moment, y_label) in zip(panels, _MOMENTS.items()):
            for color, spec in zip(_colors(norms), norms):
                if spec not in batches[0][layers[0]]:
                    continue
                values = [[getattr(each[layer][spec], f"relative_{moment}") for each in batches] for layer in layers]
                means = [sum(each) / len(each) for each in values]
                panel.plot(places, means, marker="o", markersize=4, color=color, label=spec)
                panel.vlines(places, [*map(min, values)], [*map(max, values)], color=color, alpha=0.5)
            unit = "in deviations" if moment == "mean" else "in variances"
            panel.set(ylabel=f"{y_label}, {unit}\nof the whole batch", title=label)
            shown = [i for i in places if i % math.ceil(len(layers) / 30) == 0]
            panel.set_xticks(shown, [layers[i] for i in shown], rotation=90 if len(layers) > 4 else 0, fontsize=8)
    return _finished(figure, grid.flat, note)


def _colors(labels: Sequence[str] | Mapping[str, object]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(labels))]


def _finished(figure, axes, note: str) -> bytes:
    shown: dict[str, object] = {}  # label -> one of the artists that have it
    for panel in axes:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=min(len(shown), 4), frameon=False)
    figure.suptitle(note, fontsize=9)
    return to_png(figure)
