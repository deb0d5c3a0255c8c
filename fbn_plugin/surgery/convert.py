"""Swap the norms of a built model, keeping weights and statistics: for models that take no norm argument, and for
trained ones."""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers.description import (
    NormDescription,
    affine_terms,
    describe,
    describe_class,
    describe_type,
    family,
    outer_batch_norm,
)
from fbn_plugin.layers.random_start import separate_stream
from fbn_plugin.ops.plain import SMALLEST_EPS
from fbn_plugin.registry import NormFactory, NormSpec, norm_factory, norm_options
from fbn_plugin.surgery.choose import as_tuple, check_sources, choose_norms, why_left
from fbn_plugin.surgery.norm_report import NormChange, NormLeft, NormReport
from fbn_plugin.surgery.norm_summary import norm_kind, norm_settings, num_channels
from fbn_plugin.surgery.references import replace_references
from fbn_plugin.surgery.refit import refit_norms
from fbn_plugin.training.evaluation_modes import evaluation_mode
from fbn_plugin.training.population_statistics import update_population_stats

_SYNCHRONIZED = "it is synchronized already"
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Options that mean the same in all norms that have them; those of the filter but for FRN, whose cut is in units of the
# root mean square.
_COMMON = ("eps", "momentum", "affine")
_FILTER = ("t_sigma", "grad_mode", "gaussian_correction")


def copy_norm_state(old: nn.Module, new: nn.Module) -> nn.Module:
    """Hand the parameters, running statistics and training flag of ``old`` over to ``new``, as far as both have them;
    return ``new``. Parameters besides weight and bias go to a norm of the same class.

    The tensors themselves move, so an optimizer that holds the old parameters keeps training the new norm. Only where a
    parameter becomes a constant or a constant a parameter, ``new`` gets a copy.
    """
    for name in _STATE:
        tensor, place = getattr(old, name, None), getattr(new, name, None)
        tensor = _for_each_position(tensor, place, new)
        if tensor is not None and place is not None and tensor.shape == place.shape:
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


