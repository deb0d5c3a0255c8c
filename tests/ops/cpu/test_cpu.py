"""The C++ kernels against the float64 reference: forward, moments, both gradients; and what they leave to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CHANNELS_LAST, batch, close, examples, moments_of, run

from fbn_plugin import ops
from fbn_plugin.ops import cpu, reference
from fbn_plugin.ops.reference import Options

built = pytest.mark.skipif(isinstance(cpu.library(), str), reason=f"no C++ kernels here: {cpu.library()}")

shapes = st.one_of(
    st.tuples(st.integers(3, 40), st.sampled_from([2, 6, 34, 96])),
    st.tuples(st.sampled_from([257, 700]), st.sampled_from([4, 40])),
    st.tuples(st.integers(1, 4), st.sampled_from([2, 6]), st.integers(4, 150)),
    st.tuples(st.integers(1, 5), st.sampled_from([2, 6, 16, 34, 66, 130]), st.integers(2, 12), st.integers(2, 12)),
    st.tuples(st.integers(1, 2), st.sampled_from([2, 4]), st.integers(60, 75), st.integers(60, 75)),
    st.tuples(st.integers(2, 3), st.sampled_from([4, 20]), st.integers(2, 4), st.integers(2, 4), st.integers(2, 4)),
)


@built
@settings(max_examples=examples(150), deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    num_groups=st.sampled_from([0, 1, 2]),
    channels_last=st.booleans(),
    t_sigma=st.sampled_from([1.5, 2.0, 5.0]),
    correction=st.booleans(),
    mode=st.sampled_from(["exact", "paper"]),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_reference(shape, dtype, num_groups, channels_last, t_sigma, correction, mode, affine, seed):
    channels_last = channels_last and len(shape) in CHANNELS_LAST
    x = batch(shape, dtype, channels_last, seed, t_sigma, num_groups)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.rand(shape[1], generator=generator) + 0.5 if affine else None
    bias = torch.randn(shape[1], generator=generator) if affine else None
    assert cpu.refuses(x) is None
    options = num_groups, t_sigma, correction, mode
    y, moments, (dx, d_weight, d_bias) = run(cpu, x, grad, weight, bias, *options)
    double = [None if t is None else t.double() for t in (x, grad, weight, bias)]
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


@built
@pytest.mark.parametrize("capability, name", [("generic", "generic"), ("avx2", "AVX2")])
def test_other_instruction_sets_agree_too(capability, name):
    """The same tests in a process that leaves out what this machine has beyond; fewer of them, as the kernels of all
    instruction sets are compiled from one text."""
    if name not in ("generic", ops.backends()["cpu"].split()[-1]) and "AVX-512" not in ops.backends()["cpu"]:
        pytest.skip(f"this machine has no {name}")
    environment = {**os.environ, "FBN_CPU_CAPABILITY": capability, "FBN_PLUGIN_TEST_EXAMPLES": "25"}
    which = "from fbn_plugin import ops; print(ops.backends()['cpu'])"
    used = subprocess.run([sys.executable, "-c", which], env=environment, capture_output=True, text=True, check=True)
    assert used.stdout.split()[-1] == name
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        str(Path(__file__).with_name("test_accuracy.py")),
        "-k",
        "reference or digits or twice",
    ]
    result = subprocess.run(tests, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@built
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(4, 32, 14, 14), (2, 16, 60, 70), (8, 24, 3, 5)], ids=str)
def test_error_is_at_most_twice_that_of_batch_norm(shape, channels_last):
    """Float32, where both round: outputs and gradients against float64; nothing filtered, so that both do the same."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 3
    grad = torch.randn(shape, generator=generator)
    if channels_last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)

    def native(x, grad, weight, bias):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
        return [y, *torch.autograd.grad(y, leaves, grad)]

    y, _, gradients = run(cpu, x, grad, weight, bias, 0, 1e6, False, "exact")
    exact = native(*(t.double() for t in (x, grad, weight, bias)))
    for ours, theirs, truth in zip((y, *gradients), native(x, grad, weight, bias), exact):
        spacing = torch.finfo(torch.float32).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + spacing


