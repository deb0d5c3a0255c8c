"""What a norm is, said once: by its class, or, for classes of PyTorch's, in the one table here.

What changes a built model or groups its parameters asks :func:`describe` and needs no table of classes of its own. A
norm of this library or of yours has a class attribute ``description``; an adapter of a framework describes classes that
it cannot change by :func:`describe_class`. A class without a description is what the nearest class that it derives from
is, unless it has a forward of its own, of which nothing is known.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

NO_SYNCHRONIZED_FORM = "it does more than normalize, and has no synchronized form"


@dataclass(frozen=True)
class NormDescription:
    """What a norm is.

    Args:
        family: what its moments are of: ``"BN"`` of a batch, ``"FrozenBN"`` none, they are constants, ``"GN"``,
            ``"LN"``, ``"IN"``, ``"FRN"`` and ``"LearnedNorm"`` of each sample; another name is a family of its own.
            None is a norm to weight decay, which leaves its parameters alone, and nothing else is done to it.
        evaluation: ``"channel"``, a fixed scale and shift of each channel where it has running statistics; ``"image"``,
            a scale and shift that depend on the image; ``"activation"``, fixed ones of each channel and position;
            ``"sample"``, by moments of its input. What scale and shift of a channel are follows from the state of a
            batch norm, or a method ``eval_affine()`` tells: two tensors ``(C,)``.
        dims: number of spatial dimensions that it is for; None is any.
        synchronized: its moments are those of all processes' batches.
        synchronized_form: name and options of the registered norm that synchronizes it, of a module; None: there is
            none.
        why_not_synchronized: why there is none.
        affine_terms: weight and bias of the batch normalization that a module equals, ``(C,)`` each or None, where they
            are not its own ``weight`` and ``bias``.
        splits_affine: without ``affine`` and followed by a scale and shift it is still the same norm, so that these may
            be shared.
        batch_scale: its ``weight`` is the scale of a batch normalization, for a norm without a family.
        owns_children: its submodules are part of the normalization, not something that follows it.
        convert: turns a module into the norm that a factory builds, where that takes more than handing on parameters
            and statistics.
        why_left: why a module cannot become another norm; None where it can.
        rest: what takes the place of a module whose normalization is folded into a layer, where it does more than
            normalize.

    A batch norm (family ``"BN"``) takes, in training, mean and variance of all values of a channel, or those that its
    method ``batch_statistics(input)`` tells: mean, biased variance and number of the values, ``(C,)`` each. In
    evaluation it normalizes by ``running_mean`` and ``running_var``, or, where these are None, by the moments of its
    input.

    Examples::

        >>> class Doubled(nn.BatchNorm2d):
        ...     description = fbn_plugin.NormDescription(
        ...         "BN", "channel", dims=2, affine_terms=lambda norm: (2 * norm.weight, 2 * norm.bias)
        ...     )
        ...     def forward(self, input):
        ...         return 2 * super().forward(input)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), Doubled(8)).eval()
        >>> fbn_plugin.fold_norms(model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """

    family: str | None = None
    evaluation: Literal["channel", "image", "activation", "sample"] = "sample"
    dims: int | None = None
    synchronized: bool = False
    synchronized_form: Callable[[Any], tuple[str, dict]] | None = None
    why_not_synchronized: str = NO_SYNCHRONIZED_FORM
    affine_terms: Callable[[Any], tuple[Tensor | None, Tensor | None]] | None = None
    splits_affine: bool = True
    batch_scale: bool = False
    owns_children: bool = False
    convert: Callable[[Any, Any], nn.Module] | None = None
    why_left: Callable[[Any], str | None] | None = None
    rest: Callable[[Any], nn.Module] | None = None

    @property
    def has_batch_scale(self) -> bool:
        """Whether its ``weight`` is the scale of a batch normalization."""
        return self.batch_scale or self.family == "BN"

    @property
    def keeps_meaning(self) -> bool:
        """Whether weight and bias mean what they mean in batch normalization."""
        return self.affine_terms is None and self.evaluation != "image"


def plain_sync(module: nn.Module) -> tuple[str, dict]:
    """The synchronized form of plain batch normalization."""
    return "SyncBN", {}


FROZEN = NormDescription("FrozenBN", "channel")

# PyTorch's own.
_DESCRIPTIONS: dict[type[nn.Module], NormDescription] = {
    _NormBase: NormDescription(),
    _BatchNorm: NormDescription("BN", "channel", synchronized_form=plain_sync),
    nn.BatchNorm1d: NormDescription("BN", "channel", 1, synchronized_form=plain_sync),
    nn.BatchNorm2d: NormDescription("BN", "channel", 2, synchronized_form=plain_sync),
    nn.BatchNorm3d: NormDescription("BN", "channel", 3, synchronized_form=plain_sync),
    nn.SyncBatchNorm: NormDescription("BN", "channel", synchronized=True),
    _InstanceNorm: NormDescription("IN", "channel"),
    nn.InstanceNorm1d: NormDescription("IN", "channel", 1),
    nn.InstanceNorm2d: NormDescription("IN", "channel", 2),
    nn.InstanceNorm3d: NormDescription("IN", "channel", 3),
    nn.GroupNorm: NormDescription("GN"),
    nn.LayerNorm: NormDescription("LN", why_left=lambda norm: "its channels are not the second dimension"),
    nn.RMSNorm: NormDescription(),
}


def describe_class(description: NormDescription, *classes: type[nn.Module]) -> None:
    """Say what classes that belong to others are; it holds for what derives from them, too, as long as that has no
    forward of its own. A class of yours says it by an attribute ``description``.

    Args:
        description: what their modules are.
        *classes: module classes.

    Examples::

        >>> class TheirNorm(nn.GroupNorm):
        ...     def forward(self, input):
        ...         return super().forward(input).relu()
        >>> meaning = fbn_plugin.NormDescription("GN", why_left=lambda norm: "it is an activation, too")
        >>> fbn_plugin.describe_class(meaning, TheirNorm)
    """
    for cls in classes:
        _DESCRIPTIONS[cls] = description


def _describing(cls: type) -> tuple[type, NormDescription] | None:
    for base in cls.__mro__:
        description = base.__dict__.get("description", _DESCRIPTIONS.get(base))
        if isinstance(description, NormDescription):
            return base, description
    return None


def describe_type(cls: type) -> NormDescription | None:
    """What the modules of a class are; None if that is no norm that is known."""
    found = _describing(cls)
    return None if found is None else found[1]


def describe(module: nn.Module) -> NormDescription | None:
    """What a module is; None if it is no norm that is known.

    A module that has all of batch normalization's state as buffers is a frozen batch norm, whoever made it.
    """
    found = _describing(type(module))
    if found is not None:
        return found[1]
    keys = ("weight", "bias", "running_mean", "running_var")
    return FROZEN if all(name in module._buffers for name in keys) else None


def is_replaced(module: nn.Module) -> bool:
    """Whether a forward was put on a module that is not its class's."""
    own = vars(module).get("forward")  # who replaces it for one call puts the class's back there
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def has_hooks(module: nn.Module) -> bool:
    """Whether a module computes something besides what its class does: by hooks, or by a forward that was put on it."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return is_replaced(module) or any(getattr(module, name) for name in names)


def has_known_forward(cls: type) -> bool:
    """Whether a class computes what its description, which may be that of a class it derives from, says."""
    found = _describing(cls)
    return found is not None and cls.forward is found[0].forward


def tells_moments(cls: type) -> bool:
    """Whether it is known by which moments a batch norm normalizes in training: by those that its method
    ``batch_statistics`` tells, or by mean and variance of all values of a channel.

    A forward that is overridden below the method, or below the class that is described, may do anything. PyTorch's own
    classes take the plain moments.
    """
    computing, telling = _defining(cls, "forward"), _defining(cls, "batch_statistics")
    if has_known_forward(cls) or computing.__module__.startswith("torch."):
        return True
    return telling is not None and issubclass(telling, computing)


def _defining(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in base.__dict__), None)


def check_moments(norms: Iterable[nn.Module]) -> None:
    """Refuse a batch norm of whose moments in training nothing is known.

    Raises:
        ValueError: there is one.
    """
    for norm in norms:
        if not tells_moments(type(norm)):
            raise ValueError(
                f"{type(norm).__name__} has a forward of its own, and by which moments it normalizes is not known: "
                "give the class a method `batch_statistics(input)`, or a `description` if they are mean and variance "
                "of the batch, see fbn_plugin.NormDescription"
            )


def spatial_dims(cls: type) -> int | None:
    """Number of spatial dimensions that the modules of a class are for; None is any, or not known."""
    description = describe_type(cls)
    if description is not None and description.dims is not None:
        return description.dims
    checked = _defining(cls, "_check_input_dim")  # by which PyTorch's norms refuse other inputs
    return getattr(_DESCRIPTIONS.get(checked), "dims", None)


def outer_batch_norm(cls: type) -> type[nn.Module]:
    """The nearest class that a batch norm of this library or of yours derives from and that belongs to PyTorch or a
    framework."""
    return next(base for base in cls.__mro__ if base in _DESCRIPTIONS and issubclass(base, _BatchNorm))


def family(module: nn.Module) -> str | None:
    """The family of a module; None if it is no norm that is known, or one of no family."""
    description = describe(module)
    return None if description is None else description.family


def families() -> tuple[str, ...]:
    """All families that are known: first those of this library and PyTorch, then those of registered norms."""
    first = ("BN", "FrozenBN", "GN", "LN", "IN", "FRN", "LearnedNorm")
    others = {each.family for each in _DESCRIPTIONS.values()} | _subclass_families(nn.Module)
    return (*first, *sorted(others - {None, *first}))


def _subclass_families(cls: type) -> set[str | None]:
    own = cls.__dict__.get("description")
    found = {own.family} if isinstance(own, NormDescription) else set()
    return found.union(*map(_subclass_families, cls.__subclasses__()))


def affine_terms(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of the batch normalization that ``norm`` equals where it has running statistics, ``(C,)`` each or
    None."""
    description = describe(norm)
    if description is not None and description.affine_terms is not None:
        return description.affine_terms(norm)
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def eval_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel in evaluation, ``(C,)`` each, in float64, of a norm that is one then."""
    if hasattr(norm, "eval_affine"):
        scale, shift = norm.eval_affine()
        return scale.detach().double(), shift.detach().double()
    with torch.no_grad():
        weight, bias = affine_terms(norm)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -norm.running_mean * scale
        return scale, shift if bias is None else shift + bias


def evaluates_by_constants(norm: nn.Module) -> bool:
    """Whether a norm is, in evaluation, a scale and shift of each channel that :func:`eval_affine` tells."""
    if hasattr(norm, "eval_affine"):
        return True
    description = describe(norm)
    if description is None or description.evaluation != "channel" or not has_known_forward(type(norm)):
        return False
    return getattr(norm, "running_mean", None) is not None
