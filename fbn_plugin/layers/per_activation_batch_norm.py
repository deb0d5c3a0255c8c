"""Batch normalization of each activation by itself: of every unit at every position, over the images of a batch alone.

Source: Ioffe and Szegedy, "Batch Normalization" (2015): Algorithm 1 as it stands, which section 3.2 gives up for
convolutions, and which section 4.2.3 takes up again in the last hidden layers of the ensemble's networks
("non-convolutional, per-activation").
"""

import math

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.batch_norm import AnyDimsMixin, BatchNormMixin
from fbn_plugin.layers.conv_norm import Size, _pair
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops.plain import batch_norm, without_values
from fbn_plugin.ops.reference import accumulate_dtype

_NAMES = ("weight", "bias", "running_mean", "running_var")


class PerActivationBatchNorm2d(AnyDimsMixin, BatchNormMixin, nn.BatchNorm2d):
    """Batch normalization with moments, scale and shift of each channel and position (Ioffe and Szegedy 2015,
    Algorithm 1)::

        y_ncp = gamma_cp (x_ncp - mu_cp) / sqrt(var_cp + eps) + beta_cp,   mu_cp, var_cp over the N images

    Parameters and running statistics have ``C P`` entries, P the number of positions, channel by channel. P is that of
    ``map_size``, or of the first input: until then they have batch normalization's ``C`` entries, which the first input
    then gives to each position. So the weights of a batch normalization load, and mean the same. Parameters stay the
    same objects; ``DistributedDataParallel`` and compiled graphs are to be made behind the first input, though.

    In evaluation it is a scale and shift of each position, by the running statistics: it cannot be folded into a
    convolution, frozen as batch norms are, or synchronized.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.
        bias: False has a scale and no shift.
        gamma_init: what the scale starts at, in (0, 1].
        map_size: height and width of the input, or a number for both; None takes those of the first one.

    Shape:
        input and output ``(N, C, H, W)``, or any other number of spatial dimensions, all inputs of as many positions.

    Raises:
        ValueError: a ``map_size`` that is none; in ``forward``, an input of another number of positions, or of a single
            image in training.

    Examples::

        >>> layer = fbn_plugin.PerActivationBatchNorm2d(8)
        >>> layer(torch.randn(4, 8, 5, 5)).shape, layer.running_mean.shape
        (torch.Size([4, 8, 5, 5]), torch.Size([200]))
    """

    description = NormDescription(
        "BN", "activation", why_not_synchronized="its moments are of each position, and have no synchronized form"
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
        bias: bool = True,
        gamma_init: float = 1.0,
        map_size: Size | None = None,
    ) -> None:
        size = None if map_size is None else _pair("map_size", map_size)
        options = {"bias": bias, "gamma_init": gamma_init, "device": device, "dtype": dtype}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.map_size = size
        self.positions = 0  # not known yet
        if size is not None:
            self._spread(math.prod(size))

    def _spread(self, positions: int) -> None:
        """Give every position what the channels have; the tensors stay the same objects."""
        for name in _NAMES:
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel() == self.num_features and positions > 1:
                try:
                    tensor.data = tensor.data.repeat_interleave(positions)
                except RuntimeError as error:  # torch.func, whose tensors are not to be changed
                    raise ValueError(
                        f"{type(self).__name__} learns the size of its maps by the first input, which cannot be one in "
                        "torch.func: call it before, or give map_size"
                    ) from error
        self.positions = positions

    def _positions_of(self, input: Tensor) -> int:
        """The number of positions of an input; others than those of the first one are refused."""
        positions = math.prod(input.shape[2:])
        if positions != self.positions and self.positions:
            raise ValueError(
                f"expected maps of {self.positions} positions, as the first ones had or map_size says, got input size "
                f"{tuple(input.shape)}: normalization per activation is for maps of one size"
            )
        return positions

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Weights of a layer that knows its positions, or of a batch normalization for one that does."""
        for name in _NAMES:
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is None or own is None or given.shape == own.shape or given.dim() != 1:
                continue
            positions, rest = divmod(given.numel(), self.num_features)
            if not self.positions and not rest and positions:
                self._spread(positions)
            elif positions == 1 and not rest:
                state_dict[prefix + name] = given.repeat_interleave(self.positions)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def batch_statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of values that training normalizes ``input`` with, ``(C P,)`` each, in at
        least float32."""
        self._check_input_dim(input)
        self._positions_of(input)
        values = input.flatten(1).to(accumulate_dtype(input.dtype))
        var, mean = torch.var_mean(values, dim=0, correction=0)
        return mean, var, torch.full_like(mean, input.shape[0])

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        elif input.numel() == 0:  # tells no positions
            return without_values(input, [self.weight, self.bias])
        else:
            self._spread(self._positions_of(input))
        mean, var, counter, training = self._running(input)
        y = batch_norm(input.flatten(1), mean, var, self.weight, self.bias, training, self.momentum, self.eps, counter)
        return y.view(input.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, positions={self.positions or 'of the first input'}"
