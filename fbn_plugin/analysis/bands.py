"""How far from zero a trained network's normalized activations go: the bands of each layer, the share beyond some
deviations, and the images that pass them in one kernel. Source: Horváth and Al-afandi, "Filtered Batch Normalization"
(2020), section II-B with figures 1 to 3, and figures S1 to S6.

A layer that has a norm is measured inside of it, before scale and shift. The paper shows layers without one too, such
as the dense layers behind VGG-16-BN, and does not say how those were normalized: here each unit is, by its own mean and
deviation over the images, which are measured in a first pass.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fbn_plugin.adapters import load_adapters
from fbn_plugin.analysis.layer_names import LayerName, check_unit, find_layer, nearest_names, parse_layer_name
from fbn_plugin.analysis.normalized_values import channel_dim, moments_taken, normalized
from fbn_plugin.analysis.quantiles import QuantileSketch
from fbn_plugin.layers.description import describe
from fbn_plugin.surgery.norm_summary import has_running_stats, norm_spec
from fbn_plugin.training.evaluation_modes import device_of, evaluation_mode
from fbn_plugin.training.population_statistics import forward_batch

__all__ = [
    "SHARES",
    "SIGMAS",
    "ActivationBands",
    "KernelActivations",
    "LayerBands",
    "batch_probability",
    "measure_bands",
]

SHARES = (50, 75, 98)  # percent of the activations that lie within a band
SIGMAS = (3.0, 5.0, 7.0, 10.0, 15.0)
SET = "mean and deviation of each unit over the images"

Forward = Callable[[nn.Module, Any], Any]
Watch = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class LayerBands:
    """What was measured of a layer, in standard deviations from the mean.

    Attributes:
        name: in ``named_modules()``; ``shared`` are the other names that the same module has.
        kind: the spec of a norm, else the name of its class.
        normalized_by: which mean and deviation.
        units: channels, or units of a dense layer.
        calls: how often a forward pass calls it, all calls together being one layer here.
        count: finite values.
        minimum, maximum, median: of these; None where there is none.
        bands: percent of the values -> the two ends between which these lie, as many left out below as above.
        beyond: k -> share of the values that are further than k deviations from zero, 0 to 1.
        furthest_unit: where the value furthest from zero is.
        nan, infinite: values that are not finite.
        note: what else there is to say.
    """

    name: str
    kind: str
    normalized_by: str
    units: int = 0
    calls: int = 0
    count: int = 0
    minimum: float | None = None
    maximum: float | None = None
    median: float | None = None
    bands: dict[int, tuple[float, float]] = field(default_factory=dict)
    beyond: dict[float, float] = field(default_factory=dict)
    furthest_unit: int | None = None
    nan: int = 0
    infinite: int = 0
    shared: tuple[str, ...] = ()
    note: str = ""


@dataclass
class KernelActivations:
    """One kernel's activations over all images.

    Attributes:
        layer, unit: which kernel.
        sketch: of its activations.
        peaks: the activation furthest from zero in each image, (N,); NaN where an image has none, and None where it
            cannot be told which values are of which image.
        note: why not.
    """

    layer: str
    unit: int
    sketch: QuantileSketch
    peaks: Tensor | None
    note: str = ""

    def density(self) -> tuple[Tensor, Tensor]:
        """Edges (bins + 1) from the least to the largest activation, and the share of the activations per unit of the
        axis between them (bins), as a density has it; both empty where there is no finite activation. There are 200
        bins, of few activations as many as the Rice rule says, twice the cube root of their number."""
        least, most = self.sketch.minimum.item(), self.sketch.maximum.item()
        count = self.sketch.count.item()
        if not count:
            return torch.zeros(0), torch.zeros(0)
        bins = min(200, math.ceil(2 * count ** (1 / 3)))
        if least == most:
            least, most = least - 0.5, most + 0.5
        edges = torch.linspace(least, most, bins + 1, dtype=torch.float64)
        edges[0], edges[-1] = least, most
        counts = self.sketch.histogram(edges)[0].double()
        return edges, counts / counts.sum() / edges.diff()

    def passing(self, sigma: float) -> list[int]:
        """Numbers of the images with an activation beyond ``sigma`` deviations, the furthest first."""
        if self.peaks is None:
            return []
        size = self.peaks.abs().nan_to_num(0.0)
        order = torch.argsort(size, descending=True, stable=True)
        return order[size[order] > sigma].tolist()


@dataclass
class ActivationBands:
    """What :func:`measure_bands` found.

    Attributes:
        layers: in the order in which the network calls them.
        kernels: those that were asked for.
        images: how many were measured.
        unreached: names of layers that no value came to.
    """

    layers: list[LayerBands]
    kernels: list[KernelActivations]
    images: int
    unreached: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Layers, numbers of images and what was not reached, as JSON takes it; kernels have a form of their own."""
        return {
            "images": self.images,
            "unreached": self.unreached,
            "layers": [
                {
                    **asdict(layer),
                    "bands": {str(share): list(ends) for share, ends in layer.bands.items()},
                    "beyond": {f"{sigma:g}": share for sigma, share in layer.beyond.items()},
                    "shared": list(layer.shared),
                }
                for layer in self.layers
            ],
        }


