"""Layers of a model by name, as configs and command lines write them: ``features.fc3.norm``, one unit of it,
``features.fc3.norm[7]``, and its input as it is, ``features.fc3.act@input[7]``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fbn_plugin.layers.description import describe
from fbn_plugin.surgery.norm_summary import num_channels

__all__ = ["LayerName", "check_unit", "find_layer", "nearest_names", "parse_layer_name"]

_FORM = re.compile(r"(?P<name>[^@\[\]]*)(?:@(?P<side>input|output))?(?:\[(?P<unit>\d{1,9})\])?")


@dataclass(frozen=True)
class LayerName:
    """What is measured of which layer.

    Attributes:
        name: of the module in ``named_modules()``; empty for the model itself.
        unit: index of a channel or unit; None for all of them.
        side: ``"input"`` or ``"output"``, as they are; ``""`` for what says most of the layer: of a norm the
            normalized values before scale and shift, of another layer its output.
    """

    name: str
    unit: int | None = None
    side: str = ""

    def __str__(self) -> str:
        side = f"@{self.side}" if self.side else ""
        return f"{self.name}{side}" + ("" if self.unit is None else f"[{self.unit}]")


def parse_layer_name(text: str) -> LayerName:
    """Read the name of a layer, see the module's docstring.

    Raises:
        ValueError: it is none.

    Examples::

        >>> parse_layer_name("layer4.0.bn3[453]")
        LayerName(name='layer4.0.bn3', unit=453, side='')
        >>> str(parse_layer_name("fc3.act@input[7]"))
        'fc3.act@input[7]'
    """
    found = _FORM.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"a layer must be named as 'layer', 'layer[7]', 'layer@input' or 'layer@input[7]', got {text!r}"
        )
    unit = None if found["unit"] is None else int(found["unit"])
    return LayerName(found["name"], unit, found["side"] or "")


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The module of a name, all of whose names count where it has more than one.

    Raises:
        ValueError: there is none; with the nearest names.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(f"the model has no layer {name!r}{nearest_names(name, modules)}")
    return modules[name]


def check_unit(layer: LayerName, module: nn.Module) -> None:
    """Refuse a unit that a layer does not have, as far as the module tells how many it has.

    Raises:
        ValueError: it has not.
    """
    width = _width(module, layer.side)
    if layer.unit is not None and width is not None and layer.unit >= width:
        raise ValueError(f"layer {layer.name!r} has units 0 to {width - 1}, got {layer.unit}")


def _width(module: nn.Module, side: str) -> int | None:
    """Units of what comes to a layer or leaves it; None where the layer does not tell."""
    if isinstance(module, nn.Linear):
        return module.in_features if side == "input" else module.out_features
    if isinstance(module, _ConvNd):
        return module.in_channels if side == "input" else module.out_channels
    return num_channels(module) if describe(module) is not None else None


def nearest_names(name: str, known: Iterable[str]) -> str:
    """What to add to a sentence that a name is unknown: up to three that are like it, else the first and last one."""
    known = [each for each in known if each]
    nearest = difflib.get_close_matches(name, known, n=3)
    if not nearest:
        nearest = [each for each in known if each.rpartition(".")[2] == name][:3]
    if nearest:
        return f"; did you mean {' or '.join(map(repr, nearest))}?"
    return f"; its layers are called {known[0]!r} to {known[-1]!r}" if known else "; it has none"
