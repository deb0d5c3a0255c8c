"""Batch normalization with a sigmoid in its scale: RBN and IEBN, whose gate looks at the image, and RBN- and IEBN-,
whose gate is learned alone.

Source: Davis and Frank, "Revisiting Batch Norm Initialization" (2022), section 4.5, which takes the scaling part of
Representative Batch Normalization (Gao et al. 2021) and of Instance Enhancement Batch Normalization (Liang et al. 2020)
as baselines; the first one's centering is left out, as there.
"""

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.batch_norm import FOLDED, AnyDimsMixin, BatchNormMixin, FoldedBatchNormMixin
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops.gated import gated_batch_norm


class _Gate(AnyDimsMixin):
    """The gate's parameters: ``gate_bias`` (w), and ``gate_weight`` (v) where the gate looks at the image."""

    def _init_gate(self, gate_init: float, pooled: bool, device, dtype) -> None:
        self.gate_init = float(gate_init)
        self.gate_bias = nn.Parameter(torch.full((self.num_features,), self.gate_init, device=device, dtype=dtype))
        if pooled:
            self.gate_weight = nn.Parameter(torch.zeros(self.num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "gate_bias"):  # not there when the base class calls
            nn.init.constant_(self.gate_bias, self.gate_init)
        if hasattr(self, "gate_weight"):
            nn.init.zeros_(self.gate_weight)


class GatedBatchNorm2d(_Gate, FoldedBatchNormMixin, nn.BatchNorm2d):
    """Batch normalization whose scale passes a learned gate (RBN- and IEBN- of Davis and Frank 2022, section 4.5).

    ``y = gamma sigmoid(w) xhat + beta``, in evaluation a batch normalization like any other. The gate's parameter
    ``gate_bias`` (w) starts at ``gate_init``: 1 in RBN-, where the scale so starts at 0.731, and -1 in IEBN-, 0.269.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`; without
            ``affine`` the gate stays.
        bias: False has no shift.
        gate_init: what w starts at.
        gamma_init: what gamma starts at, in (0, 1]; 1 in the paper.

    Shape:
        input and output ``(N, C, H, W)``, or any other number of spatial dimensions.

    Raises:
        ValueError: ``gamma_init`` out of range; in ``forward``, one value per channel in training.

    Examples::

        >>> layer = fbn_plugin.GatedBatchNorm2d(8, gate_init=-1.0)
        >>> x = torch.randn(4, 8, 16, 16)
        >>> torch.allclose(layer(x), torch.sigmoid(torch.tensor(-1.0)) * nn.BatchNorm2d(8)(x), atol=1e-5)
        True
    """

    description = FOLDED

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        gate_init: float = 1.0,
        gamma_init: float = 1.0,
    ) -> None:
        placement = {"device": device, "dtype": dtype}
        options = {"bias": bias, "gamma_init": gamma_init, **placement}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self._init_gate(gate_init, pooled=False, **placement)

    def affine_terms(self) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(self.gate_bias)
        return gate if self.weight is None else self.weight * gate, self.bias


class _PooledGateBatchNorm2d(_Gate, BatchNormMixin, nn.BatchNorm2d):
    description = NormDescription("BN", "image")
    _gate_init: float
    _pool_input: bool

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        gamma_init: float = 1.0,
    ) -> None:
        placement = {"device": device, "dtype": dtype}
        options = {"bias": bias, "gamma_init": gamma_init, **placement}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self._init_gate(self._gate_init, pooled=True, **placement)
        self._pool_input = self._pool_input  # TorchScript reads nothing of the class

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        mean, var, counter, training = self._running(input)
        return gated_batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            self.gate_weight,
            self.gate_bias,
            training,
            self.momentum,
            self.eps,
            self._pool_input,
            counter,
        )


_DOC = """{name} in the form of Davis and Frank (2022), section 4.5.

    ``y = gamma sigmoid(v GAP(z) + w) xhat + beta``, ``z`` being {z} and GAP its mean over the positions of each image
    and channel. The gate's parameters ``gate_weight`` (v) and ``gate_bias`` (w) start at 0 and {w:g}, so the scale
    starts at {scale}. It depends on the image in evaluation too, so this norm cannot be folded into a convolution, or
    frozen, or synchronized. Its minus form, :class:`GatedBatchNorm2d`, can.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`; without
            ``affine`` the gate stays.
        bias: False has no shift.
        gamma_init: what gamma starts at, in (0, 1]; 1 in the paper.

    Shape:
        input and output ``(N, C, H, W)``, or any other number of spatial dimensions; without any, an image's only value
        is its mean.

    Raises:
        ValueError: ``gamma_init`` out of range; in ``forward``, one value per channel in training.

    The paper does not say what GAP(xhat) is in evaluation: here ``xhat`` is then normalized by the running statistics.

    Examples::

        >>> layer = fbn_plugin.{cls}(8)
        >>> layer(torch.randn(4, 8, 16, 16)).shape
        torch.Size([4, 8, 16, 16])
    """


class RepresentativeBatchNorm2d(_PooledGateBatchNorm2d):
    __doc__ = _DOC.format(
        cls="RepresentativeBatchNorm2d",
        name="Representative batch normalization (RBN)",
        z="the normalized values ``xhat``",
        w=1,
        scale="0.731",
    )
    _gate_init, _pool_input = 1.0, False


class InstanceEnhancementBatchNorm2d(_PooledGateBatchNorm2d):
    __doc__ = _DOC.format(
        cls="InstanceEnhancementBatchNorm2d",
        name="Instance enhancement batch normalization (IEBN)",
        z="the input ``x``",
        w=-1,
        scale="0.269",
    )
    _gate_init, _pool_input = -1.0, True