def batch_probability(passing: int, images: int, batch_size: int = 16) -> float:
    """Probability that a batch, drawn without an image twice, holds one of ``passing`` of ``images`` images.

    The paper prints 0.0163 for 51 of 50,000 images in a batch of 16, which is 16 times the share; exactly it is 0.0162.

    Examples::

        >>> round(batch_probability(51, 50000), 5)
        0.0162
    """
    if batch_size > images - passing:
        return float(passing > 0)
    return -math.expm1(sum(math.log1p(-passing / (images - drawn)) for drawn in range(batch_size)))


def measure_bands(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layers: Sequence[str] = (),
    sigmas: Sequence[float] = SIGMAS,
    kernels: Sequence[str | LayerName] = (),
    forward: Forward | None = None,
    watch: Watch | None = None,
) -> ActivationBands:
    """Measure the normalized activations of a network's layers in evaluation.

    Layers are its norms, and those convolutions and dense layers whose output goes into no norm directly. Norms are
    looked into, see :func:`~fbn_plugin.analysis.normalized_values.normalized`; the output of all else is normalized by
    mean and deviation of each unit over the images, for which the loader is passed over twice. The memory that this
    takes does not grow with the number of images, but for one number for each image and kernel.

    Args:
        model: is put into evaluation mode for the while. No parameter and no statistic changes.
        loader: batches: images, or a tuple or list whose first entry is that, or whatever ``forward`` takes. It must
            give the same in each of the two passes.
        layers: only those whose name is or matches one of these, such as ``"layer4.*"``; all without.
        sigmas: deviations beyond which values are counted.
        kernels: one unit of a layer each, ``"layer4.1.bn2[453]"``, whose density is to be known, and which images pass.
        forward: ``forward(model, batch)`` where a batch is not what the model is called with.
        watch: called with what is passed over and what for, gives the same, such as under a progress bar.

    Raises:
        ValueError: a layer or unit that is not there, an iterator in the place of a loader, or no images.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
        >>> found = fbn_plugin.measure_bands(model, [torch.randn(2, 3, 8, 8) for _ in range(5)])
        >>> [(layer.name, layer.normalized_by) for layer in found.layers]
        [('1', 'running statistics'), ('3', 'mean and deviation of each unit over the images')]
    """
    if isinstance(loader, Iterator):
        raise ValueError("the images are passed over twice: give a loader, not an iterator")
    if wrong := [sigma for sigma in sigmas if not 0 < sigma < math.inf]:
        raise ValueError(f"sigmas must be above 0 and finite, got {wrong[0]!r}")
    kernels = [parse_layer_name(each) if isinstance(each, str) else each for each in kernels]
    if wrong := [str(each) for each in kernels if each.unit is None or each.side]:
        raise ValueError(f"kernels must be units of layers, such as 'layer4.1.bn2[453]', got {wrong[0]!r}")
    load_adapters()
    forward = forward or functools.partial(forward_batch, device=device_of(model))
    watch = watch or (lambda batches, what: batches)
    meter = _Meter(model, _chosen(model, layers, kernels), sigmas, kernels)
    with evaluation_mode(model), torch.no_grad():
        if meter.has_plain:
            with meter.looking(meter.add_moments):
                meter.run(watch(loader, "means and deviations"), forward)
        with meter.looking(meter.add_values):
            meter.run(watch(loader, "activations"), forward)
    if not meter.images:
        raise ValueError("there is no image to measure: the loader is empty")
    return meter.result()


