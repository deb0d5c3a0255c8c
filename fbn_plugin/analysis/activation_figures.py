"""Pictures of activations in the form of Horváth and Al-afandi, "Filtered Batch Normalization" (2020): bands over the
depth of a network (figures 1 and 2), and a kernel's density below the images that pass some deviations in it (figure
3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fbn_plugin.analysis.bands import SET, SHARES, ActivationBands, KernelActivations
from fbn_plugin.analysis.canvas import new_figure, to_png

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["bands_figure", "kernel_figure"]

_RED, _ORANGE, _GOLD, _INK, _SOFT = "#c0392b", "#e08e2b", "#d4a017", "#222222", "#555555"
_COLUMNS = 8  # thumbnails in a row
_MOST_NAMES = 60  # layers that are named at the axis


def bands_figure(found: ActivationBands, title: str = "") -> bytes:
    """PNG of the bands of each layer over depth: dashed the least and the largest activation, in gold the ends of the
    98 %, filled the 75 % and, in red, the 50 % around the middle. Layers that are normalized by their mean and
    deviation over the images, as they have no norm, stand on grey.

    Args:
        found: with layers that have values.
        title: above it.

    Raises:
        ValueError: no layer has a value.
    """
    layers = [layer for layer in found.layers if layer.count]
    if not layers:
        raise ValueError("no layer has a finite activation: there is nothing to draw")
    width = min(16.0, max(6.4, 2.2 + 0.22 * len(layers)))
    figure, axes = new_figure(width, 5.2)
    _tidy(axes)
    x = np.arange(1, len(layers) + 1)
    low, high = ({share: [layer.bands[share][end] for layer in layers] for share in SHARES} for end in (0, 1))
    inner, middle, outer = SHARES
    marker = {"marker": "o"} if len(layers) == 1 else {}
    axes.fill_between(x, low[inner], high[inner], color=_RED, alpha=0.85, linewidth=0, label=f"{inner} %", zorder=2)
    axes.fill_between(x, low[middle], high[middle], color=_ORANGE, alpha=0.35, linewidth=0, label=f"{middle} %")
    for ends, label in ((low, f"{outer} %"), (high, None)):
        axes.plot(x, ends[outer], color=_GOLD, linewidth=2, label=label, **marker)
    for ends, label in (
        ([layer.minimum for layer in layers], "minimum, maximum"),
        ([layer.maximum for layer in layers], None),
    ):
        axes.plot(x, ends, "--", color=_INK, linewidth=1.2, label=label, **marker)
    plain = [at for at, layer in zip(x, layers) if layer.normalized_by == SET]
    for number, at in enumerate(plain):
        label = "no norm: each unit by its own\nmean and deviation over the images" if not number else None
        axes.axvspan(at - 0.5, at + 0.5, color="#e6e6e6", zorder=0, linewidth=0, label=label)
    axes.set_xlim(0.5, len(layers) + 0.5)
    step = -(-len(layers) // _MOST_NAMES)
    axes.set_xticks(x[::step], [layer.name or "the model" for layer in layers[::step]], rotation=90, fontsize=7)
    axes.set_xlabel("layer, in the order of the network", color=_SOFT)
    axes.set_ylabel("normalized activation [standard deviations σ]", color=_SOFT)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK, wrap=True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return to_png(figure)


def kernel_figure(
    kernel: KernelActivations, sigma: float, pictures: Sequence[Image.Image] = (), title: str = ""
) -> bytes:
    """PNG of one kernel: images that pass ``sigma`` deviations in it, each with its activation furthest from zero, and
    below them the density of all of its activations on a logarithmic axis, where a Gaussian is a parabola.

    Args:
        kernel: what was measured.
        sigma: where the dashed lines stand.
        pictures: of the first images of ``kernel.passing(sigma)``.
        title: above it.

    Raises:
        ValueError: the kernel has no finite activation.
    """
    edges, density = kernel.density()
    if not len(density):
        raise ValueError(f"unit {kernel.unit} of layer {kernel.layer!r} has no finite activation: nothing to draw")
    rows = -(-len(pictures) // _COLUMNS)
    ratios = {"height_ratios": [*[1.0] * rows, 2.8]}
    figure, grid = new_figure(8.4, 3.6 + 1.25 * rows, nrows=rows + 1, ncols=_COLUMNS, squeeze=False, gridspec_kw=ratios)
    for axes in grid.flat:
        axes.set_axis_off()
    passing = kernel.passing(sigma)
    for thumbnail, place, picture in zip(grid.flat, range(len(passing)), pictures):
        thumbnail.imshow(np.asarray(picture.convert("RGB")))
        thumbnail.set_title(f"{kernel.peaks[passing[place]].item():.1f}σ", fontsize=7, color=_SOFT, pad=2)
    plot = figure.add_subplot(grid[0, 0].get_gridspec()[rows, :])
    _tidy(plot)
    edges, density = edges.numpy(), density.numpy()
    plot.stairs(density, edges, color=_RED, fill=True, alpha=0.35)
    plot.stairs(density, edges, color=_RED, linewidth=1.0, label="measured")
    _gaussian(plot, edges, density)
    for number, at in enumerate(at for at in (-sigma, sigma) if edges[0] <= at <= edges[-1]):
        plot.axvline(at, color=_INK, linestyle="--", linewidth=1, label=None if number else f"±{sigma:g}σ")
    plot.set_yscale("log")
    plot.set_xlabel(
        f"normalized activation of unit {kernel.unit} of {kernel.layer} [standard deviations σ]", color=_SOFT
    )
    plot.set_ylabel("density [1/σ]", color=_SOFT)
    plot.legend(frameon=False, fontsize=8)
    figure.suptitle(title, x=0.02, ha="left", fontsize=10, fontweight="bold", color=_INK, wrap=True)
    return to_png(figure)


def _gaussian(axes, edges: np.ndarray, density: np.ndarray) -> None:
    """The unit Gaussian, as far down as the measured density goes."""
    x = np.linspace(edges[0], edges[-1], 400)
    y = np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)
    lowest = density[density > 0].min()
    shown = y >= lowest / 3
    axes.plot(x[shown], y[shown], color=_SOFT, linewidth=1, linestyle=":", label="unit Gaussian")
    axes.set_ylim(lowest / 3, 2 * max(density.max(), y.max() if shown.any() else 0))


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_SOFT, labelsize=8)
