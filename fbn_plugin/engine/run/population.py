"""TEST.PRECISE_BN: population statistics before an evaluation, in the place of the running averages of training."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed, stopping
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.layers.description import check_moments
from fbn_plugin.training.population_statistics import norms_to_update, update_population_stats

__all__ = ["check_population_stats", "refresh_population_stats"]

logger = logging.getLogger(__name__)


def check_population_stats(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse TEST.PRECISE_BN before a run begins, for a norm whose moments are not known.

    Args:
        cfg: the run's settings.
        model: with all its norms.

    Raises:
        ValueError: one sentence that names the norm.
    """
    if cfg.TEST.PRECISE_BN.ENABLED:
        try:
            check_moments(module for module in model.modules() if isinstance(module, _BatchNorm))
        except ValueError as error:
            raise ValueError(f"TEST.PRECISE_BN.ENABLED must be False: {error}") from None


def refresh_population_stats(
    model: nn.Module,
    batches: Callable[[], Iterable[Any]],
    num_iter: int,
    iterations: int,
    forward: Callable[[nn.Module, Any], Any],
) -> None:
    """Compute a model's running statistics anew, see :func:`fbn_plugin.update_population_stats`.

    Frozen norms keep their statistics; a model without batch norms in training is left as it is, and nothing is loaded.

    Args:
        model: in training mode, out of ``DistributedDataParallel``.
        batches: gives training batches of this process, in an order of their own.
        num_iter: batches of each process.
        iterations: finished ones, for the messages.
        forward: called with the model and a batch.

    Raises:
        UserError: the statistics are not finite, or no value reaches a norm.
        EvaluationLeft: a process is asked to stop; all have the statistics from before.
    """
    norms = norms_to_update(model)
    if not norms:
        logger.info("TEST.PRECISE_BN: the model has no running statistics to compute")
        return
    logger.info("population statistics over %d batches", num_iter)
    before = [(norm, norm.running_mean.clone(), norm.running_var.clone()) for norm in norms.values()]
    try:
        update_population_stats(model, stopping.until_asked(batches()), num_iter, forward=forward)
    except ValueError as error:
        raise UserError(f"TEST.PRECISE_BN after {counted(iterations, 'iteration')}: {error}") from None
    try:
        stopping.unless_asked(distributed.all_gather(stopping.asked()))
    except stopping.EvaluationLeft:
        for norm, mean, var in before:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        raise