def _chosen(model: nn.Module, patterns: Sequence[str], kernels: Sequence[LayerName]) -> dict[nn.Module, list[str]]:
    """The layers to look at, with all of their names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    inside = {inner for norm in names if _is_norm(norm) for inner in norm.modules() if inner is not norm}
    candidates = {module: found for module, found in names.items() if _is_layer(module) and module not in inside}
    for pattern in patterns:
        if not any(_matches(found, [pattern]) for found in candidates.values()):
            known = [name for found in candidates.values() for name in found]
            raise ValueError(
                f"no norm, convolution or dense layer is called {pattern!r}{nearest_names(pattern, known)}"
            )
    wanted = [(find_layer(model, kernel.name), kernel) for kernel in kernels]
    for module, kernel in wanted:
        if module not in candidates:
            kind = type(module).__name__
            raise ValueError(f"layer {kernel.name!r} is a {kind}, and must be a norm, a convolution or a dense layer")
        check_unit(kernel, module)
    return {
        module: found
        for module, found in candidates.items()
        if not patterns or _matches(found, patterns) or any(module is each for each, _ in wanted)
    }


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a norm, or a convolution or dense layer without one inside of it."""
    has_norms = any(_is_norm(inner) for inner in module.modules() if inner is not module)
    return _is_norm(module) if not isinstance(module, _ConvNd | nn.Linear) else not has_norms


def _is_norm(module: nn.Module) -> bool:
    description = describe(module)
    is_known = description is not None and (description.family is not None or isinstance(module, nn.RMSNorm))
    return is_known or has_running_stats(module)


