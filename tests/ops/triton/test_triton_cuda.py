"""The Triton kernels where there is a GPU: real sizes against the float64 reference, PyTorch's own error as the
measure, repetition bit for bit, and CUDA graphs."""

import pytest
import torch
import torch.nn.functional as F
from oracle import batch, close, run

from fbn_plugin import FilteredBatchNormAct2d, ops
from fbn_plugin.ops import reference, triton
from fbn_plugin.ops.reference import FilteredMoments, Options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
DEVICE = "cuda"
SHAPES = [(16, 64, 112, 112), (16, 512, 7, 7), (2, 256, 25, 38), (4, 6, 5, 7), (64, 128)]


def inputs(shape, dtype, channels_last, num_groups=0):
    generator = torch.Generator().manual_seed(1)
    x = batch(shape, dtype, channels_last and len(shape) == 4, 3, 2.0, num_groups).to(DEVICE)
    grad = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    return x, grad, weight.to(DEVICE), bias.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_groups, mode", [(0, "exact"), (0, "paper"), (2, "exact")])
def test_agrees_with_the_reference(shape, dtype, channels_last, num_groups, mode):
    x, grad, weight, bias = inputs(shape, dtype, channels_last, num_groups)
    assert ops.explain(x).startswith("triton: ")
    y, moments, gradients = run(triton, x, grad, weight, bias, num_groups, 2.0, False, mode)
    double = [t.double() for t in (x, grad, weight, bias)]
    y_ref, ref, gradients_ref = run(reference, *double, num_groups, 2.0, False, mode)
    one_rounding = torch.finfo(dtype).eps
    assert torch.equal(moments.count.double(), ref.count), "the mask is the same to the last value"
    assert y.stride() == gradients[0].stride() == x.stride()
    close(moments.mean, ref.mean, 1e-5, "mean")
    close(moments.var, ref.var, 1e-5, "var")
    close(y, y_ref, one_rounding + 1e-5, "y")
    tolerances = one_rounding + 1e-4, 2e-4, 2e-4
    for name, ours, truth, tolerance in zip(("dx", "d_weight", "d_bias"), gradients, gradients_ref, tolerances):
        close(ours, truth, tolerance, name)


@pytest.mark.parametrize("channels_last", [False, True])
def test_error_is_at_most_twice_that_of_batch_norm(channels_last):
    x, grad, weight, bias = inputs((8, 32, 28, 28), torch.float32, channels_last)

    def native(x, grad, weight, bias):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    y, _, gradients = run(triton, x, grad, weight, bias, 0, 1e6, False, "exact")
    exact = native(*(t.double() for t in (x, grad, weight, bias)))
    for ours, theirs, truth in zip((y, *gradients), native(x, grad, weight, bias), exact):
        spacing = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + spacing


@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_repeat_bit_for_bit(num_groups, channels_last):
    arguments = inputs((16, 64, 56, 56), torch.bfloat16, channels_last, num_groups)
    y, moments, gradients = run(triton, *arguments, num_groups, 2.0, False, "exact")
    for _ in range(3):
        y2, moments2, gradients2 = run(triton, *arguments, num_groups, 2.0, False, "exact")
        assert all(torch.equal(a, b) for a, b in zip((y, *moments, *gradients), (y2, *moments2, *gradients2)))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
def test_fused_layer(activation, add):
    """Against the reference in double precision, statistics too; the derivative jumps at 0, so no value lies there."""
    x, grad, weight, bias = inputs((4, 32, 14, 14), torch.float32, True)
    residual = torch.randn_like(x) if add else None
    layers = [FilteredBatchNormAct2d(32, t_sigma=2.0, activation=activation, device=DEVICE) for _ in range(2)]
    results = []
    for layer, cast in zip(layers, (torch.Tensor.float, torch.Tensor.double)):
        layer.to(cast(x).dtype).weight.data.copy_(weight)
        layer.bias.data.copy_(bias)
        leaves = [cast(t).requires_grad_() for t in (x, residual) if t is not None]
        y = layer(leaves[0], leaves[1] if add else None)
        gradients = torch.autograd.grad(y, [*leaves, *layer.parameters()], cast(grad))
        results.append((y, *gradients, layer.running_mean, layer.running_var))
    close(results[0][0], results[1][0], 1e-5, "y")
    near_zero = results[1][0].abs() < 1e-4 if activation in reference.SIGN_TELLS else torch.zeros_like(x).bool()
    for ours, truth in zip(results[0][1:], results[1][1:]):
        if ours.shape == x.shape:
            ours, truth = ours.masked_fill(near_zero, 0), truth.masked_fill(near_zero, 0)
        close(ours, truth, 1e-3, activation)


def test_several_streams_at_a_time():
    """None sees the counters and sums of another."""
    cases = [inputs((16, 64, 56, 56), torch.float32, channels_last) for channels_last in (False, True)]
    expected = [run(triton, *case, 0, 2.0, False, "exact") for case in cases]
    streams = [torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got.append((i % 2, run(triton, *cases[i % 2], 0, 2.0, False, "exact")))
    torch.cuda.synchronize()
    for which, (y, moments, gradients) in got:
        truth = expected[which]
        assert all(torch.equal(a, b) for a, b in zip((y, *moments, *gradients), (truth[0], *truth[1], *truth[2])))
    assert all(counters.count_nonzero() == 0 for counters in triton._default_counters.values())


def test_cuda_graph():
    layer = FilteredBatchNormAct2d(64, t_sigma=2.0, device=DEVICE)
    x, grad, *_ = inputs((8, 64, 28, 28), torch.float32, True)
    static = x.clone(memory_format=torch.preserve_format).requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(layer(static), static, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static)
        (dx,) = torch.autograd.grad(y, static, grad)
    with torch.no_grad():
        static.copy_(x.flip(0) * 2)
    before = layer.running_mean.clone()
    graph.replay()
    assert not torch.equal(layer.running_mean, before)
    fresh = static.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    expected = layer(fresh)
    assert torch.equal(y, expected) and torch.equal(dx, torch.autograd.grad(expected, fresh, grad)[0])


def test_more_than_two_to_the_31_values():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.empty(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE).normal_()
    x[-1, -1, -1, -1] = 100.0
    y, moments = triton.forward(x, None, None, None, None, Options(0, 6.0, 1e-5, False, "exact"))
    moments = FilteredMoments(*moments)
    expected = (x[-1, -1].float() - moments.mean[-1]) / (moments.var[-1] + 1e-5).sqrt()
    torch.testing.assert_close(y[-1, -1].float(), expected, rtol=1e-2, atol=1e-2)
    assert abs(moments.var[-1].item() - 1) < 1e-2 and moments.upper[-1] < 7
