"""What the tests of all backends share: inputs whose mask does not hang on a rounding, a backend's whole run, and the
measure of its error against the float64 reference."""

import torch

from fbn_plugin.ops import reference
from fbn_plugin.ops.reference import FilteredMoments, Options

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def batch(shape, dtype, channels_last, seed, t_sigma=2.0, num_groups=0):
    """Input with a mean per channel and outliers, no value of which lies near the edges of a band."""
    generator = torch.Generator().manual_seed(seed)
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = torch.randn(shape, generator=generator) * 2 + torch.randn(per_channel, generator=generator) * 5
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


def run(backend, x, grad, weight, bias, num_groups, t_sigma, correction, mode):
    options = Options(num_groups, t_sigma, 1e-5, correction, mode)
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
