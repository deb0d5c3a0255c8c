"""What to measure: the names that the command line accepts, the sizes of inputs, and :class:`Settings`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fbn_plugin.engine.run.rules import check_norms

SHAPES = ((16, 64, 56, 56), (16, 256, 28, 28), (2, 256, 100, 152), (16, 512, 7, 7), (2, 2048, 25, 38))
QUICK_SHAPES = ((4, 64, 14, 14), (2, 128, 7, 7))
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
OUTLIERS = (5e-5, 0.0)

# Seconds of timing for a row: by itself, and where all the rows of the targets share a few minutes.
SECONDS = {"layers": (5.0, 0.8), "models": (60.0, 4.0), "host": (5.0, 1.5), "compiled": (60.0, 4.0)}


@dataclass(frozen=True)
class ModelRow:
    """A training step: ``(batch, height, width)`` on a CPU, on a GPU, and for a smoke run."""

    cpu: tuple[int, int, int]
    gpu: tuple[int, int, int]
    quick: tuple[int, int, int]

    def size(self, device: str, quick: bool) -> tuple[int, int, int]:
        return self.quick if quick else self.cpu if device == "cpu" else self.gpu


MODELS = {
    "vgg16": ModelRow(cpu=(4, 224, 224), gpu=(16, 224, 224), quick=(2, 64, 64)),
    "resnet50": ModelRow(cpu=(8, 224, 224), gpu=(64, 224, 224), quick=(2, 64, 64)),
    "mask_rcnn_R_50_FPN": ModelRow(cpu=(2, 256, 320), gpu=(2, 800, 1216), quick=(1, 96, 128)),
    "mask_rcnn_X_101_32x8d_FPN": ModelRow(cpu=(2, 256, 320), gpu=(2, 800, 1216), quick=(1, 64, 96)),
}
DEFAULT_MODELS = ("vgg16", "resnet50", "mask_rcnn_R_50_FPN")


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
        seconds_per_row: None is what ``SECONDS`` says; every peer runs at least 5 times.
        batch_size: of the models; None is each model's own.
        compiled: time the naive form under ``torch.compile`` as well.
        quick: small inputs and few rounds, to see that everything runs; the figures mean nothing.
        targets: measure the rows of :mod:`.rows` that the targets of a GPU ask for; what says which layers and models
            to time is ignored.
        minutes: all rows share this time; those that do not fit are skipped with a note. None is no limit.
    """

    device: str = "cpu"
    threads: int | None = None
    layers: bool = True
    norms: tuple[str, ...] = ()
    models: tuple[str, ...] = DEFAULT_MODELS
    shapes: tuple[tuple[int, int, int, int], ...] | None = None
    layouts: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    seconds_per_row: float | None = None
    batch_size: int | None = None
    compiled: bool = False
    quick: bool = False
    targets: bool = False
    minutes: float | None = None

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
                raise ValueError(f"a shape must be N x C x H x W with at least 4 values a channel, got {shape}")
        for name in ("seconds_per_row", "minutes"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name.replace('_', ' ')} must be a number above 0, got {value}")
        for name in ("threads", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name.replace('_', ' ')} must be 1 or more, got {value}")
        for spec in self.norms:
            check_norms({"--norms": spec})
        if not self.targets and not self.layers and not self.models:
            raise ValueError("nothing to measure: choose layers, models or both")

    @property
    def min_rounds(self) -> int:
        return 2 if self.quick else 5

    @property
    def layer_shapes(self) -> Sequence[tuple[int, int, int, int]]:
        return self.shapes or (QUICK_SHAPES if self.quick else SHAPES)

    @property
    def row_dtypes(self) -> Sequence[str]:
        return self.dtypes or (("float32",) if self.device == "cpu" else ("float32", "bfloat16"))

    def seconds(self, kind: str) -> float:
        """For how long a row of a kind of results is timed, its setting up not counted."""
        return self.seconds_per_row or (0.2 if self.quick else SECONDS[kind][self.targets])