def _for_each_position(tensor: Tensor | None, place: Tensor | None, new: nn.Module) -> Tensor | None:
    """What a channel has, once for each position of a norm that has learned how many there are; a copy."""
    description = describe(new)
    if description is None or description.evaluation != "activation" or tensor is None or place is None:
        return tensor
    if tensor.dim() == 0 or tensor.shape == place.shape or len(place) % len(tensor):
        return tensor
    values = tensor.detach().repeat_interleave(len(place) // len(tensor))
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def build_like(old: nn.Module, factory: NormFactory) -> nn.Module:
    """Build the factory's norm for the channels of the norm ``old``, with its options and state.

    What the spec does not set is that of ``old``: ``eps``, ``momentum``, ``affine``, ``track_running_stats``,
    ``num_groups`` and the options of the filter where both norms have them, a small ``gamma_init``, and all options if
    ``old`` is the norm that the spec names; between synchronized norms the process group stays. An instance
    normalization tracks no statistics unless the spec says so. Where ``old`` has no weight or bias, neither has the new
    norm, unless the spec sets ``affine``. An ``eps`` of 0, with which torchvision freezes norms, is not kept where the
    new norm trains: the scale makes up for it.

    Raises:
        ValueError: the norm does not fit the channels, or would freeze statistics that ``old`` does not have.
    """
    state = [getattr(old, name, None) for name in _STATE]
    reference = next((tensor for tensor in (state[0], state[2], *old.parameters()) if tensor is not None), None)
    placement = {} if reference is None else {"device": reference.device, "dtype": reference.dtype}
    kept = _kept_options(old, factory.spec)
    new = factory(_num_channels(old), **kept, **placement)
    if family(new) == "FrozenBN" and (state[2] is None or state[3] is None):
        raise ValueError(f"{type(old).__name__} has no running statistics to freeze")
    copy_norm_state(old, new)
    if hasattr(old, "process_group") and hasattr(new, "process_group"):
        new.process_group = old.process_group
    if "affine" not in factory.spec.options:
        for name in ("weight", "bias"):
            if getattr(old, name, old) is None and isinstance(getattr(new, name, None), nn.Parameter):
                setattr(new, name, None)
    return _make_up_for_eps(old, new)


def _make_up_for_eps(old: nn.Module, new: nn.Module) -> nn.Module:
    """Where a norm has an eps of 0 and a new one that trains another, let the scale keep the evaluation, if that goes
    by running statistics."""
    parts = [getattr(new, name, None) for name in ("weight", "running_var")]
    if _has_no_eps(old) and family(new) == "BN" and all(part is not None for part in parts):
        with torch.no_grad():
            scale = ((new.running_var + new.eps) / new.running_var).sqrt()
            new.weight.mul_(torch.where(new.running_var > 0, scale, 1))
    return new


def _has_no_eps(norm: nn.Module) -> bool:
    eps = getattr(norm, "eps", None)
    return isinstance(eps, float | int) and eps < SMALLEST_EPS


def _kept_options(old: nn.Module, spec: NormSpec) -> dict:
    """The options of ``old`` that the norm of a spec gets."""
    settings, defaults = norm_settings(old), norm_options(spec.name)
    common = (*_COMMON, *_FILTER) if ("tlu" in defaults) == (family(old) == "FRN") else _COMMON
    kept = {name: getattr(old, name) for name in common if hasattr(old, name)}
    if defaults.get("track_running_stats") and family(old) == "BN":
        kept["track_running_stats"] = old.track_running_stats
    if getattr(old, "gamma_init", 1.0) != 1.0:
        kept["gamma_init"] = old.gamma_init
    if family(old) == "GN" and hasattr(old, "num_groups"):
        kept["num_groups"] = old.num_groups
    if norm_kind(old) == spec.name:
        kept = {**settings, **kept}
    if _has_no_eps(old) and spec.name != "FrozenBN":  # in training a constant channel would be NaN
        kept.pop("eps", None)
    return {name: value for name, value in kept.items() if name in defaults and name not in (*spec.options, "bias")}


def make_plain(module: nn.Module) -> None:
    """Make a batch norm of this package whose weight and bias are not all of its affine part, in place, the plain one
    that it equals in evaluation; leave any other module as it is.

    For what reads weight and bias of a batch normalization to freeze, fold or replace it.

    Raises:
        ValueError: there is no such batch normalization, as the scale depends on the image.
    """
    description = describe(module)
    if description is None or not isinstance(module, _BatchNorm):
        return
    if description.evaluation == "image":
        raise ValueError(f"{type(module).__name__} is no batch norm in evaluation: its scale depends on the image")
    if description.evaluation == "activation":
        raise ValueError(f"{type(module).__name__} is no batch norm in evaluation: each position has its own scale")
    plain, says_all = outer_batch_norm(type(module)), module.weight is None or module.bias is not None
    if plain is type(module) or (description.affine_terms is None and says_all):
        return
    weight, bias = affine_terms(module)
    trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    for name in [name for name, _ in module.named_parameters(recurse=False) if name not in _STATE]:
        delattr(module, name)
    if weight is not None:
        module.affine = True
        module.weight = nn.Parameter(weight.detach(), trains)
        module.bias = nn.Parameter(torch.zeros_like(weight) if bias is None else bias.detach(), trains)
    module.__class__ = plain


def build_from(old: nn.Module, factory: NormFactory) -> nn.Module:
    """As :func:`build_like`, but from a norm whose weights have another meaning than a batch norm's, the new one gets
    those of the plain batch norm that evaluates as the old one."""
    new = build_like(old, factory)
    if type(new) is type(old) or describe(old).affine_terms is None:
        return new
    plain = copy.deepcopy(old)
    make_plain(plain)
    return build_like(plain, factory)


def _num_channels(module: nn.Module) -> int:
    channels = num_channels(module)
    if channels is None:
        raise ValueError(f"{type(module).__name__} has neither num_features nor a weight that tells its channels")
    return channels


def _dims(module: nn.Module) -> int:
    return describe(module).dims or getattr(module, "spatial_dims", 2)


def _convert(module: nn.Module, factory: NormFactory) -> nn.Module:
    new = (describe(module).convert or build_from)(module, factory)
    described, dims = describe(new), _dims(module)
    if described is not None and described.dims is None and dims != 2:
        new.spatial_dims = dims  # it does not say of itself what it works on, and may be converted again
    return new


def _note(old: nn.Module, new: nn.Module, spec: NormSpec) -> str:
    """What the new norm has no place for, what it did not get, and the cut that it has from the old one."""

    def has(module, name):
        return getattr(module, name, None) is not None

    def fits(name):
        return has(new, name) and getattr(new, name).shape == getattr(old, name).shape

    lost = [name for name in _STATE[:4] if has(old, name) and not fits(name)]
    lost += ["momentum"] if has(old, "momentum") and not has(new, "momentum") else []
    if describe(old).affine_terms is None:  # else its further parameters are in the new weight and bias
        kept = {id(parameter) for parameter in new.parameters()}
        further = [name for name, parameter in old.named_parameters() if id(parameter) not in kept]
        lost += dict.fromkeys(name.partition(".")[0] for name in further if name not in _STATE)
    if hasattr(old, "t_sigma") and not hasattr(new, "t_sigma"):
        lost.append("the filter")
    if getattr(old, "gamma_init", 1.0) != 1.0 and not hasattr(new, "gamma_init"):
        lost.append("gamma_init")
    if old._forward_hooks or old._forward_pre_hooks or old._backward_hooks:
        lost.append("hooks")
    notes = [f"not carried over: {', '.join(lost)}"] if lost else []
    if has(new, "running_mean") and not has(old, "running_mean"):
        notes.append("running statistics are fresh")
    cut = getattr(new, "t_sigma", None)
    if cut is not None and "t_sigma" not in spec.options and cut != norm_options(spec.name).get("t_sigma", cut):
        notes.append(f"keeps t_sigma={cut:g}")
    if _has_no_eps(old) and not _has_no_eps(new) and family(old) != "FrozenBN":
        notes.append(f"eps is {new.eps:g} in the place of {old.eps:g}")
    meaning = describe(new)
    if meaning is not None and not meaning.keeps_meaning and type(new) is not type(old):
        notes.append("weight and bias mean something else, so the evaluation changes")
    if _is_constant_on_rows(old, new):
        notes.append(_CONSTANT)
    return "; ".join(notes)


_CONSTANT = "it has a group for each channel, so that an input (N, C) becomes constant"


def _is_constant_on_rows(old: nn.Module, new: nn.Module) -> bool:
    """Whether the new norm of what may be rows ``(N, C)`` normalizes each value by itself."""
    channels = getattr(new, "num_channels", None)
    return _dims(old) == 1 and family(new) == "GN" and channels == getattr(new, "num_groups", None)


def register_converter(
    module_type: type[nn.Module],
    family: str = "BN",
    convert: Callable[[nn.Module, NormFactory], nn.Module] | None = None,
    *,
    dims: int | None = None,
) -> None:
    """Let :func:`convert_norm` and its like know a norm of somebody else's.

    The short form of :func:`describe_class`, which can say more of a class.

    Args:
        module_type: a class of modules.
        family: ``"BN"``, ``"FrozenBN"``, ``"GN"``, ``"LN"``, ``"IN"`` or a name of your own: ``sources=`` takes it by
            that.
        convert: called with a module and a factory, as :func:`norm_factory` makes one; returns the new norm. Without
            it, ``weight``, ``bias``, ``running_mean``, ``running_var`` and options such as ``eps`` are handed on by
            their names: for a class that computes what the family does.
        dims: number of spatial dimensions that it is for; None is any.

    Examples::

        >>> class TheirFrozenNorm(nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        ...             self.register_buffer(name, torch.full((channels,), start))
        ...     def forward(self, x):
        ...         scale = self.weight * (self.running_var + 1e-5).rsqrt()
        ...         return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]
        >>> fbn_plugin.register_converter(TheirFrozenNorm, "FrozenBN", dims=2)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), TheirFrozenNorm(8))
        >>> type(fbn_plugin.convert_norm(model, "FBN", sources="FrozenBN")[1]).__name__
        'FilteredBatchNorm2d'
    """
    known = describe_type(module_type) or NormDescription()
    evaluation = "channel" if family in ("BN", "FrozenBN") else known.evaluation
    described = replace(known, family=family, evaluation=evaluation, dims=dims or known.dims, convert=convert)
    describe_class(described, module_type)


def convert_norm(
    model: nn.Module,
    spec: str,
    *,
    sources: str | Iterable[str] | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    thaw: bool = False,
    recalibrate: Iterable | None = None,
    report: NormReport | None = None,
) -> nn.Module:
    """Replace the batch normalizations in ``model`` (filtered and synchronized ones too), or the norms of other
    families, by the norm that ``spec`` names.

    Weights, biases, running statistics, ``eps``, ``momentum``, ``num_groups``, the training flag, device, dtype and
    ``requires_grad`` are kept as far as the new norm has them; parameters stay the same objects. Between filtered norms
    the filter keeps its options: of ``FBN(t_sigma=4)`` a spec ``"SyncFBN"`` or ``"FGN"`` makes one with ``t_sigma=4``,
    and ``"FBN"`` changes nothing. What the spec sets comes first. A module that is used twice stays shared. What that
    means for a trained model:

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
            ``"FRN"`` and ``"LearnedNorm"``, or the name of a registered norm that is a family of its own. By default
            ``"BN"``: what is frozen stays frozen.
        include, exclude: names of modules, as ``named_modules()`` has them, or patterns such as ``"*.downsample.1"``,
            one or several: only norms that have such a name or are in such a module, and none of those. A ``*`` stands
            for dots too.
        thaw: convert frozen norms in frozen stages, too. Without it a FrozenBN beside a layer whose parameters are all
            frozen, as the first stages of a detector's backbone are, stays as it is.
        recalibrate: batches of data, each the model's input or a tuple that begins with it, to refit the new norms on.
            For norms of the BN family :func:`fbn_plugin.update_population_stats` measures their running statistics. For
            all others each scale and shift is fitted by least squares, in one pass through the old model in
            evaluation mode: such that on the inputs of the old norm the new norm's outputs come nearest to the old
            one's, channel by channel. What the new norm takes out of every single sample does not come back: group and
            layer norms come near to the old network, but instance norm takes the mean of each channel, which is what a
            classifier that averages over positions sees.
        report: is filled with what was changed, and what was left and why; print it.

    Returns:
        ``model``, or the new norm if ``model`` is itself such a norm.

    Raises:
        ValueError: a bad spec, an unknown family, a name or pattern that no norm has, a norm that does not fit a
            layer's channels, is for another number of dimensions, or has no statistics to freeze, or ``recalibrate``
            with FrozenBN, without a batch or with a norm whose moments are not known; the model is then as it was.

    Warns:
        UserWarning: there is no norm to convert; norms of these families are left as they are, such as those that have
            not run yet (``nn.LazyBatchNorm2d``) or have a forward of their own and no description
            (:class:`fbn_plugin.NormDescription`), or a module of an unknown class has running statistics; without
            ``sources``, there are frozen norms beside layers that train; or a norm is also held by a closure or a set.

    A norm that modules of the model also keep in a plain list, dict or tuple, a ``functools.partial`` or as a bound
    method is replaced there too. Forward hooks of the old norms are not carried over.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fbn_plugin.convert_norm(model, "FBN(t_sigma=4)")[1]
        FilteredBatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, t_sigma=4)
        >>> type(fbn_plugin.convert_norm(model, "BN")[1]).__name__
        'BatchNorm2d'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert_norm takes a model, an nn.Module, and a spec, got {type(model).__name__}")
    load_adapters()
    choice = choose_norms(model, check_sources(sources), include, as_tuple("exclude", exclude), thaw)
    replaced, changed = _build_new(choice.chosen, spec)
    remarks = choice.remarks(str(spec), by_default=sources is None)
    model, held = _replace(model, replaced, recalibrate)
    if dead := [name for old, name in choice.chosen.items() if _is_constant_on_rows(old, replaced[old])]:
        remarks.append(f"{spec} at {dead[0]!r}: {_CONSTANT}; give a smaller num_groups")
    for remark in remarks + _told(held):
        warnings.warn(remark, stacklevel=2)
    if report is not None:
        report.changed += changed
        report.left += choice.left
    return model


def _build_new(chosen: dict[nn.Module, str], spec: str) -> tuple[dict[nn.Module, nn.Module], list[NormChange]]:
    """The new norm of each old one, and what a report says of it."""
    factories = {dims: norm_factory(spec, dims) for dims in (1, 2, 3)}
    replaced, changed = {}, []
    with separate_stream():  # one for all, so that they differ
        for module, name in chosen.items():
            factory = factories[_dims(module)]
            try:
                new = replaced[module] = _convert(module, factory)
            except ValueError as error:
                raise ValueError(f"cannot convert {name or 'the module'!r} to {spec}: {error}") from error
            note = _note(module, new, factory.spec)
            changed.append(NormChange(name, type(module).__name__, type(new).__name__, note))
    return replaced, changed


def _replace(
    model: nn.Module, replaced: dict[nn.Module, nn.Module], recalibrate: Iterable | None
) -> tuple[nn.Module, list[str]]:
    """Put the new norms in the place of the old ones, refitted to data; returns also where the old ones are held
    still."""
    refit = next((family(new) for new in replaced.values()), None) if recalibrate is not None else None
    if refit == "FrozenBN":
        raise ValueError("recalibrate refits norms that are not frozen: convert to BN with it, then to FrozenBN")
    if refit not in (None, "BN"):
        refit_norms(model, replaced, recalibrate)
    model, held = _swap(model, replaced)
    if refit == "BN":
        try:
            with evaluation_mode(model):
                for new in replaced.values():
                    new.train()
                update_population_stats(model, recalibrate)
        except Exception:
            _swap(model, {new: old for old, new in replaced.items()})
            raise
    return model, held


def replace_norms(model: nn.Module, build: Callable[[int], nn.Module], sources: str | Iterable[str]) -> nn.Module:
    """Replace norms of some families by what a callable builds for their number of channels, as :func:`convert_norm`
    does for a spec; frozen stages stay frozen. Settings such as ``eps`` are those of the callable.

    Returns:
        ``model``, changed in place.
    """
    choice = choose_norms(model, check_sources(sources), None, (), thaw=False)
    replaced = {}
    for old in choice.chosen:
        with separate_stream():
            new = build(_num_channels(old))
        if type(new) is not type(old):
            reference = next((tensor for tensor in (*old.parameters(), *old.buffers())), None)
            new = new if reference is None else new.to(reference.device, reference.dtype)
            replaced[old] = _make_up_for_eps(old, copy_norm_state(old, new))
    for remark in choice.remarks(str(build), by_default=False):
        warnings.warn(remark, stacklevel=2)
    return _swap(model, replaced)[0]


def _told(held: list[str]) -> list[str]:
    """What a user has to hear of old norms that are still held."""
    if not held:
        return []
    number = f" and {len(held) - 1} other attributes" if len(held) > 1 else ""
    return [f"the model still holds a norm that was replaced, outside of its modules: in {held[0]!r}{number}"]


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
        spec = NormSpec(*describe(module).synchronized_form(module))
        new = replaced[module] = _convert(module, norm_factory(spec))
        new.process_group = process_group
        report.changed.append(NormChange(name, type(module).__name__, type(new).__name__, _note(module, new, spec)))
    if not any(kind == "BN" for _, _, kind in norms):
        warnings.warn("nothing was synchronized: the model has no batch normalization", stacklevel=2)
    if local:
        name, kind = next(iter(local.items()))
        what = "norms are left unsynchronized, such as" if len(local) > 1 else "norm is left unsynchronized,"
        warnings.warn(f"{len(local)} batch {what} {kind} (at {name!r}): see the report", stacklevel=2)
    model, held = _swap(model, replaced)
    for remark in _told(held):
        warnings.warn(remark, stacklevel=2)
    return model


def _why_not_synchronized(module: nn.Module, kind: str) -> str | None:
    description = describe(module)
    if kind == "FrozenBN":
        return "it is frozen"
    if description.synchronized:
        return _SYNCHRONIZED
    if description.synchronized_form is not None:
        return why_left(module)
    if kind != "BN":
        return f"{kind} takes no moments of a batch, so there is nothing to synchronize"
    return description.why_not_synchronized


def _swap(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> tuple[nn.Module, list[str]]:
    """Put new modules in the place of old ones; returns also the names of attributes that still hold an old one."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a second name of a child
            if child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(model, model), replace_references(model, replaced) if replaced else []
