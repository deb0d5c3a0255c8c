"""What has no kernels: second derivatives, forward mode, and the transforms of ``torch.func``. They follow the formulas
of :mod:`fbn_plugin.ops.reference`, which are made of PyTorch's standard operators.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fbn_plugin.ops import reference
from fbn_plugin.ops.reference import SIGN_TELLS, Options


def is_dual(*tensors: Tensor | None) -> bool:
    """Whether one of them has a tangent, as inside of ``torch.autograd.forward_ad.dual_level``."""
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def by_formula(
    formula: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a formula's inputs, from those of its outputs, for a backward pass of one's own.

    They can be differentiated again where autograd asks for that.

    Args:
        formula: of the inputs; one output, or None, for each of ``grads``.
        inputs: as saved for the backward pass, with their history.

    Returns:
        One for each input; None where it needs none.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Of each its own view: one tensor may come twice, as values and as their gradient, say.
        views = [None if t is None else t.view_as(t) for t in inputs]
        outputs = formula(*views)
        pairs = [(y, g) for y, g in zip(outputs, grads) if y is not None and g is not None and y.requires_grad]
        wanted = [t for t in views if t is not None and t.requires_grad]
        if not pairs or not wanted:
            return [None] * len(views)
        ys, gs = zip(*pairs)
        found = iter(torch.autograd.grad(ys, wanted, gs, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in views]


def other_of(y: Tensor, residual: Tensor | None, activation: str) -> Tensor | None:
    """What the backward pass needs to know the activation's derivative, if there is a residual."""
    if residual is None or activation == "identity":
        return None
    return y if activation in SIGN_TELLS else residual


class _Printed(torch.autograd.Function):
    """The norm with the gradient that the paper prints, ``grad_mode`` "paper". It is that of no function: the second
    derivative is the printed formula's, and what comes first in forward mode nobody has printed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, options):
        y, moments = reference.formula(x, weight, bias, residual, options._replace(grad_mode="exact"))
        return y, torch.stack(moments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, ctx.options = inputs
        y, moments = output
        ctx.mark_non_differentiable(moments)
        ctx.save_for_backward(x, weight, bias, other_of(y, residual, ctx.options.activation))
        ctx.has_residual = residual is not None

    @staticmethod
    def backward(ctx, grad, _):
        x, weight, bias, other = ctx.saved_tensors
        dx, d_weight, d_bias, dz = reference.gradient_formula(grad, x, weight, bias, other, ctx.options)
        d_residual = (grad if dz is None else dz) if ctx.has_residual else None
        d_weight, d_bias = (None if t is None else d.to(t.dtype) for t, d in ((weight, d_weight), (bias, d_bias)))
        return dx, d_weight, d_bias, d_residual, None

    @staticmethod
    def jvp(ctx, *_):
        raise ValueError("forward-mode derivatives follow the exact gradient only, got grad_mode 'paper'")


def formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """:meth:`fbn_plugin.ops.dispatch.Backend.forward` by standard operators, with all derivatives; in a graph that is
    captured by those operators alone."""
    if torch.onnx.is_in_onnx_export():  # without a gradient
        options = options._replace(grad_mode="exact")
    elif options.grad_mode == "paper" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return _Printed.apply(x, weight, bias, residual, options)
    return standard(x, weight, bias, residual, options)


def standard(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """:func:`formula` by standard operators and nothing else, for graphs; of the printed gradient it has the first
    derivative alone."""
    y, moments = reference.formula(x, weight, bias, residual, options)
    return y, torch.stack([moment.detach() for moment in moments])


class _Below(torch.autograd.Function):
    """A function that writes, called with what the transforms around it have wrapped, one transform after the other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function, *tensors):
        function(*tensors)
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)
        ctx.number = len(inputs)

    @staticmethod
    def backward(ctx, _):
        return (None,) * ctx.number

    @staticmethod
    def jvp(ctx, *_):
        return None


def below_transforms(function: Callable[..., None], *tensors: Tensor | None) -> None:
    """Call ``function(*tensors)``, which writes into some of them and holds no other, where no transform of
    ``torch.func`` minds. One that differentiates refuses that a tensor is written which is not its argument, such as
    the running statistics of a model. ``vmap`` refuses, rightly, what would write many values into one place."""
    _Below.apply(function, *(t if t is None else t.detach() for t in tensors))
