"""Filtered batch normalization whose moments are those of all processes' batches together.

Source of the filter: Horváth and Al-afandi, "Filtered Batch Normalization" (2020), Eq. 2-8.
"""

import torch.distributed as dist
from torch import Tensor
from torch.jit import is_scripting

from fbn_plugin.layers.batch_norm import AnyDimsMixin
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.filtered_batch_norm import FilteredBatchNorm2d
from fbn_plugin.layers.graph import Proxy
from fbn_plugin.ops.sync import sync_filtered_batch_norm


class SyncFilteredBatchNorm(AnyDimsMixin, FilteredBatchNorm2d):
    """Filtered batch normalization over the batches of all processes (Horváth and Al-afandi 2020, Eq. 2-8).

    In training with ``torch.distributed``, outputs, gradients and running statistics are those of
    :class:`FilteredBatchNorm2d` in one process with the concatenated batch. The processes' batches may be of different
    sizes, and empty: a detector's mask head without a box to look at takes part like any other. With one process,
    without ``torch.distributed``, and in evaluation, with or without running statistics, it is
    :class:`FilteredBatchNorm2d`, and exchanges nothing.

    It is no ``nn.SyncBatchNorm``, but a ``BatchNorm2d`` of any number of dimensions, with its ``state_dict`` keys:
    ``DistributedDataParallel`` refuses an ``nn.SyncBatchNorm`` on CPUs, and detectron2's convolution one with an empty
    input, while this one takes both; and what looks for batch norms, to freeze, fold or decay them, looks for
    ``BatchNorm2d`` too. To ``nn.SyncBatchNorm.convert_sync_batchnorm`` it is a batch norm like any other, and loses its
    filter there; after :func:`fbn_plugin.register` that warns.

    All processes must call it alike often and in the same order, forward and backward. The gradients of weight and bias
    are the sums over a process's own values, as those of ``nn.SyncBatchNorm``, for ``DistributedDataParallel`` to
    average like any other parameter's.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.SyncBatchNorm`.
        process_group: the processes to synchronize, as in :class:`torch.nn.SyncBatchNorm`; None is all of them. A layer
            with a group of its own can neither be copied nor pickled, as no process group can.
        bias, t_sigma, grad_mode, gaussian_correction, gamma_init: as in :class:`FilteredBatchNorm2d`; with
            ``t_sigma=inf`` it is synchronized plain batch normalization, on CPUs too.

    Shape:
        input and output ``(N, C, *spatial)``, N 0 or more.

    Raises:
        ValueError: an option out of range; in ``forward``, an input of fewer than two dimensions or, on every process
        alike, one value per channel on all processes together.

    Examples::

        >>> layer = fbn_plugin.SyncFilteredBatchNorm(8, t_sigma=4.0)
        >>> layer(torch.randn(4, 8, 16, 16)).shape  # one process: FilteredBatchNorm2d
        torch.Size([4, 8, 16, 16])
    """

    description = NormDescription("BN", "channel", synchronized=True)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "dist.ProcessGroup | None" = None,
        device=None,
        dtype=None,
        *,
        bias: bool = True,
        t_sigma: float = 5.0,
        grad_mode: str = "exact",
        gaussian_correction: bool = False,
        gamma_init: float = 1.0,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            t_sigma=t_sigma,
            grad_mode=grad_mode,
            gaussian_correction=gaussian_correction,
            gamma_init=gamma_init,
        )
        self.process_group = process_group

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            if self.training:  # TorchScript cannot ask how many processes there are
                raise RuntimeError("SyncFBN does not train in TorchScript, which exchanges nothing between processes")
            return self._forward_scripted(input)
        elif isinstance(input, Proxy) or not self._synchronizes():
            return super().forward(input)
        running_mean, running_var, counter, _ = self._running(input)
        return sync_filtered_batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            momentum=self.momentum,
            eps=self.eps,
            t_sigma=self.t_sigma,
            grad_mode=self.grad_mode,
            gaussian_correction=self.gaussian_correction,
            process_group=self.process_group,
            num_batches_tracked=counter,
        )

    def _synchronizes(self) -> bool:
        joined = self.training and dist.is_available() and dist.is_initialized()
        return joined and dist.get_world_size(self.process_group) > 1
