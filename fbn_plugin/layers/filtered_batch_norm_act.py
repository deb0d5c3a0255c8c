"""Filtered batch normalization with the residual and the activation that follow it, as one module.

On a GPU all three are one operator that stores no value between them. Source of the normalization: Horváth and
Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-8.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNorm2d, FilteredBatchNormMixin
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops.checks import check_activation
from fbn_plugin.ops.functional import filtered_batch_norm_act


def activation_of(activation: Callable) -> tuple[str, float] | None:
    """Name and negative slope by which the fused operator knows an activation module or function; None for another, or
    for a module with hooks, which are to be called."""
    if activation in (F.relu, F.relu_):
        return "relu", 0.0
    name = {nn.Identity: "identity", nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.SiLU: "silu"}.get(type(activation))
    if name is None or activation._forward_hooks or activation._forward_pre_hooks or activation._backward_hooks:
        return None
    slope = getattr(activation, "negative_slope", 0.0)
    return (name, slope) if slope >= 0 else None


def normalize_and_activate(
    norm: FilteredBatchNormMixin, input: Tensor, activation: str, negative_slope: float, residual: Tensor | None = None
) -> Tensor:
    """``activation(norm(input) + residual)``, as one operator."""
    running_mean, running_var, counter, training = norm._running(input)
    return filtered_batch_norm_act(
        input,
        running_mean,
        running_var,
        norm.weight,
        norm.bias,
        training,
        norm.momentum,
        norm.eps,
        t_sigma=norm.t_sigma,
        grad_mode=norm.grad_mode,
        gaussian_correction=norm.gaussian_correction,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
        num_batches_tracked=counter,
    )


class FilteredBatchNormAct2d(FilteredBatchNorm2d):
    """``activation(norm(input) + residual)``, the norm a :class:`FilteredBatchNorm2d` with its ``state_dict`` keys.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`FilteredBatchNorm2d`.
        **options: its other ones.
        activation: ``"relu"``, ``"leaky_relu"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``"leaky_relu"``, not below 0.

    Shape:
        input, residual and output ``(N, C, H, W)``.

    Raises:
        ValueError: an option out of range; in ``forward`` as :class:`FilteredBatchNorm2d`.

    Examples::

        >>> layer = fbn_plugin.FilteredBatchNormAct2d(8, activation="silu")
        >>> x, shortcut = torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16)
        >>> layer(x, shortcut).shape
        torch.Size([4, 8, 16, 16])
    """

    description = NormDescription(
        "BN",
        "channel",
        2,
        why_not_synchronized="it is fused with its activation: synchronize before fuse_norm_act",
        why_left=lambda norm: "it is fused with its activation: convert before fuse_norm_act",
        rest=lambda norm: norm.activation_module(),
    )

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
        activation: str = "relu",
        negative_slope: float = 0.01,
        **options,
    ) -> None:
        check_activation(activation, negative_slope)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_scripting():
            return self._forward_scripted(input, residual, self.activation, self.negative_slope)
        elif isinstance(input, Proxy):
            return call_node(self, input) if residual is None else call_node(self, input, residual)
        return normalize_and_activate(self, input, self.activation, self.negative_slope, residual)

    def activation_module(self) -> nn.Module:
        """The activation as a module of its own."""
        if self.activation == "leaky_relu":
            return nn.LeakyReLU(self.negative_slope)
        return {"identity": nn.Identity, "relu": nn.ReLU, "silu": nn.SiLU}[self.activation]()

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope:g}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{slope}"
