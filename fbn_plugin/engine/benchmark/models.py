"""Times and memory of a training step (forward, loss, backward, SGD) of whole models, eager and compiled.

Horváth and Al-afandi, "Filtered Batch Normalization" (2020), report 148, 164 and 172 ms for one VGG-16 step without
norm, with BN and with FBN.
"""

import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fbn_plugin.engine.benchmark.layers import usable
from fbn_plugin.engine.benchmark.peers import TARGET_MODEL_PEERS
from fbn_plugin.engine.benchmark.settings import DTYPES, LAYOUTS, Settings
from fbn_plugin.engine.benchmark.timing import Call, interleave, memory_of, summarize, wall_timer

_BACKBONES = {"mask_rcnn_R_50_FPN": "resnet50", "mask_rcnn_X_101_32x8d_FPN": "resnext101_32x8d"}


def build_model(name: str) -> nn.Module:
    """A model with BN and random weights; in a detector the backbone has norms, pyramid and heads have none."""
    from torchvision import models

    from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn

    if name in _BACKBONES:
        return mask_rcnn_fpn(_BACKBONES[name], norm="BN", num_classes=81)
    return getattr(models, "vgg16_bn" if name == "vgg16" else name)()


# Rows of one model follow each other, and to fill its weights with random values takes seconds.
_built = functools.lru_cache(1)(lambda name: build_model(name))


def training_data(name: str, size: tuple[int, int, int], device: str) -> tuple:
    """Images and labels, or a list of images and one of targets for a detector."""
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height, width, generator=generator).to(device)
    if name not in _BACKBONES:
        return images, torch.arange(batch, device=device)
    boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.9], [0.2, 0.5, 0.4, 0.8]])
    boxes = boxes * torch.tensor([width, height, width, height])
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist()):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes.to(device), "labels": torch.arange(1, 4, device=device), "masks": masks.to(device)}
    return list(images), [target] * batch


def fix_work(model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Give a detector's heads the same regions at every step, whatever the norm; the images keep their size."""
    height, width = images[0].shape[1:]
    model.transform.min_size, model.transform.max_size = (min(height, width),), max(height, width)
    generator = torch.Generator().manual_seed(0)
    near = targets[0]["boxes"].cpu().repeat(10, 1)
    near = near + 0.1 * min(height, width) * (torch.rand(near.shape, generator=generator) - 0.5)
    corners = torch.rand(1000, 2, 2, generator=generator).sort(dim=1).values.flatten(1)
    regions = torch.cat([near, corners * torch.tensor([width, height, width, height])]).to(images[0].device)
    model.rpn.register_forward_hook(lambda rpn, inputs, output: ([regions] * len(images), output[1]))


def training_step(
    model: nn.Module, images, targets, layout: str, dtype: str, device: str, compiled: bool = False
) -> Call:
    """A function that makes one step, and returns its loss.

    Args:
        model: moved to ``device`` and ``layout``.
        images, targets: of :func:`training_data`.
        layout, dtype: names in ``LAYOUTS`` and ``DTYPES``; a narrow dtype is autocast's.
        device: ``"cpu"`` or ``"cuda"``.
        compiled: compile the model.
    """
    model.to(device, memory_format=LAYOUTS[layout]).train()
    detector = isinstance(images, list)
    if detector:
        fix_work(model, images, targets)
    else:
        images = images.contiguous(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    run = torch.compile(model) if compiled else model

    def step() -> Tensor:
        torch.manual_seed(0)  # the detector samples its regions
        with torch.autocast(device, DTYPES[dtype], enabled=dtype != "float32"):
            loss = sum(run(images, targets).values()) if detector else F.cross_entropy(run(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def measure_model(
    settings: Settings,
    peers: Mapping[str, Callable[[nn.Module], nn.Module]],
    name: str,
    size: tuple[int, int, int],
    layout: str,
    dtype: str,
    until: float,
    notes: list[str],
) -> dict:
    """Time one training step of a model with each peer.

    Args:
        settings: the device, and for how long.
        peers: name -> what makes it out of the model with BN, see ``MODEL_PEERS``.
        name: in ``MODELS``.
        size: ``(batch, height, width)``.
        layout, dtype: names in ``LAYOUTS`` and ``DTYPES``.
        until: the ``time.perf_counter()`` by which to be done.
        notes: gets a sentence for each peer that could not be timed.

    Returns:
        ``model``, ``batch``, ``image``, ``layout``, ``dtype``, and ``peers`` as in :func:`.timing.summarize`, with the
        memory of :func:`.timing.memory_of` and whether the last ``loss`` was finite.
    """
    torch.manual_seed(0)
    plain = _built(name)
    models = {peer: make(copy.deepcopy(plain)) for peer, make in peers.items()}
    if name == "vgg16" and "naive FBN" in peers:
        from torchvision.models import vgg16

        models["no norm"] = vgg16()
    data = training_data(name, size, settings.device)
    where = f" of {name} {'x'.join(map(str, size))} {layout} {dtype}"
    steps = {peer: training_step(model, *data, layout, dtype, settings.device) for peer, model in models.items()}
    steps = usable(steps, dict.fromkeys(steps, "BN"), notes, where)
    results = _timed(settings, "models", steps, until)
    for peer, step in steps.items():
        results[peer] |= memory_of(step, settings.device, list(models[peer].parameters()))
        if not step().isfinite():
            notes.append(f"the loss of {peer} is not finite in a step{where}")
    return _row(name, size, layout, dtype, results)


def measure_compiled(
    settings: Settings,
    name: str,
    size: tuple[int, int, int],
    layout: str,
    dtype: str,
    until: float,
    notes: list[str],
) -> dict:
    """Time one training step under ``torch.compile``, as :func:`measure_model` does the eager one.

    The fused form, which is compiled after BN and FBN, is left out where the time left is not enough. Each peer has
    ``compile_seconds``, the time of its first two steps.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    plain, data = _built(name), training_data(name, size, settings.device)
    where = f" of compiled {name} {'x'.join(map(str, size))} {layout} {dtype}"
    steps, took = {}, {}
    for peer, make in TARGET_MODEL_PEERS.items():
        if len(took) == 2 and until - time.perf_counter() < 1.2 * max(took.values()) + settings.seconds("compiled"):
            notes.append(f"{peer} is left out{where}: the time was over")
            continue
        step = training_step(make(copy.deepcopy(plain)), *data, layout, dtype, settings.device, compiled=True)
        start = time.perf_counter()
        try:
            usable({peer: step}, {peer: peer}, notes, where)
        except RuntimeError:  # it is in the notes
            if peer == "BN":
                raise
            continue
        steps[peer], took[peer] = step, time.perf_counter() - start
    results = _timed(settings, "compiled", steps, until)
    for peer, result in results.items():
        result["compile_seconds"] = took[peer]
    return _row(name, size, layout, dtype, results)


def _timed(settings: Settings, kind: str, steps: Mapping[str, Callable[[], Tensor]], until: float) -> dict[str, dict]:
    """The steps timed in turn, against BN, for as long as a row of this kind may take."""
    seconds = min(settings.seconds(kind), until - time.perf_counter())
    times = interleave(steps, seconds, settings.min_rounds, wall_timer(settings.device))
    return summarize(times, dict.fromkeys(steps, "BN"))


def _row(name: str, size: tuple[int, int, int], layout: str, dtype: str, peers: dict[str, dict]) -> dict:
    image = list(size[1:])
    return {"model": name, "batch": size[0], "image": image, "layout": layout, "dtype": dtype, "peers": peers}
