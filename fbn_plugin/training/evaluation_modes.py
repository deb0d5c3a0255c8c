"""States that a model is put into for the length of a ``with`` block and comes back from: evaluation, and evaluation by
the batch's own moments, which Hajaj and Gillies, "Batch Normalization and the impact of batch structure on the behavior
of deep convolution networks" (2018), classify with.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import check_moments


@contextlib.contextmanager
def batch_moments(model: nn.Module) -> Iterator[nn.Module]:
    """Let the batch norms in ``model`` use the batch's own moments in evaluation, for the length of a ``with`` block.

    BN, FBN, ConvNorm and all other ``_BatchNorm`` whose running statistics are None do so; here they are None for a
    while, and the same tensors, untouched, come back, also after an exception. Blocks may be nested. Instance norms and
    frozen batch norms stay as they are. ``state_dict`` and ``load_state_dict`` see the statistics inside of the block
    too; ``copy.deepcopy`` does not carry them along, and a norm that is trained there still counts its batches.

    Args:
        model: in evaluation mode, for what the block is meant to do.

    Yields:
        ``model``.

    Raises:
        ValueError: a batch norm has a forward of its own, of which nothing is known: it has neither a method
            ``batch_statistics`` nor a description, see :class:`fbn_plugin.NormDescription`.

    Examples::

        >>> layer = fbn_plugin.FilteredBatchNorm2d(8).eval()
        >>> x = 5 + torch.randn(4, 8, 16, 16)
        >>> with fbn_plugin.batch_moments(layer):
        ...     round(layer(x).mean().abs().item(), 2)
        0.0
    """
    held, handles = [], []
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            held.append((module, module.running_mean, module.running_var))
    load_adapters()
    check_moments(module for module, _, _ in held)
    try:
        for module, mean, var in held:

            def show(module: nn.Module, *_, mean=mean, var=var) -> None:
                module.running_mean, module.running_var = mean, var

            handles += [
                module.register_state_dict_pre_hook(show),
                module.register_state_dict_post_hook(_hide),
                module.register_load_state_dict_pre_hook(show),
                module.register_load_state_dict_post_hook(_hide),
            ]
            _hide(module)
        yield model
    finally:
        for handle in handles:
            handle.remove()
        for module, mean, var in held:
            module.running_mean, module.running_var = mean, var


def _hide(module: nn.Module, *_) -> None:
    module.running_mean = module.running_var = None


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """``model.eval()`` for the length of a ``with`` block; every module gets its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in flags:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer is; the CPU if there is none."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0)).device
