"""What every backend must do, on any device: checks that the tests of a backend call with inputs of their own."""

import torch
from oracle import batch, close, run
from torch import Tensor

from fbn_plugin.ops import reference
from fbn_plugin.ops.reference import SIGN_TELLS, FilteredMoments, Options, RunningStats

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(shape, dtype, channels_last, num_groups=0, seed=3, device="cpu"):
    """Input, gradient, weight and bias; the mask at T = 2 does not hang on a rounding."""
    generator = torch.Generator(device).manual_seed(seed)
    x = batch(shape, dtype, channels_last and len(shape) in (4, 5), seed, 2.0, num_groups, device)
    grad = torch.randn(shape, generator=generator, device=device).to(dtype)
    weight = torch.rand(shape[1], generator=generator, device=device) + 0.5
    return x, grad, weight, torch.randn(shape[1], generator=generator, device=device)


def check_agrees(backend, x, grad, weight, bias, num_groups, correction, mode):
    """One pass each way against the reference; the arithmetic's own tolerances."""
    assert backend.refuses(x, num_groups) is None
    y, moments, (dx, d_weight, d_bias) = run(backend, x, grad, weight, bias, num_groups, 2.0, correction, mode)
    double = [None if t is None else t.double() for t in (x, grad, weight, bias)]
    y_ref, ref, gradients_ref = run(reference, *double, num_groups, 2.0, correction, mode)
    assert y.stride() == x.stride() and dx.stride() == x.stride() and y.dtype == dx.dtype == x.dtype
    assert torch.equal(moments.count.double(), ref.count), "the mask is the same to the last value"
    one_rounding = torch.finfo(x.dtype).eps
    for name, ours, truth in zip(FilteredMoments._fields[:4], moments, ref):
        close(ours, truth, 1e-5, name)
    close(y, y_ref, one_rounding + 1e-5, "y")
    close(d_weight, gradients_ref[1], 2e-4, "d_weight")
    close(d_bias, gradients_ref[2], 1e-4, "d_bias")
    if ref.count.min() > 4:  # with a few values, dx is what is left of sums that cancel
        close(dx, gradients_ref[0], one_rounding + 1e-4, "dx")


def check_activation(backend, x, grad, weight, bias, residual, activation, mode):
    """Activation and residual (or None), forward and backward, against the reference."""
    options = Options(0, 2.0, 1e-5, False, mode, activation, 0.1)
    results: list[tuple[Tensor | None, ...]] = []
    for each, cast in ((backend, lambda t: t), (reference, torch.Tensor.double)):
        x_, grad_, weight_, bias_ = map(cast, (x, grad, weight, bias))
        residual_ = None if residual is None else cast(residual)
        y, moments = each.forward(x_, weight_, bias_, residual_, None, options)
        # The derivative jumps at 0: the reference decides by what the kernels gave out.
        ours = results[0][0] if results else y
        other = residual_
        if activation == "identity" or residual is None:
            other = None
        elif activation in SIGN_TELLS:
            other = cast(ours)
        results.append((y, *each.backward(grad_, x_, weight_, bias_, other, moments, options)))
    one_rounding = torch.finfo(x.dtype).eps
    near_zero = torch.zeros_like(x, dtype=torch.bool)
    if activation in SIGN_TELLS and residual is None:
        near_zero = results[1][0].abs() < 1e-3
    for name, ours, truth in zip(("y", "dx", "d_weight", "d_bias", "d_residual"), *results):
        assert (ours is None) == (truth is None), name
        if ours is None:
            continue
        if ours.shape == x.shape:
            ours, truth = ours.masked_fill(near_zero, 0), truth.masked_fill(near_zero, 0)
        close(ours, truth, 2 * one_rounding + 2e-4, f"{name} {x.dtype}")


