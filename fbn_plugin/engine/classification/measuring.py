"""What a training measures beside loss and accuracy, the group MEASURE of its config: scalars in ``metrics.json``, from
iterations that end a period. The trained bits are the same with and without.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn

from fbn_plugin.analysis.layer_names import check_unit, find_layer, parse_layer_name
from fbn_plugin.analysis.moments import batch_norms, check_norm, flat_distances
from fbn_plugin.engine.classification.batch import BatchSizes
from fbn_plugin.engine.classification.batch_measures import BatchMeasures
from fbn_plugin.engine.classification.step import TrainingStep
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.activation_meter import ACTIVATION_RULES, ActivationMeter, build_activation_meter
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.logging import Timer, TrainingLog
from fbn_plugin.engine.run.norm_stats import FilterMeter
from fbn_plugin.engine.run.rules import (
    MOST_ITERATIONS,
    Rule,
    above,
    at_least,
    check_values,
    each_of,
    exactly,
    named,
    refusal,
)

__all__ = ["RULES", "Measurement", "Measuring", "check_measured"]

RULES = {
    "MEASURE.LANDSCAPE.PERIOD": at_least(0, MOST_ITERATIONS),
    "MEASURE.LANDSCAPE.STEPS": each_of(100, above(0, 1e6)),
    "MEASURE.MOMENTS.PERIOD": at_least(0, MOST_ITERATIONS),
    "MEASURE.MOMENTS.SUBSET": at_least(2, 2**20),
    "MEASURE.MOMENTS.NORMS": Rule("1 to 100 norms, each once", lambda given: 0 < len(set(given)) == len(given) <= 100),
    "MEASURE.KERNELS": Rule(
        "units of layers, each once, such as 'layer4.1.bn2[453]'", lambda given: len(set(given)) == len(given) <= 1000
    ),
    "MEASURE.SIGMA": above(0, 1e6),
    **ACTIVATION_RULES,
}

# Of one process's images, which are not the batch where there are more.
_OF_ONE_PROCESS = ("LANDSCAPE", "MOMENTS")


def check_measured(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse to measure what a run does not have.

    Raises:
        ValueError: in one sentence.
    """
    if (world := distributed.world_size()) > 1:
        reason = f"with {world} processes, each of which has a part of the batch"
        check_values(cfg, {f"MEASURE.{name}.PERIOD": exactly(0, reason) for name in _OF_ONE_PROCESS})
        check_values(cfg, {"MEASURE.BANDS": exactly(False, f"with {world} processes")})
    if cfg.MODEL.COMPILE:  # its code is of the layers without hooks
        hooked = ("MEASURE.ACTIVATIONS.PERIOD", "NORM_STATS_PERIOD")
        check_values(cfg, {key: exactly(0, "with MODEL.COMPILE") for key in hooked})
    build_activation_meter(cfg, model)
    _check_kernels(cfg, model)
    moments, images = cfg.MEASURE.MOMENTS, BatchSizes.of(cfg).step
    if not moments.PERIOD:
        return
    with named("MEASURE.MOMENTS.NORMS"):
        for spec in moments.NORMS:
            check_norm(spec)
    if not batch_norms(model):
        raise refusal("MEASURE.MOMENTS.PERIOD", f"0 with {cfg.MODEL.NAME} without batch norms", moments.PERIOD)
    if images <= moments.SUBSET:
        raise refusal("MEASURE.MOMENTS.SUBSET", f"less than {images}, the images of a batch", moments.SUBSET)


def _check_kernels(cfg: CfgNode, model: nn.Module) -> None:
    if cfg.MEASURE.KERNELS:
        check_values(cfg, {"MEASURE.BANDS": exactly(True, "with MEASURE.KERNELS")})
    with named("MEASURE.KERNELS"):
        for text in cfg.MEASURE.KERNELS:
            kernel = parse_layer_name(text)
            if kernel.unit is None or kernel.side:
                raise ValueError(f"a kernel must be a unit of a layer, such as 'layer4.1.bn2[453]', got {text!r}")
            check_unit(kernel, find_layer(model, kernel.name))


