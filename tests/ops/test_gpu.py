"""The backends for GPUs on a real card: right at real sizes, as exact as plain PyTorch, the same bits each time, as a
CUDA graph, on many streams, in several threads and processes, on a card that is full.

What a kernel that waits for ever would hang runs in a process of its own, which is killed when its time is over; any
other test that does not end within ``PATIENCE`` ends all of them. ``python test_gpu.py cuda`` is that process.
"""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import HARD_KINDS, Hard, check_as_exact_as_plain, close
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

from fbn_plugin import FilteredBatchNorm2d, FilteredBatchNormAct2d, ops
from fbn_plugin.ops import cuda, dispatch, reference, triton
from fbn_plugin.ops.cuda import driver, plan
from fbn_plugin.ops.reference import FilteredMoments, Options

DEVICE = "cuda"
BACKENDS = {"cuda": cuda, "triton": triton}
PATIENCE = 60  # seconds

SHAPES = [(16, 64, 112, 112), (16, 512, 7, 7), (2, 256, 25, 38), (8, 128, 28, 28), (4, 6, 5, 7), (64, 128)]
ODD, SMALL, LARGE = (16, 512, 7, 7), (8, 32, 28, 28), (2, 16, 400, 608)  # the last is more than a card keeps


def _cases():
    """Shape, channels-last, dtype, groups (0: batch form), kind of gradient."""
    for shape in SHAPES:
        groups = 32 if shape[1] % 32 == 0 else 2
        for last in (False, True) if len(shape) == 4 else (False,):
            for form in ((0, "exact"), (0, "paper"), (groups, "exact")):
                for dtype in DTYPES:
                    yield shape, last, dtype, *form
    for last in (False, True):
        yield LARGE, last, torch.float32, 0, "exact"
    for groups in (1, 64):
        yield (4, 64, 56, 56), False, torch.float32, groups, "exact"


