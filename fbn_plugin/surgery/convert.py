"""Swap the norms of a built model, keeping weights and statistics: for models that take no norm argument, and for
trained ones."""

import copy
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fbn_plugin import layers
from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.batch_norm import BatchNormMixin, FoldedBatchNormMixin
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNormMixin, FilterMixin
from fbn_plugin.layers.frozen_batch_norm import FrozenBatchNormMixin
from fbn_plugin.registry import NormFactory, NormSpec, norm_factory, norm_options
from fbn_plugin.surgery.norm_report import NormChange, NormLeft, NormReport
from fbn_plugin.surgery.refit import refit_norms
from fbn_plugin.training.evaluation_modes import evaluation_mode
from fbn_plugin.training.population_statistics import update_population_stats

Converter = Callable[[nn.Module, NormFactory], nn.Module]

FAMILIES = ("BN", "FrozenBN", "GN", "LN", "IN", "FRN", "LearnedNorm")

_CONVERTERS: dict[type[nn.Module], Converter] = {}
_SYNCHRONIZED_TYPES: set[type[nn.Module]] = {nn.SyncBatchNorm, layers.SyncFilteredBatchNorm}
_PLAIN_FORWARDS = (
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    FilteredBatchNormMixin.forward,
    layers.SyncFilteredBatchNorm.forward,
    FrozenBatchNormMixin.forward,
    layers.ConvNorm2d.forward,
    nn.GroupNorm.forward,
    layers.FilteredGroupNorm.forward,
    layers.LayerNorm2d.forward,
    layers.FilteredLayerNorm2d.forward,
    _InstanceNorm.forward,
    layers.InstanceNorm2d.forward,  # of all three
    layers.FilteredInstanceNorm2d.forward,
    layers.FilterResponseNorm2d.forward,
    layers.LearnedStatsNorm2d.forward,
)
_GATED_BY_IMAGE = (layers.RepresentativeBatchNorm2d, layers.InstanceEnhancementBatchNorm2d)
_WITHOUT_SYNCHRONIZED_FORM = (FoldedBatchNormMixin, *_GATED_BY_IMAGE, layers.ConvNorm2d)
_SYNCHRONIZED = "it is synchronized already"
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_FAMILY: dict[type[nn.Module], str] = {
    _BatchNorm: "BN",
    nn.GroupNorm: "GN",
    nn.LayerNorm: "LN",
    _InstanceNorm: "IN",
    layers.FilteredInstanceNorm2d: "IN",
    layers.FilterResponseNorm2d: "FRN",
    layers.LearnedStatsNorm2d: "LearnedNorm",
}


def register_converter(
    module_type: type[nn.Module], converter: Converter, family: str | None = None, synchronized: bool = False
) -> None:
    """Teach :func:`convert_norm` a norm class whose forward does more than normalize.

    Args:
        module_type: the class, for instances of it and of subclasses without a converter of their own.
        converter: called with the old module and the factory of the new norm; returns the new module.
            :func:`build_like` itself says that the class does no more than normalize.
        family: which of ``FAMILIES`` it is of, if it derives from no norm of torch's or of this library.
        synchronized: it takes the moments of all processes' batches, so :func:`convert_sync` leaves it.
    """
    _CONVERTERS[module_type] = converter
    if synchronized:
        _SYNCHRONIZED_TYPES.add(module_type)
    if family is not None:
        _FAMILY[module_type] = family


def family(module: nn.Module) -> str | None:
    """Which of ``FAMILIES`` a module belongs to, by what its moments are of; None if it is no norm that is known.

    ``"BN"`` is every subclass of PyTorch's batch norms; ``"FrozenBN"`` a module that has all of batch normalization's
    state as buffers, whoever made it.
    """
    for cls in type(module).__mro__:
        if cls in _FAMILY:
            return _FAMILY[cls]
    return "FrozenBN" if all(name in module._buffers for name in _STATE[:4]) else None


