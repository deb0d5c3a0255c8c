"""The Triton kernels against the float64 reference, run by Triton's interpreter on CPU tensors.

``test_triton.py`` runs this file in a process of its own, with ``TRITON_INTERPRET=1``. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/ops/triton/triton_in_interpreter.py``.
"""

import itertools

import pytest
import torch
from oracle import batch, close, moments_of, run
from simulated_group import SimulatedGroup

from fbn_plugin import ops
from fbn_plugin.ops import reference, sync, triton
from fbn_plugin.ops.reference import SIGN_TELLS, Options, RunningStats

# Rows and columns that do not fill their tiles, several tiles along both axes, a set in a tile, single positions.
SHAPES = [(3, 4, 5, 7), (2, 2, 1, 300), (7, 4, 3, 3), (12, 4)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Many tiles in small inputs, but not more programs than the interpreter can run in the time of a test."""
    monkeypatch.setattr(triton, "_TILE", 256)
    monkeypatch.setattr(triton, "_PROGRAMS", 4)
    triton._planned.cache_clear()
    yield
    triton._planned.cache_clear()


def test_backend_is_in_use():
    x = torch.randn(2, 4, 3, 3, dtype=torch.float16)
    assert ops.explain(x).startswith(f"triton: {ops.backends()['triton']}")
    assert "interpreter" in ops.backends()["triton"]
    assert ops.explain(x[:, ::2]).startswith("reference: ")


def inputs(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(shape, generator=generator).to(dtype)
    residual = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.rand(shape[1], generator=generator) + 0.5
    return grad, residual, weight, torch.randn(shape[1], generator=generator)


@pytest.mark.parametrize(
    "shape, dtype",
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[0], torch.float16), (SHAPES[0], torch.bfloat16)],
    ids=str,
)
def test_agrees_with_the_reference(shape, dtype):
    grad, _, weight, bias = inputs(shape, dtype)
    grad_modes = itertools.cycle(["exact", "paper", "paper", "exact"])
    for num_groups, channels_last in itertools.product([0, 2], [False, True]):
        mode = next(grad_modes)
        correction, affine = mode == "paper", not (num_groups and dtype is torch.float16)
        x = batch(shape, dtype, channels_last and len(shape) == 4, 3, 2.0, num_groups)
        parameters = (weight, bias) if affine else (None, None)
        options = num_groups, 2.0, correction, mode
        assert triton.refuses(x) is None
        y, moments, (dx, d_weight, d_bias) = run(triton, x, grad, *parameters, *options)
        double = [None if t is None else t.double() for t in (x, grad, *parameters)]
        y_ref, ref, (dx_ref, d_weight_ref, d_bias_ref) = run(reference, *double, *options)
        assert y.stride() == x.stride() and dx.stride() == x.stride() and y.dtype == dx.dtype == dtype
        assert torch.equal(moments.count.double(), ref.count), "the mask is the same to the last value"
        one_rounding = torch.finfo(dtype).eps
        close(moments.mean, ref.mean, 1e-5, "mean")
        close(moments.var, ref.var, 1e-5, "var")
        close(y, y_ref, one_rounding + 1e-5, "y")
        close(d_bias, d_bias_ref, 1e-5, "d_bias")
        close(d_weight, d_weight_ref, 2e-4, "d_weight")
        if ref.count.min() > 4:  # with a few values, dx is what is left of sums that cancel
            close(dx, dx_ref, one_rounding + 1e-4, "dx")


def test_sums_in_two_stages(monkeypatch):
    """Families of many tiles, whose sums are added up a few at a time."""
    monkeypatch.setattr(triton, "_TILE", 16)
    monkeypatch.setattr(triton, "_ADDED", 1)
    monkeypatch.setattr(triton, "_CHUNK", 1)
    triton._planned.cache_clear()
    shape, not_full = (2, 4, 13, 22), []
    grad, _, weight, bias = inputs(shape, torch.float32)
    for num_groups, channels_last in itertools.product([0, 2], [False, True]):
        x = batch(shape, torch.float32, channels_last, 3, 2.0, num_groups)
        plan = triton._plan(x, num_groups)
        assert plan.moments.options["CHUNK"] and plan.gradients.options["CHUNK"], "two stages"
        not_full.append(plan.moments.chunks > plan.moments.slots / plan.moments.options["CHUNK"])
        arguments = num_groups, 2.0, False, "exact"
        y, moments, gradients = run(triton, x, grad, weight, bias, *arguments)
        y_ref, ref, gradients_ref = run(reference, *(t.double() for t in (x, grad, weight, bias)), *arguments)
        for name, ours, truth in zip(("y", *ref._fields), (y, *moments), (y_ref, *ref)):
            close(ours, truth, 1e-6, name)
        for name, ours, truth in zip(("dx", "d_weight", "d_bias"), gradients, gradients_ref):
            close(ours, truth, 1e-4, name)
    assert any(not_full), "a chunk that is not full"


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that are launched."""
    names, kernels = [], triton.load_kernels()

    class Counting:
        def __getattr__(self, name):
            names.append(name)
            return getattr(kernels, name)

    monkeypatch.setattr(triton, "load_kernels", Counting)
    return names


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("channels_last", [False, True])
def test_three_launches_forward_and_two_backward(momentum, channels_last, launches):
    """With everything that a norm can have: activation, residual, running statistics and the counter of batches."""
    shape = (3, 4, 5, 7)
    x = batch(shape, torch.float32, channels_last, 3)
    grad, residual, weight, bias = inputs(shape, torch.float32)
    residual, grad = (torch.empty_like(x).copy_(t) for t in (residual, grad))
    options = Options(0, 2.0, 1e-5, True, "exact", "silu")
    start = torch.linspace(-1, 1, 4), torch.linspace(1, 2, 4)
    x[0, 1, 2, 3] = float("inf")  # these statistics stay
    results = []
    for backend, dtype in ((triton, torch.float32), (reference, torch.float64)):
        running = RunningStats(*(t.to(dtype, copy=True) for t in start), momentum, torch.tensor(6))
        versions = [t._version for t in (running.mean, running.var, running.num_batches)]
        _, moments = backend.forward(*(t.to(dtype) for t in (x, weight, bias, residual)), running, options)
        backend.backward(*(t.to(dtype) for t in (grad, x, weight, bias, residual)), moments, options)
        assert all(t._version > v for t, v in zip((running.mean, running.var, running.num_batches), versions))
        results.append(running)
    assert launches == ["measure", "measure_kept", "normalize", "measure_gradient", "input_gradient"]
    ours, truth = results
    assert ours.num_batches == truth.num_batches == 7
    close(ours.mean, truth.mean, 1e-6, "mean")
    close(ours.var, truth.var, 1e-6, "var")
    assert ours.mean[1] == start[0][1] and ours.var[1] == start[1][1]
    assert (ours.mean != start[0]).sum() == 3


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_of_several_processes(momentum):
    channels = 1500  # more than are updated at a time
    mean, var = torch.randn(channels), torch.rand(channels)
    count = torch.randint(1, 9, (channels,)).float()
    mean[3], var[5] = float("nan"), float("inf")
    results = []
    for backend in (triton, reference):
        running = RunningStats(torch.zeros(channels), torch.ones(channels), momentum, torch.tensor(2))
        backend.update_running_stats(running, mean, var, count)
        results.append(running)
    ours, truth = results
    assert ours.num_batches == truth.num_batches == 3
    close(ours.mean, truth.mean.double(), 1e-6, "mean")
    close(ours.var, truth.var.double(), 1e-6, "var")
    assert (ours.mean[3], ours.var[5]) == (0, 1)


@pytest.mark.parametrize("channels_last", [False, True])
def test_several_steps_and_clean_tiles(channels_last):
    """One outlier in all, so that all tiles but one keep their first sums; a program takes several steps."""
    x = torch.randn(4, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    x[1, 3, 4, 5] = 50.0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        assert triton._plan(x, 0).tiling["STEPS"] > 1 and triton._plan(x, 0).grid[0] > 1
    for num_groups in (0, 2):
        moments = moments_of(triton, x, num_groups, 6.0)
        ref = moments_of(reference, x.double(), num_groups, 6.0)
        assert torch.equal(moments.count.double(), ref.count) and (ref.count < ref.count.max()).sum() == 1
        close(moments.var, ref.var, 1e-5, "var")


@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_mean_and_extreme_first_value(num_groups, channels_last):
    x = batch((4, 4, 9, 9), torch.float32, channels_last, 1, num_groups=num_groups) / 4 + 1e4
    exact = moments_of(reference, x.double(), num_groups, 3.0)
    moments = moments_of(triton, x, num_groups, 3.0)
    torch.testing.assert_close(moments.var.double(), exact.var, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.mean.double(), exact.mean, rtol=1e-7, atol=0)
    x[0, :, 0, 0] = 1e7
    exact = moments_of(reference, x.double(), num_groups, 3.0)
    moments = moments_of(triton, x, num_groups, 3.0)
    torch.testing.assert_close(moments.var.double(), exact.var, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_loud_in_its_channel_and_absent_elsewhere(bad):
    x = batch((2, 4, 5, 5), torch.float16, True, 1)
    clean = ops.filtered_batch_norm(x, training=True, t_sigma=2.0)
    x[1, 1, 2, 2] = bad
    mean, var = torch.zeros(4), torch.ones(4)
    y = ops.filtered_batch_norm(x.requires_grad_(), mean, var, training=True, t_sigma=2.0)
    others = [0, 2, 3]
    assert y[:, 1].isnan().all() and torch.equal(y[:, others], clean[:, others])
    y.sum().backward()
    assert x.grad[:, 1].isnan().all() and x.grad[:, others].isfinite().all()
    assert (mean[1].item(), var[1].item()) == (0.0, 1.0)
    assert mean[others].ne(0).all() and var.isfinite().all()


def test_constant_input_gives_the_bias():
    x = torch.full((3, 4, 5, 5), 123456.0)
    options = Options(0, 1.01, 1e-5, False, "exact")
    y, moments = triton.forward(x, None, torch.arange(4.0), None, None, options)
    assert (y - torch.arange(4.0).view(1, 4, 1, 1)).abs().max() < 10 and (moments[4] == 75).all()


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
def test_fused_activation_and_residual(activation, add):
    for channels_last, dtype, mode in ((False, torch.float32, "paper"), (True, torch.bfloat16, "exact")):
        shape = (3, 4, 5, 7)
        grad, residual, weight, bias = inputs(shape, dtype)
        x = batch(shape, dtype, channels_last, 3)
        residual = torch.empty_like(x).copy_(residual) if add else None
        results = []
        for backend, cast in ((triton, lambda t: t), (reference, torch.Tensor.double)):
            x_, grad_, weight_, bias_ = map(cast, (x, grad, weight, bias))
            residual_ = None if residual is None else cast(residual)
            options = Options(0, 2.0, 1e-5, False, mode, activation, 0.1)
            y, moments = backend.forward(x_, weight_, bias_, residual_, None, options)
            # The derivative jumps at 0: the reference decides by what the kernels gave out.
            other = None if activation == "identity" else y if activation in SIGN_TELLS and add else residual_
            results.append((y, *backend.backward(grad_, x_, weight_, bias_, other, moments, options)))
        got, expected = results
        one_rounding = torch.finfo(dtype).eps
        for name, ours, truth in zip(("y", "dx", "d_weight", "d_bias", "d_residual"), got, expected):
            assert (ours is None) == (truth is None), name
            if ours is not None:
                close(ours, truth, 2 * one_rounding + 2e-4, f"{name} {dtype}")


def test_operator_with_activation_uses_the_kernels(monkeypatch):
    """What layers call: operator contracts, running statistics, and no reference behind them."""
    for name in ("forward", "backward", "update_running_stats"):
        monkeypatch.setattr(reference, name, None)
    x = batch((2, 4, 3, 3), torch.float16, True, 1).requires_grad_()
    residual = torch.randn_like(x).requires_grad_()
    weight, bias = torch.rand(4, requires_grad=True), torch.randn(4, requires_grad=True)
    for activation, added in (("relu", None), ("silu", residual)):
        arguments = (x, weight, bias, added, 0, 2.0, 1e-5, False, "exact", activation, 0.01)
        torch.library.opcheck(torch.ops.fbn_plugin.filtered_norm, arguments)
    mean, var = torch.zeros(4), torch.ones(4)
    y = ops.filtered_batch_norm_act(x, mean, var, weight, bias, True, t_sigma=2.0, residual=residual)
    y.sum().backward()
    assert mean.ne(0).all() and residual.grad.isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("t_sigma, mode", [(2.0, "exact"), (2.0, "paper"), (float("inf"), "exact")])
def test_synchronized_batch_is_normalized_as_one(channels_last, t_sigma, mode, monkeypatch):
    """The kernels with the exchanges between them, no share like another and one empty."""
    group, sizes = SimulatedGroup(3), (3, 0, 2)
    monkeypatch.setattr(sync, "dist", group)
    shape, dtype = (5, 4, 5, 7), torch.float16 if channels_last else torch.float32
    grad, _, weight, bias = inputs(shape, dtype)
    x = batch(shape, dtype, channels_last, 3)
    options = {"t_sigma": t_sigma, "grad_mode": mode, "gaussian_correction": True}

    def one(operator, x, grad, dtype, **options):
        leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (x, weight.to(dtype), bias.to(dtype))]
        x, w, b = (leaf.requires_grad_() for leaf in leaves)
        mean, var = torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype)
        y = operator(x, mean, var, w, b, **options)
        y.backward(grad)
        return y.detach(), x.grad, w.grad, b.grad, mean, var

    shares = list(zip(x.split(sizes), grad.split(sizes)))
    expected = one(ops.filtered_batch_norm, x.double(), grad.double(), torch.float64, training=True, **options)
    for name in ("measure", "measure_kept", "normalize", "gradient_sums", "input_gradient", "update_running_stats"):
        monkeypatch.setattr(reference, name, None)
    results = group.run(lambda rank: one(sync.sync_filtered_batch_norm, *shares[rank], torch.float32, **options))
    assert not any(isinstance(result, Exception) for result in results), results
    parts = list(zip(*results))
    one_rounding = torch.finfo(dtype).eps
    for name, share, truth in zip(("y", "dx"), parts[:2], expected[:2]):
        close(torch.cat(share), truth, one_rounding + 1e-4, name)
    for name, share, truth in zip(("d_weight", "d_bias"), parts[2:4], expected[2:4]):
        close(sum(share), truth, 2e-4, name)
    for name, share, truth in zip(("mean", "var"), parts[4:], expected[4:]):
        close(share[0], truth, 1e-5, name)
        assert torch.equal(share[0], share[1]) and torch.equal(share[0], share[2])
