"""The functions against oracles: the paper's equations value by value in NumPy, gradcheck, PyTorch's own norms, and the
three steps of a norm with residual and activation one by one."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forms import BOTH_FORMS, act_inputs, batch, norm
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_equations import backward as paper_backward
from paper_equations import forward as paper_forward
from torch import nn

from fbn_plugin.layers import FilteredBatchNormAct2d
from fbn_plugin.ops import (
    dispatch,
    filtered_batch_norm,
    filtered_batch_norm_act,
    filtered_group_norm,
    functional,
    reference,
)
from fbn_plugin.ops.reference import ACTIVATIONS, activate, gaussian_kappa

SHAPES = [(7, 4), (3, 4, 5), (2, 4, 3, 5), (2, 4, 3, 2, 2)]


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t_sigma", [1.5, 2.0, math.inf])
def test_forward_equals_the_paper(shape, t_sigma, num_groups):
    x, weight, bias = batch(shape)
    y = norm(x, weight, bias, num_groups, t_sigma=t_sigma, eps=1e-3)
    expected, moments = paper_forward(x.numpy(), weight.numpy(), bias.numpy(), t_sigma, 1e-3, num_groups)
    if t_sigma == 1.5 and num_groups == 0:
        assert any(kept < x.numel() // shape[1] for _, _, kept in moments), "the data must hold something to filter"
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paper_gradients_equal_equations_9_to_13(shape, num_groups):
    x, weight, bias = (t.requires_grad_() for t in batch(shape))
    y = norm(x, weight, bias, num_groups, t_sigma=1.5, eps=1e-3, grad_mode="paper")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(grad)
    expected = paper_backward(grad.numpy(), x.detach().numpy(), weight.detach().numpy(), 1.5, 1e-3, num_groups)
    for got, want in zip((x.grad, weight.grad, bias.grad), expected):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gaussian_correction", [False, True])
@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 3, 2)], ids=str)
def test_exact_gradients_pass_gradcheck(shape, num_groups, gaussian_correction):
    inputs = [t.requires_grad_() for t in batch(shape)]
    options = {"t_sigma": 1.8, "gaussian_correction": gaussian_correction}
    assert torch.autograd.gradcheck(lambda *args: norm(*args, num_groups, **options), inputs)


def test_paper_mode_is_not_the_true_gradient():
    """What the default mends: with an outlier, Eq. 9-13 differ from finite differences."""
    inputs = [t.requires_grad_() for t in batch((3, 2, 3, 3))]
    options = {"t_sigma": 1.8, "grad_mode": "paper"}
    assert not torch.autograd.gradcheck(lambda *args: norm(*args, 0, **options), inputs, raise_exception=False)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_grad_modes_agree_without_outliers(num_groups):
    grads = []
    for mode in ("exact", "paper"):
        inputs = [t.requires_grad_() for t in batch((4, 4, 5, 5), outliers=False)]
        norm(*inputs, num_groups, t_sigma=10.0, grad_mode=mode).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for exact, paper in zip(*grads):
        torch.testing.assert_close(exact, paper)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("t_sigma", [math.inf, 1e30], ids=["inf", "huge"])
def test_without_a_cut_it_is_batch_norm(shape, dtype, t_sigma):
    results = []
    for function, options in ((F.batch_norm, {}), (filtered_batch_norm, {"t_sigma": t_sigma})):
        x, weight, bias = (t.requires_grad_() for t in batch(shape, dtype=dtype))
        mean, var = torch.zeros(shape[1], dtype=dtype), torch.ones(shape[1], dtype=dtype)
        y = function(x, mean, var, weight, bias, True, 0.3, 1e-4, **options)
        y.backward(torch.arange(y.numel(), dtype=dtype).view(y.shape).sin())
        results.append((y, x.grad, weight.grad, bias.grad, mean, var))
    for ours, native in zip(results[1], results[0]):
        if t_sigma == math.inf:
            assert torch.equal(ours, native)
        torch.testing.assert_close(ours, native)


@pytest.mark.parametrize("t_sigma", [math.inf, 1e30], ids=["inf", "huge"])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_cut_it_is_group_norm(shape, num_groups, t_sigma):
    results = []
    for filtered in (False, True):
        x, weight, bias = (t.requires_grad_() for t in batch(shape))
        if filtered:
            y = filtered_group_norm(x, num_groups, weight, bias, 1e-4, t_sigma=t_sigma)
        else:
            y = F.group_norm(x, num_groups, weight, bias, 1e-4)
        y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape).sin())
        results.append((y, x.grad, weight.grad, bias.grad))
    for native, ours in zip(*results):
        torch.testing.assert_close(ours, native)


def test_running_statistics_average_the_filtered_unbiased_moments():
    x, weight, bias = batch((3, 4, 5, 5))
    mean, var = torch.full((4,), 0.5, dtype=x.dtype), torch.full((4,), 2.0, dtype=x.dtype)
    filtered_batch_norm(x, mean, var, weight, bias, training=True, momentum=0.25, t_sigma=2.0)
    _, moments = paper_forward(x.numpy(), weight.numpy(), bias.numpy(), 2.0, 1e-5)
    for c, (batch_mean, batch_var, kept) in enumerate(moments):
        assert kept < 75
        assert mean[c].item() == pytest.approx(0.75 * 0.5 + 0.25 * batch_mean, rel=1e-12)
        assert var[c].item() == pytest.approx(0.75 * 2.0 + 0.25 * batch_var * kept / (kept - 1), rel=1e-12)


def test_one_huge_value_does_not_move_the_moments():
    """The purpose of it all: the outlier changes plain statistics by much and the filtered ones by nothing."""
    x, _, _ = batch((8, 3, 8, 8), outliers=False)
    clean, dirty = x.clone(), x.clone()
    dirty[0, :, 0, 0] = 1e4
    kept = torch.ones_like(x, dtype=torch.bool)
    kept[0, :, 0, 0] = False
    filtered = filtered_batch_norm(dirty, training=True, t_sigma=7.0)
    expected = F.batch_norm(clean, None, None, training=True)
    assert (filtered[kept] - expected[kept]).abs().max() < 0.05
    assert (F.batch_norm(dirty, None, None, training=True)[kept] - expected[kept]).abs().max() > 1
    assert (filtered[0, :, 0, 0] > 1000).all(), "an outlier is normalized, not clipped"


def test_the_band_is_inclusive_and_outliers_beyond_it_are_dropped():
    # Nine values at -1 and one at 9: mean 0, variance 9, so with hardly an eps the last lies 3 deviations away.
    x = torch.tensor([-1.0] * 9 + [9.0], dtype=torch.float64).view(10, 1)
    mean, var = torch.zeros(1, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)
    filtered_batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-30, t_sigma=3.0)
    assert (mean.item(), var.item()) == (0.0, 10.0)
    filtered_batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-30, t_sigma=2.99)
    assert (mean.item(), var.item()) == (-1.0, 0.0)


def test_evaluation_is_batch_norm_to_the_bit():
    x, weight, bias = batch((2, 4, 5, 5), dtype=torch.float32)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    ours = filtered_batch_norm(x, mean, var, weight, bias, training=False, t_sigma=1.5)
    assert torch.equal(ours, F.batch_norm(x, mean, var, weight, bias, False))


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_input_has_float32_statistics(dtype, num_groups):
    x, weight, bias = batch((4, 4, 9, 9), dtype=dtype)
    y = norm(x, weight.float(), bias.float(), num_groups, t_sigma=3.0)
    expected = norm(x.double(), weight.double(), bias.double(), num_groups, t_sigma=3.0)
    assert y.dtype == dtype
    # One rounding of the result to half precision is all that may differ.
    assert ((y.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-5).all()


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_no_less_accurate_than_pytorch_at_a_large_mean(num_groups):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 4, 20, 20, generator=generator, dtype=torch.float64) + 1e4).float()
    exact = norm(x.double(), None, None, num_groups, t_sigma=3.0)
    error = (norm(x, None, None, num_groups, t_sigma=3.0) - exact).abs().max()
    if num_groups:
        native = (F.group_norm(x, num_groups), F.group_norm(x.double(), num_groups))
    else:
        native = (F.batch_norm(x, None, None, training=True), F.batch_norm(x.double(), None, None, training=True))
    # a mean that is handed on as a float32 is off by up to half an ulp, by how much is luck
    half_ulp = torch.finfo(torch.float32).eps * 2**13 / 2
    assert error <= 2 * max((native[0] - native[1]).abs().max(), half_ulp)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept_and_does_not_matter(num_groups, memory_format):
    x, weight, bias = batch((2, 4, 5, 6))
    expected = norm(x, weight, bias, num_groups, t_sigma=2.0)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y = norm(x, weight, bias, num_groups, t_sigma=2.0)
    y.square().sum().backward()
    assert y.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.contiguous(), expected)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_strided_input_and_expanded_gradient(num_groups):
    x, weight, bias = batch((4, 8, 6, 6))
    view = x[:, ::2, 1:].requires_grad_()
    y = norm(view, weight[::2], bias[::2], num_groups, t_sigma=2.0)
    torch.testing.assert_close(
        y, norm(view.detach().contiguous(), weight[::2].clone(), bias[::2].clone(), num_groups, t_sigma=2.0)
    )
    y.sum().backward()  # the incoming gradient has stride 0


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_empty_batch(num_groups):
    x = torch.empty(0, 4, 3, 3, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    y = norm(x, weight, bias, num_groups)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert weight.grad.eq(0).all() and bias.grad.eq(0).all()


def test_empty_batch_leaves_running_statistics():
    mean, var = torch.zeros(4), torch.ones(4)
    filtered_batch_norm(torch.empty(0, 4, 3, 3), mean, var, training=True)
    assert mean.eq(0).all() and var.eq(1).all()


def test_one_value_per_channel_is_pytorchs_error():
    for function in (filtered_batch_norm, lambda x, **_: filtered_group_norm(x, 4)):
        with pytest.raises(ValueError, match="Expected more than 1 value per"):
            function(torch.ones(1, 4, 1, 1), training=True)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-30, 1e6, 123456.789, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_constant_input_gives_the_bias(value, dtype, num_groups):
    x = torch.full((3, 4, 7, 5), value, dtype=dtype, requires_grad=True)
    bias = torch.arange(4.0, dtype=dtype)
    y = norm(x, None, bias, num_groups, t_sigma=1.01)
    y.sum().backward()
    # the mean of equal values may round away from them by an ulp, which 1 / sqrt(eps) magnifies, as in F.batch_norm
    ulp = torch.finfo(dtype).eps * abs(value) * 1e5**0.5
    assert ((y - bias.view(1, 4, 1, 1)).abs() <= 2 * ulp + 1e-6).all()
    assert torch.isfinite(x.grad).all()


def test_one_kept_value_divides_by_nothing():
    """Two values, each as far out as two can be; with a third at the mean and a narrow band only that one is kept."""
    x = torch.tensor([[-10.0], [0.0], [10.0]], requires_grad=True)
    mean, var = torch.ones(1), torch.ones(1)
    y = filtered_batch_norm(x, mean, var, training=True, momentum=1.0, t_sigma=1.01)
    y.sum().backward()
    assert (mean.item(), var.item()) == (0.0, 0.0)
    assert torch.isfinite(y).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_non_finite_input_is_loud_in_its_set_and_absent_elsewhere(bad, num_groups):
    x, _, _ = batch((2, 4, 5, 5), dtype=torch.float32)
    clean = norm(x, None, None, num_groups, t_sigma=2.0)
    x[1, 1, 2, 2] = bad
    x.requires_grad_()
    y = norm(x, None, None, num_groups, t_sigma=2.0)
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[(slice(None), 1) if num_groups == 0 else (1, slice(0, 2))] = True
    assert y[touched].isnan().all()
    assert torch.equal(y[~touched], clean[~touched])
    y[~touched].sum().backward()
    assert torch.isfinite(x.grad[~touched]).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_input_stays_out_of_the_running_statistics(bad):
    x, _, _ = batch((2, 4, 5, 5), dtype=torch.float32)
    x[1, 1, 2, 2] = bad
    mean, var = torch.zeros(4), torch.ones(4)
    filtered_batch_norm(x, mean, var, training=True, t_sigma=2.0)
    assert (mean[1].item(), var[1].item()) == (0.0, 1.0)
    assert mean[[0, 2, 3]].ne(0).all() and torch.isfinite(var).all()


@pytest.mark.parametrize("t_sigma", [2.0, 3.0, 5.0])
def test_gaussian_correction_leaves_a_gaussian_as_it_is(t_sigma):
    x = torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, var = torch.zeros(1, dtype=x.dtype), torch.zeros(1, dtype=x.dtype)
    for correction, expected in ((False, gaussian_kappa(t_sigma)), (True, 1.0)):
        options = {"t_sigma": t_sigma, "gaussian_correction": correction}
        filtered_batch_norm(x, mean, var, training=True, momentum=1.0, **options)
        assert var.item() == pytest.approx(expected, abs=6e-3)


def test_kappa_values():
    for t_sigma, printed in ((2, 0.774), (3, 0.973), (5, 0.99998), (math.inf, 1.0)):
        assert gaussian_kappa(t_sigma) == pytest.approx(printed, abs=6e-4 if t_sigma < 5 else 1e-5)


@pytest.mark.parametrize("t_sigma", [1, 1.0, 0.5, -2.0, 0, math.nan, True, "5", None])
def test_a_cut_that_means_nothing_is_refused(t_sigma):
    for function in (
        lambda **o: filtered_batch_norm(torch.randn(4, 2), training=False, **o),
        lambda **o: filtered_group_norm(torch.randn(4, 2), 1, **o),
    ):
        with pytest.raises(ValueError, match="t_sigma must be a number greater than 1") as error:
            function(t_sigma=t_sigma)
        assert repr(t_sigma) in str(error.value)


def test_other_refusals():
    x = torch.randn(4, 6, 2, 2)
    with pytest.raises(ValueError, match="grad_mode .*'exact', 'paper'.*'true'"):
        filtered_batch_norm(x, training=True, grad_mode="true")
    with pytest.raises(ValueError, match="weight .*5 .*6 channels"):
        filtered_batch_norm(x, weight=torch.ones(5), training=True)
    with pytest.raises(ValueError, match="4 groups .*6 channels"):
        filtered_group_norm(x, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_parameters_of_another_length_are_refused(num_groups, dtype):
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    for name in ("weight", "bias"):
        parameters = {"weight": None, "bias": None, name: torch.ones(4, dtype=dtype)}
        with pytest.raises(ValueError, match=f"{name} .*4 .*8 channels"):
            norm(x, num_groups=num_groups, **parameters)
    with pytest.raises(ValueError, match="weight .*4 "):
        options = num_groups, 2.0, 1e-5, False, "exact", "identity", 0.0
        torch.ops.fbn_plugin.filtered_norm(x, torch.ones(4), None, None, *options)


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_parameters_on_another_device_are_refused(num_groups):
    """The kernels would read them by address."""
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(ValueError, match="weight .*meta.*cpu"):
        norm(x, torch.ones(8, device="meta"), None, num_groups)
    with pytest.raises(ValueError, match="bias .*meta.*cpu"):
        norm(x, None, torch.ones(8, device="meta"), num_groups)
    running = torch.zeros(8, device="meta"), torch.ones(8, device="meta")
    with pytest.raises(ValueError, match="running_mean .*meta.*cpu"):
        filtered_batch_norm(x, *running, training=True)


@pytest.mark.parametrize("x", [torch.ones(4, 3, dtype=torch.int64), torch.ones(4)], ids=["integer", "1-D"])
def test_inputs_that_are_no_activations_are_refused(x):
    with pytest.raises(ValueError, match="the input must be floating point of shape"):
        filtered_batch_norm(x, training=True)


values = st.floats(-100, 100, allow_nan=False, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=4, max_size=24), st.floats(1.0, 8, exclude_min=True), st.sampled_from([0, 1]))
def test_chebyshev_keeps_something(numbers, t_sigma, num_groups):
    x = torch.tensor(numbers).view(-1, 1) if num_groups == 0 else torch.tensor(numbers).view(1, -1)
    assert torch.isfinite(norm(x, None, None, num_groups, t_sigma=t_sigma)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-100, 100), st.floats(1.2, 6))
def test_shift_and_scale_change_nothing(seed, scale, shift, t_sigma):
    """The band moves with the data, so normalization undoes an affine map (as good as no eps)."""
    x, _, _ = batch((3, 2, 3, 3), seed=seed)
    options = {"t_sigma": t_sigma, "eps": 1e-30}
    torch.testing.assert_close(
        norm(x * scale + shift, None, None, 0, **options), norm(x, None, None, 0, **options), rtol=1e-6, atol=1e-6
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.2, 6))
def test_order_of_samples_and_positions_changes_nothing(seed, t_sigma):
    x, _, _ = batch((3, 2, 3, 3), seed=seed)
    flipped = norm(x.flip(0, 2), None, None, 0, t_sigma=t_sigma).flip(0, 2)
    torch.testing.assert_close(flipped, norm(x, None, None, 0, t_sigma=t_sigma))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.2, 6))
def test_kept_values_have_zero_mean_and_unit_variance(seed, t_sigma):
    x, _, _ = batch((5, 2, 4, 4), seed=seed)
    y = norm(x, None, None, 0, t_sigma=t_sigma, eps=1e-30)
    for c in range(2):
        mu, sigma = x[:, c].mean(), x[:, c].std(correction=0)
        kept = y[:, c][(x[:, c] - mu).abs() <= t_sigma * sigma]
        assert kept.mean().item() == pytest.approx(0, abs=1e-9)
        assert kept.std(correction=0).item() == pytest.approx(1, abs=1e-9)


# --- with a residual and an activation -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_three_steps(activation, add, training, dtype, fused, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    x, weight, bias, residual = act_inputs(dtype)
    residual = residual if add else None
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    statistics = [(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)) for _ in range(2)]
    y = filtered_batch_norm_act(
        x, *statistics[0], weight, bias, training, t_sigma=2.0, activation=activation, residual=residual
    )
    steps = filtered_batch_norm(x, *statistics[1], weight, bias, training, t_sigma=2.0)
    steps = activate(steps + residual if add else steps, activation, 0.01)
    torch.testing.assert_close(y, steps)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, steps)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*statistics)


def test_residuals_that_kernels_do_not_take_are_added_as_pytorch_adds(monkeypatch):
    monkeypatch.setattr(dispatch, "fuses", lambda *_: True)
    x, *_ = act_inputs(torch.float32)
    for residual in (torch.randn(3, 1, 1), torch.randn(x.shape, dtype=torch.float64)):
        y = filtered_batch_norm_act(x, training=True, t_sigma=2.0, residual=residual)
        expected = (filtered_batch_norm(x, training=True, t_sigma=2.0) + residual).relu()
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype, kernels, fused, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    if not kernels:
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", reference)
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), FilteredBatchNormAct2d(4, t_sigma=3.0)
    parameters = [*conv.parameters(), *norm.parameters()]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=dtype):
        y = norm(conv(torch.randn(4, 3, 8, 8)))
        loss = y.float().square().mean() + y[:, 0].float().mean()
    assert y.dtype == dtype and norm.weight.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0, "no step was skipped"
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(parameters[:1], before[:1]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "gelu"}, "activation .*'identity', 'relu', 'leaky_relu', 'silu'.*'gelu'"),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, "negative_slope .*-0.1"),
    ],
)
def test_refusals(options, message):
    for build in (
        lambda: filtered_batch_norm_act(torch.randn(4, 2), **options),
        lambda: FilteredBatchNormAct2d(2, **options),
    ):
        with pytest.raises(ValueError, match=message):
            build()
