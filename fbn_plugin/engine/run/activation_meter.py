"""Quantiles of activations while a model trains, layer by layer, as scalars beside the loss: the group
MEASURE.ACTIVATIONS of every engine's config. Sources: Horváth and Al-afandi, "Filtered Batch Normalization" (2020),
figure 4; Ioffe and Szegedy, "Batch Normalization" (2015), figure 1.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fbn_plugin.adapters import load_adapters
from fbn_plugin.analysis.layer_names import LayerName, check_unit, find_layer, parse_layer_name
from fbn_plugin.analysis.normalized_values import channel_dim, moments_taken, normalized
from fbn_plugin.analysis.quantiles import QuantileSketch
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.rules import MOST_ITERATIONS, Rule, at_least, between, each_of, named, refusal
from fbn_plugin.layers.description import describe

__all__ = ["ACTIVATION_KEYS", "ACTIVATION_RULES", "ActivationMeter", "build_activation_meter"]

ACTIVATION_KEYS: dict[str, Any] = {
    "PERIOD": 0,  # iterations between two measurements; 0 is off
    "LAYERS": (),  # "layer4.0.bn3", one unit of it, "layer4.0.bn3[7]", or what comes to or leaves a layer, "act@input"
    "QUANTILES": (0.0, 0.25, 0.5, 0.75, 1.0),
}

_GROUP = "MEASURE.ACTIVATIONS"
_MOST_LAYERS = 1000


def _are_layers(given: Any) -> bool:
    if not isinstance(given, list | tuple) or len(given) > _MOST_LAYERS or len(set(given)) < len(given):
        return False
    try:
        return bool([parse_layer_name(each) for each in given] or True)
    except ValueError:
        return False


ACTIVATION_RULES = {
    f"{_GROUP}.PERIOD": at_least(0, MOST_ITERATIONS),
    f"{_GROUP}.LAYERS": Rule(
        "names of layers, each once, such as 'layer4.0.bn3', 'layer4.0.bn3[7]' or 'layer4.0.act3@input'", _are_layers
    ),
    f"{_GROUP}.QUANTILES": each_of(100, between(0, 1)),
}


class ActivationMeter:
    """Measures activations of a model in chosen iterations::

        meter = ActivationMeter(model, period=50, layers=["features.conv3.norm"], quantiles=[0.25, 0.5, 0.75])
        with meter.measure(iteration) as found:
            loss = model(images)
        log(found)  # {"activations/features.conv3.norm/q25": -0.6, ...}, or {} in other iterations

    Of a norm it is the normalized values before scale and shift, by the moments that the norm takes in training; of
    another layer its output; with ``@input`` or ``@output`` behind the name what comes to any layer, or leaves it, as
    it is. A measurement changes nothing. All forward passes of the block count together, and all calls of a layer in
    one. A layer that no value reaches is left out. Values that are not finite are in no quantile, and their number is
    added as ``activations/<layer>/not_finite``.

    Args:
        model: in training mode when it is measured.
        period: iterations between two measurements, the first one after ``period`` iterations; 0 is never.
        layers: names, see :func:`~fbn_plugin.analysis.layer_names.parse_layer_name`.
        quantiles: from 0 to 1; they are as :class:`~fbn_plugin.analysis.quantiles.QuantileSketch` has them.

    Raises:
        ValueError: a period below 0, a layer or unit that the model does not have.
        UserError: in a block, a unit that a layer does not have whose width was not known before.
    """

    def __init__(self, model: nn.Module, period: int, layers: Sequence[str], quantiles: Sequence[float]):
        if period < 0:
            raise ValueError(f"the period must be 0 (never) or more, got {period}")
        load_adapters()
        self.period, self._quantiles = period, tuple(quantiles)
        self._layers = [(layer, find_layer(model, layer.name)) for layer in map(parse_layer_name, layers)]
        for layer, module in self._layers:
            check_unit(layer, module)

    @contextlib.contextmanager
    def measure(self, iteration: int) -> Iterator[dict[str, float]]:
        """Fill the mapping that it gives at the end of the block, if ``iteration`` (from 0) ends a period."""
        found: dict[str, float] = {}
        if not self.period or (iteration + 1) % self.period:
            yield found
            return
        sketches: dict[LayerName, QuantileSketch] = {}
        handles = [self._hook(layer, module, sketches) for layer, module in self._layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
        for layer, sketch in sketches.items():
            for q, value in zip(self._quantiles, sketch.quantile(self._quantiles)[0].tolist()):
                found[f"activations/{layer}/q{100 * q:g}"] = value
            if odd := (sketch.nan + sketch.infinite).item():
                found[f"activations/{layer}/not_finite"] = odd

    def _hook(self, layer: LayerName, module: nn.Module, sketches: dict[LayerName, QuantileSketch]):
        if layer.side == "output" or (not layer.side and moments_taken(module) is None):
            hook = functools.partial(_after, layer, sketches)
            return module.register_forward_hook(hook)
        look = normalized if not layer.side else lambda module, x: x
        hook = functools.partial(_before, layer, sketches, look)
        return module.register_forward_pre_hook(hook, with_kwargs=True)


@torch.no_grad()
def _before(
    layer: LayerName,
    sketches: dict[LayerName, QuantileSketch],
    look: Callable[[nn.Module, Tensor], Tensor],
    module: nn.Module,
    args: tuple,
    kwargs: dict,
) -> None:
    x = args[0] if args else next(iter(kwargs.values()), None)
    if isinstance(x, Tensor) and x.numel():
        _add(layer, sketches, module, look(module, x))


def _after(
    layer: LayerName, sketches: dict[LayerName, QuantileSketch], module: nn.Module, args: tuple, output: Any
) -> None:
    if isinstance(output, Tensor) and output.numel():
        _add(layer, sketches, module, output)


def _add(layer: LayerName, sketches: dict[LayerName, QuantileSketch], module: nn.Module, values: Tensor) -> None:
    values = values.detach()
    if layer.unit is not None:
        dim = channel_dim(module, values)
        if layer.unit >= values.shape[dim]:
            raise UserError(
                f"{_GROUP}.LAYERS: layer {layer.name!r} has units 0 to {values.shape[dim] - 1}, got {layer.unit}"
            )
        values = values.select(dim, layer.unit)
    if layer not in sketches:
        sketches[layer] = QuantileSketch(device=values.device)
    sketches[layer].update(values)


def build_activation_meter(cfg: Mapping[str, Any], model: nn.Module) -> ActivationMeter:
    """The meter that MEASURE.ACTIVATIONS describes, for which ``ACTIVATION_RULES`` hold. Every process has one, as
    synchronized norms exchange moments for it; the first one's figures, of its own images, are logged.

    Raises:
        ValueError: a period without a layer, or a layer that the model does not have.
    """
    options = cfg["MEASURE"]["ACTIVATIONS"]
    if options["PERIOD"] and not options["LAYERS"]:
        raise refusal(f"{_GROUP}.LAYERS", f"one layer or more with {_GROUP}.PERIOD", options["LAYERS"])
    with named(f"{_GROUP}.LAYERS"):
        meter = ActivationMeter(model, options["PERIOD"], options["LAYERS"], options["QUANTILES"])
    synchronized = any(getattr(describe(module), "synchronized", False) for _, module in meter._layers)
    if not (distributed.is_main() or synchronized):
        meter.period = 0
    return meter
