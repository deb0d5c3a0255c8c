"""Derivatives that no kernel computes: of second order, in forward mode and inside of torch.func, for both gradients
and with the activation in the same operator."""

import pytest
import torch
from forms import BOTH_FORMS, act_inputs, batch, norm
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import examples
from paper_equations import backward as paper_backward
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from fbn_plugin.ops import filtered_batch_norm, filtered_batch_norm_act, functional, library
from fbn_plugin.ops.derivatives import below_transforms, formula
from fbn_plugin.ops.reference import ACTIVATIONS, Options

SHAPES = [(5, 4), (3, 4, 5), (2, 4, 3, 2), (2, 4, 2, 2, 2)]


@settings(max_examples=examples(40), deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    num_groups=st.sampled_from([0, 1, 2]),
    t_sigma=st.sampled_from([1.2, 1.8, 3.0]),
    correction=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_the_tangent_is_the_adjoint_of_the_gradient(shape, num_groups, t_sigma, correction, eps, seed, dtype):
    """<g, J v> = <J^T g, v>, the right side by a backend."""
    x, weight, bias = batch(shape, seed, dtype)
    g, *tangents = (batch(t.shape if t.dim() > 1 else (1, len(t)), seed + i, dtype)[0] for i, t in
                    enumerate((x, x, weight, bias)))  # fmt: skip
    tangents = [v.view_as(t) for v, t in zip(tangents, (x, weight, bias))]

    def call(x, weight, bias):
        return norm(x, weight, bias, num_groups, t_sigma=t_sigma, gaussian_correction=correction, eps=eps)

    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    gradients = torch.autograd.grad(call(*leaves), leaves, g)
    terms = [(d * v).double().sum() for d, v in zip(gradients, tangents)]
    scale = sum((d * v).double().abs().sum() for d, v in zip(gradients, tangents)) + g.double().abs().sum()
    _, by_transform = jvp(call, tuple(t.detach() for t in leaves), tuple(tangents))
    with forward_ad.dual_level():
        y = call(*(forward_ad.make_dual(t.detach(), v) for t, v in zip(leaves, tangents)))
        by_dual = forward_ad.unpack_dual(y).tangent
    for tangent in (by_transform, by_dual):
        error = ((g * tangent).double().sum() - sum(terms)).abs() / scale
        assert error < (1e-11 if dtype is torch.float64 else 1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_second_derivatives_of_the_operator(num_groups, add, activation):
    x, weight, bias, residual = act_inputs(shape=(3, 4, 3, 2))
    options = Options(num_groups, 1.5, 1e-5, True, "exact", activation, 0.1)

    def call(x, weight, bias, residual=None):
        return library.normalize(x, weight, bias, residual, None, options)[0]

    leaves = (x, weight, bias, residual) if add else (x, weight, bias)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("fused", [False, True])
def test_second_derivatives_in_half_precision(fused, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x, weight, bias, residual = (t.detach().bfloat16().to(dtype).requires_grad_() for t in act_inputs())
        y = filtered_batch_norm_act(x, weight=weight, bias=bias, training=True, residual=residual, activation="silu")
        first = torch.autograd.grad(y.square().sum(), [x, residual], create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), [x, weight, bias, residual])
        assert [d.dtype for d in second] == [dtype] * 4
        results.append(second)
    for half, double in zip(*results):
        assert (half.double() - double).norm() < 0.05 * double.norm()


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_a_tensor_that_is_its_own_gradient(mode):
    x, weight, bias = batch((3, 4, 3))
    x.requires_grad_()

    def gradient(x, g):
        y = norm(x, weight, bias, 2, t_sigma=1.8, grad_mode=mode)
        return torch.autograd.grad(y, x, g, create_graph=True)[0].sin().sum()

    (together,) = torch.autograd.grad(gradient(x, x), x)
    other = x.detach().requires_grad_()
    assert other is not x
    torch.testing.assert_close(together, sum(torch.autograd.grad(gradient(x, other), [x, other])))


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_third_derivatives(num_groups):
    x, weight, bias = batch((2, 2, 2), outliers=False)
    x.requires_grad_()

    def loss(x):
        return norm(x, weight, bias, num_groups, t_sigma=1.2).sin().sum()

    derivative = loss(x)
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
    third = grad(lambda x: grad(lambda x: grad(loss)(x).sum())(x).sum())(x.detach())
    torch.testing.assert_close(derivative, third)


# --- the gradient as printed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_the_printed_gradient_inside_of_transforms(num_groups):
    x, weight, bias = batch((3, 4, 2, 2))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def call(x, weight, bias):
        return norm(x, weight, bias, num_groups, t_sigma=1.8, grad_mode="paper")

    arrays = (t.numpy() for t in (g, x, weight))
    expected = [torch.from_numpy(each) for each in paper_backward(*arrays, 1.8, 1e-5, num_groups)]
    y, backward = vjp(call, x, weight, bias)
    torch.testing.assert_close(y, call(x, weight, bias))
    torch.testing.assert_close(list(backward(g)), expected)
    many = vmap(lambda x: vjp(call, x, weight, bias)[1](g)[0])(torch.stack([x, x.flip(0)]))
    torch.testing.assert_close(many[0], expected[0])


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
def test_the_second_derivative_is_that_of_the_printed_formula(num_groups):
    x, weight, bias = (t.requires_grad_() for t in batch((2, 4, 2)))
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def first(x, weight, g, create_graph=True):
        y = norm(x, weight, bias, num_groups, t_sigma=1.5, grad_mode="paper", gaussian_correction=True)
        return torch.autograd.grad(y, [x, weight, bias], g, create_graph=create_graph)

    assert torch.autograd.gradcheck(first, (x, weight, g.requires_grad_()))

    def transformed(x):
        def call(x):
            return norm(x, weight, bias, num_groups, t_sigma=1.5, grad_mode="paper", gaussian_correction=True)

        return vjp(call, x)[1](g)[0]

    expected = torch.autograd.functional.jacobian(lambda x: first(x, weight, g)[0], x)
    torch.testing.assert_close(jacrev(transformed)(x.detach()), expected)


def test_forward_mode_has_no_printed_form():
    x, *_ = batch((3, 4, 2))

    def call(x):
        return norm(x, None, None, 0, grad_mode="paper")

    with pytest.raises(ValueError, match="exact gradient only, got grad_mode 'paper'"):
        jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="exact gradient only, got grad_mode 'paper'"):
        call(forward_ad.make_dual(x, x))


# --- hard values ------------------------------------------------------------------------------------------------------


def test_values_that_have_no_derivative_are_those_of_the_backends():
    """A constant channel, a NaN, an infinity, and a single kept value."""
    x, weight, bias = batch((4, 5, 3))
    x[:, 0], x[1, 1, 1], x[2, 2, 2] = 7.0, torch.nan, torch.inf
    x[:, 3] = torch.tensor([0.0, 1.0, -1.0]) * 1e-30
    options = Options(0, 1.1, 0.0, False, "exact")
    results = []
    for way in (formula, lambda *a: library.normalize(*a[:4], None, a[4])):
        leaf = x.clone().requires_grad_()
        y, moments = way(leaf, weight, bias, None, options)
        results.append([y, moments, *torch.autograd.grad(y.nan_to_num().sum(), leaf)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_jacobians_of_an_empty_batch_and_of_no_cut():
    x, weight, bias = batch((2, 4, 2))
    assert jacrev(lambda x: norm(x, weight, bias, 0))(x[:0]).shape == (0, 4, 2, 0, 4, 2)

    def plain(x):
        return norm(x, weight, bias, 0, t_sigma=torch.inf)

    torch.testing.assert_close(jacfwd(plain)(x), jacrev(plain)(x))


# --- writes beneath transforms ----------------------------------------------------------------------------------------


def test_writes_beneath_transforms():
    def add(total, value):
        total.add_(value)

    def loss(x, total):
        below_transforms(add, total, x.sum())
        return x.square().sum()

    x, total = torch.arange(3.0), torch.zeros(())
    grad(lambda x: loss(x, total))(x)  # of a tensor that is no argument
    assert total == 3
    grad(lambda x: grad(lambda x: loss(x, total))(x).sum())(x)
    jvp(lambda x: loss(x, total), (x,), (x,))
    assert total == 9
    totals = torch.zeros(2)
    vmap(grad(loss))(torch.stack([x, 2 * x]), totals)
    assert totals.tolist() == [3, 6]
    with pytest.raises(RuntimeError, match="place|shape"):
        vmap(lambda x: loss(x, total))(torch.stack([x, x]))
    assert total == 9


def test_statistics_of_one_batch_for_many_models():
    """The batch is one, the statistics are each model's own."""
    x, *_ = batch((4, 3, 5), dtype=torch.float32)
    means, variances, counts = torch.rand(2, 3), torch.rand(2, 3), torch.tensor([0, 4])
    expected = [[t[i].clone() for t in (means, variances, counts)] for i in range(2)]

    def call(mean, var, count):
        return filtered_batch_norm(x, mean, var, None, None, True, None, t_sigma=1.5, num_batches_tracked=count)

    y = vmap(call)(means, variances, counts)
    for i, each in enumerate(expected):
        torch.testing.assert_close(y[i], call(*each))
        torch.testing.assert_close([t[i] for t in (means, variances, counts)], each)