class Measurement(Protocol):
    """One thing that is measured while a model trains."""

    period: int  # iterations between two measurements; 0 is never

    def measure(
        self, iteration: int, images: Tensor, targets: Tensor
    ) -> contextlib.AbstractContextManager[dict[str, float]]:
        """A block around an update of the weights that gives a mapping, filled when the block ends.

        Args:
            iteration: from 0, one that ends a period.
            images, targets: of the update's first step, as the loader gives them.
        """


class Measuring:
    """The updates of a training, with what is measured in some of them.

    Args:
        cfg: config.
        step: updates the weights.
        log: where figures go.
        bands: measures MEASURE.BANDS of the trained model.
    """

    def __init__(self, cfg: CfgNode, step: TrainingStep, log: TrainingLog, bands: Callable[[], dict[str, float]]):
        self._step, self._log = step, log
        # What computes with the model comes before what hooks into it and would see those passes, too.
        on_batch = BatchMeasures(step.model, step.prepare, step.loss, cfg.SEED)
        measurements: list[Measurement] = [_LandscapeMeter(cfg, on_batch), _MomentMeter(cfg, on_batch)]
        measurements.append(_HookMeter(build_activation_meter(cfg, step.model)))
        measurements.append(_HookMeter(FilterMeter(step.model, cfg.NORM_STATS_PERIOD if distributed.is_main() else 0)))
        self._measurements = [each for each in measurements if each.period]
        # Each gives figures of the trained model, for metrics.json and results.json.
        self._at_end: list[Callable[[], dict[str, float]]] = [bands] if cfg.MEASURE.BANDS else []

    def __call__(
        self, iteration: int, batches: Iterator[tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, float], float, float]:
        """Update the weights; arguments and errors as :class:`TrainingStep`.

        Returns:
            the loss, the seconds that batches were waited for, and those that measuring took besides the update.
        """
        due = [each for each in self._measurements if not (iteration + 1) % each.period]
        if not due:
            return *self._step(iteration, batches), 0.0
        timer = Timer()
        first = next(batches)
        waited = timer()
        with contextlib.ExitStack() as blocks:
            found = [blocks.enter_context(each.measure(iteration, *first)) for each in due]
            seconds = timer()
            losses, data_time = self._step(iteration, itertools.chain([first], batches))
            timer()
        self._log.write(iteration, {name: value for figures in found for name, value in figures.items()})
        return losses, waited + data_time, seconds + timer()

    def end(self) -> dict[str, float]:
        """Measure what is of the trained model."""
        return {name: value for measure in self._at_end for name, value in measure().items()}


class _LandscapeMeter:
    """Range of loss and gradient along the gradient (MEASURE.LANDSCAPE), at the weights before the update."""

    def __init__(self, cfg: CfgNode, on_batch: BatchMeasures):
        self.period, self._steps, self._on_batch = cfg.MEASURE.LANDSCAPE.PERIOD, cfg.MEASURE.LANDSCAPE.STEPS, on_batch

    @contextlib.contextmanager
    def measure(self, iteration: int, images: Tensor, targets: Tensor) -> Iterator[dict[str, float]]:
        landscape = self._on_batch.landscape(iteration, images, targets, self._steps)
        yield {f"landscape/{name}": value for name, value in landscape.figures().items()}


class _MomentMeter:
    """Distance of the moments of some images from those of all (MEASURE.MOMENTS), at the weights before the update."""

    def __init__(self, cfg: CfgNode, on_batch: BatchMeasures):
        moments = cfg.MEASURE.MOMENTS
        self.period, self._options, self._on_batch = moments.PERIOD, (moments.SUBSET, moments.NORMS), on_batch

    @contextlib.contextmanager
    def measure(self, iteration: int, images: Tensor, targets: Tensor) -> Iterator[dict[str, float]]:
        try:
            distances = self._on_batch.moments(iteration, images, targets, *self._options)
        except ValueError as error:  # of a model that merges its images with another dimension
            raise UserError(f"MEASURE.MOMENTS: {error}") from None
        yield {f"moments/{name}": value for name, value in flat_distances(distances).items()}


class _HookMeter:
    """What is seen by hooks in the update itself: MEASURE.ACTIVATIONS, NORM_STATS_PERIOD."""

    def __init__(self, meter: ActivationMeter | FilterMeter):
        self.period, self._meter = meter.period, meter

    def measure(
        self, iteration: int, images: Tensor, targets: Tensor
    ) -> contextlib.AbstractContextManager[dict[str, float]]:
        return self._meter.measure(iteration)