def copy_norm_state(old: nn.Module, new: nn.Module) -> nn.Module:
    """Hand the parameters, running statistics and training flag of ``old`` over to ``new``, as far as both have them;
    return ``new``. Parameters besides weight and bias go to a norm of the same class.

    The tensors themselves move, so an optimizer that holds the old parameters keeps training the new norm. Only where a
    parameter becomes a constant or a constant a parameter, ``new`` gets a copy.
    """
    for name in _STATE:
        tensor, place = getattr(old, name, None), getattr(new, name, None)
        if tensor is not None and place is not None:
            if isinstance(tensor, nn.Parameter) != isinstance(place, nn.Parameter):
                tensor = tensor.detach().clone()
                tensor = nn.Parameter(tensor) if isinstance(place, nn.Parameter) else tensor
            setattr(new, name, tensor)
    if type(new) is type(old):
        places = dict(new.named_parameters())
        for name, parameter in old.named_parameters():
            if name not in _STATE and name in places and places[name].shape == parameter.shape:
                owner, _, attribute = name.rpartition(".")
                setattr(new.get_submodule(owner), attribute, parameter)
    return new.train(old.training)


def build_like(old: nn.Module, factory: NormFactory) -> nn.Module:
    """Build the factory's norm for the channels of the norm ``old``, with its options and state.

    ``eps``, ``momentum``, ``affine``, ``track_running_stats`` and ``num_groups`` are those of ``old`` where both norms
    have them and the spec does not set them, and so is a small ``gamma_init``; between synchronized norms the process
    group stays. An instance normalization tracks no statistics unless the spec says so.
    Where ``old`` has no weight or bias, neither has the new norm, unless the spec sets ``affine``.

    Raises:
        ValueError: the norm does not fit the channels, or would freeze statistics that ``old`` does not have.
    """
    state = [getattr(old, name, None) for name in _STATE]
    reference = next((tensor for tensor in (state[0], state[2], *old.parameters()) if tensor is not None), None)
    placement = {} if reference is None else {"device": reference.device, "dtype": reference.dtype}
    defaults = norm_options(factory.spec.name)
    inherited = {"eps", "momentum", "affine"} & defaults.keys()
    if defaults.get("track_running_stats") and isinstance(old, _BatchNorm):
        inherited.add("track_running_stats")
    if "gamma_init" in defaults and getattr(old, "gamma_init", 1.0) != 1.0:
        inherited.add("gamma_init")
    if "num_groups" in defaults and family(old) == "GN":
        inherited.add("num_groups")
    kept = {name: getattr(old, name) for name in inherited - factory.spec.options.keys() if hasattr(old, name)}
    new = factory(_num_channels(old), **kept, **placement)
    if family(new) == "FrozenBN" and (state[2] is None or state[3] is None):
        raise ValueError(f"{type(old).__name__} has no running statistics to freeze")
    copy_norm_state(old, new)
    if hasattr(old, "process_group") and hasattr(new, "process_group"):
        new.process_group = old.process_group
    if "affine" not in factory.spec.options:
        for name in ("weight", "bias"):
            if getattr(old, name) is None and isinstance(getattr(new, name), nn.Parameter):
                setattr(new, name, None)
    return new


def make_plain(module: nn.Module) -> None:
    """Make a norm of this package whose weight and bias are not all of its affine part, in place, the plain batch
    normalization that it equals in evaluation; leave any other module as it is.

    For what reads weight and bias of a batch normalization to freeze, fold or replace it.

    Raises:
        ValueError: there is no such batch normalization, as the scale depends on the image.
    """
    if isinstance(module, _GATED_BY_IMAGE):
        raise ValueError(f"{type(module).__name__} is no batch norm in evaluation: its scale depends on the image")
    if isinstance(module, FoldedBatchNormMixin):
        weight, bias = module.affine_terms()
    elif isinstance(module, layers.InputNorm2d):
        weight, bias = module.weight, module.bias
    else:
        return
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    for name in [name for name, _ in module.named_parameters(recurse=False) if name not in _STATE]:
        delattr(module, name)
    if weight is not None:
        module.affine = True
        module.weight = nn.Parameter(weight.detach(), trains)
        module.bias = nn.Parameter(torch.zeros_like(weight) if bias is None else bias.detach(), trains)
    bases = (cls for cls in type(module).__mro__ if issubclass(cls, _BatchNorm) and not issubclass(cls, BatchNormMixin))
    module.__class__ = next(bases)


