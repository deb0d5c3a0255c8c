"""What the batch normalizations of this package share: the constant that their scale starts at, and what
``nn.BatchNorm*`` does around the arithmetic of its forward pass.

Source of ``gamma_init``: Davis and Frank, "Revisiting Batch Norm Initialization" (2022), section 3.2.
"""

import numbers

from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.ops.checks import check_device, check_eps
from fbn_plugin.ops.plain import batch_norm


def check_gamma_init(gamma_init: float) -> float:
    """Return ``gamma_init`` as a float; ValueError if it is no number in (0, 1]."""
    if isinstance(gamma_init, bool) or not isinstance(gamma_init, numbers.Real) or not 0 < gamma_init <= 1:
        raise ValueError(f"gamma_init must be a number in (0, 1], got {gamma_init!r}")
    return float(gamma_init)


class OptionalBiasMixin:
    """To stand before a norm of PyTorch's in the bases: ``bias=False``, which not all PyTorch versions have, and an
    ``eps`` that is one."""

    def __init__(self, *args, bias: bool = True, **kwargs) -> None:
        check_device(kwargs.get("device"))
        super().__init__(*args, **kwargs)
        check_eps(self.eps)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:  # that of PyTorch 2.6 takes a weight to come with a bias
        if getattr(self, "track_running_stats", False):
            self.reset_running_stats()
        for name, start in (("weight", getattr(self, "gamma_init", 1.0)), ("bias", 0.0)):
            if getattr(self, name) is not None:
                nn.init.constant_(getattr(self, name), start)


class BatchNormMixin(OptionalBiasMixin):
    """To stand before a ``_BatchNorm`` class in the bases: its scale starts at ``gamma_init``."""

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
        self.gamma_init = check_gamma_init(gamma_init)  # first, as reset_parameters is called by the base class
        statistics = {"momentum": momentum, "track_running_stats": track_running_stats}
        super().__init__(num_features, eps, affine=affine, **statistics, bias=bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.gamma_init == 1 else f"{text}, gamma_init={self.gamma_init:g}"

    def _running(self, input: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, bool]:
        """The running statistics that this call reads or updates, the counter of batches if it is to count this one,
        and whether it normalizes by the moments of ``input``, which is checked."""
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        if not self.training:
            return mean, var, None, mean is None and var is None
        if not self.track_running_stats:
            return None, None, None, True
        return mean, var, self.num_batches_tracked, True


class FoldedBatchNormMixin(BatchNormMixin):
    """Batch normalization whose scale and shift are made of its parameters, and then given to ``F.batch_norm``: what
    that costs does not grow with the batch. A subclass defines :meth:`affine_terms`; plain batch normalization takes
    them as they are."""

    def affine_terms(self) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift of the normalized values, ``(C,)`` each or None: weight and bias of the plain batch
        normalization that this one equals."""
        return self.weight, self.bias

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        mean, var, counter, training = self._running(input)
        weight, bias = self.affine_terms()
        return batch_norm(input, mean, var, weight, bias, training, self.momentum, self.eps, counter)


FOLDED = NormDescription("BN", "channel", affine_terms=lambda norm: norm.affine_terms())


class AnyDimsMixin:
    """Inputs of any number of spatial dimensions, for a layer that is made for images only in its name."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
