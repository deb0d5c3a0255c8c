"""What the tests of all backends share: inputs whose mask does not hang on a rounding, a backend's whole run, and the
measure of its error against the float64 reference."""

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fbn_plugin.ops import reference
from fbn_plugin.ops.reference import FilteredMoments, Options

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def examples(most: int) -> int:
    """How many examples Hypothesis tries: ``most``, unless FBN_PLUGIN_TEST_EXAMPLES wants fewer."""
    return min(most, int(os.environ.get("FBN_PLUGIN_TEST_EXAMPLES", most)))


def batch(shape, dtype, channels_last, seed, t_sigma=2.0, num_groups=0, device="cpu"):
    """Input with a mean per channel and outliers, no value of which lies near the edges of a band."""
    generator = torch.Generator(device).manual_seed(seed)
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    x, means = (torch.randn(each, generator=generator, device=device) for each in (shape, per_channel))
    x = x * 2 + means * 5
    x.flatten()[seed % 7 :: 61] *= 20
    x = x.to(dtype)
    # Where the band ends exactly is a matter of rounding; values there are moved to the middle of their set.
    view = x.double().reshape(reference._view(x, num_groups).shape)
    dims = reference._view(x, num_groups).reduced
    while True:
        var, mean = torch.var_mean(view, dims, correction=0, keepdim=True)
        near = ((view - mean).abs() / (var + 1e-5).sqrt() - t_sigma).abs() < 1e-4
        if not near.any():
            break
        view = torch.where(near, mean, view).to(dtype).double()
    x = view.reshape(shape).to(dtype)
    return x.contiguous(memory_format=CHANNELS_LAST[len(shape)]) if channels_last else x


def run(backend, x, grad, weight, bias, num_groups, t_sigma, correction, mode, eps=1e-5):
    options = Options(num_groups, t_sigma, eps, correction, mode)
    y, moments = backend.forward(x, weight, bias, None, None, options)
    dx, d_weight, d_bias, dz = backend.backward(grad, x, weight, None, None, moments, options)
    assert dz is None
    return y, FilteredMoments(*moments), (dx, d_weight, d_bias)


def moments_of(backend, x, num_groups, t_sigma, eps=1e-5):
    """The moments alone."""
    return FilteredMoments(
        *backend.forward(x, None, None, None, None, Options(num_groups, t_sigma, eps, False, "exact"))[1]
    )


