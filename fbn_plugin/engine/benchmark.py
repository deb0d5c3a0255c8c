"""Time filtered batch normalization against what it replaces: single layers, and training steps of whole models.

All peers of a row take turns, in a new random order each round, so that a busy machine, a cold cache or a falling clock
hits them alike; ratios are taken within a round. Horváth and Al-afandi, "Filtered Batch Normalization" (2020), report
148, 164 and 172 ms for one VGG-16 step without norm, with BN and with FBN.
"""

import copy
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fbn_plugin
from fbn_plugin import ops
from fbn_plugin.engine.run_info import cpu_name
from fbn_plugin.fuse import fuse_norm_act
from fbn_plugin.layers import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm
from fbn_plugin.registry import norm_factory, parse_spec

FORMAT = "fbn_plugin benchmark 1"
SHAPES = ((16, 64, 56, 56), (16, 256, 28, 28), (2, 256, 100, 152), (16, 512, 7, 7), (2, 2048, 25, 38))
QUICK_SHAPES = ((4, 64, 14, 14), (2, 128, 7, 7))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
OUTLIERS = (5e-5, 0.0)

# How often one pass streams a tensor of the input's size: BN reads x for the moments and again to normalize it, and
# writes y; backward it reads x and dL/dy for the sums and again for the result, which it writes. The filter reads x
# once more; where few tiles hold an outlier it need not, and BN's figure holds for FBN too.
SIZES_MOVED = {"forward": {"BN": 3, "FBN": 4}, "forward+backward": {"BN": 8, "FBN": 9}}

Call = Callable[[], object]


def naive_filtered_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float,
    t_sigma: float,
) -> Tensor:  # fmt: skip
    """Filtered batch normalization as one writes it down from the paper (Eq. 2-8), differentiated by autograd."""
    dims = (0, 2, 3)
    values = x.float()
    with torch.no_grad():
        var, mean = torch.var_mean(values, dims, correction=0, keepdim=True)
        kept = (values - mean).abs() <= t_sigma * torch.sqrt(var + eps)
        count = kept.sum(dims, keepdim=True)
    mean = (values * kept).sum(dims, keepdim=True) / count
    var = ((values - mean).square() * kept).sum(dims, keepdim=True) / count
    with torch.no_grad():
        running_mean.lerp_(mean.flatten(), momentum)
        running_var.lerp_((var * count / (count - 1)).flatten(), momentum)
    y = (values - mean) / torch.sqrt(var + eps) * weight[:, None, None] + bias[:, None, None]
    return y.to(x.dtype)


class NaiveFilteredBatchNorm2d(nn.BatchNorm2d):
    """:func:`naive_filtered_batch_norm` in training."""

    t_sigma = 5.0

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return naive_filtered_batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.momentum, self.eps, self.t_sigma
        )


def _relu_after(norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU(inplace=True))


@dataclass(frozen=True)
class Peer:
    """Something to time: ``build(channels)`` gives the module, ``to`` names the peer that its ratio is to."""

    name: str
    to: str
    build: Callable[[int], nn.Module]


def _groups(channels: int) -> int:
    return math.gcd(32, channels)


LAYER_PEERS = [
    Peer("BN", "BN", nn.BatchNorm2d),
    Peer("FBN T=2", "BN", lambda channels: FilteredBatchNorm2d(channels, t_sigma=2.0)),
    Peer("FBN T=5", "BN", lambda channels: FilteredBatchNorm2d(channels, t_sigma=5.0)),
    Peer("naive FBN", "BN", NaiveFilteredBatchNorm2d),
    Peer("BN, ReLU", "BN, ReLU", lambda channels: _relu_after(nn.BatchNorm2d(channels))),
    Peer("FBN, ReLU", "BN, ReLU", lambda channels: _relu_after(FilteredBatchNorm2d(channels))),
    Peer("FBN+ReLU fused", "BN, ReLU", FilteredBatchNormAct2d),
    Peer("GN", "BN", lambda channels: nn.GroupNorm(_groups(channels), channels)),
    Peer("FGN T=2", "GN", lambda channels: FilteredGroupNorm(_groups(channels), channels, t_sigma=2.0)),
    Peer("FGN T=5", "GN", lambda channels: FilteredGroupNorm(_groups(channels), channels, t_sigma=5.0)),
]
COMPILED = Peer("compiled naive FBN", "BN", lambda channels: torch.compile(NaiveFilteredBatchNorm2d(channels)))