def check_running_statistics(backend, x, weight, bias, momentum, counted):
    """One batch against the reference: statistics, counter (None: there is none), and what autograd is told."""
    channels, stats = x.shape[1], []
    for each, dtype in ((backend, torch.float32), (reference, torch.float64)):
        generator = torch.Generator(x.device).manual_seed(0)
        mean = torch.randn(channels, generator=generator, device=x.device).to(dtype)
        var = torch.rand(channels, generator=generator, device=x.device).to(dtype)
        count = None if counted is None else torch.tensor(counted, device=x.device)
        version = mean._version
        running = RunningStats(mean, var, momentum, count)
        each.forward(
            x.to(dtype), weight.to(dtype), bias.to(dtype), None, running, Options(0, 2.0, 1e-5, False, "exact")
        )
        assert mean._version > version and var._version > version
        stats.append((mean, var, None if count is None else count.item()))
    close(stats[0][0], stats[1][0], 1e-5, "mean")
    close(stats[0][1], stats[1][1], 1e-5, "var")
    assert stats[0][2] == stats[1][2] == (None if counted is None else counted + 1)


def check_non_finite(backend, x, grad, bad):
    """One bad value in channel 1 makes that channel NaN, and leaves its running statistics; others see nothing."""
    options = Options(0, 2.0, 1e-5, False, "exact")
    clean, _ = backend.forward(x, None, None, None, None, options)
    x = x.clone(memory_format=torch.preserve_format)
    x[1, 1, 2, 2] = bad
    mean, var = x.new_zeros(x.shape[1], dtype=torch.float32), x.new_ones(x.shape[1], dtype=torch.float32)
    y, moments = backend.forward(x, None, None, None, RunningStats(mean, var, 0.1, None), options)
    others = [c for c in range(x.shape[1]) if c != 1]
    assert y[:, 1].isnan().all() and torch.equal(y[:, others], clean[:, others])
    dx = backend.backward(grad, x, None, None, None, moments, options)[0]
    assert dx[:, 1].isnan().all() and dx[:, others].isfinite().all()
    assert (mean[1].item(), var[1].item()) == (0.0, 1.0)
    assert mean[others].ne(0).all() and var.isfinite().all()


def check_odd_address(backend, x, weight, bias):
    """A view whose address is a multiple of 4 bytes only, and a gradient that is expanded."""
    odd = torch.empty(x.numel() + 1, device=x.device)[1:].view(x.shape).copy_(x)
    assert odd.data_ptr() % 8 == 4
    options = Options(0, 2.0, 1e-5, False, "exact")
    expected, moments = backend.forward(x, weight, bias, None, None, options)
    y, _ = backend.forward(odd, weight, bias, None, None, options)
    close(y, expected.double(), 1e-6, "y")
    grad = torch.ones((), device=x.device).expand(x.shape)
    dx = backend.backward(grad, odd, weight, bias, None, moments, options)[0]
    close(dx, backend.backward(grad.contiguous(), x, weight, bias, None, moments, options)[0].double(), 1e-6, "dx")


def check_steps(backend, x, grad, weight, bias, mode):
    """The steps of synchronized batch normalization on the whole batch give what one call gives."""
    options = Options(0, 2.0, 1e-5, False, mode)
    y, moments = backend.forward(x, weight, bias, None, None, options)
    dx, d_weight, d_bias, _ = backend.backward(grad, x, weight, bias, None, moments, options)
    mean, var, measured = backend.measure(x)
    lower, upper = reference.band(mean, var, 2.0, 1e-5)
    close(lower, moments[2].double(), 1e-5, "lower")
    kept = backend.measure_kept(x, lower, upper, measured)
    for ours, row in zip(kept, (moments[0], moments[1], moments[4])):
        close(ours, row.double(), 1e-5, "kept")
    together = torch.stack((kept[0], kept[1], lower, upper, kept[2]))
    close(backend.normalize(x, weight, bias, together, 0, 1e-5), y.double(), 1e-5, "y")
    sums = backend.gradient_sums(grad, x, together, 1e-5, mode)
    close(sums[0], d_weight.double(), 1e-4, "d_weight")
    close(sums[1], d_bias.double(), 1e-4, "d_bias")
    means = (weight * sums[1] / kept[2], weight * sums[0] / kept[2])
    close(backend.input_gradient(grad, x, weight, together, 1e-5, mode, *means), dx.double(), 1e-4, "dx")


def results_of(backend, x, grad, weight, bias, num_groups=0, mode="exact"):
    """All that a pass each way gives, as one list, to be compared bit for bit."""
    y, moments, gradients = run(backend, x, grad, weight, bias, num_groups, 2.0, False, mode)
    return [y, *moments, *gradients]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))
