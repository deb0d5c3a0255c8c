"""Fit the scale and shift of new norms to the norms that they are to replace, on data."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fbn_plugin.layers.description import describe
from fbn_plugin.training.evaluation_modes import device_of, evaluation_mode
from fbn_plugin.training.population_statistics import forward_batch


class _Fit:
    """Sums over the data for the straight line from one norm's outputs to another's, channel by channel."""

    def __init__(self, old: nn.Module, new: nn.Module) -> None:
        self.old, self.new, self.count, self.sums = _bare(old), _bare(new), 0, 0.0
        nn.init.ones_(self.new.weight)
        nn.init.zeros_(self.new.bias)

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        goal, base = (norm.forward(args[0]).movedim(1, 0).flatten(1).double() for norm in (self.old, self.new))
        self.count += base.shape[1]
        self.sums = self.sums + torch.stack([base.sum(1), goal.sum(1), base.square().sum(1), (base * goal).sum(1)])

    def apply(self, norm: nn.Module) -> None:
        if self.count:
            base, goal, squares, products = self.sums / self.count
            variance = squares - base * base
            # A channel that is constant but for rounding has no slope.
            slope = torch.where(variance > 1e-9 * squares, (products - base * goal) / variance, 0.0)
            fitted = {"weight": slope, "bias": goal - slope * base}
            for name, values in fitted.items():
                if not values.to(getattr(norm, name).dtype).isfinite().all():
                    kind, dtype = type(norm).__name__, getattr(norm, name).dtype
                    raise ValueError(
                        f"the {name} that is fitted to a {kind} is not finite in {dtype}: refit in float32"
                    )
            for name, values in fitted.items():
                getattr(norm, name).copy_(values)


def _bare(norm: nn.Module) -> nn.Module:
    """A copy without what follows the normalization in the same module."""
    norm = copy.deepcopy(norm).eval()
    if not describe(norm).owns_children:
        for name in norm._modules:
            norm._modules[name] = nn.Identity()
    return norm


@torch.no_grad()
def refit_norms(model: nn.Module, replaced: dict[nn.Module, nn.Module], batches: Iterable) -> None:
    """Fit scale and shift of new norms such that on data they come nearest to the old ones, by least squares.

    Args:
        model: with the old norms in place; runs in evaluation mode.
        replaced: the new norm of each old one. A norm without scale and shift, or that the data do not reach, stays as
            it is.
        batches: each the model's input, or a tuple that begins with it.

    Raises:
        ValueError: no batch, or a scale or shift that is not finite in the precision of the norm.
    """
    fits = {
        old: _Fit(old, new)
        for old, new in replaced.items()
        if getattr(new, "weight", None) is not None and getattr(new, "bias", None) is not None
    }
    hooks = [old.register_forward_pre_hook(fit) for old, fit in fits.items()]
    number, device = 0, device_of(model)
    try:
        with evaluation_mode(model):
            for batch in batches:
                number += 1
                forward_batch(model, batch, device)
    finally:
        for hook in hooks:
            hook.remove()
    if not number:
        raise ValueError("recalibrate has no batch of data")
    for old, fit in fits.items():
        fit.apply(replaced[old])
