"""Whether what is timed is right: each layer on the device against the same layer in float64 on the CPU; the same run
twice, on two streams at once, and as a CUDA graph, bit for bit.
"""

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fbn_plugin import ops
from fbn_plugin.engine.benchmark.layers import first_line, layer_input
from fbn_plugin.engine.benchmark.timing import captured, side_stream
from fbn_plugin.engine.files.words import counted
from fbn_plugin.layers import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm

# Error of a result against float64, relative to its largest value: one rounding to the dtype of outputs, and sums in
# float32.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
TOLERANCE_OF_SUMS = 1e-4

# Outliers lie far beyond T = 5 deviations, and nothing near: no rounding changes what is filtered. Layers and whether
# they take a residual.
LAYERS: dict[str, tuple[Callable[[int], nn.Module], bool]] = {
    "FBN": (lambda channels: FilteredBatchNorm2d(channels, t_sigma=5.0), False),
    "FBN+ReLU": (lambda channels: FilteredBatchNormAct2d(channels, t_sigma=5.0), False),
    "FBN+add+ReLU": (lambda channels: FilteredBatchNormAct2d(channels, t_sigma=5.0), True),
    "FGN": (lambda channels: FilteredGroupNorm(8, channels, t_sigma=5.0), False),
}
# A few values a channel; rows of an even but not round length; on a GPU many values, too.
SHAPES = {
    "cpu": ((4, 16, 14, 14), (2, 32, 25, 38)),
    "cuda": ((4, 16, 14, 14), (2, 256, 25, 38), (16, 64, 56, 56)),
}
# In channels_last, 16 channels of it are more than an H100 holds on its chip.
LARGE = (2, 16, 400, 608)
FORMATS = (
    ("contiguous", "float32"),
    ("contiguous", "float16"),
    ("channels_last", "float32"),
    ("channels_last", "bfloat16"),
)


def _layer(name: str, x: Tensor) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, takes_residual = LAYERS[name]
    generator = torch.Generator().manual_seed(1)
    module = build(x.shape[1])
    with torch.no_grad():
        module.weight.copy_(torch.rand(x.shape[1], generator=generator) + 0.5)
        module.bias.copy_(torch.rand(x.shape[1], generator=generator) - 0.5)
    residual = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    residual = residual.contiguous(memory_format=_format(x)).requires_grad_()
    return module.to(x.device), (x, residual) if takes_residual else (x,)


