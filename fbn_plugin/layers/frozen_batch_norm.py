"""Batch normalization whose parameters and statistics are constants: a fixed scale and shift of each channel.

What detectors put into a pretrained backbone. Source of the normalization: Ioffe and Szegedy, "Batch Normalization"
(2015), Algorithm 2, step 11.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops.checks import check_eps

_KEYS = ("weight", "bias", "running_mean", "running_var")


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
        scale = self.weight.to(dtype) * (self.running_var.to(dtype) + self.eps).rsqrt()
        return scale, self.bias.to(dtype) - self.running_mean.to(dtype) * scale

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        self._check_input_dim(input)
        if not (self.training and input.requires_grad):
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, training=False, eps=self.eps)
        # The backward pass of F.batch_norm keeps the input; that of a product with constants keeps C numbers.
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale, shift = self.eval_affine()
        return input * scale.reshape(shape).to(input.dtype) + shift.reshape(shape).to(input.dtype)

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
    _check_input_dim = nn.BatchNorm1d._check_input_dim


class FrozenBatchNorm2d(FrozenBatchNormMixin, nn.Module):
    __doc__ = _DOC.format(shape="``(N, C, H, W)``", base="BatchNorm2d")
    description = NormDescription("FrozenBN", "channel", 2)
    _check_input_dim = nn.BatchNorm2d._check_input_dim


class FrozenBatchNorm3d(FrozenBatchNormMixin, nn.Module):
    __doc__ = _DOC.format(shape="``(N, C, D, H, W)``", base="BatchNorm3d")
    description = NormDescription("FrozenBN", "channel", 3)
    _check_input_dim = nn.BatchNorm3d._check_input_dim
