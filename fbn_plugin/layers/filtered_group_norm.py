"""Filtered group, layer and instance normalization: the filter on the values of one sample, in training and evaluation
alike.

Horváth and Al-afandi, "Filtered Batch Normalization" (2020), section IV-D, puts the filter into group normalization and
names layer normalization as a further host; instance normalization is a group for each channel. Plain ``LayerNorm2d``
is here because PyTorch has no channels-first one.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.batch_norm import OptionalBiasMixin
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.filtered_batch_norm import FilterMixin
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops import scripted
from fbn_plugin.ops.checks import check_device, check_eps_of_moments, check_groups
from fbn_plugin.ops.functional import filtered_group_norm, filtered_share
from fbn_plugin.ops.reference import Options


class _GroupFilterMixin(FilterMixin):
    """A filter on the values of one sample."""

    def _init_filter(self, t_sigma: float, grad_mode: str, gaussian_correction: bool) -> None:
        check_eps_of_moments(self.eps)
        super()._init_filter(t_sigma, grad_mode, gaussian_correction)

    def _by_groups(self, x: Tensor, num_groups: int) -> Tensor:
        if is_scripting():
            options = Options(
                num_groups, self.t_sigma, float(self.eps), self.gaussian_correction, self.grad_mode, "identity", 0.0
            )
            return scripted.group_norm(x, self.weight, self.bias, options)
        return filtered_group_norm(
            x,
            num_groups,
            self.weight,
            self.bias,
            self.eps,
            t_sigma=self.t_sigma,
            grad_mode=self.grad_mode,
            gaussian_correction=self.gaussian_correction,
        )


class FilteredGroupNorm(_GroupFilterMixin, OptionalBiasMixin, nn.GroupNorm):
    """Filtered group normalization (Horváth and Al-afandi 2020, section IV-D), a drop-in for
    :class:`torch.nn.GroupNorm`.

    Args:
        num_groups: groups of channels, each normalized by its own moments in each sample; divides ``num_channels``.
        num_channels: C.
        eps, affine, device, dtype: as in :class:`torch.nn.GroupNorm`.
        bias: False has a scale and no shift, as newer versions of :class:`torch.nn.GroupNorm` have it.
        t_sigma: cut in standard deviations, above 1; ``inf`` is plain group normalization.
        grad_mode, gaussian_correction: as in :class:`FilteredBatchNorm2d`.

    Shape:
        input and output ``(N, C, *spatial)``.

    Raises:
        ValueError: an option out of range, or groups that do not divide the channels.

    Examples::

        >>> layer = fbn_plugin.FilteredGroupNorm(4, 32, t_sigma=4.0)
        >>> layer(torch.randn(1, 32, 16, 16)).shape
        torch.Size([1, 32, 16, 16])
    """

    description = NormDescription("GN")

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        t_sigma: float = 5.0,
        grad_mode: str = "exact",
        gaussian_correction: bool = False,
    ) -> None:
        check_groups(num_groups, num_channels)
        super().__init__(num_groups, num_channels, eps, affine, bias=bias, device=device, dtype=dtype)
        self._init_filter(t_sigma, grad_mode, gaussian_correction)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        return self._by_groups(input, self.num_groups)


class FilteredInstanceNorm2d(FilteredGroupNorm):
    """Filtered instance normalization: each channel of each sample by its own filtered moments, with a learned scale
    and shift.

    The same as :class:`FilteredGroupNorm` with a group for each channel; there are no running statistics.

    Args:
        num_features: C.
        eps, affine, device, dtype, bias, t_sigma, grad_mode, gaussian_correction: as in :class:`FilteredGroupNorm`.
            There is no ``momentum``, which stands before ``affine`` in :class:`torch.nn.InstanceNorm2d`: what follows
            ``eps`` is passed by name.

    Shape:
        input and output ``(N, C, H, W)``, or any other number of spatial dimensions, with more than one position.

    Examples::

        >>> layer = fbn_plugin.FilteredInstanceNorm2d(8, t_sigma=4.0)
        >>> layer(torch.randn(1, 8, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    description = NormDescription("IN")

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        affine: bool = True,
        device=None,
        dtype=None,
        bias: bool = True,
        t_sigma: float = 5.0,
        grad_mode: str = "exact",
        gaussian_correction: bool = False,
    ) -> None:
        super().__init__(
            num_features,
            num_features,
            eps,
            affine,
            device,
            dtype,
            bias=bias,
            t_sigma=t_sigma,
            grad_mode=grad_mode,
            gaussian_correction=gaussian_correction,
        )

    @property
    def num_features(self) -> int:
        return self.num_channels

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        if all([size == 1 for size in input.shape[2:]]):  # noqa: C419, a list for TorchScript
            raise ValueError(f"Expected more than 1 spatial element, got input size {input.shape}")
        return self._by_groups(input, self.num_groups)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels at each position, channels first, as detectron2 and timm understand ``LN``.

    Args:
        num_channels: C.
        eps, affine, bias, device, dtype: as in :class:`torch.nn.LayerNorm`, ``affine`` as its ``elementwise_affine``.

    Shape:
        input and output ``(N, C, H, W)``, or any other number of spatial dimensions.

    Examples::

        >>> layer = fbn_plugin.LayerNorm2d(8)
        >>> layer(torch.randn(1, 8, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    description = NormDescription("LN")

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        check_device(device)
        super().__init__(num_channels, check_eps_of_moments(eps), affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        last = input.movedim(1, -1)
        return F.layer_norm(last, self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class FilteredLayerNorm2d(_GroupFilterMixin, LayerNorm2d):
    """Layer normalization over the channels at each position, by filtered moments.

    For the other layer normalization of images, over all channels and positions of a sample, use ``FilteredGroupNorm(1,
    num_channels)``.

    Args:
        num_channels: C. No value lies further than ``sqrt(C - 1)`` deviations from the mean of C values, so a larger
            cut filters nothing.
        eps, affine, bias, device, dtype: as in :class:`LayerNorm2d`.
        t_sigma, grad_mode, gaussian_correction: as in :class:`FilteredGroupNorm`.

    Shape:
        input and output ``(N, C, H, W)``, or any other number of spatial dimensions.

    Examples::

        >>> layer = fbn_plugin.FilteredLayerNorm2d(64, t_sigma=3.0)
        >>> layer(torch.randn(1, 64, 16, 16)).shape
        torch.Size([1, 64, 16, 16])
    """

    description = NormDescription("LN")

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        t_sigma: float = 5.0,
        grad_mode: str = "exact",
        gaussian_correction: bool = False,
    ) -> None:
        super().__init__(num_channels, eps, affine, bias, device, dtype)
        self._init_filter(t_sigma, grad_mode, gaussian_correction)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        last = input.movedim(1, -1)
        rows = self._by_groups(last.reshape(-1, last.shape[-1]), 1)
        return rows.view(last.shape).movedim(input.dim() - 1, 1)  # counted from 0, for exporters

    def filtered_share(self, input: Tensor) -> Tensor:
        rows = input.movedim(1, -1).reshape(-1, input.shape[1])
        return filtered_share(rows, 1, self.eps, t_sigma=self.t_sigma)