def _format(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _passes(module: nn.Module, inputs: Sequence[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """All that a training step sees of a layer."""
    output = module(*inputs)
    gradients = torch.autograd.grad(output, [*inputs, *module.parameters()], grad)
    names = ["dx", "d_residual"][: len(inputs)] + [f"d_{name}" for name, _ in module.named_parameters()]
    return {"output": output.detach(), **dict(zip(names, gradients)), **dict(module.named_buffers())}


def _clear_gradient(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """dL/dy that is 0 where the activation's kink is near, whose side a rounding may change; float64, on the CPU."""
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
    if isinstance(module, FilteredBatchNormAct2d):
        plain = copy.deepcopy(module)
        plain.activation = "identity"
        with torch.no_grad():
            grad[plain(*inputs).abs() < 1e-2] = 0
    return grad


def check_accuracy(name: str, shape: Sequence[int], layout: str, dtype: str, device: str) -> dict:
    """A layer on the device against float64: forward, gradients, buffers.

    Returns:
        ``check``, ``shape``, ``layout``, ``dtype``, ``backend``, ``errors`` (each relative to its largest value) and
        ``passed``.
    """
    x = layer_input(shape, 5e-3, layout, dtype, device)
    module, inputs = _layer(name, x)
    wide = copy.deepcopy(module).cpu().double()
    wide_inputs = [each.detach().cpu().double().requires_grad_() for each in inputs]
    grad = _clear_gradient(wide, wide_inputs).to(x.dtype)
    expected = _passes(wide, wide_inputs, grad.double())
    found = _passes(module, inputs, grad.to(device).contiguous(memory_format=_format(x)))
    errors, passed = {}, True
    for key, value in expected.items():
        value = value.double()
        error = (found[key].detach().cpu().double() - value).abs().max() / value.abs().max().clamp_min(1e-30)
        errors[key] = error.item()
        limit = TOLERANCE[dtype] if key in ("output", "dx", "d_residual") else TOLERANCE_OF_SUMS
        passed = passed and errors[key] <= limit  # NaN is not
    return {
        "check": f"{name} against float64", "shape": list(shape), "layout": layout, "dtype": dtype,
        "backend": ops.explain(x), "errors": errors, "passed": passed,
    }  # fmt: skip


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def _case(name: str, shape: Sequence[int], layout: str, dtype: str, device: str) -> Callable[[], dict[str, Tensor]]:
    """A function that makes the same passes again at each call."""
    x = layer_input(shape, 5e-3, layout, dtype, device)
    module, inputs = _layer(name, x)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, x.dtype)
    grad = grad.contiguous(memory_format=_format(x))
    state = {key: value.clone() for key, value in module.state_dict().items()}

    def run() -> dict[str, Tensor]:
        module.load_state_dict(state)
        return {key: value.clone() for key, value in _passes(module, inputs, grad).items()}

    return run


def repeats(name: str, shape: Sequence[int], layout: str, dtype: str, device: str) -> bool:
    """Whether the same input gives the same bits each time."""
    run = _case(name, shape, layout, dtype, device)
    first = run()
    return all(_same(run(), first) for _ in range(5))


def two_at_once(name: str, shape: Sequence[int], layout: str, dtype: str, device: str) -> bool:
    """Whether two threads, on a GPU each on a stream of its own, get the bits that each gets alone."""
    runs = [_case(name, shape, layout, dtype, device) for _ in range(2)]
    alone, wrong = runs[0](), []
    if device == "cuda":
        torch.cuda.synchronize()

    def work(number: int, run: Callable[[], dict[str, Tensor]]) -> None:
        try:
            with torch.cuda.stream(side_stream(number)) if device == "cuda" else contextlib.nullcontext():
                found = [run() for _ in range(10)]
            if device == "cuda":
                torch.cuda.synchronize()
            if not all(_same(each, alone) for each in found):
                wrong.append("other bits")
        except Exception as error:
            wrong.append(first_line(error))

    threads = [threading.Thread(target=work, args=each, daemon=True) for each in enumerate(runs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong and wrong[0] != "other bits":
        raise RuntimeError(wrong[0])
    return not wrong


def graph_replays(name: str, shape: Sequence[int], layout: str, dtype: str, device: str) -> bool:
    """Whether a CUDA graph of the passes leaves the bits that eager passes leave."""
    run, found = _case(name, shape, layout, dtype, device), {}
    expected = run()
    replay = captured(lambda: found.update(run()))
    for value in found.values():
        value.zero_()
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    return _same(expected, found)


def _cases(device: str) -> list[tuple[str, Callable, tuple]]:
    """What is checked, by which function, and its arguments."""
    cases = [
        (f"{name} against float64", check_accuracy, (name, shape, *form))
        for shape in SHAPES[device]
        for form in FORMATS
        for name in LAYERS
    ]
    bits = {"the same bits each time": repeats, "two at once": two_at_once}
    if device == "cuda":
        bits["as a CUDA graph"] = graph_replays
        for form in FORMATS[2:]:
            cases.append(("FBN against float64", check_accuracy, ("FBN", LARGE, *form)))
    for what, function in bits.items():
        cases += [
            (f"{name}, {what}", function, (name, SHAPES[device][1], *form)) for form in FORMATS for name in LAYERS
        ]
    return cases


def check(device: str, until: float, notes: list[str]) -> list[dict]:
    """All checks for which there is time until ``time.perf_counter()`` is ``until``.

    One that ends in an exception has not passed, and has its first line as ``error``. ``notes`` gets a sentence for
    each that did not pass.
    """
    rows = []
    cases = _cases(device)
    for what, function, case in cases:
        if time.perf_counter() > until:
            notes.append(f"{len(cases) - len(rows)} of {counted(len(cases), 'check')} were left out: the time was over")
            break
        rows.append(_guarded(what, function, case, device))
    notes += [f"WRONG: {_words(row)}" for row in rows if not row["passed"]]
    return rows


def _words(row: dict) -> str:
    where = f"{row['check']}, {'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']}"
    errors = ", ".join(f"{key} {value:.1e}" for key, value in row.get("errors", {}).items())
    return f"{where}: {row.get('error') or errors or 'other bits'}"


def _guarded(what: str, function: Callable, case: tuple, device: str) -> dict:
    _, shape, layout, dtype = case
    row = {"check": what, "shape": list(shape), "layout": layout, "dtype": dtype, "passed": False}
    try:
        result = function(*case, device)
    except Exception as error:
        return row | {"error": first_line(error)}
    return row | (result if isinstance(result, dict) else {"passed": result})