def _build_from_plain(old: nn.Module, factory: NormFactory) -> nn.Module:
    """The same for a batch norm with weights of another meaning: those of the plain batch norm that evaluates as it."""
    new = build_like(old, factory)
    if type(new) is type(old):
        return new
    plain = copy.deepcopy(old)
    make_plain(plain)
    return build_like(plain, factory)


def _num_channels(module: nn.Module) -> int:
    for name in ("num_features", "num_channels"):
        if hasattr(module, name):
            return getattr(module, name)
    return module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else len(module.weight)


def _dims(module: nn.Module) -> int:
    if isinstance(module, (nn.BatchNorm1d, nn.InstanceNorm1d, layers.FrozenBatchNorm1d)):
        return 1
    return 3 if isinstance(module, (nn.BatchNorm3d, nn.InstanceNorm3d, layers.FrozenBatchNorm3d)) else 2


def converter_of(module: nn.Module) -> Converter | None:
    """What turns this module into another norm; None for a module that stays."""
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or getattr(module, "tau", None) is not None:
        return None
    for cls in type(module).__mro__:
        if cls in _CONVERTERS:
            return _CONVERTERS[cls]
    if type(module).forward in _PLAIN_FORWARDS:
        return build_like
    return _build_from_plain if type(module).forward is FoldedBatchNormMixin.forward else None


def _note(old: nn.Module, new: nn.Module) -> str:
    """What the new norm has no place for, and what it did not get."""

    def has(module, name):
        return getattr(module, name, None) is not None

    lost = [name for name in (*_STATE[:4], "momentum") if has(old, name) and not has(new, name)]
    if not isinstance(old, FoldedBatchNormMixin):  # whose further parameters are in the new weight and bias
        kept = {id(parameter) for parameter in new.parameters()}
        further = [name for name, parameter in old.named_parameters() if id(parameter) not in kept]
        lost += dict.fromkeys(name.partition(".")[0] for name in further if name not in _STATE)
    if isinstance(old, FilterMixin) and not isinstance(new, FilterMixin):
        lost.append("the filter")
    if getattr(old, "gamma_init", 1.0) != 1.0 and not hasattr(new, "gamma_init"):
        lost.append("gamma_init")
    if old._forward_hooks or old._forward_pre_hooks or old._backward_hooks:
        lost.append("hooks")
    notes = [f"not carried over: {', '.join(lost)}"] if lost else []
    if has(new, "running_mean") and not has(old, "running_mean"):
        notes.append("running statistics are fresh")
    if isinstance(new, (FoldedBatchNormMixin, *_GATED_BY_IMAGE)) and type(new) is not type(old):
        notes.append("weight and bias mean something else, so the evaluation changes")
    return "; ".join(notes)


