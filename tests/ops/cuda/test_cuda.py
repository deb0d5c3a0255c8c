"""The CUDA kernels against the float64 reference, run on the CPU (``cuda_on_cpu.h``): every layout, dtype, form,
gradient and activation, groups of one and of many blocks, data kept on the chip whole, in part and not at all, random
schedules."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import check_as_exact_as_plain, close, hard_inputs, run
from suite import (
    DTYPES,
    check_activation,
    check_agrees,
    check_non_finite,
    check_odd_address,
    check_running_statistics,
    check_steps,
    inputs,
    results_of,
    same_bits,
)

from fbn_plugin import ops
from fbn_plugin.ops import cuda, reference
from fbn_plugin.ops.cuda import plan
from fbn_plugin.ops.cuda.driver import Card
from fbn_plugin.ops.reference import Options

# Multiprocessors that small tensors fill, so that sets are spread over blocks; with room for all of what is kept, for
# some, and for nothing.
ROOMY = Card("sm_90", 16, 60000, 160000, 256, 65536, 2048, 32)
TIGHT = Card("sm_90", 16, 40000, 40000, 256, 65536, 2048, 32)
BARE = Card("sm_90", 16, 16000, 16000, 256, 65536, 2048, 32)
FEW = Card("sm_90", 2, 60000, 160000, 256, 65536, 2048, 32)
LARGE = Card("sm_90", 2, 200000, 220000, 1024, 65536, 2048, 32)
CARDS = {"roomy": ROOMY, "tight": TIGHT, "bare": BARE, "few": FEW}

PLANES = [(2, 3, 63, 65), (2, 4, 40, 64), (2, 6, 1, 300)]
BUNDLES = [(3, 8, 7, 7), (2, 16, 5, 5, 3), (9, 8, 13, 11)]
ROWS = [(3, 16, 40, 41), (2, 20, 9, 9), (600, 20), (5, 6, 3, 3)]


def cuts(x, num_groups=0, activation=0):
    """(kernel, members, steps, kept) of the plan's launches."""
    planned = cuda._find(x, num_groups, activation)
    assert not isinstance(planned, str), planned
    found = []
    for launch in (planned.forward, planned.backward):
        *_, members, steps, kept, _, _, _, _ = plan.CUT.unpack(launch.packed)
        found.append((launch.kernel.name, members, steps, kept))
    return found


CASES = [
    *((shape, False, groups) for shape in PLANES for groups in (0, 1, shape[1])),
    *((shape, False, 0) for shape in BUNDLES),
    *((shape, len(shape) == 4, groups) for shape in ROWS[:2] + ROWS[3:] for groups in (0, 2, shape[1])),
    ((1, 2, 131, 137), False, 0),
    ((1, 1, 200, 200), False, 0),
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
        check_agrees(cuda, x, grad, weight, bias if number % 3 else None, num_groups, mode == "paper", mode)
        check_agrees(cuda, x, grad, None, None, num_groups, False, "exact")
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


@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize(
    "shape, last, dtype", [((2, 8, 104, 128), False, torch.float32), ((2, 40, 50, 60), True, torch.bfloat16)]
)
def test_copies_ahead_of_their_use(shape, last, dtype, mode, emulated):
    """Threads with several times as many vectors as they keep: what they have used makes room for what comes."""
    emulated.replace(card=LARGE, seed=mode == "paper")
    x, grad, weight, bias = inputs(shape, dtype, last)
    for _, members, steps, kept in cuts(x):
        assert members == 1 and steps > kept >= 6
    check_agrees(cuda, x, grad, weight, bias, 0, mode == "paper", mode)
    residual = torch.empty_like(x).copy_(torch.randn(shape, generator=torch.Generator().manual_seed(5)))
    check_activation(cuda, x, grad, weight, bias, residual if mode == "paper" else None, "silu", mode)


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
        check_activation(cuda, x, grad, weight, bias, residual if add else None, activation, mode)


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
    for momentum, counted in ((0.1, 7), (None, 3), (0.25, None)):
        check_running_statistics(cuda, x, weight, bias, momentum, counted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "shape, channels_last", [((2, 4, 40, 64), False), ((2, 20, 9, 9), True), ((3, 8, 7, 7), False)]
)
def test_non_finite_input_is_loud_in_its_channel_and_absent_elsewhere(shape, channels_last, bad, emulated):
    emulated.replace(card=TIGHT)
    x, grad, *_ = inputs(shape, torch.float16, channels_last)
    check_non_finite(cuda, x, grad, bad)


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
    for seed, places in ((0, None), (0, 16), (1, None), (2, 17), (3, 40)):
        emulated.seed, emulated.places = seed, places
        results = results_of(cuda, x, grad, weight, bias)
        first = first or results
        assert same_bits(first, results)
    assert all(not counters.any() for _, counters in cuda._workspaces.values()), "counters are left at zero"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype(kind, emulated):
    emulated.replace(card=ROOMY)
    x, grad, weight, bias = inputs((3, 8, 7, 7), torch.float32, False)
    check_agrees(cuda, x, grad, weight.to(kind), bias.to(kind), 0, False, "exact")


def test_views_at_odd_addresses_and_expanded_gradients(emulated):
    emulated.replace(card=ROOMY)
    x, _, weight, bias = inputs((2, 4, 40, 64), torch.float32, False)
    check_odd_address(cuda, x, weight, bias)


def test_the_steps_of_synchronized_batch_norm(emulated):
    """On the whole batch they give what one launch gives."""
    emulated.replace(card=ROOMY)
    for channels_last, mode in ((False, "exact"), (True, "paper")):
        x, grad, weight, bias = inputs((3, 16, 20, 21), torch.float32, channels_last)
        check_steps(cuda, x, grad, weight, bias, mode)


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
    y = ops.filtered_batch_norm(x, mean, var, weight, None, training=True, t_sigma=2.0)
    y.square().mean().backward()
    assert mean.ne(0).all() and weight.grad.abs().sum() > 0 and x.grad.shape == x.shape
    ops.filtered_group_norm(x, 2, t_sigma=2.0).sum().backward()
    ops.filtered_batch_norm_act(x, weight=weight, training=True, activation="relu", residual=x).sum().backward()
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
    emulated = emulated.replace(card=Card("sm_90", 4, 60000, 160000, 256, 65536, 2048, 32))
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
    places = 4 * 4  # of blocks of 64 threads
    assert members[0] == 4 and members[-1] == 1
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
