"""The CUDA kernels against the float64 reference, run on the CPU (``cuda_on_cpu.h``): every layout, dtype, form,
gradient and activation, groups of one and of many blocks, data kept on the chip whole, in part and not at all, random
schedules."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import batch, check_as_exact_as_plain, close, hard_inputs, run

from fbn_plugin import ops
from fbn_plugin.ops import cuda, reference
from fbn_plugin.ops.cuda import plan
from fbn_plugin.ops.cuda.driver import Card
from fbn_plugin.ops.reference import SIGN_TELLS, FilteredMoments, Options, RunningStats

# Multiprocessors that small tensors fill, so that sets are spread over blocks; with room for all of what is kept, for
# some, and for nothing.
ROOMY = Card("sm_90", 16, 60000, 160000, 256, 65536, 2048, 32, 1 << 20)
TIGHT = Card("sm_90", 16, 40000, 40000, 256, 65536, 2048, 32, 1 << 20)
BARE = Card("sm_90", 16, 16000, 16000, 256, 65536, 2048, 32, 1 << 20)
FEW = Card("sm_90", 2, 60000, 160000, 256, 65536, 2048, 32, 1 << 20)
CARDS = {"roomy": ROOMY, "tight": TIGHT, "bare": BARE, "few": FEW}

PLANES = [(2, 3, 63, 65), (2, 4, 40, 64), (2, 6, 1, 300)]
BUNDLES = [(3, 8, 7, 7), (2, 16, 5, 5, 3), (9, 8, 13, 11)]
ROWS = [(3, 16, 40, 41), (2, 20, 9, 9), (600, 20), (5, 6, 3, 3)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(shape, dtype, channels_last, num_groups=0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    x = batch(shape, dtype, channels_last and len(shape) in (4, 5), seed, 2.0, num_groups)
    grad = torch.randn(shape, generator=generator).to(dtype)
    weight, bias = torch.rand(shape[1], generator=generator) + 0.5, torch.randn(shape[1], generator=generator)
    return x, grad, weight, bias


def cuts(x, num_groups=0, activation=0):
    """(kernel, members, steps, kept) of the plan's launches."""
    planned = cuda._find(x, num_groups, activation)
    assert not isinstance(planned, str), planned
    found = []
    for launch in (planned.forward, planned.backward):
        *_, members, steps, kept, _, _, _, _ = plan.CUT.unpack(launch.packed)
        found.append((launch.kernel.name, members, steps, kept))
    return found


def compare(x, grad, weight, bias, num_groups, correction, mode):
    """One pass each way against the reference; the arithmetic's own tolerances."""
    assert cuda.refuses(x, num_groups) is None
    y, moments, (dx, d_weight, d_bias) = run(cuda, x, grad, weight, bias, num_groups, 2.0, correction, mode)
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


CASES = [
    *((shape, False, groups) for shape in PLANES for groups in (0, 1, shape[1])),
    *((shape, False, 0) for shape in BUNDLES),
    *((shape, len(shape) == 4, groups) for shape in ROWS[:2] + ROWS[3:] for groups in (0, 2, shape[1])),
    ((1, 2, 131, 137), False, 0),
    ((600, 20), False, 0),
    ((300, 200), False, 1),
    ((40, 24), False, 3),
]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case, card, emulated):
    shape, channels_last, num_groups = case
    number = CASES.index(case) + list(CARDS).index(card)
    driver = emulated.replace(card=CARDS[card], seed=number % 4)
    # float32 everywhere; the others take turns, as do the kinds of gradient
    for dtype, mode in ((torch.float32, ("exact", "paper")[number % 2]), (DTYPES[1 + number % 2], "exact")):
        x, grad, weight, bias = inputs(shape, dtype, channels_last, num_groups)
        if reason := cuda.refuses(x, num_groups):
            assert "fit into no block" in reason
            continue
        compare(x, grad, weight, bias if number % 3 else None, num_groups, mode == "paper", mode)
        compare(x, grad, None, None, num_groups, False, "exact")
    assert set(driver.launched) <= {
        "forward", "backward", "forward_bundles", "backward_bundles", "forward_lines", "backward_lines",
        "finish_backward",
    }  # fmt: skip


