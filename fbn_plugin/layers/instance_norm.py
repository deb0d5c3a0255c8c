"""PyTorch's instance normalization, for batches of no images too, on which PyTorch's own fails: a detector's mask
head gets one where nothing is detected."""

from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node, renamed


class _AnyBatchMixin:
    _forward_values = renamed(nn.InstanceNorm1d.forward, "_forward_values")  # that of all three

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        if input.numel() > 0:
            if is_scripting():
                return self._forward_values(input)
            return super().forward(input)
        self._check_input_dim(input)
        # Nothing is added to no values, but distributed training waits for a gradient of every parameter.
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                input = input + parameter.sum()
        return input


class InstanceNorm1d(_AnyBatchMixin, nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d`, for empty batches too."""

    description = NormDescription("IN", "channel", 1)


class InstanceNorm2d(_AnyBatchMixin, nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d`, for empty batches too.

    Examples::

        >>> fbn_plugin.InstanceNorm2d(8)(torch.randn(0, 8, 16, 16)).shape
        torch.Size([0, 8, 16, 16])
    """

    description = NormDescription("IN", "channel", 2)


class InstanceNorm3d(_AnyBatchMixin, nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d`, for empty batches too."""

    description = NormDescription("IN", "channel", 3)
