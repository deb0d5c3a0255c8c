"""Put a filtered norm, the residual and the activation after it into one layer, in a model that is built: on a GPU that
is less memory traffic than the three one by one.

The blocks that add a residual are the frameworks', see ``frameworks/*``; what is in a plain ``nn.Sequential`` is here.
"""

import itertools
from collections.abc import Callable

from torch import nn

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import has_hooks
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNorm2d
from fbn_plugin.layers.filtered_batch_norm_act import FilteredBatchNormAct2d, activation_of
from fbn_plugin.surgery.convert import copy_norm_state

_FUSERS: dict[type[nn.Module], Callable[[nn.Module], None]] = {}


def register_fuser(module_type: type[nn.Module], fuser: Callable[[nn.Module], None]) -> None:
    """Teach :func:`fuse_norm_act` a module: ``fuser(module)`` changes it in place if it can be fused.

    It is called for this very class, not for subclasses, whose forward may differ.
    """
    _FUSERS[module_type] = fuser


def fused(norm: nn.Module, activation: Callable) -> FilteredBatchNormAct2d | None:
    """``norm`` and ``activation`` as one layer with the state of ``norm``; None if they are no pair that can be."""
    known = activation_of(activation)
    if type(norm) is not FilteredBatchNorm2d or has_hooks(norm) or known is None:
        return None
    names = ("num_features", "eps", "momentum", "affine", "track_running_stats", "gamma_init")
    options = {name: getattr(norm, name) for name in names}
    return copy_norm_state(
        norm, FilteredBatchNormAct2d(**options, **norm.filter_options(), activation=known[0], negative_slope=known[1])
    )


def fuse_children(module: nn.Module, norm: str, activation: str) -> None:
    """Fuse two children that follow each other; an identity stays in the activation's place, so that all keep their
    names."""
    layer = fused(getattr(module, norm), getattr(module, activation))
    if layer is not None:
        setattr(module, norm, layer)
        setattr(module, activation, nn.Identity())


def fuse_block(block: nn.Module, fused_class: type[nn.Module], norms: tuple[str, ...]) -> None:
    """Make ``block``, whose norms are all followed by its ``relu``, the last one after a residual is added, a
    ``fused_class``, a subclass of its class. It stays as it is if one norm cannot be fused."""
    layers = {name: fused(getattr(block, name), block.relu) for name in norms}
    if None not in layers.values():
        for name, layer in layers.items():
            setattr(block, name, layer)
        block.__class__ = fused_class


def _fuse_sequential(module: nn.Sequential) -> None:
    for norm, activation in itertools.pairwise(list(module._modules)):  # a module that stands there twice, too
        fuse_children(module, norm, activation)


def fuse_norm_act(model: nn.Module) -> nn.Module:
    """Fuse filtered batch norms with what follows them: with an activation in any ``nn.Sequential``, with activation
    and residual in the ResNets of timm, torchvision and detectron2.

    Parameters, statistics and ``state_dict`` keys stay; parameters stay the same objects. The activation modules are no
    longer called; what has a hook is not fused. Freeze norms before, not after: what turns a batch norm into a
    frozen one does not know that this one holds an activation.

    Args:
        model: changed in place.

    Returns:
        ``model``.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.FilteredBatchNorm2d(8), nn.ReLU())
        >>> [type(module).__name__ for module in fbn_plugin.fuse_norm_act(model)]
        ['Conv2d', 'FilteredBatchNormAct2d', 'Identity']
    """
    load_adapters()
    for module in list(model.modules()):
        if type(module) in _FUSERS:
            _FUSERS[type(module)](module)
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            _fuse_sequential(module)
    return model
