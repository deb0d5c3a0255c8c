"""Measuring the activations of a network that was found over images that were found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fbn_plugin.analysis.bands import SET, ActivationBands, measure_bands
from fbn_plugin.analysis.layer_names import LayerName
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.data.loaders import data_loader
from fbn_plugin.engine.inspection.model_sources import FoundModel
from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.training.population_statistics import forward_batch

__all__ = ["bands_of", "layer_rows"]


def bands_of(
    found: FoundModel,
    images: Images,
    device: torch.device,
    *,
    batch_size: int = 32,
    workers: int = 0,
    layers: Sequence[str] = (),
    sigmas: Sequence[float] = (),
    kernels: Sequence[LayerName] = (),
) -> ActivationBands:
    """Measure a network's bands, see :func:`~fbn_plugin.analysis.bands.measure_bands`.

    Args:
        found: the network; it is brought to ``device``.
        images: what it is shown.
        device: where.
        batch_size: images at a time.
        workers: processes that load images.
        layers, sigmas, kernels: as ``measure_bands`` has them.

    Raises:
        ValueError: what it raises.
        UserError: an image cannot be read, or the network cannot be called with the images.
    """
    model = found.model.to(device)
    shown = images.part(range(len(images)))  # the given ones stay without the transform
    shown.transform = found.transform
    collate = None if found.forward is None else _together
    loader = data_loader(shown, batch_size=batch_size, num_workers=workers, collate_fn=collate)

    def forward(model: nn.Module, batch: Any) -> None:
        try:
            if found.forward is None:
                forward_batch(model, batch, device)
            else:
                found.forward(model, batch[0])
        except (RuntimeError, TypeError, AssertionError, IndexError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{found.title} cannot be called with these images: {reason}") from error

    def watch(batches: Iterable[Any], what: str) -> Iterable[Any]:
        return stopping.until_asked(tqdm(batches, what, leave=False, disable=None))

    options = {"layers": layers, "sigmas": sigmas, "kernels": kernels}
    return measure_bands(model, loader, forward=forward, watch=watch, **options)


def _together(batch: list[tuple[Any, int]]) -> tuple[list[Any]]:
    return ([entry for entry, _ in batch],)


def layer_rows(found: ActivationBands, sigma: float) -> list[list[str]]:
    """A table of the layers, its head first: ends, the band of 98 %, the share beyond ``sigma`` deviations, and the
    unit that goes furthest."""
    head = ["layer", "kind", "minimum", "98 %", "maximum", f"beyond {sigma:g}σ", "furthest unit"]
    rows = [head]
    for layer in found.layers:
        mark = " *" if layer.normalized_by == SET else ""
        if not layer.count:
            rows.append([layer.name + mark, layer.kind, "-", "-", "-", "-", "-"])
            continue
        low, high = layer.bands[98]
        share = layer.beyond.get(sigma)
        rows.append(
            [
                layer.name + mark,
                layer.kind,
                f"{layer.minimum:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{layer.maximum:.2f}",
                "-" if share is None else f"{100 * share:.3g} %",
                str(layer.furthest_unit),
            ]
        )
    return rows
