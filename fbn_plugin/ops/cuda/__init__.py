"""The CUDA kernels (``kernels.cu``) on PyTorch tensors: float32, float16 and bfloat16, contiguous and channels-last,
batch and group form, with an optional residual and activation; one launch forward and one backward.

They are compiled when the first tensor asks for them (``compiler.py``), cut for its shape by ``plan.py`` and launched
by ``driver.py``, whose packages are imported then; or, if ``host.py`` has been told to build it, by ``host.cpp``, which
is given the plans that are made here. Nothing here waits for the GPU or looks at a value, so that CUDA
graphs can capture it. Where the packages or the card do not allow it, :func:`refuses` says why and the next backend is
taken.
"""

import ctypes
import struct
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fbn_plugin.ops import reference
from fbn_plugin.ops.cuda import compiler, driver, plan
from fbn_plugin.ops.reference import Options, RunningStats, gaussian_kappa

_ACTIVATIONS = {"identity": 0, "relu": 1, "leaky_relu": 1, "silu": 2}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
_MOST_PLANS = 4096  # are kept; detection brings new shapes at every step


class _Arguments:
    """A kernel's structure of arguments in memory, and what the driver wants: the address of its address."""

    def __init__(self, head: struct.Struct) -> None:
        self.pack_into, self.size = head.pack_into, head.size
        self.memory = bytearray(head.size + plan.CUT.size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._parameters = (ctypes.c_void_p * 1)(address)
        self.parameters = ctypes.addressof(self._parameters)


class _ThreadsOwn(threading.local):
    """The driver reads arguments while another Python thread may run: each thread has its own."""

    def __init__(self) -> None:
        self.forward, self.backward = _Arguments(plan.FORWARD), _Arguments(plan.BACKWARD)
        self.finish = _Arguments(plan.FINISH)


_own = _ThreadsOwn()


class _Launch:
    """A kernel with its cut, on one device."""

    __slots__ = "counters", "dynamic", "floats", "grid", "kernel", "packed", "threads"

    def __init__(self, kernel: driver.Kernel, cut: plan.Cut) -> None:
        self.kernel, self.grid, self.threads = kernel, cut.grid, cut.variant.threads
        self.dynamic, self.packed = cut.dynamic_shared, cut.packed
        self.floats, self.counters = cut.partial_floats, 2 + cut.groups

    def __call__(self, arguments: _Arguments, stream: int) -> None:
        arguments.memory[arguments.size :] = self.packed
        driver.launch(self.kernel, self.grid, self.threads, self.dynamic, arguments.parameters, stream)

    def parts(self) -> tuple:
        """As ``host.cpp`` takes it."""
        return self.kernel.handle, self.grid, self.threads, self.dynamic, self.packed, self.floats, self.counters


class _Planned:
    """What a shape needs, ready to be launched."""

    __slots__ = "backward", "device", "finish", "forward", "result", "shape", "stats", "sum_samples"

    def __init__(self, device: int, shape: plan.Shape, made: plan.Plan) -> None:
        self.forward, self.backward, self.result = (
            None if cut is None else _Launch(_kernels[device, cut.variant][0], cut) for cut in made[:3]
        )
        self.device, self.shape, self.sum_samples = device, shape, made.sum_samples
        self.stats = (shape.samples, shape.num_groups) if shape.num_groups else (shape.channels,)
        self.finish = None if made.backward is None else _kernels[device, made.backward.variant][1]


_NAMES = {plan.PLANES: "", plan.ROWS: "", plan.LINES: "_lines", plan.BUNDLES: "_bundles"}


def _load(device: int, variant: plan.Variant) -> str | None:
    """Put a variant's kernels into ``_kernels``, or tell why not."""
    defines = variant.defines()
    if reason := driver.reason(device, defines):
        return reason
    loaded = driver.load(device, defines)
    kernel = loaded[("forward", "backward")[variant.backward] + _NAMES[variant.layout]]
    card = driver.card(device)
    room = plan.room_for(card, variant)
    places = card.resident(kernel, variant.threads, room.shared)
    if places < room.places:
        return f"the card holds {places} blocks of a kernel, {room.places} are reckoned with"
    _kernels[device, variant] = kernel, loaded.get("finish_backward")
    return None


_kernels: dict[tuple[int, plan.Variant], tuple[driver.Kernel, driver.Kernel | None]] = {}
_planned: dict[tuple, _Planned | str] = {}
_lock = threading.Lock()
_workspaces: dict[int, tuple[Tensor, Tensor]] = {}
_streams: dict[int, set[int]] = {}
_launches: dict[int, int] = {}

# What launches from C++, once it is looked for: "table", None where it cannot be; with one "normalize", what eager.py
# calls; without, "reason".
hosted: dict[str, Any] = {}


def describe() -> str:
    """What the backend is and which language launches its kernels, or why it cannot be used here."""
    if driver.reason(0) is not None:
        return driver.describe()
    by = "C++" if _host() is not None else f"Python ({hosted['reason']})"
    return f"{driver.describe()}; launched by {by}"


def forget() -> None:
    """Give up all plans and workspaces; they are made anew where they are needed."""
    with _lock:
        for kept in (_planned, _kernels, _workspaces, _streams, _launches):
            kept.clear()
        if (table := hosted.get("table")) is not None:
            table.forget(True)


def _channels_last(x: Tensor) -> bool | None:
    """True for channels-last, False for contiguous, None for anything else."""
    if x.is_contiguous():
        return False
    memory_format = _FORMATS.get(x.dim())
    last = x.movedim(1, -1).is_contiguous() if memory_format is None else x.is_contiguous(memory_format=memory_format)
    return True if last else None


def _find(x: Tensor, num_groups: int, activation: int = 0, phases: int = plan.ALL, way: str = "both") -> _Planned | str:
    """The plan for a tensor, or why there is none; the steps of a synchronized norm go one ``way`` at a time."""
    channels_last = _channels_last(x)
    if channels_last is None:
        return "the tensor is neither contiguous nor channels-last"
    device = x.device.index or 0
    aligned = x.data_ptr() & 15
    key = (
        x.shape,
        x.dtype,
        device,
        channels_last,
        num_groups,
        aligned,
        activation,
        phases,
        way,
        _launches.get(device, 4),
    )
    found = _planned.get(key)
    if found is None:
        found = _make(x, *key[2:])
        if len(_planned) >= _MOST_PLANS:
            _planned.clear()
            if (table := hosted.get("table")) is not None:
                table.forget(False)
        if not _is_full(found):
            _planned[key] = found
    return found


def _is_full(found: _Planned | str) -> bool:
    """Whether it is but the card that is full, which may have room the next time."""
    return isinstance(found, str) and "is full" in found


def _make(
    x: Tensor,
    device: int,
    channels_last: bool,
    num_groups: int,
    aligned: int,
    activation: int,
    phases: int,
    way: str,
    launches: int,
) -> _Planned | str:
    if x.numel() == 0:
        return "the tensor is empty"
    if num_groups and activation:
        return "an activation after the group form is not in the kernels"
    positions, alignment = x.shape[2:].numel(), aligned & -aligned or 16
    shape = plan.Shape(x.shape[0], x.shape[1], positions, x.dtype, channels_last, num_groups, alignment)
    if reason := plan.refuses(shape) or driver.reason(device, None):
        return reason
    made = plan.make(shape, driver.card(device), launches, activation, phases)
    if way == "forward":
        made = made._replace(backward=None, result=None)
    elif way == "backward":
        made = made._replace(forward=None)
    missing = [cut.variant for cut in made[:3] if cut is not None and (device, cut.variant) not in _kernels]
    if missing:
        driver.prepare(device, [variant.defines() for variant in missing])
        for variant in missing:
            if reason := _load(device, variant):
                return reason
    return _Planned(device, shape, made)


def _stream(x: Tensor) -> int:
    """The stream of a launch for ``x``, whose plan is to be found afterwards: a new stream makes groups smaller."""
    device = x.device.index or 0
    stream = driver.current_stream(device)
    if stream and stream not in _streams.get(device, ()):
        _note(device, stream)
    return stream


def refuses(x: Tensor, num_groups: int = 0, activation: str = "identity") -> str | None:
    """Why these kernels do not take ``x``; None if they do."""
    if x.device.type != driver.DEVICE_TYPE:
        return f"the tensor is on {x.device.type}"
    if x.dtype not in plan.DTYPES:
        return f"{x.dtype} is not float32, float16 or bfloat16"
    found = _find(x, num_groups, _ACTIVATIONS[activation])
    return found if isinstance(found, str) else None


def precompile(inputs: Iterable[tuple], device: int | None = None) -> int:
    """Compile the kernels that inputs will need, all at once and before the first of them comes.

    Args:
        inputs: for each ``(shape, dtype, channels_last, num_groups, activation)``; what follows is ignored.
        device: index of the card; None is the current one.

    Returns:
        How many variants of the kernels that are.

    Raises:
        RuntimeError: the kernels cannot be used here, and why.
    """
    device = torch.cuda.current_device() if device is None else device
    if reason := driver.reason(device, None):
        raise RuntimeError(reason)
    variants: dict[tuple[str, ...], None] = {}
    for size, dtype, channels_last, num_groups, activation, *_ in inputs:
        positions = torch.Size(size[2:]).numel()
        shape = plan.Shape(size[0], size[1], positions, dtype, channels_last, num_groups, 16)
        if plan.refuses(shape) is None:
            made = plan.make(shape, driver.card(device), _launches.get(device, 4), _ACTIVATIONS[activation])
            variants.update((cut.variant.defines(), None) for cut in made[:3] if cut is not None)
    driver.prepare(device, list(variants))
    return len(variants)


def _workspace(device: int, stream: int, launch: _Launch) -> tuple[Tensor | None, Tensor | None]:
    """Partial sums and counters, which belong to one launch at a time, as those of the default stream are.

    On other streams each launch has its own, which costs filling the counters: there CUDA graphs are captured, or
    warmed up with a memory pool that nothing may be kept of.
    """
    if not launch.floats:
        return None, None
    if stream:
        return _new(device, launch.floats), _new(device, launch.counters, torch.int32)
    found = _workspaces.get(device)
    if found is None or found[0].numel() < launch.floats or found[1].numel() < launch.counters:
        with _lock:
            found = _new(device, 2 * launch.floats), _new(device, 2 * launch.counters, torch.int32)
            _workspaces[device] = found
            if (table := hosted.get("table")) is not None:
                table.workspace(device, *found)
    return found


def _new(device: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    make = torch.zeros if dtype is torch.int32 else torch.empty  # counters start at zero
    return make(size, dtype=dtype, device=torch.device(driver.DEVICE_TYPE, device))


def _note(device: int, stream: int) -> None:
    """Reckon with another stream, beside the default one, whose launches may run at the same time."""
    with _lock:
        streams = _streams.setdefault(device, set())
        streams.add(stream)
        grown = len(streams) + 1 > _launches.get(device, 4)
        if grown:
            _launches[device] = 2 * _launches.get(device, 4)
        if (table := hosted.get("table")) is not None:
            table.stream(device, stream, grown)
    if grown and driver.DEVICE_TYPE == "cuda":
        with driver.on(device):
            if not driver.capturing(device):
                torch.cuda.synchronize(device)  # until the larger groups are done


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _parameter(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A tensor that the kernels read, its address and its type."""
    if tensor is None:
        return None, 0, 0
    kind = plan.PARAMETER_TYPES.get(tensor.dtype)
    if kind is None or not tensor.is_contiguous():
        tensor = tensor.float().contiguous()
        kind = 0
    return tensor, tensor.data_ptr(), kind


def _like(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the layout and dtype of ``x``, at an address that is as good."""
    if other.stride() == x.stride() and other.dtype == x.dtype and not other.data_ptr() & 15:
        return other
    return torch.empty_like(x).copy_(other)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: RunningStats | None,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.forward`, for what :func:`refuses` does not refuse."""
    num_groups, t_sigma, eps, correction, _, activation, slope = options
    stream = _stream(x)
    planned = _find(x, num_groups, _ACTIVATIONS[activation])
    if isinstance(planned, str):  # since it was asked, the card has become full
        raise RuntimeError(planned)
    y = torch.empty_like(x)
    moments = x.new_empty((5, *planned.stats), dtype=torch.float32)
    kappa = gaussian_kappa(t_sigma) if correction else 1.0
    slope = slope if activation == "leaky_relu" else 0.0
    _forward(planned, stream, x, y, weight, bias, residual, running, moments, t_sigma, eps, kappa, slope)
    if not hosted:
        _host()  # takes the next call
    return y, moments


def _forward(planned, stream, x, y, weight, bias, residual, running, moments, t_sigma, eps, kappa, slope) -> None:
    weight, weight_at, weight_type = _parameter(weight)
    bias, bias_at, bias_type = _parameter(bias)
    if residual is not None:
        residual = _like(x, residual)
    mean_at = var_at = count_at = 0
    momentum = 0.0
    if running is not None:
        running_mean, running_var, momentum, num_batches = running
        mean_at, var_at = running_mean.data_ptr(), running_var.data_ptr()
        torch.autograd.graph.increment_version((running_mean, running_var))
        if num_batches is None:
            momentum = 0.0 if momentum is None else momentum
        elif momentum is None:
            num_batches.add_(1)  # before the launch, which reads it
            count_at, momentum = num_batches.data_ptr(), -1.0
        else:
            count_at = num_batches.data_ptr()
            torch.autograd.graph.increment_version(num_batches)
    device, launch = planned.device, planned.forward
    with driver.on(device):
        partial, counters = _workspace(device, stream, launch)
        arguments = _own.forward
        arguments.pack_into(
            arguments.memory,
            0,
            x.data_ptr(),
            _address(residual),
            _address(y),
            weight_at,
            bias_at,
            mean_at,
            var_at,
            count_at,
            moments.data_ptr(),
            _address(partial),
            _address(counters),
            t_sigma,
            eps,
            kappa,
            momentum,
            slope,
            weight_type,
            bias_type,
        )
        launch(arguments, stream)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    other: Tensor | None,
    moments: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As :func:`fbn_plugin.ops.reference.backward`, for what :func:`refuses` does not refuse."""
    num_groups, t_sigma, eps, correction, grad_mode, activation, slope = options
    stream = _stream(x)
    planned = _find(x, num_groups, _ACTIVATIONS[activation])
    if isinstance(planned, str):  # since it was asked, the card has become full
        raise RuntimeError(planned)
    shape = planned.shape
    dx, dz = torch.empty_like(x), None
    if other is not None:
        other, dz = _like(x, other), torch.empty_like(x)
    gradients = x.new_empty((2, shape.channels), dtype=torch.float32)
    samples = planned.sum_samples
    sums = x.new_empty((2, samples, shape.channels), dtype=torch.float32) if samples else gradients
    kappa = gaussian_kappa(t_sigma) if correction else 1.0
    slope = slope if activation == "leaky_relu" else 0.0
    is_output = activation in reference.SIGN_TELLS
    coefficients = x.new_empty((2, *planned.stats), dtype=torch.float32) if planned.result is not None else None
    common = grad_mode == "paper", is_output, eps, kappa, slope
    arguments = _like(x, grad), x, other, dx, dz, weight, bias, moments, coefficients, sums
    _backward(planned, planned.backward, stream, *arguments, *common)
    if samples:
        _finish(planned, stream, sums, weight, moments, coefficients, gradients, kappa)
    if planned.result is not None:
        _backward(planned, planned.result, stream, *arguments, *common)
    return dx, gradients[1], gradients[0], dz


def _backward(
    planned,
    launch,
    stream,
    grad,
    x,
    other,
    dx,
    dz,
    weight,
    bias,
    moments,
    coefficients,
    sums,
    paper,
    is_output,
    eps,
    kappa,
    slope,
) -> None:
    weight, weight_at, weight_type = _parameter(weight)
    bias, bias_at, bias_type = _parameter(bias)
    device = planned.device
    with driver.on(device):
        partial, counters = _workspace(device, stream, launch)
        arguments = _own.backward
        arguments.pack_into(
            arguments.memory,
            0,
            grad.data_ptr(),
            x.data_ptr(),
            _address(other),
            _address(dx),
            _address(dz),
            weight_at,
            bias_at,
            moments.data_ptr(),
            _address(coefficients),
            _address(sums),
            _address(partial),
            _address(counters),
            eps,
            kappa,
            slope,
            weight_type,
            bias_type,
            paper,
            is_output,
        )
        launch(arguments, stream)


def _finish(planned: _Planned, stream: int, sums, weight, moments, coefficients, gradients, kappa) -> None:
    weight, weight_at, weight_type = _parameter(weight)
    shape, kernel = planned.shape, planned.finish
    threads = planned.backward.threads
    sets = shape.sets if coefficients is not None else 0
    with driver.on(planned.device):
        arguments = _own.finish
        arguments.pack_into(
            arguments.memory,
            0,
            sums.data_ptr(),
            weight_at,
            moments.data_ptr(),
            _address(coefficients),
            gradients.data_ptr(),
            kappa,
            weight_type,
            planned.sum_samples,
            shape.channels,
            shape.set_channels,
            shape.sets,
        )
        grid = -(-(2 * shape.channels + sets) // threads)
        driver.launch(kernel, grid, threads, 0, arguments.parameters, stream)


# --- the same from C++ ------------------------------------------------------------------------------------------------


def _host():
    """The ``Table`` of ``host.cpp``, what it launches by; None where there is none, and why in ``hosted``."""
    with _lock:
        if not hosted:
            from fbn_plugin.ops.cuda import host  # here, as it is a command, too

            try:
                table = host.load().Table(driver.DEVICE_TYPE, driver.addresses(), driver.current_stream)
            except compiler.Unavailable as reason:
                hosted.update(table=None, reason=str(reason))
            else:
                for device, kept in _workspaces.items():
                    table.workspace(device, *kept)
                for device, streams in _streams.items():
                    for stream in streams:
                        table.stream(device, stream, False)
                hosted.update(table=table, normalize=table.normalize)
        return hosted["table"]


def hand_over(x: Tensor, options: Options) -> bool:
    """Give the table what it lacks to take a call with a tensor like ``x``; whether it will."""
    num_groups, t_sigma, _, correction, _, activation, _ = options
    stream, activation = _stream(x), _ACTIVATIONS[activation]
    planned = _find(x, num_groups, activation)
    if isinstance(planned, str):
        return False
    table, device, shape = hosted["table"], planned.device, planned.shape
    launches = planned.forward, planned.backward, planned.result
    if not stream:  # on others, what is made may be part of a graph
        for launch in launches:
            if launch is not None:
                _workspace(device, stream, launch)
    finish = None
    if planned.finish is not None:
        finish = planned.finish.handle, 0, planned.backward.threads, 0, b"", 0, 0
    given = [None if launch is None else launch.parts() for launch in launches]
    table.context(device, driver.context(device))
    if correction:
        table.kappa(t_sigma, gaussian_kappa(t_sigma))
    sizes = planned.sum_samples, shape.set_channels, shape.sets
    table.add(x, num_groups, activation, *given, finish, *sizes)
    return True


# --- the single steps of a batch that is spread over processes --------------------------------------------------------


def measure(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.measure`, for what :func:`refuses` does not refuse."""
    moments = _step(x, plan.FIRST, x.new_empty((5, x.shape[1]), dtype=torch.float32))
    return moments[0], moments[1], moments[0]


def measure_kept(x: Tensor, lower: Tensor, upper: Tensor, measured: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.measure_kept`, for what :func:`measure` has measured."""
    edges = torch.stack((measured, measured, lower, upper, measured)).float()
    moments = _step(x, plan.FILTERED, edges)
    return moments[0], moments[1], moments[4]


def _step(x: Tensor, phase: int, moments: Tensor) -> Tensor:
    stream = _stream(x)
    planned = _find(x, 0, phases=phase, way="forward")
    _forward(planned, stream, x, None, None, None, None, None, moments, 1.0, 0.0, 1.0, 0.0)
    return moments


def normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, moments: Tensor, num_groups: int, eps: float
) -> Tensor:
    """As :func:`fbn_plugin.ops.reference.normalize`, for what :func:`refuses` does not refuse."""
    stream, y = _stream(x), torch.empty_like(x)
    planned = _find(x, num_groups, phases=plan.APPLY, way="forward")
    _forward(planned, stream, x, y, weight, bias, None, None, moments, 1.0, eps, 1.0, 0.0)
    return y


def gradient_sums(grad: Tensor, x: Tensor, moments: Tensor, eps: float, grad_mode: str) -> tuple[Tensor, Tensor]:
    """As :func:`fbn_plugin.ops.reference.gradient_sums`, for what :func:`refuses` does not refuse."""
    stream = _stream(x)
    planned = _find(x, 0, phases=plan.FIRST, way="backward")
    sums = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    common = grad_mode == "paper", False, eps, 1.0, 0.0
    arguments = _like(x, grad), x, None, None, None, None, None, moments, None, sums
    _backward(planned, planned.backward, stream, *arguments, *common)
    return sums[1], sums[0]


def input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    moments: Tensor,
    eps: float,
    grad_mode: str,
    mean_g: Tensor,
    mean_g_xhat: Tensor,
) -> Tensor:
    """As :func:`fbn_plugin.ops.reference.input_gradient`, for what :func:`refuses` does not refuse."""
    stream, dx = _stream(x), torch.empty_like(x)
    planned = _find(x, 0, phases=plan.APPLY, way="backward")
    coefficients = torch.stack((mean_g, mean_g_xhat)).float()
    common = grad_mode == "paper", False, eps, 1.0, 0.0
    arguments = _like(x, grad), x, None, dx, None, weight, None, moments, coefficients, None
    _backward(planned, planned.backward, stream, *arguments, *common)
    return dx


def update_running_stats(running: RunningStats, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """As :func:`fbn_plugin.ops.reference.update_running_stats`, which does it: a few numbers a channel."""
    reference.update_running_stats(running, mean, var, count)