CASES = list(_cases())
# Triton takes a second for a kernel, so that its cases take turns with the dtypes.
OF_TRITON = [case for i, case in enumerate(CASES) if DTYPES.index(case[2]) == i // 3 % 3 or i >= len(CASES) - 4]
# Of both backends, besides: shape, channels-last, dtype, activation.
FUSED = [
    (SMALL, last, dtype, activation)
    for last, dtype in ((False, torch.float32), (True, torch.bfloat16))
    for activation in reference.ACTIVATIONS
] + [(ODD, False, torch.float32, "relu")]
HARD_FORMS = [((8, 32, 56, 56), False, 0), ((8, 32, 56, 56), True, 0), ((8, 32, 56, 56), False, 2), (ODD, False, 0)]
UNLOADED = (4, 6, 9, 9), torch.float16, False, 0, "silu"  # kernels that no other test needs


class HardOnDevice(Hard):
    """The same values on every device."""

    def tensors(self):
        return tuple(tensor.to(DEVICE) for tensor in super().tensors())


def _is_there() -> bool:
    return torch.cuda.is_available()


def _no_use(name: str) -> str | None:
    """Why a backend is not tested here."""
    if not _is_there():
        return "there is no GPU here"
    return BACKENDS[name].refuses(torch.zeros(2, 4, 8, 8, device=DEVICE))


@pytest.fixture(scope="session")
def compiled():
    """All kernels, side by side, before anything is tested: (name) -> None."""
    done = set()

    def compile_for(name):
        if name in done:
            return
        done.add(name)
        if name == "cuda":
            wanted = [(shape, dtype, last, groups, "identity") for shape, last, dtype, groups, _ in CASES]
            wanted += [(shape, dtype, last, 0, activation) for shape, last, dtype, activation in FUSED]
            wanted += [(shape, torch.float32, last, groups, "identity") for shape, last, groups in HARD_FORMS]
            cuda.precompile([*wanted, UNLOADED])
            return

        def warm(case):  # what goes wrong is for the tests to say
            shape, last, dtype, groups, mode = case
            with contextlib.suppress(Exception):
                results_of(triton, *inputs(shape, dtype, last, groups, device=DEVICE), groups, mode)

        with ThreadPoolExecutor(min(14, os.cpu_count())) as pool:
            list(pool.map(warm, OF_TRITON))
        torch.cuda.synchronize()

    return compile_for


def _ready(name, compiled, monkeypatch):
    if reason := _no_use(name):
        pytest.skip(f"{name}: {reason}")
    compiled(name)
    monkeypatch.setattr(dispatch, "BACKENDS", {name: BACKENDS[name]})  # for layers
    cuda.forget()  # streams of earlier tests
    return BACKENDS[name]


@pytest.fixture(autouse=True)
def patience():
    """A kernel that never ends ends the tests."""
    if _is_there():
        faulthandler.dump_traceback_later(2 * PATIENCE, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=BACKENDS)
def backend(request, compiled, monkeypatch):
    return _ready(request.param, compiled, monkeypatch)


@pytest.fixture
def of_cuda(compiled, monkeypatch):
    return _ready("cuda", compiled, monkeypatch)


# --- what needs no card -----------------------------------------------------------------------------------------------


def test_the_cases_reach_every_layout():
    """On an H100: all layouts, groups of one and of many blocks, data that is kept whole and in part."""
    card = driver.Card("sm_90", 132, 232448, 233472, 1024, 65536, 2048, 32)
    layouts, kinds = set(), set()
    for shape, last, dtype, groups, _ in CASES:
        n, c, *spatial = shape
        cut = plan.Shape(n, c, torch.Size(spatial).numel(), dtype, last, groups, 16)
        if plan.refuses(cut):
            continue
        for made in plan.make(cut, card, 4)[:3]:
            if made is not None:
                *_, steps, kept, _, _, _, _ = plan.CUT.unpack(made.packed)
                layouts.add(made.variant.layout)
                kinds.add((made.members > 1, "all" if kept == steps else "some" if kept else "none"))
    assert layouts == {plan.PLANES, plan.ROWS, plan.LINES, plan.BUNDLES}
    assert kinds >= {(False, "all"), (True, "all"), (True, "some")}, kinds


def test_all_dtypes_and_forms_are_among_triton_s_cases():
    for column in range(2, 5):
        assert {case[column] for case in OF_TRITON} == {case[column] for case in CASES}
    assert {(shape, last) for shape, last, *_ in OF_TRITON} == {(shape, last) for shape, last, *_ in CASES}


def test_a_process_that_does_not_end_is_killed():
    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="not ended"):
        _within(1, [sys.executable, "-c", "import time; time.sleep(30)"])
    assert time.monotonic() - start < 15
    with pytest.raises(pytest.fail.Exception, match="code 3"):
        _within(30, [sys.executable, "-c", "raise SystemExit(3)"])
    assert _within(30, [sys.executable, "-c", "print(1)"], [sys.executable, "-c", "print(2)"]) == ["1\n", "2\n"]


# --- right ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, case", [*(("cuda", c) for c in CASES), *(("triton", c) for c in OF_TRITON)], ids=str)
def test_agrees_with_the_reference(name, case, compiled, monkeypatch):
    backend = _ready(name, compiled, monkeypatch)
    shape, last, dtype, groups, mode = case
    x, grad, weight, bias = inputs(shape, dtype, last, groups, device=DEVICE)
    if reason := backend.refuses(x, groups):
        assert "fit into no block" in reason or "compute capability" in reason, reason
        pytest.skip(reason)
    check_agrees(backend, x, grad, weight, bias, groups, mode == "paper", mode)
    check_agrees(backend, x, grad, None, None, groups, False, mode)


@pytest.mark.parametrize("form", HARD_FORMS, ids=str)
@pytest.mark.parametrize("kind", HARD_KINDS, ids=lambda kind: kind.__name__)
def test_as_exact_as_plain_pytorch(backend, kind, form):
    shape, last, groups = form
    for apart, eps, mode in ((2.0, 1e-5, "exact"), (4.0, 0.0, "paper"), (6.0, 1e-5, "exact")):
        hard = HardOnDevice(kind, 0.1, apart, 1, 1.0, shape, torch.float32, last, 7, groups, 2.0, eps, mode)
        check_as_exact_as_plain(backend, hard)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_activation_and_residual(backend, case, add):
    shape, last, dtype, activation = case
    x, grad, weight, bias = inputs(shape, dtype, last, device=DEVICE)
    residual = inputs(shape, dtype, last, seed=4, device=DEVICE)[0] if add else None
    check_activation(backend, x, grad, weight, bias, residual, activation, "exact")


