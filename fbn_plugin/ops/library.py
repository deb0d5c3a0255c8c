"""Filtered normalization as operators of ``torch.library``: what compilers, exporters, tracers and modes see.

``fbn_plugin::filtered_norm`` is the norm of either form with the residual and the activation that may follow it. It is
defined by schema and implementation rather than by ``torch.library.custom_op``, whose wrapper checks every call anew,
in compiled graphs too. What is kept for the backward pass is the input and five numbers a normalized set; the mask is
recomputed from the band's two edges. The running statistics are updated by PyTorch's own operators, which compilers
make one kernel of.

Where a kernel will not do, an operator is its formula of standard operators (``derivatives.py``): inside the transforms
of ``torch.func``, for second derivatives, and in graphs for elsewhere (:func:`decompositions`).
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from fbn_plugin.ops import derivatives, dispatch, reference
from fbn_plugin.ops.checks import check_channels
from fbn_plugin.ops.derivatives import other_of
from fbn_plugin.ops.reference import Options, RunningStats, accumulate_dtype, update_running_stats

_OPTIONS = (
    "int num_groups, float t_sigma, float eps, bool gaussian_correction, str grad_mode, str activation, "
    "float negative_slope"
)


def _define(name: str, schema: str) -> None:
    # Any strides are taken, and those of the input come back: a compiler that lays a model out as channels-last, as it
    # does for convolutions, is to leave it so, without a copy before each norm.
    tags = torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout
    torch.library.define(f"fbn_plugin::{name}", schema, tags=tags)


_define(
    "filtered_norm",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, {_OPTIONS}) -> (Tensor y, Tensor moments)",
)
_define(
    "filtered_norm_backward",
    f"(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? other, Tensor moments, {_OPTIONS})"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor dz)",
)
# The second, or its formula where a tensor has a tangent: what a backward pass calls that is not Python's.
_define(
    "filtered_norm_gradients",
    f"(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor? other, Tensor moments, {_OPTIONS})"
    " -> (Tensor dx, Tensor d_weight, Tensor d_bias, Tensor dz)",
)
_filtered_norm = torch.ops.fbn_plugin.filtered_norm.default
_filtered_norm_backward = torch.ops.fbn_plugin.filtered_norm_backward.default
_filtered_norm_gradients = torch.ops.fbn_plugin.filtered_norm_gradients.default


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    check_channels(x, weight, bias)  # the kernels read them by address
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"the residual must be like the input, {x.dtype} of {tuple(x.shape)}, got {residual.dtype} of "
            f"{tuple(residual.shape)}"
        )


@torch.library.impl("fbn_plugin::filtered_norm", "default")
def _(x, weight, bias, residual, *options):
    _check(x, weight, bias, residual)
    return dispatch.forward(x, weight, bias, residual, None, Options(*options))


@torch.library.register_fake("fbn_plugin::filtered_norm")
def _(x, weight, bias, residual, num_groups, *_):
    stats = x.shape[1:2] if num_groups == 0 else (x.shape[0], num_groups)
    return torch.empty_like(x), x.new_empty((5, *stats), dtype=accumulate_dtype(x.dtype))


@torch.library.impl("fbn_plugin::filtered_norm_backward", "default")
def _(grad, x, weight, bias, other, moments, *options):
    gradients = dispatch.backward(grad, x, weight, bias, other, moments, Options(*options))
    # An operator's outputs are there, and share no memory with each other or with an input.
    dx, d_weight, d_bias, dz = gradients
    if d_weight.storage_offset() or d_bias.storage_offset():
        d_weight, d_bias = d_weight.clone(), d_bias.clone()
    return dx, d_weight, d_bias, x.new_empty(0) if dz is None else dz


@torch.library.register_fake("fbn_plugin::filtered_norm_backward")
def _(grad, x, weight, bias, other, moments, *_):
    channels = x.shape[1:2]
    dz = x.new_empty(0) if other is None else torch.empty_like(x)
    return torch.empty_like(x), moments.new_empty(channels), moments.new_empty(channels), dz


def _keep_for_backward(ctx, inputs, output):
    x, weight, bias, residual, *options = inputs
    y, moments = output
    ctx.mark_non_differentiable(moments)
    ctx.set_materialize_grads(False)
    activation = options[Options._fields.index("activation")]
    other, shift = other_of(y, residual, activation), None if activation == "identity" else bias
    ctx.save_for_backward(x, weight, shift, other, moments)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual = residual is not None
    ctx.options = options


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * (4 + len(ctx.options))
    x, weight, bias, other, moments = ctx.saved_tensors
    dx, d_weight, d_bias, dz = gradients(grad, x, weight, bias, other, moments, Options(*ctx.options))
    d_weight = None if weight is None else d_weight.to(weight.dtype)
    d_bias = None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)
    d_residual = (grad if other is None else dz) if ctx.residual else None
    return dx, d_weight, d_bias, d_residual, *(None,) * len(ctx.options)


def _keep_for_second_backward(ctx, inputs, output):
    *tensors, _, ctx.options = *inputs[:6], Options(*inputs[6:])  # the moments are taken from x again
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _second_backward(ctx, *grads):
    def formula(*tensors):
        return reference.gradient_formula(*tensors, ctx.options)

    return *derivatives.by_formula(formula, ctx.saved_tensors, grads), None, *(None,) * len(ctx.options)


torch.library.register_autograd("fbn_plugin::filtered_norm", _backward, setup_context=_keep_for_backward)
torch.library.register_autograd(
    "fbn_plugin::filtered_norm_backward", _second_backward, setup_context=_keep_for_second_backward
)


# --- as formulas ------------------------------------------------------------------------------------------------------


def _norm_formula(x, weight, bias, residual, *options):
    _check(x, weight, bias, residual)
    return derivatives.formula(x, weight, bias, residual, Options(*options))


def _norm_in_graphs(x, weight, bias, residual, *options):
    _check(x, weight, bias, residual)
    return derivatives.standard(x, weight, bias, residual, Options(*options))


def _gradient_formula(grad, x, weight, bias, other, _, *options):
    dx, d_weight, d_bias, dz = reference.gradient_formula(grad, x, weight, bias, other, Options(*options))
    return dx, d_weight, d_bias, x.new_empty(0) if dz is None else dz


# The key by which torch.func's transforms see an operator first, whatever the tensors are. No public name: without it
# they refuse the operators, as they do those of others.
with contextlib.suppress(RuntimeError):
    for _name, _formula in (
        ("filtered_norm", _norm_formula),
        ("filtered_norm_backward", _gradient_formula),
        ("filtered_norm_gradients", _gradient_formula),
    ):
        torch.library.impl(f"fbn_plugin::{_name}", "FuncTorchDynamicLayerFrontMode", _formula)


@torch.library.impl("fbn_plugin::filtered_norm_gradients", "CompositeImplicitAutograd")
def _(grad, x, weight, bias, other, moments, *options):
    function = _gradient_formula if derivatives.is_dual(grad, x, weight, bias, other) else _filtered_norm_backward
    return function(grad, x, weight, bias, other, moments, *options)


def decompositions() -> dict[Callable, Callable]:
    """The operators of this package as functions of PyTorch's standard ones, for graphs that are to work without it.

    ``torch.export`` and ``torch.onnx.export`` write the standard operators by themselves, but for the ``torch.export``
    of PyTorch 2.6. A graph that was captured otherwise has ``fbn_plugin::filtered_norm``, for which there are kernels.

    Returns:
        A table for ``ExportedProgram.run_decompositions``, ``make_fx`` and the like.

    Examples::

        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> graph = make_fx(fbn_plugin.FilteredGroupNorm(2, 4), decomposition_table=fbn_plugin.ops.decompositions())
        >>> "fbn_plugin" in graph(torch.randn(2, 4, 8, 8)).code
        False
    """
    return {_filtered_norm: _norm_in_graphs, _filtered_norm_backward: _gradient_formula}


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """:meth:`fbn_plugin.ops.dispatch.Backend.forward` as an operator, with a gradient."""
    y, moments = _filtered_norm(x, weight, bias, residual, *options)
    if running is not None:
        mean, var, _, _, count = moments
        update_running_stats(running, mean, var, count)
    return y, moments


def gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:meth:`fbn_plugin.ops.dispatch.Backend.backward` as an operator, which knows batched gradients, tangents and
    second derivatives."""
    operator = _filtered_norm_gradients if derivatives.is_dual(grad) else _filtered_norm_backward
    dx, d_weight, d_bias, dz = operator(grad, x, weight, bias, other, moments, *options)
    return dx, d_weight, d_bias, None if other is None else dz
