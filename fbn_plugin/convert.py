"""Swap the norms of a built model, keeping weights and statistics: for models that take no norm argument, and for
trained ones."""

import warnings
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.layers.conv_norm import ConvNorm2d
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin
from fbn_plugin.registry import NormFactory, norm_factory, norm_options

Converter = Callable[[nn.Module, NormFactory], nn.Module]

_CONVERTERS: dict[type[nn.Module], Converter] = {}
_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, FilteredBatchNormMixin.forward, ConvNorm2d.forward)
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def register_converter(module_type: type[nn.Module], converter: Converter) -> None:
    """Teach :func:`convert_norm` a batch normalization class whose forward does more than normalize.

    Args:
        module_type: the class, for instances of it and of subclasses without a converter of their own.
        converter: called with the old module and the factory of the new norm; returns the new module.
    """
    _CONVERTERS[module_type] = converter


def copy_norm_state(old: nn.Module, new: nn.Module) -> nn.Module:
    """Hand the parameters, running statistics and training flag of ``old`` over to ``new``, as far as both have them;
    return ``new``.

    The tensors themselves move, so an optimizer that holds the old parameters keeps training the new norm.
    """
    for name in _STATE:
        tensor = getattr(old, name, None)
        if tensor is not None and getattr(new, name, None) is not None:
            setattr(new, name, tensor)
    return new.train(old.training)


def build_like(old: nn.Module, factory: NormFactory) -> nn.Module:
    """Build the factory's norm for the channels of the batch normalization ``old``, with its options and state.

    ``eps``, ``momentum``, ``affine`` and ``track_running_stats`` are those of ``old`` where the new norm has them and
    the spec does not set them; an instance normalization tracks no statistics unless the spec says so. Where ``old``
    has no weight or bias, neither has the new norm, unless the spec sets ``affine``.
    """
    reference = next((t for t in (old.weight, old.running_mean) if t is not None), None)
    placement = {} if reference is None else {"device": reference.device, "dtype": reference.dtype}
    defaults = norm_options(factory.spec.name)
    inherited = {"eps", "momentum", "affine"} & defaults.keys()
    if defaults.get("track_running_stats"):
        inherited.add("track_running_stats")
    kept = {name: getattr(old, name) for name in inherited - factory.spec.options.keys()}
    new = copy_norm_state(old, factory(old.num_features, **kept, **placement))
    if "affine" not in factory.spec.options:
        for name in ("weight", "bias"):
            if getattr(old, name) is None and getattr(new, name) is not None:
                setattr(new, name, None)
    return new


def _dims(module: nn.Module) -> int:
    if isinstance(module, nn.BatchNorm1d):
        return 1
    return 3 if isinstance(module, nn.BatchNorm3d) else 2


def _converter(module: nn.Module) -> Converter | None:
    """What turns this module into another norm; None for a module that stays."""
    if not isinstance(module, _BatchNorm) or isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return None
    for cls in type(module).__mro__:
        if cls in _CONVERTERS:
            return _CONVERTERS[cls]
    if type(module).forward in _PLAIN_FORWARDS:
        return build_like
    return None


def convert_norm(model: nn.Module, spec: str) -> nn.Module:
    """Replace every batch normalization in ``model`` (filtered and synchronized ones too) by the norm that ``spec``
    names.

    Weights, biases, running statistics, ``eps``, ``momentum``, the training flag, device, dtype and ``requires_grad``
    are kept as far as the new norm has them; parameters stay the same objects. A module that is used twice stays
    shared.

    Args:
        model: changed in place.
        spec: such as ``"FBN(t_sigma=4)"``, see :func:`fbn_plugin.parse_spec`.

    Returns:
        ``model``, or the new norm if ``model`` is itself a batch normalization.

    Raises:
        ValueError: a bad spec, or a norm that does not fit a layer's channels; the model is then as it was.

    Warns:
        UserWarning: subclasses of batch normalization with a forward of their own that no converter is registered for
        are left as they are; or there is no batch normalization at all.

    Forward hooks of the old norms are not carried over.
    """
    factories = {dims: norm_factory(spec, dims) for dims in (1, 2, 3)}
    replaced: dict[nn.Module, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in left):  # the norms inside of a norm that is left
            continue
        converter = _converter(module)
        if converter is not None:
            try:
                replaced[module] = converter(module, factories[_dims(module)])
            except ValueError as error:
                raise ValueError(f"cannot convert {name or 'the module'!r} to {spec}: {error}") from error
        elif isinstance(module, _BatchNorm):
            left[name] = type(module).__name__
    if not replaced and not left:
        warnings.warn(f"nothing was converted to {spec}: the model has no batch normalization", stacklevel=2)
    if left:
        name, kind = next(iter(left.items()))
        warnings.warn(f"{len(left)} norms are left as they are: no converter for {kind} (at {name!r})", stacklevel=2)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a second name of a child
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model)
