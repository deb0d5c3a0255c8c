"""What is measured on one training batch, with a model as it is: the landscape of its loss, the consistency of its
moments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from fbn_plugin.analysis.landscape import Landscape, measure_landscape
from fbn_plugin.analysis.moments import Distances, measure_moments
from fbn_plugin.engine.classification.preparation import BatchPreparation

__all__ = ["BatchMeasures"]


class BatchMeasures:
    """Measures on batches as the loader gives them; each pass of a measurement mixes and drops what the training itself
    does there. In full precision.

    Args:
        model: in training mode.
        prepare: of the same model.
        loss: of logits and targets.
        seed: of the run.
    """

    def __init__(self, model: nn.Module, prepare: BatchPreparation, loss: nn.Module, seed: int):
        self._model, self._prepare, self._loss, self._seed = model, prepare, loss, seed

    def landscape(self, iteration: int, images: Tensor, targets: Tensor, steps: Sequence[float]) -> Landscape:
        """See :func:`fbn_plugin.analysis.landscape.measure_landscape`.

        Args:
            iteration: that the batch is of, from 0; of its steps the first.
            images: (N, C, H, W).
            targets: class indices (N,).
            steps: step sizes.
        """

        def loss() -> Tensor:
            inputs, labels = self._prepared(iteration, images, targets)
            return self._loss(self._model(inputs), labels)

        return measure_landscape(self._model, loss, steps)

    def moments(self, iteration: int, images: Tensor, targets: Tensor, subset: int, norms: Sequence[str]) -> Distances:
        """See :func:`fbn_plugin.analysis.moments.measure_moments`; the images are drawn by the seed and the iteration.

        Args:
            iteration, images, targets: as above.
            subset: how many images.
            norms: by which their moments are taken.
        """
        inputs, _ = self._prepared(iteration, images, targets)
        drawn = np.random.default_rng((self._seed, iteration)).choice(len(images), subset, replace=False)
        return measure_moments(self._model, lambda: self._model(inputs), drawn.tolist(), norms)

    def _prepared(self, iteration: int, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._prepare(iteration, 0, images.clone(), targets)  # a copy, as mixing writes into it
