"""The pictures of what was measured within a network: between which ends the activations of its layers lie, and how
those of single kernels are distributed. They are of one run of each variant, as the papers draw them of one network."""

import itertools
import math
from collections.abc import Sequence

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.studies.figures import Figure, Line, LinePanel
from fbn_plugin.engine.studies.outcomes import KernelDensity, LayerRange, Outcome, Study

__all__ = ["KERNELS", "LAYERS", "first_measured", "kernels_figure", "layers_figure"]

LAYERS, KERNELS = "layers", "kernels"  # their names, and their kinds
_BANDS, _ENDS = 1, 2  # styles
_GAUSSIAN, _MEASURED, _LIMITS = 0, 1, 2
_CAPTION = (
    "Of the first run of each variant: median, and the bands of {} % of a layer's values; the least and the greatest "
    "value. Layers in the order in which they are called; each variant at a scale of its own."
)


def first_measured(outcomes: Sequence[Outcome], what: str) -> dict[str, Outcome]:
    """Variant -> its run with the least seed, of those whose ``"layers"`` or ``"kernels"`` were measured."""
    found: dict[str, Outcome] = {}
    for each in sorted(outcomes, key=lambda outcome: outcome.seed):
        if getattr(each, what) and each.state == "done":
            found.setdefault(each.variant, each)
    return found


def layers_figure(study: Study, outcomes: Sequence[Outcome]) -> Figure | None:
    """A panel for each variant whose layers were measured; None where there is none."""
    runs = first_measured(outcomes, LAYERS)
    measured = {name: runs[name].layers for name in study.variants if name in runs}
    if not measured:
        return None
    percents = list(dict.fromkeys(percent for layers in measured.values() for each in layers for percent in each.bands))
    panels = [_panel(name, layers, percents) for name, layers in measured.items()]
    shares = ", ".join(percents[:-1]) + " and " * (len(percents) > 1) + percents[-1]
    legend = [(f"median, and bands of {shares} %, dark to light", _BANDS), ("least and greatest", _ENDS)]
    title = "Activations of each layer"
    return Figure(LAYERS, "", LAYERS, title, _CAPTION.format(shares), panels, legend)


def _panel(title: str, layers: Sequence[LayerRange], percents: Sequence[str]) -> LinePanel:
    x = [float(number) for number in range(1, len(layers) + 1)]
    none = [None] * len(layers)
    lines = [
        Line(f"{percent} %", _BANDS, x, [each.median for each in layers], [each.bands[percent] for each in layers])
        for percent in reversed(percents)
    ]
    lines += [Line("greatest", _ENDS, x, [each.maximum for each in layers], none)]
    lines += [Line("least", _ENDS, x, [each.minimum for each in layers], none)]
    return LinePanel(title, "layer", "normalized activation (deviations)", lines)


def kernels_figure(study: Study, outcomes: Sequence[Outcome]) -> Figure | None:
    """A panel for each kernel whose density was measured; None where there is none."""
    runs = first_measured(outcomes, KERNELS)
    found = [(name, each) for name in study.variants if name in runs for each in runs[name].kernels]
    if not found:
        return None
    panels = [_density_panel(name if len(runs) > 1 else "", each) for name, each in found]
    legend = [("measured", _MEASURED), ("unit Gaussian", _GAUSSIAN), ("what counts as passing", _LIMITS)]
    return Figure(KERNELS, "", KERNELS, "Activations of single kernels", _KERNELS_CAPTION, panels, legend)


_KERNELS_CAPTION = (
    "Of the first run of each variant: density of all activations of the kernel over the images, on a logarithmic "
    "axis. Beyond the upright lines an image counts as passing."
)


def _density_panel(variant: str, kernel: KernelDensity) -> LinePanel:
    passing = f"{kernel.passing:,} of {counted(kernel.images, 'image')} beyond {kernel.sigma:g} deviations"
    name = f"{kernel.layer}[{kernel.unit}]"
    title = f"{variant + ': ' if variant else ''}{name}: {passing}"
    lowest = min((value for value in kernel.values if value > 0), default=1.0)
    ends = (lowest / 3, 3 * max(1 / math.sqrt(2 * math.pi), *kernel.values))
    floor = lowest / 9  # below what is shown
    bins = list(zip(itertools.pairwise(kernel.edges), kernel.values))
    x = [edge for bin_edges, _ in bins for edge in bin_edges]
    y = [max(value, floor) for _, value in bins for _ in range(2)]
    lines = [Line("measured", _MEASURED, x, y, [None] * len(x)), _gaussian(ends[0])]
    lines += [Line("", _LIMITS, [at, at], list(ends), [None, None]) for at in (-kernel.sigma, kernel.sigma)]
    return LinePanel(title, "normalized activation (deviations)", "density", lines, y_range=ends, is_log_y=True)


def _gaussian(lowest: float) -> Line:
    """The unit Gaussian, as far down as is shown."""
    reach = math.sqrt(max(-2 * math.log(lowest * math.sqrt(2 * math.pi)), 1.0))
    x = [reach * (i / 40 - 1) for i in range(81)]
    y = [math.exp(-at * at / 2) / math.sqrt(2 * math.pi) for at in x]
    return Line("unit Gaussian", _GAUSSIAN, x, y, [None] * len(x))
