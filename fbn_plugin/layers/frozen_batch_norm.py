"""Batch normalization whose parameters and statistics are constants: a fixed scale and shift of each channel.

What detectors put into a pretrained backbone. Source of the normalization: Ioffe and Szegedy, "Batch Normalization"
(2015), Algorithm 2, step 11.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbn_plugin.layers.description import NormDescription
from fbn_plugin.ops.checks import check_eps

_KEYS = ("weight", "bias", "running_mean", "running_var")


class _ScaleAndShift(torch.autograd.Function):
    """``scale * x + shift`` for ``x`` of half precision and constants ``(C,)`` of single precision, in one pass of
    ``F.batch_norm`` each way, without a tensor of single precision of the size of ``x``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return F.batch_norm(x, zero, one, scale, shift, training=False, eps=0.0)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return _ScaleAndShift.apply(grad, scale, torch.zeros_like(scale)), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *constants: None) -> Tensor:
        (scale,) = ctx.saved_tensors
        return _ScaleAndShift.apply(tangent, scale, torch.zeros_like(scale))


def _scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``scale * x + shift``, rounded to the precision of ``x`` once: a scale and a shift that are rounded before would
    shift a channel's mean, and its mean is what the shift is for."""
    if not torch.jit.is_scripting():
        compiled = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if x.dtype != scale.dtype and not compiled:  # compilers fuse by themselves, and know no function with a jvp
            return _ScaleAndShift.apply(x, scale, shift)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return (x * scale.view(shape) + shift.view(shape)).to(x.dtype)


class FrozenBatchNormMixin:
    """Buffers and forward pass of a frozen batch normalization, to stand before ``nn.Module`` in the bases."""

    def __init__(self, num_features: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps(eps)
        for name in _KEYS:
            start = torch.ones if name in ("weight", "running_var") else torch.zeros
            self.register_buffer(name, start(num_features, device=device, dtype=dtype))

    def eval_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, ``(C,)`` each: the layer computes ``scale * x + shift``."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        weight, bias, mean, var = (getattr(self, name).to(dtype) for name in _KEYS)
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in self._ranks:
            raise ValueError(f"expected {' or '.join(map(str, self._ranks))}D input (got {input.dim()}D input)")
        if not (self.training and input.requires_grad):
            statistics = self.running_mean, self.running_var
            return F.batch_norm(input, *statistics, self.weight, self.bias, training=False, eps=self.eps)
        # The backward pass of F.batch_norm keeps the input; this one keeps C numbers.
        dtype = torch.promote_types(input.dtype, torch.float32)
        scale, shift = self.eval_affine()
        return _scale_and_shift(input, scale.to(dtype), shift.to(dtype))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # in the checkpoints of layers that count
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


_DOC = """Frozen batch normalization over {shape}: ``weight * (x - running_mean) / sqrt(running_var + eps) + bias`` with
    all four constants, in training and evaluation alike.

    They are buffers, so nothing is trained, under the keys that :class:`torch.nn.{base}`, detectron2 and torchvision
    use; a ``num_batches_tracked`` in a checkpoint is passed over. Gradients go through to the input.

    Args:
        num_features: C.
        eps, device, dtype: as in :class:`torch.nn.{base}`.

    Shape:
        input and output {shape}.

    Raises:
        ValueError: in ``forward``, an input of another rank.

    Examples::

        >>> layer = fbn_plugin.Frozen{base}(8)
        >>> layer.load_state_dict(nn.{base}(8).state_dict())
        <All keys matched successfully>
        >>> list(layer.parameters())
        []
    """


class FrozenBatchNorm1d(FrozenBatchNormMixin, nn.Module):
    __doc__ = _DOC.format(shape="``(N, C)`` or ``(N, C, L)``", base="BatchNorm1d")
    description = NormDescription("FrozenBN", "channel", 1)
    _ranks = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNormMixin, nn.Module):
    __doc__ = _DOC.format(shape="``(N, C, H, W)``", base="BatchNorm2d")
    description = NormDescription("FrozenBN", "channel", 2)
    _ranks = (4,)


class FrozenBatchNorm3d(FrozenBatchNormMixin, nn.Module):
    __doc__ = _DOC.format(shape="``(N, C, D, H, W)``", base="BatchNorm3d")
    description = NormDescription("FrozenBN", "channel", 3)
    _ranks = (5,)