def test_the_cases_reach_every_way(emulated):
    """One and several members, all, some and nothing kept, all kernels."""
    kinds, kernels = set(), set()
    for card, (shape, channels_last, num_groups) in itertools.product(CARDS.values(), CASES):
        emulated.replace(card=card)
        x = inputs(shape, torch.float32, channels_last, num_groups)[0]
        if cuda.refuses(x, num_groups):
            continue
        for (kernel, members, steps, kept), way in zip(cuts(x, num_groups), ("forward", "backward")):
            kernels.add(kernel)
            if kernel == way:
                kinds.add((way, members > 1, "all" if kept == steps else "some" if kept else "none"))
    assert kinds == set(itertools.product(("forward", "backward"), (False, True), ("all", "some", "none"))), kinds
    assert len(kernels) == 6


def test_one_launch_each_way(emulated):
    x, grad, weight, bias = inputs((3, 16, 40, 41), torch.float32, True)
    emulated = emulated.replace(card=ROOMY)
    run(cuda, x, grad, weight, bias, 0, 2.0, False, "exact")
    assert emulated.launched == ["forward", "backward"]


@pytest.mark.parametrize(
    "channels_last, shape", [(False, (2, 4, 40, 64)), (True, (2, 20, 9, 9)), (False, (3, 8, 7, 7))]
)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
def test_activation_and_residual(shape, channels_last, activation, add, emulated):
    for card, dtype, mode in ((TIGHT, torch.float32, "paper"), (ROOMY, torch.bfloat16, "exact")):
        emulated.replace(card=card, seed=1)
        x, grad, weight, bias = inputs(shape, dtype, channels_last)
        residual = torch.empty_like(x).copy_(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
        residual = residual if add else None
        options = Options(0, 2.0, 1e-5, False, mode, activation, 0.1)
        results = []
        for backend, cast in ((cuda, lambda t: t), (reference, torch.Tensor.double)):
            x_, grad_, weight_, bias_ = map(cast, (x, grad, weight, bias))
            residual_ = None if residual is None else cast(residual)
            y, moments = backend.forward(x_, weight_, bias_, residual_, None, options)
            # The derivative jumps at 0: the reference decides by what the kernels gave out.
            ours = results[0][0] if results else y
            other = (
                None if activation == "identity" or not add else cast(ours) if activation in SIGN_TELLS else residual_
            )
            results.append((y, *backend.backward(grad_, x_, weight_, bias_, other, moments, options)))
        one_rounding = torch.finfo(dtype).eps
        near_zero = torch.zeros_like(x, dtype=torch.bool)
        if activation in SIGN_TELLS and not add:
            near_zero = results[1][0].abs() < 1e-3
        for name, ours, truth in zip(("y", "dx", "d_weight", "d_bias", "d_residual"), *results):
            assert (ours is None) == (truth is None), name
            if ours is None:
                continue
            if ours.shape == x.shape:
                ours, truth = ours.masked_fill(near_zero, 0), truth.masked_fill(near_zero, 0)
            close(ours, truth, 2 * one_rounding + 2e-4, f"{name} {dtype}")


@pytest.mark.parametrize("shape, channels_last", [((2, 4, 40, 64), False), ((2, 16, 9, 9), True), ((40, 24), False)])
def test_residual_after_the_group_form(shape, channels_last, emulated):
    emulated.replace(card=ROOMY)
    x, _, weight, bias = inputs(shape, torch.float32, channels_last, 4)
    residual = torch.empty_like(x).copy_(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    options = Options(4, 2.0, 1e-5, False, "exact")
    assert cuda.refuses(x, 4) is None
    y, _ = cuda.forward(x, weight, bias, residual, None, options)
    expected, _ = reference.forward(*(t.double() for t in (x, weight, bias, residual)), None, options)
    close(y, expected, 1e-5, "y")


@pytest.mark.parametrize(
    "shape, channels_last", [((2, 3, 63, 65), False), ((3, 16, 40, 41), True), ((3, 8, 7, 7), False)]
)
def test_running_statistics(shape, channels_last, emulated):
    emulated.replace(card=ROOMY)
    x, _, weight, bias = inputs(shape, torch.float32, channels_last)
    c = shape[1]
    for momentum, counted in ((0.1, 7), (None, 3), (0.25, None)):
        stats = []
        for backend, dtype in ((cuda, torch.float32), (reference, torch.float64)):
            generator = torch.Generator().manual_seed(0)
            mean, var = torch.randn(c, generator=generator).to(dtype), torch.rand(c, generator=generator).to(dtype)
            count = None if counted is None else torch.tensor(counted)
            version = mean._version
            running = RunningStats(mean, var, momentum, count)
            backend.forward(
                x.to(dtype), weight.to(dtype), bias.to(dtype), None, running, Options(0, 2.0, 1e-5, False, "exact")
            )
            assert mean._version > version and var._version > version
            stats.append((mean, var, count))
        close(stats[0][0], stats[1][0], 1e-5, "mean")
        close(stats[0][1], stats[1][1], 1e-5, "var")
        assert stats[0][2] == stats[1][2] == (None if counted is None else counted + 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape, channels_last", [((2, 4, 40, 64), False), ((2, 20, 9, 9), True), ((3, 8, 7, 7), False)]
)
def test_non_finite_input_is_loud_in_its_channel_and_absent_elsewhere(shape, channels_last, bad, emulated):
    emulated.replace(card=TIGHT)
    x, grad, *_ = inputs(shape, torch.float16, channels_last)
    options = Options(0, 2.0, 1e-5, False, "exact")
    clean, _ = cuda.forward(x, None, None, None, None, options)
    x[1, 1, 2, 2] = bad
    mean, var = torch.zeros(shape[1]), torch.ones(shape[1])
    y, moments = cuda.forward(x, None, None, None, RunningStats(mean, var, 0.1, None), options)
    others = [c for c in range(shape[1]) if c != 1]
    assert y[:, 1].isnan().all() and torch.equal(y[:, others], clean[:, others])
    dx = cuda.backward(grad, x, None, None, None, moments, options)[0]
    assert dx[:, 1].isnan().all() and dx[:, others].isfinite().all()
    assert (mean[1].item(), var[1].item()) == (0.0, 1.0)
    assert mean[others].ne(0).all() and var.isfinite().all()


@pytest.mark.parametrize(
    "shape, channels_last", [((2, 4, 40, 64), False), ((2, 20, 9, 9), True), ((3, 8, 7, 7), False)]
)
def test_constant_input_gives_the_bias(shape, channels_last, emulated):
    emulated.replace(card=TIGHT)
    bias = torch.arange(float(shape[1]))
    x = torch.full(shape, 123456.0)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    y, moments = cuda.forward(x, None, bias, None, None, Options(0, 1.01, 1e-5, False, "exact"))
    assert (y - bias.view(1, -1, 1, 1)).abs().max() < 10 and (moments[4] == x.numel() // shape[1]).all()


@pytest.mark.parametrize("shape, channels_last", [((2, 3, 63, 65), False), ((3, 16, 40, 41), True)])
def test_results_repeat_bit_for_bit_over_schedules(shape, channels_last, emulated):
    emulated = emulated.replace(card=TIGHT)
    x, grad, weight, bias = inputs(shape, torch.bfloat16, channels_last)
    first = None
    for seed, places in ((0, None), (0, 8), (1, None), (2, 9), (3, 40)):
        emulated.seed, emulated.places = seed, places
        y, moments, gradients = run(cuda, x, grad, weight, bias, 0, 2.0, False, "exact")
        results = (y, *moments, *gradients)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results))
    assert all(not counters.any() for _, counters in cuda._workspaces.values()), "counters are left at zero"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype(kind, emulated):
    emulated.replace(card=ROOMY)
    x, grad, weight, bias = inputs((3, 8, 7, 7), torch.float32, False)
    compare(x, grad, weight.to(kind), bias.to(kind), 0, False, "exact")


def test_views_at_odd_addresses_and_expanded_gradients(emulated):
    emulated.replace(card=ROOMY)
    x, _, weight, bias = inputs((2, 4, 40, 64), torch.float32, False)
    odd = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    assert odd.data_ptr() % 8 == 4
    options = Options(0, 2.0, 1e-5, False, "exact")
    expected, moments = cuda.forward(x, weight, bias, None, None, options)
    y, _ = cuda.forward(odd, weight, bias, None, None, options)
    close(y, expected.double(), 1e-6, "y")
    grad = torch.ones(()).expand(x.shape)
    dx = cuda.backward(grad, odd, weight, bias, None, moments, options)[0]
    close(dx, cuda.backward(grad.contiguous(), x, weight, bias, None, moments, options)[0].double(), 1e-6, "dx")


def test_the_steps_of_synchronized_batch_norm(emulated):
    """On the whole batch they give what one launch gives."""
    emulated.replace(card=ROOMY)
    for channels_last, mode in ((False, "exact"), (True, "paper")):
        x, grad, weight, bias = inputs((3, 16, 20, 21), torch.float32, channels_last)
        options = Options(0, 2.0, 1e-5, False, mode)
        y, moments = cuda.forward(x, weight, bias, None, None, options)
        dx, d_weight, d_bias, _ = cuda.backward(grad, x, weight, bias, None, moments, options)
        mean, var, measured = cuda.measure(x)
        lower, upper = reference.band(mean, var, 2.0, 1e-5)
        close(lower, moments[2].double(), 1e-5, "lower")
        kept = cuda.measure_kept(x, lower, upper, measured)
        for ours, row in zip(kept, (moments[0], moments[1], moments[4])):
            close(ours, row.double(), 1e-5, "kept")
        together = torch.stack((kept[0], kept[1], lower, upper, kept[2]))
        close(cuda.normalize(x, weight, bias, together, 0, 1e-5), y.double(), 1e-5, "y")
        sums = cuda.gradient_sums(grad, x, together, 1e-5, mode)
        close(sums[0], d_weight.double(), 1e-4, "d_weight")
        close(sums[1], d_bias.double(), 1e-4, "d_bias")
        means = (weight * sums[1] / kept[2], weight * sums[0] / kept[2])
        close(cuda.input_gradient(grad, x, weight, together, 1e-5, mode, *means), dx.double(), 1e-4, "dx")


def test_what_is_refused(emulated):
    emulated.replace(card=ROOMY)
    x = torch.randn(2, 6, 4, 4)
    assert cuda.refuses(x) is None and cuda.refuses(x, 2) is None
    assert cuda.refuses(x.double()) == "torch.float64 is not float32, float16 or bfloat16"
    assert cuda.refuses(x[:, ::2]) == "the tensor is neither contiguous nor channels-last"
    assert cuda.refuses(x.to("meta")) == "the tensor is on meta"
    assert cuda.refuses(x[:0]) == "the tensor is empty"
    assert cuda.refuses(x, 2, "relu") == "an activation after the group form is not in the kernels"
    last = x.contiguous(memory_format=torch.channels_last)
    assert cuda.refuses(last, 2) == "groups of 3 channels, channels-last, fit into no block of channels"
    assert cuda.refuses(torch.randn(4, 40000), 1) == "40000 channels are more than a multiprocessor can add up"
    large = plan.Shape(2**21, 2**10, 2, torch.float16, False, 2**10, 16)
    assert plan.refuses(large) == f"{2**31} channels of samples are more than {2**30}"
    large = large._replace(positions=1, num_groups=1)
    assert plan.refuses(large) is None and plan.make(large, ROOMY, 4).forward.members == 1


def test_layers_take_it(emulated, monkeypatch):
    """From the functions that users call, with running statistics, and no other backend behind them."""
    emulated = emulated.replace(card=ROOMY)
    monkeypatch.setattr(ops.dispatch, "BACKENDS", {"cuda": cuda})
    for name in ("forward", "backward", "update_running_stats"):
        monkeypatch.setattr(reference, name, None)
    x = torch.randn(4, 8, 6, 6, requires_grad=True)
    assert ops.explain(x).startswith("cuda: emulated")
    mean, var, weight = torch.zeros(8), torch.ones(8), torch.ones(8, requires_grad=True)
    y = ops.filtered_batch_norm(x, weight, None, mean, var, training=True, t_sigma=2.0)
    y.square().mean().backward()
    assert mean.ne(0).all() and weight.grad.abs().sum() > 0 and x.grad.shape == x.shape
    ops.filtered_group_norm(x, 2, t_sigma=2.0).sum().backward()
    ops.filtered_batch_norm_act(x, weight, training=True, activation="relu", residual=x).sum().backward()
    assert set(emulated.launched) == {"forward", "backward", "finish_backward"}


def test_the_default_stream_has_a_workspace_and_each_launch_on_another_its_own(emulated):
    emulated = emulated.replace(card=ROOMY)
    x = inputs((2, 3, 63, 65), torch.float32, False)[0]
    launch = cuda._find(x, 0).forward
    first = cuda._workspace(0, 0, launch)
    assert cuda._workspace(0, 0, launch) is first and not first[1].any()
    for stream in (1, 2, 1):
        emulated.stream = stream
        other = cuda._workspace(0, cuda._stream(x), launch)
        addresses = {tensor.data_ptr() for tensor in (*first, *other)}
        assert len(addresses) == 4 and not other[1].any()
    assert set(cuda._workspaces) == {0} and cuda._streams[0] == {1, 2}


def test_another_card_that_cannot_be_used(emulated, monkeypatch):
    """What the first card can says nothing of the second."""
    x = torch.randn(2, 4, 8, 8)
    assert cuda.refuses(x) is None
    monkeypatch.setattr(emulated, "reason", lambda device, defines=None: "too old" if defines is None else None)
    assert cuda.refuses(torch.randn(2, 4, 8, 9)) == "too old"


def test_more_streams_make_groups_smaller(emulated):
    emulated = emulated.replace(card=Card("sm_90", 4, 60000, 160000, 256, 65536, 2048, 32, 1 << 20))
    x = torch.randn(1, 1, 127, 129)
    options = Options(0, 2.0, 1e-5, False, "exact")
    expected = None
    members = []
    for stream in range(9):
        emulated.stream = stream
        y, _ = cuda.forward(x, None, None, None, None, options)
        expected = y if expected is None else expected
        close(y, expected.double(), 1e-6, "y")
        members.append(cuts(x)[0][1])
    places = 4 * 2
    assert members[0] == 2 and members[-1] == 1
    for streams, each in enumerate(members, 1):
        assert (each - 1) * streams < places


@pytest.mark.parametrize("channels_last", [False, True])
def test_two_launches_at_a_time(channels_last, emulated):
    """On two streams, with just as many places as the plans reckon with, and any schedule."""
    emulated = emulated.replace(card=ROOMY)
    x, _, weight, bias = inputs((2, 8, 63, 65), torch.float32, channels_last)
    options = Options(0, 2.0, 1e-5, False, "exact")
    expected, _ = cuda.forward(x, weight, bias, None, None, options)
    launch = cuda._find(x, 0).forward
    members = plan.CUT.unpack(launch.packed)[-7]
    assert members > 1
    for seed in (1, 2, 3):
        emulated.seed, emulated.places = seed, 2 * (members - 1) + 1
        with emulated.together():
            results = []
            for stream in (1, 2):
                emulated.stream = stream
                results.append(cuda.forward(x, weight, bias, None, None, options)[0])
        assert all(torch.equal(y, expected) for y in results)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hard=hard_inputs(DTYPES, ((2, 8, 7, 7), (2, 4, 16, 9), (98, 64), (5, 2000), (12, 6, 21, 20))),
    card=st.sampled_from(list(CARDS)),
)
def test_as_exact_as_plain_pytorch(hard, card, emulated):
    emulated.replace(card=CARDS[card])
    x = hard.tensors()[0]
    if cuda.refuses(x, hard.num_groups) is None:
        check_as_exact_as_plain(cuda, hard)