@built
@pytest.mark.parametrize("channels_last", [False, True])
def test_outliers_at_regular_places_cost_no_digits(channels_last):
    """Sums are taken around a value of the set, which must not be one of these."""
    x = torch.randn(1, 2, 61, 72, generator=torch.Generator().manual_seed(0))
    x.flatten(2)[..., ::61] = 300.0
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    moments = moments_of(cpu, x, 0, 3.0)
    exact = moments_of(reference, x.double(), 0, 3.0)
    torch.testing.assert_close(moments.var.double(), exact.var, rtol=1e-6, atol=0)


@built
@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_mean_keeps_its_digits(num_groups, channels_last):
    x = batch((8, 4, 20, 20), torch.float32, channels_last, 1, num_groups=num_groups) / 4 + 1e4
    moments = moments_of(cpu, x, num_groups, 3.0)
    exact = moments_of(reference, x.double(), num_groups, 3.0)
    torch.testing.assert_close(moments.var.double(), exact.var, rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.mean.double(), exact.mean, rtol=1e-7, atol=0)


@built
@pytest.mark.parametrize("channels_last", [False, True])
def test_an_extreme_first_value_does_not_cost_the_others_their_digits(channels_last):
    x = batch((4, 4, 20, 20), torch.float32, channels_last, 1)
    x[0, :, 0, 0] = 1e7
    moments = moments_of(cpu, x, 0, 3.0)
    exact = moments_of(reference, x.double(), 0, 3.0)
    torch.testing.assert_close(moments.var.double(), exact.var, rtol=1e-4, atol=0)


@built
@pytest.mark.parametrize("num_groups", [0, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_repeat_whatever_the_number_of_threads(num_groups, channels_last):
    x = batch((3, 66, 13, 17), torch.float32, channels_last, 2)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.rand(66), torch.rand(66)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            y, moments, gradients = run(cpu, x, grad, weight, bias, num_groups, 2.0, False, "exact")
            results.append([y, *moments, *gradients])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_what_is_refused_goes_to_the_reference_and_explain_says_why():
    x = torch.randn(4, 6, 5, 5)
    for other, reason in (
        (x.double(), "torch.float64 is not float32 or bfloat16"),
        (x.half(), "torch.float16 is not"),
        (x[:, ::2], "neither contiguous nor channels-last"),
        (x.transpose(2, 3), "neither contiguous nor channels-last"),
        (x.to("meta"), "the tensor is on meta"),
    ):
        assert ops.explain(other).startswith("reference: ") and reason in ops.explain(other)
    strided = ops.filtered_batch_norm(x[:, ::2], training=True, t_sigma=2.0)
    torch.testing.assert_close(strided, ops.filtered_batch_norm(x[:, ::2].contiguous(), training=True, t_sigma=2.0))


@built
def test_explain_names_the_kernels():
    assert ops.explain(torch.randn(4, 6)) == f"cpu: {ops.backends()['cpu']}"
    assert ops.backends()["cpu"].startswith("C++ kernels for ")


def test_without_kernels_everything_works_and_says_so(monkeypatch):
    x = batch((4, 6, 5, 5), torch.float32, False, 3).requires_grad_()
    with_kernels = ops.filtered_batch_norm(x, training=True, t_sigma=2.0)
    (gradient,) = torch.autograd.grad(with_kernels.square().sum(), x)
    monkeypatch.setattr(cpu, "library", lambda: "the C++ kernels were not built")
    without = ops.filtered_batch_norm(x, training=True, t_sigma=2.0)
    torch.testing.assert_close(without, with_kernels)
    torch.testing.assert_close(torch.autograd.grad(without.square().sum(), x)[0], gradient, rtol=1e-4, atol=1e-5)
    assert ops.explain(x) == "reference: the C++ kernels were not built"
    assert ops.backends()["cpu"] == "the C++ kernels were not built"


@built
def test_moments_are_those_of_the_set_and_nothing_else():
    """A value changed in one channel leaves every other channel's result as it was, bit for bit."""
    x = batch((3, 34, 6, 7), torch.float32, True, 4)
    options = Options(0, 2.0, 1e-5, False, "exact")
    y, moments = cpu.forward(x, None, None, None, None, options)
    changed = x.clone(memory_format=torch.preserve_format)
    changed[1, 5, 2, 2] += 100
    y2, moments2 = cpu.forward(changed, None, None, None, None, options)
    others = torch.arange(34) != 5
    assert torch.equal(y[:, others], y2[:, others]) and not torch.equal(y[:, 5], y2[:, 5])
    assert torch.equal(moments[:, others], moments2[:, others])
