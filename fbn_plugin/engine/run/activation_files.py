"""What was measured of a network's activations, on the disk: ``activations.json`` with what it was measured on and by,
and the pictures beside it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fbn_plugin.analysis.activation_figures import bands_figure, kernel_figure
from fbn_plugin.analysis.bands import ActivationBands, KernelActivations, batch_probability
from fbn_plugin.engine.files.disk import atomic_write, writing
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.run_info import ACTIVATIONS_FILE, hardware, package_versions
from fbn_plugin.engine.run.source import source_commit

__all__ = ["band_figures", "kernel_sentence", "write_activations"]

BATCH = 16  # images of the batch whose probability to hold an image that passes is told, as in the paper
_FORMAT = 1
_MEASURED = (
    "activations, normalized and before scale and shift, in standard deviations; of layers without a norm their "
    "output, normalized by mean and deviation of each unit over the images"
)
_MOST_PICTURES = 16
_SIDE = 160  # pixels of a thumbnail

ImageOf = Callable[[int], tuple[str, Image.Image]]


def band_figures(found: ActivationBands, sigma: float = 14.0) -> dict[str, float]:
    """The main figures of a network's bands, in deviations.

    Args:
        found: what was measured.
        sigma: the images beyond so many deviations in a kernel are counted.

    Returns:
        ``minimum``, ``maximum``: the least and the largest activation of all layers. ``reach``: how far from zero that
        is, and ``least_reach`` the same of the layer where it is least. ``end98``: the end furthest from zero of all
        bands of 98 %. ``beyond5``: the share beyond 5 deviations, as the mean over the layers. With kernels,
        ``passing``: how many images pass in one, as the mean over them, ``passing_share``, and ``batch_probability``,
        that a batch of 16 holds one.
    """
    layers = [layer for layer in found.layers if layer.count]
    if not layers:
        return dict.fromkeys(("minimum", "maximum", "reach", "least_reach", "end98", "beyond5"), math.nan)
    reaches = [max(-layer.minimum, layer.maximum) for layer in layers]
    figures = {
        "minimum": min(layer.minimum for layer in layers),
        "maximum": max(layer.maximum for layer in layers),
        "reach": max(reaches),
        "least_reach": min(reaches),
        "end98": max(abs(end) for layer in layers for end in layer.bands[98]),
        "beyond5": sum(layer.beyond[5.0] for layer in layers) / len(layers) if 5.0 in layers[0].beyond else math.nan,
    }
    told = [kernel for kernel in found.kernels if kernel.peaks is not None]
    if told:
        passing = [len(kernel.passing(sigma)) for kernel in told]
        figures["passing"] = sum(passing) / len(told)
        figures["passing_share"] = figures["passing"] / found.images
        chances = [batch_probability(count, len(kernel.peaks), BATCH) for count, kernel in zip(passing, told)]
        figures["batch_probability"] = sum(chances) / len(told)
    return figures


def kernel_sentence(kernel: KernelActivations, sigma: float) -> str:
    """How many images pass in a kernel, in words."""
    where = f"unit {kernel.unit} of {kernel.layer}"
    if kernel.peaks is None:
        return f"{where}: which image a value is of cannot be told, as {kernel.note}"
    passing, images = len(kernel.passing(sigma)), len(kernel.peaks)
    share = batch_probability(passing, images, BATCH)
    return (
        f"{where}: {passing} of {counted(images, 'image')} beyond {sigma:g}σ; a batch of {BATCH} holds one with "
        f"probability {share:.4f}"
    )


def write_activations(
    folder: str | os.PathLike,
    found: ActivationBands,
    *,
    model: str,
    weights: str | None,
    images: str,
    device: torch.device | str,
    title: str,
    sigma: float = 14.0,
    image_of: ImageOf | None = None,
    command: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``activations.json``, ``bands.png`` and for each kernel ``kernel_<layer>_<unit>.png``.

    Args:
        folder: is made where it is not there.
        found: what was measured; a picture of what has no finite value is left out.
        model: in words.
        weights: where they are from; None where the network is not trained.
        images, device: the set's name, and what measured.
        title: of the picture of the bands.
        sigma: the images beyond so many deviations in a kernel are listed, and the first ones shown.
        image_of: name and picture of an image by its number.
        command: the command line, if there was one.
        details: further entries.

    Returns:
        the files.

    Raises:
        OSError: they cannot be written.
    """
    folder = Path(folder)
    with writing(folder):
        os.makedirs(folder, exist_ok=True)
    content = {
        "format": _FORMAT,
        "measured": _MEASURED,
        "model": model,
        "weights": weights,
        "trained": weights is not None,
        "dataset": images,
        **(details or {}),
        "figures": {name: _number(value) for name, value in band_figures(found, sigma).items()},
        **found.as_dict(),
        "kernels": [_kernel(kernel, sigma, image_of) for kernel in found.kernels],
        **_origin(command, device),
    }
    files = {ACTIVATIONS_FILE: (json.dumps(content, indent=1) + "\n").encode()}
    if any(layer.count for layer in found.layers):
        files["bands.png"] = bands_figure(found, title)
    for kernel in found.kernels:
        if kernel.sketch.count.item():
            pictures = _pictures(kernel.passing(sigma), image_of)
            files[_file_name(kernel)] = kernel_figure(kernel, sigma, pictures, kernel_sentence(kernel, sigma))
    for name, data in files.items():
        atomic_write(folder / name, data)
    return [folder / name for name in files]


def _origin(command: str | None, device: torch.device | str) -> dict[str, Any]:
    """How it was made."""
    commit, dirty = source_commit() or (None, None)
    return {
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "hardware": hardware(device),
        "versions": package_versions(),
    }


def _kernel(kernel: KernelActivations, sigma: float, image_of: ImageOf | None) -> dict[str, Any]:
    edges, density = kernel.density()
    passing = kernel.passing(sigma)
    known = kernel.peaks is not None
    images = len(kernel.peaks) if known else None
    return {
        "layer": kernel.layer,
        "unit": kernel.unit,
        "count": kernel.sketch.count.item(),
        "minimum": _number(kernel.sketch.minimum.item()),
        "maximum": _number(kernel.sketch.maximum.item()),
        "sigma": sigma,
        "images": images,
        "passing": len(passing) if known else None,
        "batch_size": BATCH,
        "batch_probability": batch_probability(len(passing), images, BATCH) if known else None,
        "gallery": [
            {
                "number": number,
                "image": image_of(number)[0] if image_of else None,
                "activation": kernel.peaks[number].item(),
            }
            for number in passing
        ],
        "density": {"edges": edges.tolist(), "values": density.tolist()},
        "note": kernel.note,
    }


def _pictures(passing: Sequence[int], image_of: ImageOf | None) -> list[Image.Image]:
    if image_of is None:
        return []
    pictures = [image_of(number)[1] for number in passing[:_MOST_PICTURES]]
    for picture in pictures:
        picture.thumbnail((_SIDE, _SIDE))
    return pictures


def _file_name(kernel: KernelActivations) -> str:
    layer = re.sub(r"[^\w.-]", "_", kernel.layer) or "model"
    return f"kernel_{layer}_{kernel.unit}.png"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