def _make_naive(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = NaiveFilteredBatchNorm2d  # the same parameters and buffers, another forward
    return model


def _make_filtered(model: nn.Module) -> nn.Module:
    return fbn_plugin.convert_norm(model, "FBN(t_sigma=5.0)")


# Name -> what makes it out of the model with BN.
MODEL_PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "BN": lambda model: model,
    "FBN T=5": _make_filtered,
    "FBN T=5 fused": lambda model: fuse_norm_act(_make_filtered(model)),
    "naive FBN": _make_naive,
}


@dataclass(frozen=True)
class ModelRow:
    """A training step: ``(batch, height, width)`` on a CPU, on a GPU, and for a smoke run."""

    cpu: tuple[int, int, int]
    gpu: tuple[int, int, int]
    quick: tuple[int, int, int]


MODELS = {
    "vgg16": ModelRow(cpu=(4, 224, 224), gpu=(16, 224, 224), quick=(2, 64, 64)),
    "resnet50": ModelRow(cpu=(8, 224, 224), gpu=(64, 224, 224), quick=(2, 64, 64)),
    "mask_rcnn_R_50_FPN": ModelRow(cpu=(2, 256, 320), gpu=(2, 800, 1216), quick=(1, 96, 128)),
}


@dataclass(frozen=True)
class Settings:
    """What to measure and for how long.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: of PyTorch and the kernels on the CPU; None leaves them as they are.
        layers: whether to time single layers.
        norms: specs of further norms to time among the layers, such as ``"ConvNorm"``.
        models: names in ``MODELS``.
        shapes: ``(N, C, H, W)`` of the layers' inputs; None is ``SHAPES``, or ``QUICK_SHAPES``.
        layouts: names in ``LAYOUTS``; None is both for layers, and for models contiguous on a CPU, channels_last on a
            GPU.
        dtypes: names in ``DTYPES``; models run narrow ones under autocast. None is float32, and on a GPU bfloat16 too.
        seconds_per_row: None is 5 for a row of layers and 60 for a model; every peer runs at least 5 times.
        batch_size: of the models; None is each model's own.
        compiled: time the naive form under ``torch.compile`` as well.
        quick: small inputs and few rounds, to see that everything runs; the figures mean nothing.
    """

    device: str = "cpu"
    threads: int | None = None
    layers: bool = True
    norms: tuple[str, ...] = ()
    models: tuple[str, ...] = tuple(MODELS)
    shapes: tuple[tuple[int, int, int, int], ...] | None = None
    layouts: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    seconds_per_row: float | None = None
    batch_size: int | None = None
    compiled: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda: this PyTorch sees no GPU")
        for name, known in (("models", MODELS), ("layouts", LAYOUTS), ("dtypes", DTYPES)):
            unknown = [each for each in getattr(self, name) or () if each not in known]
            if unknown:
                raise ValueError(f"unknown {name} {unknown[0]!r}: accepted are {', '.join(known)}")
        for shape in self.shapes or ():
            if len(shape) != 4 or min(shape) < 1 or math.prod(shape) < 4 * shape[1]:
                raise ValueError(f"a shape is N x C x H x W with at least 4 values a channel, got {shape}")
        if self.seconds_per_row is not None and not 0 < self.seconds_per_row < math.inf:
            raise ValueError(f"seconds per row must be a number above 0, got {self.seconds_per_row}")
        for name in ("threads", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be 1 or more, got {value}")
        for spec in self.norms:
            parse_spec(spec)
        if not self.layers and not self.models:
            raise ValueError("nothing to measure: choose layers, models or both")

    @property
    def min_rounds(self) -> int:
        return 2 if self.quick else 5

    def seconds(self, default: float) -> float:
        return self.seconds_per_row or (0.2 if self.quick else default)


def interleave(
    calls: Mapping[str, Call], seconds: float, min_rounds: int, timer: Callable[[Call], float]
) -> dict[str, list[float]]:
    """Time the calls in turns until ``seconds`` are over: ``{name: [time of round 0, 1, ...]}``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    deadline, rounds = time.perf_counter() + seconds, 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        while rounds < min_rounds or time.perf_counter() < deadline:
            shuffler.shuffle(order)
            for name in order:
                times[name].append(timer(calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return times


def _quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3


def summarize(times: Mapping[str, Sequence[float]], to: Mapping[str, str]) -> dict[str, dict]:
    """Medians and quartiles of interleaved times, and of the ratio within each round to the peer that ``to`` names.

    Args:
        times: name -> seconds, one for each round.
        to: name -> name of the peer that is 1.

    Returns:
        name -> ``ms`` and ``ratio``, each ``[lower quartile, median, upper quartile]``, ``to`` and ``rounds``.
    """
    result = {}
    for name, baseline in to.items():
        ratios = [own / other for own, other in zip(times[name], times[baseline])]
        ms = [1e3 * value for value in _quartiles(times[name])]
        result[name] = {"ms": ms, "ratio": _quartiles(ratios), "to": baseline, "rounds": len(ratios)}
    return result


def wall_timer(device: str) -> Callable[[Call], float]:
    """Seconds until the call's work is done, with the time that Python takes to launch it."""

    def measure(call: Call) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return measure


def gpu_timer() -> Callable[[Call], float]:
    """Seconds that the GPU works on the call, from an empty cache.

    Overwriting a large buffer first empties the cache, and keeps the GPU busy while Python launches the call.
    """
    buffer = torch.empty(2**30, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(call: Call) -> float:
        buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


def memory_of(call: Call, device: str, exclude: Sequence[Tensor] = ()) -> dict[str, int]:
    """Memory that one forward and backward pass needs.

    Args:
        call: runs it.
        device: where.
        exclude: tensors that are there anyhow: parameters.

    Returns:
        ``saved_bytes``: distinct storages that autograd keeps for the backward pass, whichever device; ``peak_bytes``
        on a GPU only: the most that was allocated during the call, beyond what was allocated before.
    """
    own = {each.untyped_storage().data_ptr() for each in exclude}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    result = {"saved_bytes": sum(saved.values())}
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        result["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return result


def layer_input(shape: Sequence[int], outliers: float, layout: str, dtype: str, device: str) -> Tensor:
    """Activations of a layer: Gaussian, each channel with a mean and a deviation of its own.

    They are cut at 4.5 deviations, and a share ``outliers`` of them then set 20 deviations off: without any, T = 5
    filters nothing, while T = 2 always filters a Gaussian's 4.6 %.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator).clamp_(-4.5, 4.5)
    x = torch.where(torch.rand(*shape, generator=generator) < outliers, 20 * x.sign(), x)
    scale, shift = (torch.rand(shape[1], 1, 1, generator=generator) + 0.5 for _ in range(2))
    x = (x * scale + shift).to(device, DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()


def _layer_call(module: nn.Module, x: Tensor, grad: Tensor, which: str) -> Call:
    inputs = [x, *module.parameters()]

    def forward() -> None:
        module(x)

    def forward_backward() -> None:
        torch.autograd.grad(module(x), inputs, grad)

    return forward if which == "forward" else forward_backward


def _build_layers(settings: Settings, x: Tensor, notes: list[str]) -> dict[str, tuple[Peer, nn.Module]]:
    channels, built = x.shape[1], {}
    if settings.compiled:
        torch.compiler.reset()  # or it gives up after a few shapes
    others = [Peer(spec, "BN", norm_factory(spec)) for spec in settings.norms]
    for peer in [*LAYER_PEERS, *others, *([COMPILED] if settings.compiled else [])]:
        module = peer.build(channels).to(x.device)
        if "GN" in peer.name:
            module.to(x.dtype)  # group normalization has no mixed form on a GPU; batch norms keep float32, as autocast
        built[peer.name] = peer, module
    if settings.compiled:
        try:
            _layer_call(built[COMPILED.name][1], x, torch.ones_like(x), "forward+backward")()
        except Exception as error:  # the compiler's own types differ between releases of PyTorch
            del built[COMPILED.name]
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            note = f"{COMPILED.name} is left out: {reason}"
            if note not in notes:
                notes.append(note)
    return built


def measure_layers(settings: Settings, notes: list[str]) -> Iterator[dict]:
    """Time single layers in training; one result for each shape, layout, dtype, share of outliers and pass."""
    timer = gpu_timer() if settings.device == "cuda" else wall_timer("cpu")
    for shape in settings.shapes or (QUICK_SHAPES if settings.quick else SHAPES):
        for layout in settings.layouts or LAYOUTS:
            for dtype in _dtypes(settings):
                inputs = {share: layer_input(shape, share, layout, dtype, settings.device) for share in OUTLIERS}
                built = _build_layers(settings, inputs[OUTLIERS[0]], notes)
                for share, x in inputs.items():
                    for which in PASSES:
                        yield _layer_row(settings, timer, built, x, which) | {
                            "shape": list(shape), "layout": layout, "dtype": dtype, "outliers": share,
                        }  # fmt: skip


def _layer_row(
    settings: Settings, timer: Callable, built: Mapping[str, tuple[Peer, nn.Module]], x: Tensor, which: str
) -> dict:
    grad, source, target = torch.randn_like(x), x.detach(), torch.empty_like(x)
    calls = {name: _layer_call(module, x, grad, which) for name, (_, module) in built.items()}
    calls["copy"] = lambda: target.copy_(source)
    for call in calls.values():
        call()
        call()
    times = interleave(calls, settings.seconds(5), settings.min_rounds, timer)
    peers = summarize(times, {name: peer.to for name, (peer, _) in built.items()})
    if which == "forward+backward":
        for name, (_, module) in built.items():
            peers[name] |= memory_of(calls[name], settings.device, list(module.parameters()))
    copy_ms = 1e3 * statistics.median(times["copy"])
    size = x.numel() * x.element_size()
    return {
        "pass": which,
        "backend": ops.explain(x),
        "tensor_bytes": size,
        "copy_gb_per_s": 2 * size / copy_ms / 1e6,
        # A copy moves two sizes.
        "roofline_ms": {name: sizes / 2 * copy_ms for name, sizes in SIZES_MOVED[which].items()},
        "peers": peers,
    }


def _dtypes(settings: Settings) -> Sequence[str]:
    return settings.dtypes or (("float32",) if settings.device == "cpu" else ("float32", "bfloat16"))


def _build_model(name: str) -> nn.Module:
    from torchvision import models

    from fbn_plugin.frameworks.torchvision import mask_rcnn_fpn  # it also tells how the models can be fused

    if name == "mask_rcnn_R_50_FPN":
        return mask_rcnn_fpn("resnet50", norm="BN", num_classes=81)
    return models.vgg16_bn() if name == "vgg16" else models.resnet50()


def _training_data(name: str, size: tuple[int, int, int], device: str) -> tuple:
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator).to(device)
    if name != "mask_rcnn_R_50_FPN":
        return images, torch.arange(batch, device=device)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9], [0.2, 0.5, 0.4, 0.8]])
    boxes = boxes * torch.tensor([width, height, width, height])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist()):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes.to(device), "labels": torch.arange(1, 4, device=device), "masks": masks.to(device)}
    return list(images), [target] * batch


def _fix_work(model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Give a detector's heads the same regions at every step, whatever the norm; the images keep their size."""
    height, width = images[0].shape[1:]
    model.transform.min_size, model.transform.max_size = (min(height, width),), max(height, width)
    generator = torch.Generator().manual_seed(0)
    near = targets[0]["boxes"].cpu().repeat(10, 1)
    near = near + 0.1 * min(height, width) * (torch.rand(near.shape, generator=generator) - 0.5)
    corners = torch.rand(1000, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    regions = torch.cat([near, corners * torch.tensor([width, height, width, height])]).to(images[0].device)
    model.rpn.register_forward_hook(lambda rpn, inputs, output: ([regions] * len(images), output[1]))


def _training_step(model: nn.Module, images, targets, layout: str, dtype: str, device: str) -> Call:
    model.to(device, memory_format=LAYOUTS[layout]).train()
    detector = isinstance(images, list)
    if detector:
        _fix_work(model, images, targets)
    else:
        images = images.contiguous(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        torch.manual_seed(0)  # the detector samples its regions
        with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
            loss = sum(model(images, targets).values()) if detector else F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_models(settings: Settings) -> Iterator[dict]:
    """Time one training step (forward, loss, backward, SGD) of whole models; one result for each model, layout and
    dtype."""
    default = ("contiguous",) if settings.device == "cpu" else ("channels_last",)
    for name in settings.models:
        row = MODELS[name]
        size = row.quick if settings.quick else getattr(row, "cpu" if settings.device == "cpu" else "gpu")
        size = (settings.batch_size or size[0], *size[1:])
        data = _training_data(name, size, settings.device)
        for layout in settings.layouts or default:
            for dtype in _dtypes(settings):
                yield _model_row(settings, name, data, layout, dtype) | {
                    "model": name, "batch": size[0], "image": list(size[1:]), "layout": layout, "dtype": dtype,
                }  # fmt: skip


def _model_row(settings: Settings, name: str, data: tuple, layout: str, dtype: str) -> dict:
    torch.manual_seed(0)
    plain = _build_model(name)
    models = {peer: make(copy.deepcopy(plain)) for peer, make in MODEL_PEERS.items()}
    if name == "vgg16":
        from torchvision.models import vgg16

        models["no norm"] = vgg16()
    steps = {peer: _training_step(model, *data, layout, dtype, settings.device) for peer, model in models.items()}
    for step in steps.values():
        step()
        if not settings.quick:
            step()
    times = interleave(steps, settings.seconds(60), settings.min_rounds, wall_timer(settings.device))
    peers = summarize(times, dict.fromkeys(steps, "BN"))
    for peer, model in models.items():
        peers[peer] |= memory_of(steps[peer], settings.device, list(model.parameters()))
    return {"peers": peers}


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory, and say whether it does.

    Otherwise the pages of large tensors go back to the system when they are freed and are faulted in again when the
    next is made, at the expense of one peer or another as it happens.
    """
    trim_threshold, mmap_max, never = -1, -4, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(trim_threshold, never) and mallopt(mmap_max, 0))


def environment() -> dict:
    """Hardware, versions, and how busy the machine was."""
    import importlib.metadata

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fbn_plugin": fbn_plugin.__version__,
        "torch": torch.__version__,
        "backends": ops.backends(),
    }
    for package in ("torchvision", "triton"):
        facts[package] = version(package)
    if hasattr(os, "getloadavg"):
        facts["load_at_start"] = round(os.getloadavg()[0], 2)
    return facts


def run(settings: Settings, on_row: Callable[[dict, dict], None] | None = None) -> dict:
    """Measure all that ``settings`` ask for.

    Args:
        settings: what to measure.
        on_row: called after each row with all results so far and the new row.

    Returns:
        ``format``, ``environment``, ``settings``, ``layers`` and ``models`` (a row each, see `measure_layers` and
        `measure_models`; ``peers`` as in `summarize`, with the memory of `memory_of`), ``notes``. Plain JSON types.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        results = {
            "format": FORMAT,
            "environment": environment() | {"keeps_freed_memory": keep_freed_memory()},
            "settings": json.loads(json.dumps(asdict(settings))),
            "layers": [],
            "models": [],
            "notes": [],
        }
        measurements = {
            "layers": measure_layers(settings, results["notes"]) if settings.layers else (),
            "models": measure_models(settings),
        }
        for kind, rows in measurements.items():
            for row in rows:
                results[kind].append(row)
                if on_row is not None:
                    on_row(results, row)
    finally:
        torch.set_num_threads(threads)
    return results


def load(path: str | os.PathLike) -> dict:
    """Read results that were written as JSON.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not hold a benchmark's results.
    """
    path = os.fspath(path)
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON") from None
    keys = ("environment", "settings", "layers", "models", "notes")
    if not isinstance(results, dict) or results.get("format") != FORMAT or any(key not in results for key in keys):
        raise ValueError(f"{path} does not hold results of this benchmark ({FORMAT!r})")
    return results
