"""The short way of eager calls: from an autograd function straight to a backend, without the dispatcher and the Python
that it calls for an operator, which takes longer than the kernels do for a small map.

It is taken where nobody would see the operator: plain tensors, and no compiler, tracer, transform or mode. To know
that, it asks PyTorch for names that are not public, and no other file of the package does. Each is looked up once, at
import; where one is missing, :mod:`fbn_plugin.ops.library` has the way that is public, slower and as right.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fbn_plugin.ops import cuda, dispatch, library, reference
from fbn_plugin.ops.derivatives import below_transforms, is_dual
from fbn_plugin.ops.reference import SIGN_TELLS, Options, RunningStats

# All names that are not public and that something here depends on.
PRIVATE = (
    "_C._functorch.peek_interpreter_stack",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._functorch.is_legacy_batchedtensor",
    "_C._len_torch_dispatch_stack",
    "_C._cuda_getCurrentRawStream",
    "Tensor._is_zerotensor",
    "autograd.forward_ad._current_level",
)


def _find(name: str) -> Any:
    """What torch has under a dotted name; None if it is not there."""
    found = torch
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


_transforms, _is_wrapped, _is_batched, _modes, _raw_stream, _is_zeros, _level = map(_find, PRIVATE)
_can_tell = None not in (_transforms, _is_batched, _modes, _is_zeros, _level)
_PLAIN = (Tensor, nn.Parameter)
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # PyTorch 2.6 cannot tell


def takes(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are computed with, and no tracer, transform or mode is to see the operator; a compiler is
    the caller's to rule out. Where a bit says that the values are those in memory negated, or that they are zeros
    without memory, the dispatcher sees to it."""
    if not _can_tell or _transforms() is not None or _modes() or torch.jit.is_tracing():
        return False
    if forward_ad._current_level >= 0:  # tensors may have tangents
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_neg() or _is_zeros(tensor)):
            return False
    return True


def _takes_gradient(grad: Tensor) -> bool:
    """False if the operator is to be called: it knows batched gradients, tangents and second derivatives."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return takes(grad) and not _is_batched(grad)


def needs_formula(*tensors: Tensor | None) -> bool:
    """Whether what is computed with them must be PyTorch's standard operators alone, as someone follows who knows no
    other: a transform of ``torch.func``, forward mode, or an exporter, whose graphs are for elsewhere."""
    if torch.compiler.is_compiling():
        return _is_exporting()
    if torch.jit.is_tracing():
        return True
    if _can_tell:
        return _transforms() is not None or (forward_ad._current_level >= 0 and is_dual(*tensors))
    tell = _has_no_memory if _is_wrapped is None else _is_wrapped
    return any(tensor is not None and tell(tensor) for tensor in tensors) or is_dual(*tensors)


def is_followed(grad: Tensor) -> bool:
    """Whether a backward pass is to be made of standard operators: one that is differentiated again, or transformed, or
    whose gradient stands for many."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or needs_formula(grad) or (_is_batched is not None and _is_batched(grad))


def _has_no_memory(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return type(tensor) in _PLAIN
    return False


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, running, options):
        y, moments = dispatch.forward(x, weight, bias, residual, running, options)
        activation = options[5]
        if activation == "identity":
            ctx.save_for_backward(x, weight, None, None, moments)
        elif residual is None:
            ctx.save_for_backward(x, weight, bias, None, moments)
        else:
            ctx.save_for_backward(x, weight, bias, y if activation in SIGN_TELLS else residual, moments)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx, grad):
        gradients = dispatch.backward if _takes_gradient(grad) else library.gradients
        x, weight, bias, other, moments = ctx.saved_tensors
        dx, d_weight, d_bias, dz = gradients(grad, x, weight, bias, other, moments, ctx.options)
        # autograd brings them to the dtype of each, but wants None for what is not there
        _, of_weight, of_bias, of_residual, _, _ = ctx.needs_input_grad
        return (
            dx,
            d_weight if of_weight else None,
            d_bias if of_bias else None,
            (grad if dz is None else dz) if of_residual else None,
            None,
            None,
        )


# (x, weight, bias, residual, running, options) -> y, with a gradient, for what :func:`takes` takes.
normalize: Callable[[Tensor, Tensor | None, Tensor | None, Tensor | None, RunningStats | None, Options], Tensor]
normalize = _Norm.apply


def hosted(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    num_batches: Tensor | None,
    options: Options,
) -> Tensor | None:
    """The shortest way: all of the call from C++, with a gradient, by the kernels for CUDA.

    None where C++ does not take it, and the caller goes on. It checks what the callers check, in their place, and takes
    nothing that they or :func:`takes` might refuse.
    """
    if torch.compiler.is_compiling():
        return None
    normalize = cuda.hosted.get("normalize")
    if normalize is None:
        return None
    arguments = x, weight, bias, residual, running_mean, running_var, momentum, num_batches, options
    y = normalize(*arguments)
    if y is not False:
        return y
    if dispatch.backend_of(x, options[0], options[5]) is not cuda or not cuda.hand_over(x, options):
        return None
    y = normalize(*arguments)
    return None if y is False else y


def update_running_stats(running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """:func:`reference.update_running_stats`, in transforms of ``torch.func`` too."""
    no_transform = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if no_transform or not needs_formula(*running[:2], mean, var):
        reference.update_running_stats(running, mean, var, count)
        return

    def update(average_mean, average_var, num_batches, mean, var, count):
        averages = RunningStats(average_mean, average_var, running.momentum, num_batches)
        reference.update_running_stats(averages, mean, var, count)

    below_transforms(update, running.mean, running.var, running.num_batches, mean, var, count)


# Backends that launch kernels are told, as they stand below this file.
cuda.driver.use_for_current_stream(_raw_stream)
