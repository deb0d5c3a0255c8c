"""Filtered batch normalization as modules: ``nn.BatchNorm*`` that leaves the outliers out of its moments in training.

They subclass ``nn.BatchNorm*`` and keep its parameters, buffers and evaluation, so that freezing, weight decay,
folding, export and checkpoints treat them as batch normalization, which in evaluation they are. Source: Horváth and
Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-8.
"""

from torch import Tensor, nn

from fbn_plugin.ops.filtered_norm import check_filter, filtered_batch_norm, filtered_batch_statistics


class FilterMixin:
    """The options of the filter, shared by all filtered layers."""

    def _init_filter(self, t_sigma: float, grad_mode: str, gaussian_correction: bool) -> None:
        self.t_sigma = check_filter(t_sigma, grad_mode)
        self.grad_mode = grad_mode
        self.gaussian_correction = bool(gaussian_correction)

    def _filter_options(self) -> dict:
        return {"t_sigma": self.t_sigma, "grad_mode": self.grad_mode, "gaussian_correction": self.gaussian_correction}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, t_sigma={self.t_sigma:g}"
        if self.grad_mode != "exact":
            text += f", grad_mode={self.grad_mode!r}"
        if self.gaussian_correction:
            text += ", gaussian_correction=True"
        return text


class FilteredBatchNormMixin(FilterMixin):
    """Forward pass of filtered batch normalization, to stand before a ``_BatchNorm`` class in the bases."""

    def forward(self, input: Tensor) -> Tensor:
        return filtered_batch_norm(input, **self._norm_arguments(input))

    def batch_statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of the kept values of each channel, ``(C,)`` each, as training normalizes
        ``input`` with them; no buffer changes."""
        self._check_input_dim(input)
        return filtered_batch_statistics(input, self.eps, self.t_sigma, self.gaussian_correction)

    def _norm_arguments(self, input: Tensor) -> dict:
        """What the operator is called with, the batch counted."""
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average, as nn.BatchNorm has it
                momentum = 1.0 / float(self.num_batches_tracked)
        track = not self.training or self.track_running_stats
        return {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean if track else None,
            "running_var": self.running_var if track else None,
            "training": self.training or (self.running_mean is None and self.running_var is None),
            "momentum": momentum,
            "eps": self.eps,
            **self._filter_options(),
        }


class _FilteredBatchNorm(FilteredBatchNormMixin):
    def __init__(
        self,
        num_features: int,
        t_sigma: float = 5.0,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        grad_mode: str = "exact",
        gaussian_correction: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._init_filter(t_sigma, grad_mode, gaussian_correction)


_DOC = """Filtered batch normalization over {shape} (Horváth and Al-afandi 2020, Eq. 2-8).

    A drop-in for :class:`torch.nn.{base}` with the same ``state_dict`` keys and the same evaluation. In training, the
    moments are recomputed without the values further than ``t_sigma`` deviations from the channel's mean, and every
    value is normalized by them.

    Args:
        num_features: C.
        t_sigma: cut in standard deviations, above 1; ``inf`` is plain batch normalization. The paper uses 2 to 7, and 5
            for Mask R-CNN.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.{base}`; ``momentum=None`` is
            a cumulative average.
        grad_mode: ``"exact"``, the gradient of the forward pass with the mask held constant, or ``"paper"``, Eq. 9-13
            as printed.
        gaussian_correction: divide the filtered variance by that of a unit Gaussian cut at ``t_sigma``; the paper does
            not.

    Shape:
        input and output {shape}.

    Raises:
        ValueError: an option out of range; in ``forward``, an input of another rank, or one value per channel in
        training.

    A NaN or an infinity makes its channel's output NaN, as in batch normalization, but is kept out of the running
    statistics.
    """


class FilteredBatchNorm1d(_FilteredBatchNorm, nn.BatchNorm1d):
    __doc__ = _DOC.format(shape="``(N, C)`` or ``(N, C, L)``", base="BatchNorm1d")


class FilteredBatchNorm2d(_FilteredBatchNorm, nn.BatchNorm2d):
    __doc__ = _DOC.format(shape="``(N, C, H, W)``", base="BatchNorm2d")


class FilteredBatchNorm3d(_FilteredBatchNorm, nn.BatchNorm3d):
    __doc__ = _DOC.format(shape="``(N, C, D, H, W)``", base="BatchNorm3d")