@pytest.mark.parametrize("momentum, counted", [(0.1, 7), (None, 3), (0.25, None)])
@pytest.mark.parametrize("shape, last", [(SMALL, False), (SMALL, True), (ODD, False)])
def test_running_statistics(backend, shape, last, momentum, counted):
    x, _, weight, bias = inputs(shape, torch.float32, last, device=DEVICE)
    check_running_statistics(backend, x, weight, bias, momentum, counted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape, last", [(SMALL, False), (SMALL, True), (ODD, False)])
def test_non_finite_input(backend, shape, last, bad):
    x, grad, *_ = inputs(shape, torch.float32, last, device=DEVICE)
    check_non_finite(backend, x, grad, bad)


@pytest.mark.parametrize("last", [False, True])
def test_the_steps_of_synchronized_batch_norm(backend, last):
    check_steps(backend, *inputs(SMALL, torch.float32, last, device=DEVICE), "exact")


def test_views_at_odd_addresses_and_expanded_gradients(backend):
    x, _, weight, bias = inputs(SMALL, torch.float32, False, device=DEVICE)
    check_odd_address(backend, x, weight, bias)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_dtype(backend, kind):
    x, grad, weight, bias = inputs(SMALL, torch.float32, False, device=DEVICE)
    check_agrees(backend, x, grad, weight.to(kind), bias.to(kind), 0, False, "exact")


@pytest.mark.parametrize("add", [False, True])
def test_fused_layer(backend, add):
    """From the layer through autograd, in training: against the same in float64, which is the reference."""
    x, grad, weight, bias = inputs(SMALL, torch.float32, True, device=DEVICE)
    residual = inputs(SMALL, torch.float32, True, seed=4, device=DEVICE)[0] if add else None
    results = []
    for cast in (torch.Tensor.float, torch.Tensor.double):
        layer = FilteredBatchNormAct2d(SMALL[1], t_sigma=2.0, activation="silu", device=DEVICE, dtype=cast(x).dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        leaves = [cast(t).requires_grad_() for t in (x, residual) if t is not None]
        y = layer(*leaves)
        gradients = torch.autograd.grad(y, [*leaves, *layer.parameters()], cast(grad))
        results.append((y.detach(), *gradients, layer.running_mean, layer.running_var))
        assert layer.num_batches_tracked == 1
    for number, (ours, truth) in enumerate(zip(*results)):
        close(ours, truth, 1e-4, f"result {number}")


@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_values(backend, last):
    if torch.cuda.mem_get_info()[0] < 28 << 30:
        pytest.skip("needs 28 GiB of free GPU memory")
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(33, 64, 1024, 1024, dtype=torch.bfloat16, device=DEVICE, memory_format=layout).normal_()
    x[-1, -1, -1, -1] = 100.0
    assert x.numel() > 2**31
    grad = torch.empty_like(x).normal_()
    options = Options(0, 6.0, 1e-5, False, "exact")
    y, moments = backend.forward(x, None, None, None, None, options)
    dx, d_weight, d_bias, _ = backend.backward(grad, x, None, None, None, moments, options)
    for channel in (0, 63):  # the last lies beyond 2^31 in either layout
        x_, grad_ = (t[:, channel : channel + 1].double().contiguous() for t in (x, grad))
        y_ref, ref = reference.forward(x_, None, None, None, None, options)
        dx_ref, d_weight_ref, d_bias_ref, _ = reference.backward(grad_, x_, None, None, None, ref, options)
        ours = FilteredMoments(*moments[:, channel : channel + 1])
        assert torch.equal(ours.count, FilteredMoments(*ref).count.float())  # 2^24 and more are rounded
        for each, truth in ((y, y_ref), (dx, dx_ref)):
            torch.testing.assert_close(each[:, channel : channel + 1].float(), truth.float(), rtol=1e-2, atol=1e-2)
        scale = grad_.abs().sum()  # they are nearly 0, of many terms
        assert (d_weight[channel] - d_weight_ref[0]).abs() < 1e-5 * scale
        assert (d_bias[channel] - d_bias_ref[0]).abs() < 1e-5 * scale


# --- the same, whatever else runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("last", [False, True])
def test_results_repeat_bit_for_bit(backend, groups, last):
    """Alone, and while another stream keeps the card busy."""
    arguments = inputs((16, 64, 56, 56), torch.bfloat16, last, groups, device=DEVICE)
    if reason := backend.refuses(arguments[0], groups):
        pytest.skip(reason)
    first = results_of(backend, *arguments, groups)
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    torch.cuda.synchronize()
    for crowded in (False, True, True):
        if crowded:
            with torch.cuda.stream(other):
                for _ in range(20):
                    busy @ busy
        assert same_bits(first, results_of(backend, *arguments, groups))


@pytest.mark.parametrize("shape, last", [((16, 64, 56, 56), False), ((16, 64, 56, 56), True), (ODD, False)])
@pytest.mark.parametrize("warm", [True, False])
def test_cuda_graph(backend, warm, shape, last):
    """Captured once, replayed with other values; without a warm-up the plans are made while it is captured."""
    layer = FilteredBatchNormAct2d(shape[1], t_sigma=2.0, momentum=None, device=DEVICE)
    x, grad, *_ = inputs(shape, torch.float32, last, device=DEVICE)
    static = x.clone(memory_format=torch.preserve_format).requires_grad_()
    if warm or backend is triton:  # whose kernels are loaded by the first launch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                torch.autograd.grad(layer(static), static, grad)
        torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(static)
        (dx,) = torch.autograd.grad(y, static, grad)
    layer.reset_running_stats()
    for number in range(1, 4):
        with torch.no_grad():
            static.copy_(x.flip(0) * number + number)
        graph.replay()
        assert layer.num_batches_tracked == number
        fresh = static.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        eager = FilteredBatchNormAct2d(shape[1], t_sigma=2.0, momentum=None, device=DEVICE)
        expected = eager(fresh)
        assert torch.equal(y, expected) and torch.equal(dx, torch.autograd.grad(expected, fresh, grad)[0])
        if number == 1:
            assert torch.equal(layer.running_mean, eager.running_mean)


def test_several_streams_and_threads_at_once(backend):
    assert _within(PATIENCE, _command(backend)) == ["as alone\n"]


def test_two_processes_at_once(of_cuda):
    assert _within(PATIENCE, *[_command(of_cuda)] * 2) == ["as alone\n"] * 2


def _command(backend):
    return [sys.executable, __file__, "cuda" if backend is cuda else "triton"]


def _within(seconds, *commands):
    """What processes print that run at the same time; the test fails if one fails, and when time is up all of them are
    killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    end = time.monotonic() + seconds
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for command in commands]
    printed = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=max(0.1, end - time.monotonic()))
            if process.returncode:
                pytest.fail(f"a process ended with code {process.returncode}: {error[-2000:]}")
            printed.append(out)
    except subprocess.TimeoutExpired:
        pytest.fail(f"a process has not ended in {seconds} s: blocks that wait for each other for ever?")
    finally:
        for process in processes:
            process.kill()
    return printed


def _all_at_once(backend) -> None:
    """Eight streams, first from one thread, then from eight: each gets the bits that it gets alone. The groups have so
    many members that those of a few launches fill the card."""
    cases = [
        (*inputs((2, 8, 400, 608), torch.float32, False, device=DEVICE), 0),
        (*inputs((4, 32, 200, 304), torch.bfloat16, True, device=DEVICE), 0),
        (*inputs((1, 8, 400, 608), torch.float32, False, 2, device=DEVICE), 2),
    ]
    # On the default stream, too. The gate is a stream on which nothing of ours runs.
    streams, gate = [torch.cuda.default_stream(), *(torch.cuda.Stream() for _ in range(7))], torch.cuda.Stream()
    for stream in streams:  # from here on plans reckon with all of them
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for case in cases:
                results_of(backend, *case)
    torch.cuda.synchronize()
    if backend is cuda:
        for x, *_, groups in cases:
            launch = cuda._find(x, groups).forward
            assert launch.grid >= 4 * (launch.counters - 2), "groups of at least four members"
    expected = [results_of(backend, *case) for case in cases]
    torch.cuda.synchronize()

    busy = torch.randn(8192, 8192, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(gate):
        for _ in range(8):
            busy @ busy
        opened = gate.record_event()
    got = []
    for stream in streams:
        stream.wait_event(opened)
    for number in range(12):  # queued behind the gate
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                which = (number + i) % len(cases)
                got.append((which, results_of(backend, *cases[which])))
    torch.cuda.synchronize()
    assert all(same_bits(results, expected[which]) for which, results in got), "one thread"
    del got

    wrong, barrier = [], threading.Barrier(len(streams))

    def work(number, stream):
        try:
            with torch.cuda.stream(stream):
                barrier.wait()
                for _ in range(8):
                    order = [(number + i) % len(cases) for i in range(len(cases))]
                    results = [results_of(backend, *cases[which]) for which in order]
                    stream.synchronize()
                    if not all(same_bits(each, expected[which]) for each, which in zip(results, order)):
                        wrong.append(f"other bits on stream {number}")
        except Exception as error:
            wrong.append(f"stream {number}: {error!r}")

    threads = [threading.Thread(target=work, args=each) for each in enumerate(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    if backend is triton:
        assert all(counters.count_nonzero() == 0 for counters in triton._default_counters.values())
    else:
        assert all(counters.count_nonzero() == 0 for _, counters in cuda._workspaces.values())


# --- what is said and counted -----------------------------------------------------------------------------------------


def test_explain(backend):
    x = torch.randn(SMALL, device=DEVICE)
    name = "cuda" if backend is cuda else "triton"
    assert ops.explain(x).startswith(f"{name}: ") and ops.explain(x, 2).startswith(f"{name}: ")
    assert ops.explain(x.double()) == "reference: torch.float64 is not float32, float16 or bfloat16"
    assert ops.explain(x[:, ::2]) == "reference: the tensor is neither contiguous nor channels-last"


@pytest.mark.parametrize("last", [False, True])
def test_launches(backend, last):
    """Of a layer's training step: those of the kernels, and nothing else."""
    layer = FilteredBatchNorm2d(SMALL[1], t_sigma=2.0, device=DEVICE)
    x, grad, *_ = inputs(SMALL, torch.float32, last, device=DEVICE)
    x.requires_grad_()
    grad = torch.empty_like(x).copy_(grad)

    def step():
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [event for event in profile.events() if event.device_type == on_device]
    launched = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    if not launched:
        pytest.skip("PyTorch's profiler sees no kernels here")
    if backend is cuda:
        assert launched == ["forward", "backward"]
    else:
        names = ["measure", "measure_kept", "normalize", "measure_gradient", "input_gradient"]
        assert launched == names


def test_a_full_card_is_a_reason_and_no_exception(of_cuda):
    shape, dtype, last, groups, activation = UNLOADED
    x, grad, weight, bias = inputs(shape, dtype, last, device=DEVICE)
    filled = []
    try:
        for size in (1 << 30, 1 << 26, 12 << 20, 1 << 20):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    filled.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        told = of_cuda.refuses(x, groups, activation)
    finally:
        filled.clear()
        torch.cuda.empty_cache()
    # The driver may have had a little room of its own.
    assert told in (None, f"the card cuda:{x.device.index} is full: no room for the kernels")
    assert of_cuda.refuses(x, groups, activation) is None, "there is room again"
    check_activation(of_cuda, x, grad, weight, bias, None, activation, "exact")


if __name__ == "__main__":
    _all_at_once(BACKENDS[sys.argv[1]])
    print("as alone")
