"""Bands of a classification run's trained model over its validation images: MEASURE.BANDS."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from fbn_plugin.analysis.bands import measure_bands
from fbn_plugin.engine.classification.data import build_val_loader
from fbn_plugin.engine.classification.model import model_title
from fbn_plugin.engine.data.image_data import ImageData
from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.activation_files import band_figures, write_activations
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.logging import TrainingLog
from fbn_plugin.engine.run.run_info import ACTIVATIONS_FILE
from fbn_plugin.engine.run.schedule import recorded_evaluation

__all__ = ["RunBands"]

_PREFIX = "val/bands/"


class RunBands:
    """Measures once, at the end of a run, writes ``activations.json`` and ``bands.png`` into its folder, and into
    ``metrics.json``, beside those of the last evaluation, the figures that
    :func:`~fbn_plugin.engine.run.activation_files.band_figures` makes of it. It runs in one process, by the weights
    that training ended with and the population's moments.

    Args:
        cfg: config.
        model: the trained one, on ``device``.
        data: whose validation images are measured.
        device: of this process.
        log: where the figures go.
        finished: iterations of the whole run.
    """

    def __init__(
        self, cfg: CfgNode, model: nn.Module, data: ImageData, device: torch.device, log: TrainingLog, finished: int
    ):
        self._cfg, self._model, self._data, self._device = cfg, model, data, device
        self._log, self._finished = log, finished

    def __call__(self) -> dict[str, float]:
        """The figures, as ``bands/minimum`` and so on; those of ``metrics.json`` where a resumed run has them.

        Raises:
            Terminated: the run is asked to stop.
        """
        folder = self._cfg.OUTPUT_DIR
        found = recorded_evaluation(folder, self._finished, lambda name: name.startswith(_PREFIX))
        if not found or not os.path.isfile(os.path.join(folder, ACTIVATIONS_FILE)):
            measured = stopping.leavable(self._measure)
            if measured is None:
                stopping.leave()
            found = {f"{_PREFIX}{name}": value for name, value in measured.items()}
            self._log.write(self._finished - 1, found)
        return {name.removeprefix("val/"): value for name, value in found.items()}

    def _measure(self) -> dict[str, float]:
        cfg = self._cfg
        loader = build_val_loader(cfg, self._data.val, self._device)

        def watch(batches: Iterable, what: str) -> Iterable:
            return tqdm(batches, what, leave=False, disable=None)

        measure = cfg.MEASURE
        found = measure_bands(self._model, loader, kernels=measure.KERNELS, watch=watch)
        model = model_title(cfg)
        after = f"{self._finished:,} iterations" if self._finished else "no training"
        write_activations(
            cfg.OUTPUT_DIR,
            found,
            model=model,
            weights=f"of this run, after {after}" if self._is_trained() else None,
            images=f"{self._data.title}, validation",
            device=self._device,
            title=f"{model} on {self._data.title}: {found.images:,} validation images",
            sigma=measure.SIGMA,
            image_of=self._image,
            details={"iteration": self._finished - 1, "image_size": cfg.INPUT.SIZE},
        )
        return band_figures(found, measure.SIGMA)

    def _image(self, number: int) -> tuple[str, Image.Image]:
        """Name and picture of a validation image, as it is stored."""
        images = copy.copy(self._data.val)
        images.transform = None
        return images.name_of(number), images[number][0]

    def _is_trained(self) -> bool:
        model = self._cfg.MODEL
        return bool(self._finished or model.WEIGHTS or model.PRETRAINED)
