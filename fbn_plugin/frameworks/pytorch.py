"""PyTorch itself: ``nn.SyncBatchNorm.convert_sync_batchnorm`` makes plain synchronized norms of filtered ones too, and
says nothing, and ``torch.ao.quantization.fuse_modules`` knows layers by their exact class. Here both learn of ours.
"""

import functools
import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import internals
from fbn_plugin.frameworks import replacement
from fbn_plugin.layers.description import describe, describe_type, spatial_dims
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin
from fbn_plugin.registry import norm_factory, registered_classes
from fbn_plugin.surgery.convert import build_from

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


# The layers that are fused, by their exact classes, with the function that does it.
_FUSERS: dict[tuple[type, ...], Callable] = internals.optional(
    "torch.ao.quantization.fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD", {}
)
_BATCH_NORMS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


def _fuse(fuse: Callable, place: int, dims: int, is_qat: bool, *modules: nn.Module) -> nn.Module:
    """PyTorch's ``fuse``, given the plain batch normalization that the norm at ``place`` is in evaluation."""
    norm, layers = modules[place], list(modules)
    lost = "without its filter" if isinstance(norm, FilteredBatchNormMixin) else ""
    if is_qat and (lost or describe(norm).affine_terms is not None):
        warnings.warn(
            "quantization-aware training has plain batch normalization only: as that "
            f"{type(norm).__name__} is trained on {lost}".rstrip(),
            stacklevel=2,
        )
    layers[place] = build_from(norm, norm_factory("BN", dims))
    return fuse(is_qat, *layers)


def _fusers() -> dict[tuple[type, ...], Callable]:
    """Fusers for what is a batch normalization in evaluation, wherever there is one for PyTorch's own."""
    found = {}
    for cls in registered_classes():
        description = describe_type(cls)
        if not issubclass(cls, _BatchNorm) or description is None or description.evaluation != "channel":
            continue
        for layers, fuse in _FUSERS.items():
            place = next((i for i, layer in enumerate(layers) if layer in _BATCH_NORMS), None)
            dims = None if place is None else _BATCH_NORMS[layers[place]]
            if dims is not None and spatial_dims(cls) in (None, dims):
                key = (*layers[:place], cls, *layers[place + 1 :])
                found[key] = functools.partial(_fuse, fuse, place, dims)
    return found


def register() -> None:
    """Let PyTorch's conversion warn of filters that it drops, and ``fuse_modules`` take the norms of this package."""
    replacement.replace(_CONVERT, _convert_sync_batchnorm, calls_itself=True)
    for layers, fuse in _fusers().items():
        _FUSERS.setdefault(layers, fuse)


def unregister() -> None:
    """Give PyTorch its own conversion and fusers back."""
    replacement.restore(_CONVERT)
    for layers in [layers for layers, fuse in _FUSERS.items() if getattr(fuse, "func", None) is _fuse]:
        del _FUSERS[layers]