def convert_norm(
    model: nn.Module,
    spec: str,
    *,
    sources: str | Iterable[str] = "BN",
    recalibrate: Iterable | None = None,
    report: NormReport | None = None,
) -> nn.Module:
    """Replace the batch normalizations in ``model`` (filtered and synchronized ones too), or the norms of other
    families, by the norm that ``spec`` names.

    Weights, biases, running statistics, ``eps``, ``momentum``, ``num_groups``, the training flag, device, dtype and
    ``requires_grad`` are kept as far as the new norm has them; parameters stay the same objects. A module that is used
    twice stays shared. What that means for a trained model:

    - Between norms of the BN and FrozenBN families the evaluation stays the same. Parameters become constants and
      constants trainable parameters, as copies. But ScaledBN-A1, ScaledBN-A2, RBN, RBN-, IEBN and IEBN- do more with
      weight and bias, which are copied as they are: the evaluation changes. Out of these, RBN and IEBN are left.
    - From BN or FrozenBN to GN, LN, IN or FRN, scale and shift are copied; running statistics have no place there. The
      new norm takes other moments, so the model has to be trained on, or refitted with ``recalibrate``.
    - From GN, LN, IN or FRN to BN, scale and shift are copied and the running statistics are fresh (mean 0, variance
      1): evaluation means nothing before training or ``recalibrate``. Such norms do not say whether they work on
      images; they are taken to. FRN with a threshold, which is an activation too, is left.
    - LearnedNorm has no scale and shift, unless ``affine`` is set: nor has what it is converted to.

    Args:
        model: changed in place.
        spec: such as ``"FBN(t_sigma=4)"``, see :func:`fbn_plugin.parse_spec`.
        sources: families to replace, one or several of ``"BN"``, ``"FrozenBN"``, ``"GN"``, ``"LN"``, ``"IN"``,
            ``"FRN"`` and ``"LearnedNorm"``. By default what is frozen stays frozen.
        recalibrate: batches of data, each the model's input or a tuple that begins with it, to refit the new norms on.
            For norms of the BN family :func:`fbn_plugin.update_population_stats` measures their running statistics. For
            all others each scale and shift is fitted by least squares, in one pass through the old model in
            evaluation mode: such that on the inputs of the old norm the new norm's outputs come nearest to the old
            one's, channel by channel. What the new norm takes out of every single sample does not come back: group and
            layer norms come near to the old network, but instance norm takes the mean of each channel, which is what a
            classifier that averages over positions sees.
        report: is filled with what was changed and what was left; print it.

    Returns:
        ``model``, or the new norm if ``model`` is itself such a norm.

    Raises:
        ValueError: a bad spec, an unknown family, a norm that does not fit a layer's channels or has no statistics to
            freeze, or ``recalibrate`` with FrozenBN or without a batch; the model is then as it was.

    Warns:
        UserWarning: norms of these families with a forward of their own that no converter is registered for are left as
            they are; or there is no such norm at all.

    Forward hooks of the old norms are not carried over.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fbn_plugin.convert_norm(model, "FBN(t_sigma=4)")[1]
        FilteredBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, t_sigma=4)
        >>> type(fbn_plugin.convert_norm(model, "BN")[1]).__name__
        'BatchNorm2d'
    """
    load_adapters()
    sources = (sources,) if isinstance(sources, str) else tuple(sources)
    for source in sources:
        if source not in FAMILIES:
            raise ValueError(f"unknown family of norms {source!r}: accepted are {', '.join(FAMILIES)}")
    factories = {dims: norm_factory(spec, dims) for dims in (1, 2, 3)}
    report = NormReport() if report is None else report
    changed, left = [], []
    replaced: dict[nn.Module, nn.Module] = {}
    unknown: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in unknown):  # the norms inside of a norm that is left
            continue
        kind = family(module)
        converter = converter_of(module) if kind in sources else None
        if converter is not None:
            try:
                new = replaced[module] = converter(module, factories[_dims(module)])
            except ValueError as error:
                raise ValueError(f"cannot convert {name or 'the module'!r} to {spec}: {error}") from error
            changed.append(NormChange(name, type(module).__name__, type(new).__name__, _note(module, new)))
        elif kind in sources:
            unknown[name] = type(module).__name__
            left.append(NormLeft(name, type(module).__name__, "no converter for a forward of its own"))
        elif kind is not None:
            left.append(NormLeft(name, type(module).__name__, f"{kind} is not among the sources"))
    if not replaced and not unknown:
        what = "batch normalization" if sources == ("BN",) else f"norm of {', '.join(sources)}"
        warnings.warn(f"nothing was converted to {spec}: the model has no {what}", stacklevel=2)
    if unknown:
        name, kind = next(iter(unknown.items()))
        warnings.warn(f"{len(unknown)} norms are left as they are: no converter for {kind} (at {name!r})", stacklevel=2)

    refit = next((family(new) for new in replaced.values()), None) if recalibrate is not None else None
    if refit == "FrozenBN":
        raise ValueError("recalibrate refits norms that are not frozen: convert to BN with it, then to FrozenBN")
    if refit not in (None, "BN"):
        refit_norms(model, replaced, recalibrate)
    model = _swap(model, replaced)
    if refit == "BN":
        try:
            with evaluation_mode(model):
                for new in replaced.values():
                    new.train()
                update_population_stats(model, recalibrate)
        except Exception:
            _swap(model, {new: old for old, new in replaced.items()})
            raise
    report.changed += changed
    report.left += left
    return model


