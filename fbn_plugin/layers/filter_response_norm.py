"""Filter response normalization with its thresholded linear unit, and the form in which the mean square is filtered.

Sources: Singh and Krishnan, "Filter Response Normalization Layer" (2020); Horváth and Al-afandi, "Filtered Batch
Normalization" (2020), which names it as a host of the filter and leaves the filter's form to us.
"""

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.filtered_batch_norm import FilterMixin
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops.checks import check_eps_of_moments
from fbn_plugin.ops.reference import accumulate_dtype, gaussian_kappa, rounding_of


class FilterResponseNorm2d(nn.Module):
    """Filter response normalization (Singh and Krishnan 2020)::

        nu2 = 1/(H W) sum_ij x_ij^2                         for each channel of each image
        y = max(gamma x / sqrt(nu2 + eps) + beta, tau)

    Nothing is subtracted; the learned threshold makes up for that, and takes the place of the activation. Training and
    evaluation are the same. The ``state_dict`` keys are those of timm's ``FilterResponseNormTlu2d``.

    Args:
        num_features: C.
        eps: added to the mean square.
        affine: learn gamma and beta.
        bias: False learns gamma alone.
        tlu: threshold the result; False where the network has an activation of its own behind the norm.
        device, dtype: of the parameters.

    Shape:
        input and output ``(N, C, *spatial)``. Where the map is a single value, ``y`` tells little but its sign.

    Raises:
        ValueError: in ``forward``, an input of another rank or number of channels.

    Examples::

        >>> layer = fbn_plugin.FilterResponseNorm2d(8)
        >>> layer(torch.randn(1, 8, 16, 16)).min() >= 0  # tau, the learned threshold, starts at 0
        tensor(True)
    """

    description = NormDescription(
        "FRN", why_left=lambda norm: None if norm.tau is None else "its threshold is an activation too"
    )

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        *,
        affine: bool = True,
        bias: bool = True,
        tlu: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = check_eps_of_moments(eps)
        for name, learned in (("weight", affine), ("bias", affine and bias), ("tau", tlu)):
            parameter = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype)) if learned else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters():
            nn.init.constant_(parameter, 1 if name == "weight" else 0)

    def mean_square(self, input: Tensor) -> Tensor:
        """``nu2``: ``(N, C, 1, ...)``, in at least float32; of no values 0, as NaN would be the gradient of gamma."""
        square, space = input.to(accumulate_dtype(input.dtype)).square(), list(range(2, input.dim()))
        return square.mean(space, keepdim=True) if input.numel() > 0 else square.sum(space, keepdim=True)

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        if input.dim() < 3 or input.shape[1] != self.num_features:
            raise ValueError(
                f"expected input of shape (N, {self.num_features}, *spatial), got input size {input.shape}"
            )
        per_channel = [-1] + [1] * (input.dim() - 2)
        scale = torch.rsqrt(self.mean_square(input) + self.eps)
        if self.weight is not None:
            scale = scale * self.weight.view(per_channel)
        y = input * scale
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        if self.tau is not None:
            y = torch.maximum(y, self.tau.view(per_channel))
        return y.to(input.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.weight is not None}, tlu={self.tau is not None}"


class FilteredFilterResponseNorm2d(FilterMixin, FilterResponseNorm2d):
    """Filter response normalization by a filtered mean square. As there is no mean, the filter looks at the distance
    from zero::

        f_ij = 1 if |x_ij| <= t_sigma sqrt(nu2 + eps), else 0
        nu2' = sum_ij f_ij x_ij^2 / sum_ij f_ij
        y = max(gamma x / sqrt(nu2' + eps) + beta, tau)     for every x, outliers included

    By Markov's inequality fewer than ``H W / t_sigma^2`` values lie outside, so ``t_sigma > 1`` keeps at least one. The
    mask carries no gradient.

    Args:
        num_features: C.
        eps, affine, bias, tlu, device, dtype: as in :class:`FilterResponseNorm2d`.
        t_sigma: cut in units of the root mean square, above 1; ``inf`` is :class:`FilterResponseNorm2d`. No value lies
            further than ``sqrt(H W)``.
        gaussian_correction: divide ``nu2'`` by the variance of a unit Gaussian cut at ``t_sigma``.

    Shape:
        input and output ``(N, C, *spatial)``.

    Raises:
        ValueError: ``t_sigma`` out of range; in ``forward`` as :class:`FilterResponseNorm2d`.

    A NaN or an infinity makes its map NaN, or zero and NaN, as in :class:`FilterResponseNorm2d`.

    Examples::

        >>> layer = fbn_plugin.FilteredFilterResponseNorm2d(8, t_sigma=4.0, tlu=False)
        >>> layer(torch.randn(1, 8, 16, 16)).shape
        torch.Size([1, 8, 16, 16])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        *,
        affine: bool = True,
        bias: bool = True,
        tlu: bool = True,
        t_sigma: float = 5.0,
        gaussian_correction: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, eps, affine=affine, bias=bias, tlu=tlu, device=device, dtype=dtype)
        self._init_filter(t_sigma, "exact", gaussian_correction)

    def _dropped(self, square: Tensor, space: list[int]) -> Tensor:
        # The margin of rounding keeps the values of a constant map for the smallest of cuts.
        cut = max(self.t_sigma * self.t_sigma, 1 + 16 * rounding_of(square.dtype)[0])
        return square > cut * (square.detach().mean(space, keepdim=True) + self.eps)

    def filtered_share(self, input: Tensor) -> Tensor:
        square = input.detach().to(accumulate_dtype(input.dtype)).square()
        return self._dropped(square, list(range(2, input.dim()))).double().mean()

    def mean_square(self, input: Tensor) -> Tensor:
        """``nu2'``: ``(N, C, 1, ...)``, in at least float32."""
        square = input.to(accumulate_dtype(input.dtype)).square()
        space = list(range(2, input.dim()))
        dropped = self._dropped(square, space)
        # no size of the map, as that of a traced one would stay; 1 where the map is empty
        kept = (~dropped).sum(space, keepdim=True).clamp(min=1)
        filtered = square.masked_fill(dropped, 0).sum(space, keepdim=True) / kept
        return filtered / gaussian_kappa(self.t_sigma) if self.gaussian_correction else filtered
