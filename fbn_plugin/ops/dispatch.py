"""What a backend is, which backends there are, and which of them takes a tensor."""

from typing import Any, Protocol

import torch
from torch import Tensor

from fbn_plugin.ops import cpu, cuda, reference, triton
from fbn_plugin.ops.checks import check_channels
from fbn_plugin.ops.reference import Options, RunningStats


class Backend(Protocol):
    """The functions of a backend, each a module of this package.

    ``stats`` is the shape of what a set of values that is normalized together has one of: ``(C,)`` in the batch form,
    ``(N, G)`` in the group form. Statistics and sums are float32, or float64 for a float64 ``x``.

    A backend is given what :meth:`refuses` does not refuse: an ``x`` of shape ``(N, C, *spatial)`` that is not empty.
    What comes with it may be of any stride and floating dtype: a weight in half precision, a gradient that is expanded.
    Exceptions are the moments, which are those of :meth:`forward` in dtype and contiguous, and the running statistics,
    which are contiguous, of the moments' dtype, with an int64 counter on the same device. Nothing is written but the
    running statistics and the counter, and autograd is told of those (``torch.autograd.graph.increment_version``).
    """

    def describe(self) -> str:
        """One line: what it is, or why it cannot be used here."""

    def refuses(self, x: Tensor, num_groups: int = 0, activation: str = "identity") -> str | None:
        """Why it does not take ``x`` for this form and activation; None if it does. It is asked at each call, in both
        directions: it looks at device, dtype, shape and strides, never at values."""

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: RunningStats | None,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        """``activation(norm(x) + residual)``, and the running statistics updated.

        Args:
            x: ``(N, C, *spatial)``.
            weight, bias: ``(C,)`` or None.
            residual: of the shape and dtype of ``x``, or None.
            running: batch form only.

        Returns:
            ``y`` in the shape, dtype and memory format of ``x``, rounded once where the backend knows the activation;
            and the moments, ``(5, *stats)``, the rows as in :class:`reference.FilteredMoments`. Where those of a set
            are not finite, its outputs are NaN, and its running statistics stay.
        """

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        other: Tensor | None,
        moments: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The gradients of :meth:`forward`, from ``grad``, that of ``y``.

        Args:
            bias: only needed to compute the value before the activation; None with the identity.
            other: None without a residual or with the identity; ``y`` if its sign tells the derivative of the
                activation (``SIGN_TELLS``); the residual otherwise.
            moments: ``(5, *stats)``, of :meth:`forward`.

        Returns:
            The gradient of ``x``, like ``x``; those of weight and bias, ``(C,)`` each in the moments' dtype; and that
            of the residual, like ``x``, or None if ``other`` is.
        """

    # The batch form step by step, for a batch that is spread over processes (``sync.py``).

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Mean and biased variance of each channel, ``(C,)``, and what :meth:`measure_kept` wants to know of it."""

    def measure_kept(self, x: Tensor, lower: Tensor, upper: Tensor, measured: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of the values of each channel in ``[lower, upper]``, ``(C,)`` all five."""

    def normalize(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        """All values by these moments, ``(5, *stats)``."""

    def gradient_sums(
        self, grad: Tensor, x: Tensor, moments: Tensor, eps: float, grad_mode: str
    ) -> tuple[Tensor, Tensor]:
        """The sums over this ``x`` that are the gradients of weight and bias, ``(C,)`` each."""

    def input_gradient(
        self,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        moments: Tensor,
        eps: float,
        grad_mode: str,
        mean_g: Tensor,
        mean_g_xhat: Tensor,
    ) -> Tensor:
        """The gradient of ``x``; the means, ``(C,)``, as in :func:`reference.input_gradient`."""

    def update_running_stats(self, running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Bring the running statistics nearer to a batch's moments, ``(C,)``, and count it."""


# In the order in which they are asked; the reference refuses nothing.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "cuda": cuda, "triton": triton}
# Those that compute residual and activation in the passes of the norm. The others compute them one after the other, and
# in the backward pass the value before the activation anew, to have the same face.
_FUSING = ("cuda", "triton")


def backend_of(x: Tensor, num_groups: int = 0, activation: str = "identity") -> Backend:
    """The first backend that takes ``x`` for this form and activation."""
    for name, backend in BACKENDS.items():
        if name == "cpu" and not x.is_cpu:
            continue  # without the sentence that says why, which takes a microsecond to write
        if backend.refuses(x, num_groups, activation) is None:
            return backend
    return reference


def fuses(x: Tensor, activation: str) -> bool:
    """Whether the activation, and a residual, cost no pass over memory with the backend that takes ``x``."""
    backend = backend_of(x, 0, activation)
    return any(BACKENDS.get(name) is backend for name in _FUSING)


def backends() -> dict[str, str]:
    """The backends in the order in which they are asked, each with what it is or why it cannot be used here.

    Examples::

        >>> list(fbn_plugin.ops.backends())
        ['cpu', 'cuda', 'triton', 'reference']
    """
    return {name: backend.describe() for name, backend in (*BACKENDS.items(), ("reference", reference))}


def explain(x: Tensor, num_groups: int = 0) -> str:
    """Which backend filters ``x`` in training, and why not one of those before it; ``num_groups`` as in
    :func:`fbn_plugin.ops.filtered_group_norm`, 0 is the batch form.

    Raises:
        ValueError: what the filters take no tensor of: not floating point of shape (N, C, ...), or groups that do not
        divide the channels.

    Examples::

        >>> print(fbn_plugin.ops.explain(torch.randn(2, 8, 16, 16, dtype=torch.float64)).splitlines()[-1].split(":")[0])
        reference
    """
    check_channels(x)
    if num_groups < 0 or (num_groups and x.shape[1] % num_groups):
        raise ValueError(
            f"num_groups must divide the number of channels, or be 0, got {num_groups} for {x.shape[1]} channels"
        )
    refused = {}
    for name, backend in BACKENDS.items():
        reason = backend.refuses(x, num_groups)
        if reason is None:
            others = [f"; not {other}: {why}" for other, why in refused.items() if _made_for(other, x)]
            return f"{name}: {backend.describe()}{''.join(others)}"
        refused[name] = reason
    # The backends that were made for the device know best.
    reasons = {name: why for name, why in refused.items() if _made_for(name, x)} or refused
    if len(set(reasons.values())) == 1:
        return f"reference: {next(iter(reasons.values()))}"
    return f"reference: {'; '.join(f'not {name}: {why}' for name, why in reasons.items())}"


def _made_for(name: str, x: Tensor) -> bool:
    return (name == "cpu") == (x.device.type == "cpu") and x.device.type != "meta"


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """:meth:`Backend.forward` of the backend that takes ``x``, for running statistics of any kind."""
    if running is None or _are_plain(running, x):
        return backend_of(x, options[0], options[5]).forward(x, weight, bias, residual, running, options)
    y, moments = backend_of(x, options[0], options[5]).forward(x, weight, bias, residual, None, options)
    mean, var, _, _, count = moments
    reference.update_running_stats(running, mean, var, count)
    return y, moments


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """:meth:`Backend.backward` of the backend that takes ``x``, which may be another than forward: a hook on saved
    tensors may have given back one of another dtype, on another device, or with other strides."""
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    if moments.dtype is not wide or not moments.is_contiguous():
        moments = moments.to(wide).contiguous()
    return backend_of(x, options[0], options[5]).backward(grad, x, weight, bias, other, moments, options)


def update_running_stats(running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """:meth:`Backend.update_running_stats` of the backend that takes the moments, for running statistics of any
    kind."""
    backend = backend_of(mean) if _are_plain(running, mean) else reference
    backend.update_running_stats(running, mean, var, count)


def _are_plain(running: RunningStats, x: Tensor) -> bool:
    """Whether kernels may write these running statistics by address."""
    mean, var, _, num_batches = running
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    plain = mean.dtype is wide and var.dtype is wide and mean.is_contiguous() and var.is_contiguous()
    if num_batches is None or not plain:
        return plain
    return num_batches.dtype is torch.int64 and num_batches.get_device() == x.get_device()
