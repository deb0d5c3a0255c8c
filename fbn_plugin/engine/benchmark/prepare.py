"""Compile the kernels that rows will need, all at once and before anything is timed."""

import importlib
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import nn

from fbn_plugin.engine.benchmark.layers import first_line, layer_call, layer_input
from fbn_plugin.engine.benchmark.models import build_model, training_data
from fbn_plugin.engine.benchmark.settings import DTYPES
from fbn_plugin.layers import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm


class KernelInput(NamedTuple):
    """What decides which kernels a layer needs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    num_groups: int = 0  # 0: batch form
    activation: str = "identity"
    residual: bool = False


def of_layer(shape: Sequence[int], layout: str, dtype: str, groups: bool = True) -> list[KernelInput]:
    """The kernels of all filtered norms that may stand at a place: with and without activation and residual, and the
    group form."""
    forms = [(0, "identity", False), (0, "relu", False), (0, "relu", True)]
    if groups:
        forms.append((min(32, shape[1]), "identity", False))
    return [KernelInput(tuple(shape), DTYPES[dtype], layout == "channels_last", *form) for form in forms]


def norm_shapes(name: str, size: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """Shapes of the inputs of a classification model's norms, each once."""
    shapes: dict[tuple[int, ...], None] = {}
    with torch.device("meta"):
        model = build_model(name).train()
        images, _ = training_data(name, size, "meta")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, inputs: shapes.setdefault(tuple(inputs[0].shape)))
        model(images)
    return list(shapes)


def _run(wanted: KernelInput, device: str) -> None:
    """One forward and backward pass of a layer that needs the kernels."""
    dtype = next(name for name, each in DTYPES.items() if each == wanted.dtype)
    x = layer_input(wanted.shape, 5e-5, "channels_last" if wanted.channels_last else "contiguous", dtype, device)
    channels = wanted.shape[1]
    if wanted.num_groups:
        module: nn.Module = FilteredGroupNorm(wanted.num_groups, channels).to(x.dtype)
    elif wanted.activation == "identity":
        module = FilteredBatchNorm2d(channels)
    else:
        module = FilteredBatchNormAct2d(channels, activation=wanted.activation)
    inputs = (x, torch.randn_like(x).requires_grad_()) if wanted.residual else (x,)
    layer_call(module.to(device), inputs, torch.ones_like(x), "forward+backward")()


def compile_kernels(wanted: Iterable[KernelInput], device: str, notes: list[str], workers: int | None = None) -> dict:
    """Compile kernels in several threads: by the CUDA backend's own means, or by running each layer once.

    Returns:
        ``kernels``, for how many inputs; ``by``, how; ``seconds``; ``failed``, how many layers did not run.
    """
    wanted = list(dict.fromkeys(wanted))
    start = time.perf_counter()
    failed: list[str] = []
    by = "fbn_plugin.ops.cuda.precompile"
    try:
        importlib.import_module("fbn_plugin.ops.cuda").precompile(wanted)
    except Exception as error:  # there is no such backend, or it cannot be used here
        by = f"running each layer ({first_line(error)})"
        # Two cores for Python and the driver.
        workers = workers or max(1, min(14, (os.cpu_count() or 1) - 2))

        def run(each: KernelInput) -> None:
            try:
                _run(each, device)
            except Exception as error:
                failed.append(first_line(error))

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(run, wanted))
    if failed:
        notes.append(f"{len(failed)} of {len(wanted)} layers did not run when their kernels were compiled: {failed[0]}")
    seconds = time.perf_counter() - start
    return {"kernels": len(wanted), "by": by, "seconds": seconds, "failed": len(failed)}
