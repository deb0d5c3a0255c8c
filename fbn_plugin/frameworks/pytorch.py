"""PyTorch itself: ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes plain synchronized norms of filtered ones too, and
says nothing. Here it learns to.

It calls itself for every child of a module, so the warning is given by the outermost call alone.
"""

import warnings
from contextvars import ContextVar

from torch import nn

from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin

_torch_convert = vars(nn.SyncBatchNorm)["convert_sync_batchnorm"]
_inside: ContextVar[bool] = ContextVar("inside of a conversion", default=False)


def _convert_sync_batchnorm(cls: type[nn.Module], module: nn.Module, process_group=None) -> nn.Module:
    if _inside.get():
        return _torch_convert.__func__(cls, module, process_group)
    filtered = sum(isinstance(each, FilteredBatchNormMixin) for each in module.modules())
    if filtered:
        warnings.warn(
            f"convert_sync_batchnorm makes {filtered} filtered norms plain SyncBatchNorm, without their filter: "
            "fbn_plugin.convert_sync keeps it",
            stacklevel=2,
        )
    token = _inside.set(True)
    try:
        return _torch_convert.__func__(cls, module, process_group)
    finally:
        _inside.reset(token)


_convert_sync_batchnorm.__doc__ = _torch_convert.__func__.__doc__
_guarded = classmethod(_convert_sync_batchnorm)


def register() -> None:
    """Let PyTorch's conversion warn of filters that it drops."""
    nn.SyncBatchNorm.convert_sync_batchnorm = _guarded


def unregister() -> None:
    """Give PyTorch its own conversion back."""
    nn.SyncBatchNorm.convert_sync_batchnorm = _torch_convert
