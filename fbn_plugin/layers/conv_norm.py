"""Norms with learned statistics: ConvNorm, whose mean is a learned weighted sum over the map, and a norm whose mean and
deviation two small networks tell. Source: Esposito and Ganaba, "Convolutional Normalization", sections 3 and 5.

A stack of depthwise kernels, each with a stride of its own size, gives every value of a map one weight: the product of
the kernel entries that it passes. So the stack is not run over the batch. The weights of the map are composed once, and
the weighted mean is one contraction with the batch's average map.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.layers.batch_norm import OptionalBiasMixin
from fbn_plugin.layers.description import NormDescription
from fbn_plugin.layers.graph import Proxy, call_node
from fbn_plugin.layers.random_start import separate_stream
from fbn_plugin.ops import eager
from fbn_plugin.ops.checks import check_eps_of_moments
from fbn_plugin.ops.derivatives import by_formula
from fbn_plugin.ops.plain import check_training_eps
from fbn_plugin.ops.reference import RunningStats, accumulate_dtype, plain_moments

# The stack of the paper's first layers, which covers 32 x 32.
DEFAULT_KERNEL_SIZES = (4, 2, 2, 2)

Size = int | tuple[int, int]


def _pair(name: str, size: Size) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else size
    whole = isinstance(pair, Sequence) and all(isinstance(k, int) and not isinstance(k, bool) and k > 0 for k in pair)
    if not whole or len(pair) != 2:
        raise ValueError(f"{name} takes positive whole numbers or pairs (height, width) of them, got {size!r}")
    return tuple(pair)


def _factors(side: int) -> list[int]:
    """Sizes of kernels that cover ``side`` positions, or, where it has a prime factor above 7, the next number without
    one. Two of more than two 2s are one 4, as in the paper's 32 = 4 x 2 x 2 x 2 and 4 = 2 x 2."""
    factors, rest = [], side
    for prime in (2, 3, 5, 7):
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
    if rest > 1:
        return _factors(side + 1)
    if factors.count(2) > 2:
        factors[:2] = [4]
    return sorted(factors, reverse=True) or [1]


def _stack(kernel_sizes: Sequence[Size] | None, map_size: Size | None) -> tuple[tuple[int, int], ...]:
    """The kernel sizes of a layer as pairs, the finest first."""
    if kernel_sizes is None and map_size is None:
        kernel_sizes = DEFAULT_KERNEL_SIZES
    if kernel_sizes is None:
        height, width = _pair("map_size", map_size)
        return tuple(itertools.zip_longest(_factors(height), _factors(width), fillvalue=1))
    if not isinstance(kernel_sizes, Sequence) or isinstance(kernel_sizes, str) or not kernel_sizes:
        raise ValueError(
            f"kernel_sizes takes a sequence of sizes, such as {DEFAULT_KERNEL_SIZES}, got {kernel_sizes!r}"
        )
    stack = tuple(_pair("kernel_sizes", size) for size in kernel_sizes)
    if map_size is not None:
        covered = tuple(math.prod(sides) for sides in zip(*stack))
        size = _pair("map_size", map_size)
        if covered[0] < size[0] or covered[1] < size[1]:
            raise ValueError(
                f"kernel_sizes {kernel_sizes!r} cover {covered[0]} x {covered[1]} positions and cannot cover the map "
                f"of {size[0]} x {size[1]}: give larger ones, or no map_size to average over what is left"
            )
    return stack


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and not x.is_contiguous()  # vmap does not tell of other memory formats


def _fold(map: Tensor, size: int, dim: int) -> Tensor:
    """The sum of the pieces of ``size`` that ``map`` has along ``dim``, the last one perhaps shorter, in its place."""
    first = map.narrow(dim, 0, size)
    for start in range(size, map.shape[dim], size):
        piece = map.narrow(dim, start, min(size, map.shape[dim] - start))
        first.narrow(dim, 0, piece.shape[dim]).add_(piece)
    return first