def convert_sync(model: nn.Module, process_group=None, report: NormReport | None = None) -> nn.Module:
    """Synchronize the batch norms in ``model`` over processes: filtered ones become
    :class:`fbn_plugin.SyncFilteredBatchNorm` and plain ones ``nn.SyncBatchNorm``, which trains on GPUs only.

    The counterpart of ``nn.SyncBatchNorm.convert_sync_batchnorm`` that keeps the filter with its options. As with
    :func:`convert_norm`, weights, statistics and settings stay, parameters are the same objects, and a shared module
    stays shared. 1-D and 3-D forms become the same classes, which take inputs of any number of dimensions. What is left
    is in the report: norms that take the moments of each sample, which need no synchronization; frozen ones; those that
    are synchronized already, with the group that they have; a filtered norm that is fused with its activation (convert
    before :func:`fbn_plugin.fuse_norm_act`); and batch norms that do more than normalize, for which there is no
    synchronized form.

    Args:
        model: changed in place.
        process_group: of ``torch.distributed``; None synchronizes all processes.
        report: is filled with what was changed and what was left; print it.

    Returns:
        ``model``, or the new norm if ``model`` is itself such a norm.

    Warns:
        UserWarning: batch norms were left that still take the moments of each process's own batch; or there is no
            batch norm at all.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.FilteredBatchNorm2d(8, t_sigma=4.0))
        >>> layer = fbn_plugin.convert_sync(model)[1]
        >>> type(layer).__name__, layer.t_sigma
        ('SyncFilteredBatchNorm', 4.0)
    """
    load_adapters()
    report = NormReport() if report is None else report
    replaced: dict[nn.Module, nn.Module] = {}
    local: dict[str, str] = {}
    norms = [(name, module, kind) for name, module in model.named_modules() if (kind := family(module)) is not None]
    for name, module, kind in norms:
        if any(name.startswith(f"{outer}.") for outer in local):  # the norms inside of a norm that is left
            continue
        if reason := _why_not_synchronized(module, kind):
            report.left.append(NormLeft(name, type(module).__name__, reason))
            if kind == "BN" and reason is not _SYNCHRONIZED:
                local[name] = type(module).__name__
            continue
        options = module._filter_options() if isinstance(module, FilterMixin) else None
        spec = NormSpec("SyncBN") if options is None else NormSpec("SyncFBN", options)
        new = replaced[module] = converter_of(module)(module, norm_factory(spec))
        new.process_group = process_group
        report.changed.append(NormChange(name, type(module).__name__, type(new).__name__, _note(module, new)))
    if not any(kind == "BN" for _, _, kind in norms):
        warnings.warn("nothing was synchronized: the model has no batch normalization", stacklevel=2)
    if local:
        name, kind = next(iter(local.items()))
        message = f"{len(local)} batch norms are left unsynchronized, such as {kind} (at {name!r}): see the report"
        warnings.warn(message, stacklevel=2)
    return _swap(model, replaced)


def _why_not_synchronized(module: nn.Module, kind: str) -> str | None:
    if kind == "FrozenBN":
        return "it is frozen"
    if kind != "BN":
        return f"{kind} takes no moments of a batch, so there is nothing to synchronize"
    if isinstance(module, tuple(_SYNCHRONIZED_TYPES)):
        return _SYNCHRONIZED
    if isinstance(module, layers.FilteredBatchNormAct2d):
        return "it is fused with its activation: synchronize before fuse_norm_act"
    if isinstance(module, _WITHOUT_SYNCHRONIZED_FORM):
        return "it does more than normalize, and has no synchronized form"
    return None if converter_of(module) is not None else "no converter for a forward of its own"


def _swap(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a second name of a child
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model)
