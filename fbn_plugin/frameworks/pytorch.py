"""PyTorch itself: ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes plain synchronized norms of filtered ones too, and
says nothing. Here it learns to.
"""

import warnings

from torch import nn

from fbn_plugin.frameworks import replacement
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin

_CONVERT = "torch.nn.SyncBatchNorm.convert_sync_batchnorm.__func__"
_torch_convert = replacement.original(_CONVERT)


def _convert_sync_batchnorm(cls: type[nn.Module], module: nn.Module, process_group=None) -> nn.Module:
    filtered = sum(isinstance(each, FilteredBatchNormMixin) for each in module.modules())
    if filtered:
        warnings.warn(
            f"convert_sync_batchnorm makes {filtered} filtered norms plain SyncBatchNorm, without their filter: "
            "fbn_plugin.convert_sync keeps it",
            stacklevel=replacement.CALLER,
        )
    return _torch_convert(cls, module, process_group)


def register() -> None:
    """Let PyTorch's conversion warn of filters that it drops."""
    replacement.replace(_CONVERT, _convert_sync_batchnorm, calls_itself=True)


def unregister() -> None:
    """Give PyTorch its own conversion back."""
    replacement.restore(_CONVERT)