def _without_autocast(x: Tensor) -> torch.autocast:
    kind = x.device.type
    return torch.autocast("cpu" if kind == "meta" else kind, enabled=False)  # there is none for the meta device


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in the dtype of the factors, under autocast too."""
    with _without_autocast(a):
        return a @ b


class _Cells(NamedTuple):
    """The cells of a kernel stack on maps of one size: the positions that share a weight, as many as the stack is laid
    side by side to cover the map."""

    passed: Tensor  # (E, h w), 1 where a cell's positions pass an entry of the kernels, otherwise 0
    copies: Tensor  # (h, w), the number of positions of each cell

    def weights(self, entries: Tensor, channels_last: bool = False) -> Tensor:
        """``p`` of one position of each cell, ``(C, h, w)``, from the raw parameters of all kernels, ``(C, E)``."""
        logits = _product(self.passed.T, entries.T).T if channels_last else _product(entries, self.passed)
        products = logits.sub_(logits.detach().amax(1, keepdim=True)).exp_()
        return (products / _product(products, self.copies.view(-1, 1))).unflatten(1, self.copies.shape)

    def total(self, x: Tensor) -> Tensor:
        """Sums of the batch's values in each cell, ``(C, h, w)``."""
        dtype = self.copies.dtype
        if _channels_last(x):  # as they lie: otherwise the sum is ten times slower
            total = x.permute(0, 2, 3, 1).sum(0, dtype=dtype).permute(2, 0, 1)
        else:
            total = x.sum(0, dtype=dtype)
        for dim, size in enumerate(self.copies.shape, 1):
            total = _fold(total, size, dim)
        return total

    def add_to(self, x: Tensor, values: Tensor) -> None:
        """Add values of the cells, ``(C, h, w)``, to the cells' positions in all maps of ``x``, in place."""
        h, w = self.copies.shape
        for rows in x.split(h, 2):
            for piece in rows.split(w, 3):
                piece += values[:, : piece.shape[2], : piece.shape[3]]


def _weighted_mean(total: Tensor, weights: Tensor, images: int) -> Tensor:
    """Eq. 7, ``(C,)``, of the values whose sums in each cell over all images are ``total``."""
    return (total * weights).sum((1, 2)) / images


