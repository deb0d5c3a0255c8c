"""The picture of a network's layers: between which ends their activations lie. It is of one run of each variant, as the
papers draw it of one network."""

from collections.abc import Sequence

from fbn_plugin.engine.studies.figures import Figure, Line, LinePanel
from fbn_plugin.engine.studies.outcomes import LayerRange, Outcome, Study

__all__ = ["LAYERS", "first_measured", "layers_figure"]

LAYERS = "layers"  # its name, and its kind
_BANDS, _ENDS = 1, 2  # styles
_CAPTION = (
    "Of the first run of each variant: median, and the bands of {} % of a layer's values; the least and the greatest "
    "value. Layers in the order in which they are called."
)


def first_measured(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """Variant -> its run with the least seed, of those whose layers were measured."""
    found: dict[str, Outcome] = {}
    for each in sorted(outcomes, key=lambda outcome: outcome.seed):
        if each.layers and each.state == "done":
            found.setdefault(each.variant, each)
    return found


def layers_figure(study: Study, outcomes: Sequence[Outcome]) -> Figure | None:
    """A panel for each variant whose layers were measured; None where there is none."""
    runs = first_measured(outcomes)
    measured = {name: runs[name].layers for name in study.variants if name in runs}
    if not measured:
        return None
    percents = list(dict.fromkeys(percent for layers in measured.values() for each in layers for percent in each.bands))
    panels = [_panel(name, layers, percents) for name, layers in measured.items()]
    shares = ", ".join(percents[:-1]) + " and " * (len(percents) > 1) + percents[-1]
    legend = [(f"median, {shares} %", _BANDS), ("least and greatest", _ENDS)]
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