class _Moments:
    """Mean and deviation of each unit over all that it was shown, by Chan, Golub and LeVeque's update."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, rows: Tensor) -> None:
        """Values (units, n)."""
        var, mean = torch.var_mean(rows, dim=1, correction=0)
        count, mean = rows.shape[1], mean.double()
        together = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + var.double() * count + shift.square() * (self.count * count / together)
        self.mean = self.mean + shift * (count / together)
        self.count = together

    def normalize(self, values: Tensor, dim: int) -> Tensor:
        """Values in deviations from the mean of their unit; those of a unit that is constant are 0."""
        var, shape = self.squares / self.count, [-1 if at == dim else 1 for at in range(values.dim())]
        # What a constant's variance is by rounding is none.
        scale = torch.where(var > (1e-6 * self.mean).square(), var.rsqrt(), 0.0)
        return (values - self.mean.to(values).view(shape)) * scale.to(values).view(shape)


class _Record:
    """What is counted of one layer."""

    def __init__(self, sigmas: Sequence[float], device: torch.device):
        self.sketch = QuantileSketch(device=device)
        self.beyond = dict.fromkeys(sigmas, 0)
        self.calls, self.furthest = 0, torch.zeros(0)

    def add(self, z: Tensor, dim: int) -> None:
        self.calls += 1
        self.sketch.update(z)
        size = z.abs()
        furthest = _by_unit(size, dim).amax(1)
        if not furthest.isfinite().all():
            size = size.masked_fill_(~z.isfinite(), 0)
            furthest = _by_unit(size, dim).amax(1)
        most = furthest.amax().item()
        for sigma in self.beyond:
            if most > sigma:
                self.beyond[sigma] += int((size > sigma).sum())
        self.furthest = furthest if not len(self.furthest) else torch.maximum(self.furthest, furthest)


class _Kernel:
    """What is kept of one unit."""

    def __init__(self, of: LayerName):
        self.of, self.sketch = of, QuantileSketch()
        self.peaks: list[Tensor] = []  # of each batch
        self.note = ""

    def begin(self, images: int) -> None:
        self.peaks.append(torch.full((images,), torch.nan))

    def add(self, z: Tensor, dim: int, layer: str) -> None:
        if self.of.unit >= z.shape[dim]:
            raise ValueError(f"layer {layer!r} has units 0 to {z.shape[dim] - 1}, got {self.of.unit}")
        values, mine = z.select(dim, self.of.unit), self.peaks[-1]
        self.sketch.update(values.cpu())
        if len(mine) == 1:
            rows = values.reshape(1, -1)
        elif dim > 0 and len(z) == len(mine):
            rows = values.reshape(len(mine), -1)
        else:
            self.note = f"it works on {len(z) if dim else 1} rows where a batch has {len(mine)} images"
            return
        rows = rows.cpu().float()
        found = rows.gather(1, rows.abs().nan_to_num(-1.0, posinf=-1.0).argmax(1, keepdim=True))[:, 0]
        self.peaks[-1] = torch.where(mine.abs() >= found.abs(), mine, found)

    def result(self) -> KernelActivations:
        peaks = None if self.note else torch.cat(self.peaks) if self.peaks else torch.zeros(0)
        return KernelActivations(self.of.name, self.of.unit, self.sketch, peaks, self.note)


def _by_unit(values: Tensor, dim: int) -> Tensor:
    return values.movedim(dim, 0).flatten(1) if values.dim() > 1 else values[:, None]


class _Meter:
    """Looks into the layers of a model as it runs."""

    def __init__(
        self,
        model: nn.Module,
        chosen: dict[nn.Module, list[str]],
        sigmas: Sequence[float],
        kernels: Sequence[LayerName],
    ):
        self.model, self.chosen, self.sigmas = model, chosen, sigmas
        with evaluation_mode(model):
            self.norms = {module: taken for module in chosen if (taken := moments_taken(module))}
        self.kernels: dict[nn.Module, list[_Kernel]] = {}
        for kernel in kernels:
            self.kernels.setdefault(find_layer(model, kernel.name), []).append(_Kernel(kernel))
        self.moments: dict[nn.Module, _Moments] = {}
        self.records: dict[nn.Module, _Record] = {}
        self.covered: set[nn.Module] = set()  # whose every output goes into a norm
        self.calls: Counter[nn.Module] = Counter()
        self.calls_into_norms: Counter[nn.Module] = Counter()
        self.given: dict[int, tuple[weakref.ref, nn.Module]] = {}
        self.order: dict[nn.Module, None] = {}
        self.inside: nn.Module | None = None  # the layer that is about to call the activation that it holds
        self.batches = self.images = 0

    @property
    def has_plain(self) -> bool:
        """Whether there are layers without a norm."""
        return len(self.norms) < len(self.chosen)

    @contextlib.contextmanager
    def looking(self, add: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
        """Let ``add`` see what comes to norms and what others give, for the length of a block."""
        with contextlib.ExitStack() as undo:
            for module in self.chosen:
                if module in self.norms:
                    hook = functools.partial(self._before_norm, add)
                    undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                elif callable(activation := getattr(module, "activation", None)):
                    self._look_before(activation, add, module, undo)
                else:
                    undo.callback(module.register_forward_hook(functools.partial(self._after_layer, add)).remove)
            yield

    def run(self, batches: Iterable[Any], forward: Forward) -> None:
        self.batches = self.images = 0
        for kernel in self._all_kernels():
            kernel.peaks.clear()
        for batch in batches:
            images = _num_images(batch)
            for kernel in self._all_kernels():
                kernel.begin(images)
            forward(self.model, batch)
            self.given.clear()
            self.covered |= {
                module
                for module, calls in self.calls.items()
                if calls == self.calls_into_norms[module] and module not in self.kernels
            }
            self.images += images
            self.batches += 1

    def _all_kernels(self) -> Iterator[_Kernel]:
        return (kernel for kernels in self.kernels.values() for kernel in kernels)

    def _before_norm(self, add: Callable, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        known = self.given.get(id(x))
        if known is not None and known[0]() is x:
            self.calls_into_norms[known[1]] += 1
        if x.numel():
            self.order.setdefault(module)
            add(module, x)

    def _after_layer(self, add: Callable, module: nn.Module, args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel() and module not in self.covered:
            self.given[id(output)] = weakref.ref(output), module
            self.calls[module] += 1
            self.order.setdefault(module)
            add(module, output)

    def _look_before(self, activation: Callable, add: Callable, module: nn.Module, undo: contextlib.ExitStack) -> None:
        """Look at what a layer gives to the activation that it holds and calls itself, as detectron2's convolution."""

        def enter(module: nn.Module, args: tuple) -> None:
            self.inside = module

        def before(_: nn.Module, args: tuple) -> None:
            if self.inside is module:  # others may share the activation
                self.inside = None
                self._after_layer(add, module, (), args[0])

        def look_and_call(x: Tensor) -> Any:
            self._after_layer(add, module, (), x)
            return activation(x)

        if isinstance(activation, nn.Module):
            undo.callback(module.register_forward_pre_hook(enter).remove)
            undo.callback(activation.register_forward_pre_hook(before).remove)
        else:
            module.activation = look_and_call
            undo.callback(setattr, module, "activation", activation)

    def add_moments(self, module: nn.Module, x: Tensor) -> None:
        """Of the first pass."""
        if module not in self.norms:
            self.moments.setdefault(module, _Moments()).add(_by_unit(x.float(), channel_dim(module, x)))

    def add_values(self, module: nn.Module, x: Tensor) -> None:
        """Of the second pass."""
        dim = channel_dim(module, x)
        z = normalized(module, x) if module in self.norms else self.moments[module].normalize(x.float(), dim)
        if module not in self.records:
            self.records[module] = _Record(self.sigmas, z.device)
        self.records[module].add(z, dim)
        for kernel in self.kernels.get(module, ()):
            kernel.add(z, dim, self.chosen[module][0])

    def result(self) -> ActivationBands:
        reached = [module for module in self.order if module in self.records and module not in self.covered]
        unreached = [names[0] for module, names in self.chosen.items() if module not in self.order]
        kernels = [kernel.result() for kernel in self._all_kernels()]
        return ActivationBands([self._layer(module) for module in reached], kernels, self.images, unreached)

    def _layer(self, module: nn.Module) -> LayerBands:
        record, (name, *shared) = self.records[module], self.chosen[module]
        sketch, count = record.sketch, record.sketch.count.item()
        ends = [(50 - share / 2) / 100 for share in SHARES]
        levels = [0.0, 0.5, 1.0, *ends, *(1 - end for end in ends)]
        found = sketch.quantile(levels)[0].tolist() if count else [None] * len(levels)
        return LayerBands(
            name=name,
            kind=norm_spec(module) if _is_norm(module) else type(module).__name__,
            normalized_by=self.norms.get(module, SET),
            units=len(record.furthest),
            calls=round(record.calls / self.batches),
            count=count,
            minimum=found[0],
            median=found[1],
            maximum=found[2],
            bands={share: (found[3 + at], found[6 + at]) for at, share in enumerate(SHARES)} if count else {},
            beyond={sigma: beyond / count for sigma, beyond in record.beyond.items()} if count else {},
            furthest_unit=int(record.furthest.argmax()) if count else None,
            nan=sketch.nan.item(),
            infinite=sketch.infinite.item(),
            shared=tuple(shared),
            note=self._note(module),
        )

    def _note(self, module: nn.Module) -> str:
        if module in self.norms or not _is_norm(module):
            return ""
        return "a norm of which it is not known by what it normalizes: its output is measured"


def _num_images(batch: Any) -> int:
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor | tuple | list):
        batch = batch[0]
    if isinstance(batch, dict):
        batch = next(iter(batch.values()))
    return len(batch)