def _weighted_mean_norm(
    x: Tensor, entries: Tensor, passed: Tensor, copies: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`_WeightedMeanNorm` computes, and the first two of its moments, by standard operators."""
    cells = _Cells(passed, copies)
    values = x.to(accumulate_dtype(x.dtype))
    var = torch.var(values, dim=(0, 2, 3), correction=0)
    mean = _weighted_mean(cells.total(x), cells.weights(entries), x.shape[0])
    scale = weight * torch.rsqrt(var + eps)
    y = (values - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
    return y.to(x.dtype), mean, var


class _WeightedMeanNorm(torch.autograd.Function):
    """``weight (x - mean) / sqrt(var + eps) + bias`` with the weighted mean and the plain variance of the batch, and
    the moments.

    With ``g = dL/dy``, ``xhat = (x - mean) / sigma``, ``m = N H W``, ``d = (mean - plain mean) / sigma``, ``t`` the
    sums of the cells and all other sums over a channel, ``dbias = sum g``, ``dweight = sum g xhat``, ``dmean = -weight
    / sigma dbias`` and::

        dx = weight / sigma * (g - (xhat + d) dweight / m) + p dmean / N
        dentries = dmean / N * passed p (t - N copies mean)

    Batch normalization's backward kernel, told that the mean is this one, gives both sums, and ``dx`` up to a map that
    all images share; adding that is all that is left to do.
    """

    @staticmethod
    def forward(x, entries, passed, copies, weight, bias, eps):
        cells = _Cells(passed, copies)
        plain_mean, var = plain_moments(x)
        p, total = cells.weights(entries, _channels_last(x)), cells.total(x)
        mean = _weighted_mean(total, p, x.shape[0])
        y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        return y, mean, var, plain_mean, p, total

    @staticmethod
    def setup_context(ctx, inputs, output):
        *inputs, ctx.eps = inputs
        _, *moments = output
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *moments)

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        *inputs, mean, var, plain_mean, p, total = ctx.saved_tensors
        if eager.is_followed(grad):
            return *by_formula(lambda *t: _weighted_mean_norm(*t, ctx.eps)[:1], inputs, [grad]), None
        x, _, passed, copies, weight, _ = inputs
        rstd = torch.rsqrt(var + ctx.eps)
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, rstd, True, ctx.eps, (True, True, True)
        )
        images, scale = x.shape[0], weight * rstd
        d_mean = -scale * d_bias / images  # of one image
        # The kernel took d for 0 and the mean for the plain one.
        excess = d_mean + scale * rstd * (mean - plain_mean) * d_weight / images
        excess = (excess / x.shape[2:].numel()).view(-1, 1, 1)
        _Cells(passed, copies).add_to(dx, (p * d_mean.view(-1, 1, 1)).sub_(excess))
        d_logits = torch.addcmul(total, copies, mean.view(-1, 1, 1), value=-images).mul_(p)
        d_entries = _product(d_logits.flatten(1), passed.T) * d_mean.view(-1, 1)
        return dx, d_entries, None, None, d_weight, d_bias, None


class ConvNorm2d(OptionalBiasMixin, nn.BatchNorm2d):
    """Convolutional normalization: batch normalization whose mean is a learned weighted sum (Esposito and Ganaba,
    section 3, Eq. 6-9)::

        mu = 1/N sum_n sum_ij p_ij x_nij,   p_ij >= 0,   sum_ij p_ij = 1        for each channel
        y = gamma (x - mu) / sqrt(var + eps) + beta

    ``p`` is what a stack of depthwise kernels with strides of their own sizes gives: ``p_ij`` is the product of one
    entry of each kernel. ``var`` is the plain variance around the plain mean. In evaluation the layer is batch
    normalization, with moving averages of ``mu`` and ``var``.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats, device, dtype: as in :class:`torch.nn.BatchNorm2d`.
        bias: False has a scale and no shift.
        kernel_sizes: sizes of the stack, the one on the input first, each a number or a pair ``(height, width)``.
        map_size: height and width of the input, or a number for both. Without ``kernel_sizes`` the stack is made of its
            factors; with them it is checked that they cover it. With neither the sizes are (4, 2, 2, 2), the paper's
            for 32 x 32.
        weighted_std: weight the variance too, around ``mu`` (Eq. 8). The authors found it unstable.
        init_spread: the initial weights lie within a factor ``exp(+-init_spread)`` of the uniform ones, at random for
            each kernel entry; 0 starts as batch normalization.

    Shape:
        input and output ``(N, C, H, W)``.

    Raises:
        ValueError: sizes that are no sizes or do not cover ``map_size``, a negative spread; in ``forward``, an input of
        another rank, or one value per channel in training.

    What the paper leaves open:

    * A kernel is non-negative with sum one as the softmax of the raw parameter. Products of softmaxes are the softmax
      of the sum of the raw parameters, which is how ``p`` is computed.
    * Each kernel starts near the uniform one of its size. The paper's n-th root of ``1 / (H W)`` is the same for
      kernels of equal sizes, and for others would not sum to one.
    * The stack need not fit the map. Where it covers more, the map lies in its upper left corner, and where it covers
      less, it is laid again beside and below itself, which averages what is left of the map as the paper does before
      its last layers. Padding has no weight: ``p`` is normalized over the map itself.
    * Moving averages take the unbiased variance, as in batch normalization; with ``weighted_std`` the number of values
      is the effective one, ``N / sum p^2``.
    * Scale and shift are batch normalization's. The kernels add their entries for each channel: 28 of the default's.

    Weight decay would draw the kernels towards the plain mean: :meth:`no_weight_decay` names them. timm's optimizers
    ask the model alone for such a method, and decay whatever has more than one dimension; after
    :func:`fbn_plugin.register` they leave the kernels alone. The kernels' random numbers are drawn from a stream of
    their own, which leaves the global one where it is.

    Examples::

        >>> layer = fbn_plugin.ConvNorm2d(8, map_size=(16, 16))
        >>> layer(torch.randn(4, 8, 16, 16)).shape
        torch.Size([4, 8, 16, 16])
    """

    description = NormDescription("BN", "channel", 2)

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
        kernel_sizes: Sequence[Size] | None = None,
        map_size: Size | None = None,
        weighted_std: bool = False,
        init_spread: float = 0.01,
    ) -> None:
        stack = _stack(kernel_sizes, map_size)
        if not 0 <= init_spread < math.inf:
            raise ValueError(f"init_spread must be a finite number not below 0, got {init_spread!r}")
        options = {"device": device, "dtype": dtype, "bias": bias}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **options)
        self.kernel_sizes = stack
        self.weighted_std = weighted_std
        self.init_spread = init_spread
        # Parameters of the module itself: what frameworks do to a norm's parameters they do not do to its children's.
        for number, size in enumerate(stack):
            kernel = torch.empty(num_features, *size, device=device, dtype=dtype)
            self.register_parameter(f"kernel{number}", nn.Parameter(kernel))
        self.reset_parameters()

    __jit_unused_properties__ = ("kernels",)

    @property
    def kernels(self) -> list[nn.Parameter]:
        """The raw parameters, ``(C, height, width)`` each, the kernel on the input first: ``kernel0``, ``kernel1``, ...

        A kernel is the softmax of its parameter over height and width.
        """
        return [getattr(self, name) for name in self._kernel_names()]

    def _kernel_names(self) -> list[str]:
        return [name for name in self._parameters if name.startswith("kernel")]

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with separate_stream():
            for kernel in self.kernels:  # none yet when the base class calls
                nn.init.uniform_(kernel, -self.init_spread, self.init_spread)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay is to leave alone, as timm asks for them."""
        return set(self._kernel_names())

    def map_weights(self, height: int, width: int) -> Tensor:
        """``p`` of a map: ``(C, height, width)``, in at least float32, non-negative with sum one for each channel."""
        dtype = accumulate_dtype(self.kernel0.dtype)
        cells = self._cells((height, width), dtype)
        h, w = cells.copies.shape
        return cells.weights(self._entries(dtype)).repeat(1, -(-height // h), -(-width // w))[:, :height, :width]

    def _entries(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([kernel.flatten(1) for kernel in self.kernels], 1).to(dtype)

    def _cells(self, shape: Sequence[int], dtype: torch.dtype) -> _Cells:
        height, width = (min(side, math.prod(sizes)) for side, sizes in zip(shape, zip(*self.kernel_sizes)))
        numbers = torch.arange(max(height, width, *map(math.prod, self.kernel_sizes)), device=self.kernel0.device)
        i, j = numbers[:height, None], numbers[:width]
        copies = torch.ones(height, width, dtype=dtype, device=numbers.device)
        if (height, width) != tuple(shape):
            copies *= ((shape[0] - 1 - i) // height + 1) * ((shape[1] - 1 - j) // width + 1)
        passed = []
        for h, w in self.kernel_sizes:
            passed.append(i % h * w + j % w == numbers[: h * w, None, None])
            i, j = i // h, j // w
        return _Cells(torch.cat(passed).flatten(1).to(dtype), copies)

    def batch_statistics(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of values that training normalizes ``input`` with, ``(C,)`` each, in at
        least float32."""
        dtype, images = accumulate_dtype(input.dtype), input.shape[0]
        cells = self._cells(input.shape[2:], dtype)
        weights = cells.weights(self._entries(dtype), _channels_last(input))
        mean = _weighted_mean(cells.total(input), weights, images)
        if not self.weighted_std:
            return mean, plain_moments(input)[1], self._count(input)
        var = _weighted_mean(cells.total((input - mean.view(-1, 1, 1)).square()), weights, images)
        return mean, var, images / (weights.square() * cells.copies).sum((1, 2))

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        if not self.training and (mean is not None or var is not None):
            return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        if is_scripting():
            raise RuntimeError("ConvNorm does not train in TorchScript, where it evaluates by running statistics")
        return self._forward_by_batch(input)

    def _forward_by_batch(self, input: Tensor) -> Tensor:
        check_training_eps(self.eps)
        if input.numel() == 0:
            y = F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
            # Nothing is added to no values, but distributed training waits for a gradient of every parameter.
            return y + sum(kernel.sum() for kernel in self.kernels)
        if input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        dtype = accumulate_dtype(input.dtype)
        placement = {"dtype": dtype, "device": input.device}
        weight = torch.ones(self.num_features, **placement) if self.weight is None else self.weight.to(dtype)
        bias = torch.zeros(self.num_features, **placement) if self.bias is None else self.bias.to(dtype)
        if self.weighted_std:
            mean, var, count = self.batch_statistics(input)
            scale = weight * torch.rsqrt(var + self.eps)
            y = (input - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + bias.view(-1, 1, 1)
            y = y.to(input.dtype)
        else:
            count = self._count(input)
            cells = self._cells(input.shape[2:], dtype)
            entries = self._entries(dtype)
            follows = eager.needs_formula(input, entries, weight, bias)
            function = _weighted_mean_norm if follows else _WeightedMeanNorm.apply
            y, mean, var, *_ = function(input, entries, *cells, weight, bias, self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._update_averages(mean.detach(), var.detach(), count.detach())
        return y

    def _count(self, input: Tensor) -> Tensor:
        dtype = accumulate_dtype(input.dtype)
        return input.new_full((self.num_features,), input.numel() // self.num_features, dtype=dtype)

    def _update_averages(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        counter = self.num_batches_tracked
        momentum = 0.0 if self.momentum is None and counter is None else self.momentum
        running = RunningStats(self.running_mean, self.running_var, momentum, counter)
        eager.update_running_stats(running, mean, var, count)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{h}" if h == w else f"({h}, {w})" for h, w in self.kernel_sizes)
        return f"{super().extra_repr()}, kernel_sizes=[{sizes}]" + (", weighted_std=True" if self.weighted_std else "")


def _statistic_network(first_layer: bool, **placement) -> nn.Sequential:
    widths, sizes = ((4, 4, 1), (4, 3, 3)) if first_layer else ((4, 4, 2, 1), (4, 3, 2, 3))
    layers = []
    for inner, outer, size in zip((1, *widths), widths, sizes):
        layers += [nn.Conv1d(inner, outer, size, padding=size // 2, **placement), nn.ReLU()]
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool1d(1))


class LearnedStatsNorm2d(nn.Module):
    """Normalization of each image by a mean and a deviation that two small networks tell (Esposito and Ganaba, section
    5)::

        y = (x - mean_network(a)) / std,   a_c = average of channel c over the map
        std = softplus(std_network(a) + ln(e - 1)) + eps

    A network is 1-D convolutions along the channels and an average over what they give: one number for an image.
    Training and evaluation are the same; there are no running statistics.

    Args:
        num_features: C.
        eps: the smallest deviation.
        affine: learn a scale and a shift for each channel. The paper has none: only so is the number of parameters, 170
            or 194 for any C, the fraction of batch normalization's that it reports.
        bias: False learns, with ``affine``, a scale alone.
        first_layer: the smaller networks that the paper gives a model's first layer: convolutions to 4, 4, 1 channels
            with kernels of 4, 3, 3 (85 parameters a network), otherwise to 4, 4, 2, 1 with 4, 3, 2, 3 (97).
        device, dtype: of the parameters.

    Shape:
        input and output ``(N, C, *spatial)``.

    Raises:
        ValueError: in ``forward``, an input of another rank or number of channels.

    What the paper leaves open: ReLU stands between the convolutions; they are padded with half their size, so that any
    number of channels will do; the deviation stays positive by a softplus, shifted so that networks that say zero
    normalize by mean 0 and deviation 1; their biases start at zero, as a mean that is off from the start leaves ReLU
    nothing; statistics are computed without autocasting. A statistic's gradient sums over a whole image: at the
    learning rates of batch normalization a network may fail to train.

    Examples::

        >>> layer = fbn_plugin.LearnedStatsNorm2d(64)
        >>> sum(parameter.numel() for parameter in layer.parameters())  # for any number of channels
        194
    """

    description = NormDescription("LearnedNorm", owns_children=True)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        affine: bool = False,
        bias: bool = True,
        first_layer: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        placement = {"device": device, "dtype": dtype}
        self.num_features = num_features
        self.eps = check_eps_of_moments(eps)
        self.affine = affine
        with separate_stream():
            self.mean_network = _statistic_network(first_layer, **placement)
            self.std_network = _statistic_network(first_layer, **placement)
        self.weight = nn.Parameter(torch.ones(num_features, **placement)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **placement)) if affine and bias else None

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay is to leave alone: those of the networks."""
        return {name for name, _ in self.named_parameters() if "." in name}

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            pass
        elif isinstance(input, Proxy):
            return call_node(self, input)
        if input.dim() < 3 or input.shape[1] != self.num_features:
            raise ValueError(
                f"expected input of shape (N, {self.num_features}, *spatial), got input size {input.shape}"
            )
        if is_scripting():  # with constants
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                mean, std = self._statistics(input)
        else:
            with _without_autocast(input):
                mean, std = self._statistics(input)
        ones = [1] * (input.dim() - 2)
        per_image, per_channel = [-1, 1] + ones, [-1] + ones  # noqa: RUF005, as TorchScript has no star here
        y = (input - mean.view(per_image)) / std.view(per_image)
        if self.weight is not None:
            y = y * self.weight.view(per_channel)
        if self.bias is not None:
            y = y + self.bias.view(per_channel)
        return y.to(input.dtype)

    def _statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each image, ``(N, 1, 1)`` each."""
        dtype = self.mean_network[0].weight.dtype
        flat, dtype_of_sum = input.flatten(2), accumulate_dtype(input.dtype)
        # of no values 0: NaN would be the gradient of the networks
        pooled = flat.mean(2, dtype=dtype_of_sum) if input.numel() > 0 else flat.sum(2, dtype=dtype_of_sum)
        pooled = pooled.to(dtype).unsqueeze(1)
        mean, raw_std = self.mean_network(pooled), self.std_network(pooled)
        return mean, F.softplus(raw_std + math.log(math.e - 1)) + self.eps

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"