def close(got, expected, tolerance, name):
    scale = expected.abs().max().clamp_min(1e-3)
    error = ((got.double() - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


# --- hard inputs, and the error that plain PyTorch makes on them ------------------------------------------------------


# Of 65536 values of a set: where kernels look for a value to sum around. Outliers there are the worst that can be.
SAMPLED = (2203, 9137, 16811, 23561, 31013, 39119, 46237, 53887, 61909)


def _cluster(x, generator, share, at):
    """A share of the values moved far off, in all sets alike."""
    return torch.where(torch.rand(x.shape, generator=generator) < share, at + x, x)


def _outliers_at_sampled_places(x, generator, share, at):
    n, c = x.shape[:2]
    by_channel = x.movedim(1, 0).reshape(c, -1)
    by_channel[:, [by_channel.shape[1] * place >> 16 for place in SAMPLED]] += at
    for sample in x.reshape(n, -1):  # and where all channels are one set
        sample[[sample.numel() * place >> 16 for place in SAMPLED]] += at
    return by_channel.reshape(c, n, *x.shape[2:]).movedim(0, 1)


def _channels_apart(x, generator, share, at):
    apart = (torch.rand(x.shape[1], generator=generator) < 2 * share) * at
    apart[0] = at
    return x + apart.view(-1, *[1] * (x.dim() - 2))


def _far_from_zero(x, generator, share, at):
    return x + at


def _two_clusters(x, generator, share, at):
    return _cluster(_cluster(x, generator, share / 2, at), generator, share, -at / 8)


HARD_KINDS = (_cluster, _outliers_at_sampled_places, _channels_apart, _far_from_zero, _two_clusters)
HARD_SHAPES = ((2, 8, 7, 7), (4, 20, 16, 9), (1, 34, 33, 40), (12, 6, 21, 20), (2, 16, 70, 64), (98, 64), (5, 2000))


class Hard(NamedTuple):
    """An input on which sums lose their digits if they are taken around the wrong value, and what to do with it."""

    kind: Callable  # one of HARD_KINDS
    share: float  # of the values that lie apart
    apart: float  # decimal logarithm of how far
    sign: int
    spread: float
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    seed: int
    num_groups: int
    t_sigma: float
    eps: float
    mode: str

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input, gradient, weight and bias."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator) * self.spread
        x = self.kind(x, generator, self.share, self.sign * 10.0**self.apart).to(self.dtype)
        layout = CHANNELS_LAST.get(x.dim()) if self.channels_last else None
        x = x.contiguous(memory_format=layout or torch.contiguous_format)
        grad = torch.empty_like(x).copy_(torch.randn(self.shape, generator=generator))
        channels = self.shape[1]
        return x, grad, torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)


def hard_inputs(dtypes=(torch.float32, torch.bfloat16), shapes=HARD_SHAPES):
    """:class:`Hard` of any kind, in both layouts and both forms."""
    return st.builds(
        Hard,
        kind=st.sampled_from(HARD_KINDS),
        share=st.floats(0.01, 0.3),
        apart=st.floats(1.5, 8),
        sign=st.sampled_from([1, -1]),
        spread=st.sampled_from([1.0, 1e-3, 30.0, 0.0]),
        shape=st.sampled_from(shapes),
        dtype=st.sampled_from(dtypes),
        channels_last=st.booleans(),
        seed=st.integers(0, 2**31),
        num_groups=st.sampled_from([0, 1, 2]),
        t_sigma=st.sampled_from([1.5, 1.9, 2.0, 3.0, 5.0]),
        eps=st.sampled_from([1e-5, 0.0]),
        mode=st.sampled_from(["exact", "paper"]),
    )


def _told(x, truth, plain, num_groups, t_sigma, eps):
    """The sets of which float32 can know the mask: none of their values lies where rounding an edge of the band would
    change sides, and plain PyTorch keeps the same number. Without eps they must have a spread as well."""
    view = reference._view(x, num_groups)
    values = x.double().reshape(view.shape)
    lower, upper = (edge.view(view.stats) for edge in (truth.lower, truth.upper))
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    rounding = torch.finfo(torch.float32).eps
    blur = 4 * rounding * (middle.abs() + half) + 1e-5 * half
    near = (((values - lower).abs() < blur) | ((values - upper).abs() < blur)).sum(view.reduced).flatten() > 0
    deviation = half / t_sigma
    widened = deviation * (t_sigma - 1) <= 32 * rounding * (deviation + middle.abs())
    spread = truth.var + eps > (1e-12 * truth.mean.abs()) ** 2 + 1e-36
    return ~near & ~widened.flatten() & spread.flatten() & (plain.count == truth.count).flatten()


def _as_exact(got, plain, truth, scale, spacing, name):
    """The rule for every backend: at most twice the error of plain PyTorch in the same precision, plus one rounding: of
    the result, and of what it is computed from, as plain PyTorch may happen to make neither."""
    error, allowed = (((each.double() - truth).abs() / scale) for each in (got, plain))
    allowed = 2 * allowed + 2 * spacing
    wrong = ~(error <= allowed) & allowed.isfinite() & truth.isfinite()
    worst = torch.where(wrong, error / allowed, 0).max().item()
    assert not wrong.any(), (
        f"{name}: {worst:.1f} times the error that is allowed, {int(wrong.sum())} of {wrong.numel()}"
    )


def check_as_exact_as_plain(backend, hard: Hard):
    """Output, moments and gradients of a backend on ``hard``, set by set, against float64 and plain float32 PyTorch."""
    x, grad, weight, bias = hard.tensors()
    num_groups, t_sigma, eps, mode = hard[-4:]
    arguments = num_groups, t_sigma, False, mode, eps
    y, moments, gradients = run(backend, x, grad, weight, bias, *arguments)
    plain_y, plain, plain_gradients = run(reference, x, grad, weight, bias, *arguments)
    wide = (each.double() for each in (x, grad, weight, bias))
    truth_y, truth, truth_gradients = run(reference, *wide, *arguments)

    told = _told(x, truth, plain, num_groups, t_sigma, eps)
    if not told.any():
        return
    assert torch.equal(moments.count.flatten()[told].double(), truth.count.flatten()[told]), "the mask"
    view = reference._view(x, num_groups)

    def sets(tensor):
        """The largest magnitude in each set that can be told."""
        return tensor.reshape(view.shape).double().abs().amax(view.reduced).flatten()[told]

    def largest(got, plain, truth, scale, name):
        errors = [sets(each.double() - truth) / scale for each in (got, plain)]
        if values_of_a_set < 256:  # a set of a few values can be right by chance, all of them cannot
            errors = [each.nan_to_num(torch.inf).max() for each in errors]
        _as_exact(*errors, 0 * errors[0], 1, torch.finfo(got.dtype).eps, name)

    values_of_a_set = x.numel() // truth.mean.numel()
    spacing = torch.finfo(torch.float32).eps
    largest(y, plain_y, truth_y, sets(truth_y), "y")
    rstd = (truth.var + eps).rsqrt().view(view.stats)
    # What dx is the difference of may be larger than dx, and so may be what the sums in it are made of.
    xhat = (x.double().reshape(view.shape) - truth.mean.view(view.stats)) * rstd
    terms = (grad.double() * weight.view(-1, *[1] * (x.dim() - 2))).reshape(view.shape) * rstd
    kept = (x.reshape(view.shape) >= truth.lower.view(view.stats)) & (
        x.reshape(view.shape) <= truth.upper.view(view.stats)
    )
    summands = sets(terms * xhat) / truth.count.flatten()[told] * sets(xhat * kept)
    scale = sets(truth_gradients[0]).maximum(sets(terms)).maximum(summands)
    largest(gradients[0], plain_gradients[0], truth_gradients[0], scale, "dx")
    if told.sum() >= 16:  # neither can many single numbers
        deviation = truth.var.sqrt() + spacing * truth.mean.abs()
        for name, scale in (("mean", deviation), ("var", truth.var)):
            got, by_plain, right = (getattr(each, name).flatten()[told].double() for each in (moments, plain, truth))
            errors = (((each - right) / scale.flatten()[told]).abs().max() for each in (got, by_plain))
            _as_exact(*errors, 0 * right[0], 1, spacing, name)
    if told.all():
        summands = {"d_weight": grad.double().reshape(view.shape) * xhat, "d_bias": grad.double().reshape(view.shape)}
        for i, (name, terms) in enumerate(summands.items(), 1):
            scale = terms.abs().sum(view.not_channel).flatten()
            got, by_plain, right = (each[i].double() for each in (gradients, plain_gradients, truth_gradients))
            errors = (((each - right).abs() / scale).max() for each in (got, by_plain))
            _as_exact(*errors, 0 * scale[0], 1, spacing, name)
