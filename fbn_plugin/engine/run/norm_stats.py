"""What a run tells of its norms: at its start which the model has, and while it trains the share of values that
filtered ones leave out, layer by layer: what the filter does, as scalars beside the loss."""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fbn_plugin.layers.filtered_batch_norm import FilterMixin
from fbn_plugin.surgery.norm_summary import summarize

__all__ = ["FilterMeter", "log_norms"]

logger = logging.getLogger(__name__)


def log_norms(model: nn.Module) -> None:
    """Say in one line which norms a model has, such as ``norms: 53 FBN(t_sigma=5), 0 BN``."""
    logger.info("norms: %s", summarize(model).line)


class FilterMeter:
    """Measures the filtered norms of a model in chosen iterations::

        meter = FilterMeter(model, period=1000)
        with meter.measure(iteration) as shares:
            loss = model(images)
        log(shares)  # {"filtered/backbone.bn1": 0.0004, ..., "filtered/mean": 0.0007}, or {} in other iterations

    A measurement filters each input once more, without a gradient, and changes nothing. A layer that is used several
    times in a forward pass is averaged over the values of all its calls; one that no value reaches is left out.

    Args:
        model: its modules with a ``t_sigma`` below infinity are measured, in training mode.
        period: iterations between two measurements, the first one after ``period`` iterations; 0 is never.

    Raises:
        ValueError: a period below 0.
    """

    def __init__(self, model: nn.Module, period: int):
        if period < 0:
            raise ValueError(f"the period must be 0 (never) or more, got {period}")
        self.period = period
        self.norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, FilterMixin) and not math.isinf(module.t_sigma)
        }

    @contextlib.contextmanager
    def measure(self, iteration: int) -> Iterator[dict[str, float]]:
        """Fill the mapping that it gives at the end of the block, if ``iteration`` (from 0) ends a period.

        ``filtered/<module name>`` is the share of the layer's values, 0 to 1, that its moments are computed without;
        ``filtered/mean`` the mean over the layers.
        """
        shares: dict[str, float] = {}
        if not self.period or (iteration + 1) % self.period or not self.norms:
            yield shares
            return
        seen: dict[str, list[tuple[Tensor, int]]] = {}
        hooks = [
            norm.register_forward_pre_hook(functools.partial(self._look, seen, name))
            for name, norm in self.norms.items()
        ]
        try:
            yield shares
        finally:
            for hook in hooks:
                hook.remove()
        for name, calls in seen.items():
            left_out = sum(share.item() * size for share, size in calls)
            shares[f"filtered/{name}"] = left_out / sum(size for _, size in calls)
        if shares:
            shares["filtered/mean"] = sum(shares.values()) / len(shares)

    @staticmethod
    @torch.no_grad()
    def _look(seen: dict[str, list[tuple[Tensor, int]]], name: str, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if norm.training and x.numel():
            seen.setdefault(name, []).append((norm.filtered_share(x), x.numel()))
