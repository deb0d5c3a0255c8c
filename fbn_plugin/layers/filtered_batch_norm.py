"""Filtered batch normalization as modules: ``nn.BatchNorm*`` that leaves the outliers out of its moments in training.

They subclass ``nn.BatchNorm*`` and keep its parameters, buffers and evaluation, so that freezing, weight decay,
folding, export and checkpoints treat them as batch normalization, which in evaluation they are. Source: Horváth and
Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-8.
"""

from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.batch_norm import BatchNormMixin
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops import scripted
from fbn_plugin.ops.checks import check_eps, check_filter
from fbn_plugin.ops.functional import filtered_batch_norm, filtered_batch_statistics, filtered_share
from fbn_plugin.ops.reference import Options


class FilterMixin:
    """The options of the filter, shared by all filtered layers."""

    def _init_filter(self, t_sigma: float, grad_mode: str, gaussian_correction: bool) -> None:
        check_eps(self.eps)
        self.t_sigma = check_filter(t_sigma, grad_mode)
        self.grad_mode = grad_mode
        self.gaussian_correction = bool(gaussian_correction)

    def filter_options(self) -> dict:
        """The options of the filter, as the layers and operators take them."""
        return {"t_sigma": self.t_sigma, "grad_mode": self.grad_mode, "gaussian_correction": self.gaussian_correction}

    def filtered_share(self, input: Tensor) -> Tensor:
        """The share of the values of ``input``, not empty, that training leaves out of its moments: a scalar, 0 to 1,
        without a gradient. A synchronized norm tells what its own process's batch would leave out."""
        return filtered_share(input, getattr(self, "num_groups", 0), self.eps, t_sigma=self.t_sigma)

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, t_sigma={self.t_sigma:g}"
        if self.grad_mode != "exact":
            text += f", grad_mode={self.grad_mode!r}"
        if self.gaussian_correction:
            text += ", gaussian_correction=True"
        return text


class FilteredBatchNormMixin(FilterMixin, BatchNormMixin):
    """Forward pass of filtered batch normalization, to stand before a ``_BatchNorm`` class in the bases."""

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self._forward_scripted(input)
        elif isinstance(input, Proxy):
            return call_node(self, input)
        running_mean, running_var, counter, training = self._running(input)
        return filtered_batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
            t_sigma=self.t_sigma,
            grad_mode=self.grad_mode,
            gaussian_correction=self.gaussian_correction,
            num_batches_tracked=counter,
        )

    def _forward_scripted(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str = "identity",
        negative_slope: float = 0.0,
    ) -> Tensor:
        """What TorchScript compiles."""
        mean, var, counter, training = self._running(input)
        slope = float(negative_slope)
        options = Options(0, self.t_sigma, float(self.eps), self.gaussian_correction, self.grad_mode, activation, slope)
        weight, bias, momentum = self.weight, self.bias, self.momentum
        return scripted.batch_norm(input, mean, var, weight, bias, training, momentum, counter, residual, options)

    def batch_statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of the kept values of each channel, ``(C,)`` each, as training normalizes
        ``input`` with them; no buffer changes."""
        self._check_input_dim(input)
        options = {"t_sigma": self.t_sigma, "gaussian_correction": self.gaussian_correction}
        return filtered_batch_statistics(input, self.eps, **options)


class _FilteredBatchNorm(FilteredBatchNormMixin):
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
        t_sigma: float = 5.0,
        grad_mode: str = "exact",
        gaussian_correction: bool = False,
        gamma_init: float = 1.0,
    ) -> None:
        options = {"device": device, "dtype": dtype, "bias": bias, "gamma_init": gamma_init}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self._init_filter(t_sigma, grad_mode, gaussian_correction)


_DOC = """Filtered batch normalization over {shape} (Horváth and Al-afandi 2020, Eq. 2-8).

    A drop-in for :class:`torch.nn.{base}` with the same ``state_dict`` keys and the same evaluation. In training, the
    moments are recomputed without the values further than ``t_sigma`` deviations from the channel's mean, and every
    value is normalized by them.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.{base}`; ``momentum=None`` is
            a cumulative average.
        bias: False has a scale and no shift, as newer versions of :class:`torch.nn.{base}` have it.
        t_sigma: cut in standard deviations, above 1; ``inf`` is plain batch normalization. The paper uses 2 to 7, and 5
            for Mask R-CNN.
        grad_mode: ``"exact"``, the gradient of the forward pass with the mask held constant, or ``"paper"``, Eq. 9-13
            as printed.
        gaussian_correction: divide the filtered variance by that of a unit Gaussian cut at ``t_sigma``; the paper does
            not.
        gamma_init: what the scale starts at, in (0, 1], see :class:`ScaledBatchNorm2d`.

    Shape:
        input and output {shape}.

    Raises:
        ValueError: an option out of range; in ``forward``, an input of another rank, or one value per channel in
        training.

    A NaN or an infinity makes its channel's output NaN, as in batch normalization, but is kept out of the running
    statistics.

    With several processes each one's moments, and so its running statistics, are those of its own batch. What a
    checkpoint holds is rank 0's: ``DistributedDataParallel`` gives all processes rank 0's buffers before each forward
    pass, or never with ``broadcast_buffers=False``, as detectron2 calls it; before processes evaluate together,
    :func:`fbn_plugin.engine.run.distributed.broadcast_buffers` does so. :class:`SyncFilteredBatchNorm` takes the
    moments of all, and has the same statistics everywhere.

    Examples::

        >>> layer = fbn_plugin.Filtered{base}(8, t_sigma=4.0)
        >>> layer(torch.randn({size})).shape
        torch.Size([{size}])
        >>> layer.load_state_dict(nn.{base}(8).state_dict())
        <All keys matched successfully>
    """


def _describe(dims: int) -> NormDescription:
    return NormDescription("BN", "channel", dims, synchronized_form=lambda norm: ("SyncFBN", norm.filter_options()))


class FilteredBatchNorm1d(_FilteredBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(shape="``(N, C)`` or ``(N, C, L)``", base="BatchNorm1d", size="4, 8, 16")
    description = _describe(1)


class FilteredBatchNorm2d(_FilteredBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(shape="``(N, C, H, W)``", base="BatchNorm2d", size="4, 8, 16, 16")
    description = _describe(2)


class FilteredBatchNorm3d(_FilteredBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(shape="``(N, C, D, H, W)``", base="BatchNorm3d", size="4, 8, 4, 16, 16")
    description = _describe(3)
