"""Image classification with timm: models, transforms, optimizers and schedulers are timm's, the norm is a spec string,
and the configuration speaks detectron2's vocabulary where it has a word.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import timm
import torch
from fvcore.common.config import CfgNode
from timm.data import Mixup, create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.transforms import str_to_interp_mode
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import Compose, RandomCrop, Resize
from tqdm import tqdm

from fbn_plugin import apply_gamma_init, convert_norm, parse_spec, prepend_input_norm, revised_init
from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.data.sampling import BalancedSampler, InfiniteSampler, SeededDataset
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer, PeriodicCheckpointer, atomic_write
from fbn_plugin.engine.run.config import check_resume, save_config
from fbn_plugin.engine.run.logging import Timer, TrainingLog, setup_logging
from fbn_plugin.frameworks import timm_models
from fbn_plugin.frameworks.timm import param_groups

__all__ = ["ClassificationTrainer", "classification_config", "create_model", "evaluate"]

logger = logging.getLogger(__name__)

SCHEDULERS = ("constant", "cosine", "multistep", "poly", "tanh")
TRAIN_CROPS = ("none", "padded", "random_resized")

# What a resumed run may have otherwise; the learning rate's schedule is computed anew.
_MAY_CHANGE = (
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_EPOCH",
    "SOLVER.MAX_ITER",
    "SOLVER.BASE_LR",
    "SOLVER.MIN_LR",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.*",
    "OUTPUT_DIR",
)


def classification_config() -> CfgNode:
    """Every key of `tools/train_classification.py` with its default."""
    cfg = CfgNode()

    cfg.MODEL = CfgNode()
    cfg.MODEL.NAME = "resnet50"  # a timm model, or one of fbn_plugin.models
    cfg.MODEL.NORM = ""  # spec of the norm in place of the model's batch normalization, "FBN(t_sigma=4)"; "": unchanged
    cfg.MODEL.PRETRAINED = False  # start from timm's weights
    cfg.MODEL.WEIGHTS = ""  # start from, or with --eval-only evaluate, this checkpoint or state dict
    cfg.MODEL.REVISED_INIT = False  # convolutions and linear layers start as Davis and Frank (2022) have them
    cfg.MODEL.DROP_RATE = 0.0  # dropout before the classifier
    cfg.MODEL.DEVICE = "cuda"  # where there is no GPU: cpu
    cfg.MODEL.PIXEL_MEAN = (123.675, 116.28, 103.53)  # of the channels of INPUT.FORMAT, in 0..255
    cfg.MODEL.PIXEL_STD = (58.395, 57.12, 57.375)

    cfg.INPUT = CfgNode()
    cfg.INPUT.FORMAT = "RGB"  # or "L", grey
    cfg.INPUT.SIZE = 224  # height and width that the model sees, in pixels
    cfg.INPUT.INTERPOLATION = "bilinear"
    cfg.INPUT.CROP_PCT = 0.875  # evaluation: resize the short side to SIZE / CROP_PCT, take the centre
    # Training: "random_resized" crops of SCALE (share of the area) and RATIO; "padded": SIZE, PADDING zeros on each
    # side, a random crop; "none": resize and centre crop, and no augmentation at all.
    cfg.INPUT.TRAIN_CROP = "random_resized"
    cfg.INPUT.SCALE = (0.08, 1.0)
    cfg.INPUT.RATIO = (3 / 4, 4 / 3)
    cfg.INPUT.PADDING = 4
    cfg.INPUT.HFLIP = 0.5  # probability
    cfg.INPUT.COLOR_JITTER = 0.0
    cfg.INPUT.AUTO_AUGMENT = ""  # timm's policy string, such as "rand-m9-mstd0.5"
    # Above 0: PIXEL_MEAN and PIXEL_STD give way to a norm that learns, with a scale of 0.58 times this number.
    cfg.INPUT.NORM_GAMMA_INIT = 0.0
    cfg.INPUT.MIXUP = 0.0  # alpha
    cfg.INPUT.CUTMIX = 0.0  # alpha

    cfg.DATASETS = CfgNode()
    cfg.DATASETS.NAME = "image_folder"  # how the images are stored, see image_data.load_image_data
    cfg.DATASETS.ROOT = "imagenet"  # folder, as it is or below $DETECTRON2_DATASETS

    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 4
    # Above 0: every batch holds so many images of each class (Hajaj and Gillies 2018: 1), in each process.
    cfg.DATALOADER.IMAGES_PER_CLASS = 0

    cfg.SOLVER = CfgNode()
    cfg.SOLVER.MAX_EPOCH = 100
    cfg.SOLVER.MAX_ITER = 0  # stop early after so many iterations, on the schedule of MAX_EPOCH; 0: do not
    cfg.SOLVER.IMS_PER_BATCH = 256  # over all processes
    cfg.SOLVER.OPTIMIZER = "momentum"  # timm's names: "momentum" is SGD, "sgd" is SGD with Nesterov's momentum
    cfg.SOLVER.BASE_LR = 0.1
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.WEIGHT_DECAY = 1e-4
    cfg.SOLVER.FILTER_BIAS_AND_BN = True  # no weight decay on biases and norms
    # The scale of batch norms learns so many times slower (Davis and Frank 2022: 100), and norms and biases are told
    # by their types, not by their shapes; 1 is all at one rate. 0: timm's groups.
    cfg.SOLVER.SCALE_LR_DIVISOR = 0.0
    cfg.SOLVER.LR_SCHEDULER_NAME = "cosine"  # constant, cosine, multistep, poly or tanh, stepped each iteration
    cfg.SOLVER.STEPS = (30, 60, 90)  # multistep: epochs at which the rate is multiplied with GAMMA
    cfg.SOLVER.GAMMA = 0.1  # of multistep; the power of poly
    cfg.SOLVER.MIN_LR = 0.0  # of cosine, poly and tanh
    cfg.SOLVER.WARMUP_EPOCHS = 0
    cfg.SOLVER.WARMUP_FACTOR = 0.001  # share of BASE_LR that warm-up starts from
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    cfg.SOLVER.CHECKPOINT_PERIOD = 0  # iterations; 0: an epoch
    cfg.SOLVER.AMP = CfgNode()
    cfg.SOLVER.AMP.ENABLED = False  # float16 on a GPU, bfloat16 on a CPU

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 1  # epochs; 0: only at the end
    cfg.TEST.IMS_PER_BATCH = 256

    cfg.SEED = 0
    cfg.OUTPUT_DIR = "./output"
    return cfg


def create_model(name: str, norm: str = "", **kwargs) -> nn.Module:
    """Build a timm model whose batch normalization is replaced by another norm; initial and loaded weights are kept.

    The model is built first and converted then, which works alike for models that take a `norm_layer`, for those
    that do not, and for norms with an activation.

    Args:
        name: a timm model name, or that of one of the papers' networks.
        norm: spec string such as "FBN(t_sigma=4)"; "" for the model's own norm.
        **kwargs: for `timm.create_model`: num_classes, in_chans, pretrained, drop_rate, ...

    Raises:
        ValueError: unknown model, bad spec, a model without batch normalization, or with one that cannot be replaced.
    """
    timm_models.register()
    try:
        model = timm.create_model(name, **kwargs)
    except RuntimeError as error:  # timm: unknown name, unknown tag, or no such pretrained weights
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] != name else ""
        raise ValueError(f"timm cannot build {name!r}: {str(error).rstrip('.')}{hint}") from error
    if not norm:
        return model
    old = {module for module in model.modules() if isinstance(module, _BatchNorm)}
    if not old:
        raise ValueError(f"{name} has no batch normalization that {norm} could replace")
    model = convert_norm(model, norm)
    if left := [type(module).__name__ for module in model.modules() if module in old]:
        raise ValueError(f"{len(left)} norms of {name} cannot be replaced by {norm}, the first is a {left[0]}")
    return model if kwargs.get("pretrained") else apply_gamma_init(model)


def _pixel_statistics(cfg: CfgNode) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of the channels in timm's scale, 0..1: 0 and 1 for an input norm."""
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    channels = len(cfg.INPUT.FORMAT) if cfg.INPUT.FORMAT in ("RGB", "L") else None
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"MODEL.PIXEL_MEAN {mean} and PIXEL_STD {std} need one value for each channel of INPUT.FORMAT "
            f"{cfg.INPUT.FORMAT!r}, which is 'RGB' or 'L'"
        )
    if cfg.INPUT.NORM_GAMMA_INIT:
        return {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return {"mean": tuple(x / 255 for x in mean), "std": tuple(x / 255 for x in std)}


def build_train_transform(cfg: CfgNode, prefetch: bool) -> Callable:
    """timm's training transform, with INPUT.TRAIN_CROP as its crop.

    Args:
        prefetch: leave the scaling and normalization to timm's PrefetchLoader.
    """
    crop, size = cfg.INPUT.TRAIN_CROP, cfg.INPUT.SIZE
    try:
        transform = create_transform(
            size,
            is_training=True,
            no_aug=crop == "none",
            scale=cfg.INPUT.SCALE,
            ratio=cfg.INPUT.RATIO,
            hflip=cfg.INPUT.HFLIP,
            color_jitter=cfg.INPUT.COLOR_JITTER or None,
            auto_augment=cfg.INPUT.AUTO_AUGMENT or None,
            interpolation=cfg.INPUT.INTERPOLATION,
            use_prefetcher=prefetch,
            **_pixel_statistics(cfg),
        )
    except AssertionError:
        raise ValueError(f"INPUT.AUTO_AUGMENT {cfg.INPUT.AUTO_AUGMENT!r} is not a policy that timm knows") from None
    if crop == "padded":  # timm has no crop of a padded image; it stands where timm has its random resized crop
        resize = Resize(size, str_to_interp_mode(cfg.INPUT.INTERPOLATION))
        transform.transforms[0] = Compose([resize, RandomCrop(size, cfg.INPUT.PADDING)])
    return transform


def build_train_loader(
    cfg: CfgNode, dataset: Dataset, device: torch.device, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The endless batches of this process, from iteration `start` on: images (N, C, H, W) and class indices (N,).

    The transforms, and on a GPU the prefetching, are timm's. The order and the augmentation of a sample depend on the
    seed and its place in the stream alone (timm's own train loader draws them from the state of each worker process),
    so that a run may be interrupted at any iteration.
    """
    prefetch = device.type == "cuda"
    dataset.transform = build_train_transform(cfg, prefetch)
    rank, world_size = distributed.rank(), distributed.world_size()
    batch_size = cfg.SOLVER.IMS_PER_BATCH // world_size
    if cfg.DATALOADER.IMAGES_PER_CLASS:
        sampler = BalancedSampler(dataset, cfg.DATALOADER.IMAGES_PER_CLASS, cfg.SEED, rank, world_size, start)
    else:
        sampler = InfiniteSampler(len(dataset), cfg.SEED, rank, world_size, start * batch_size)
    loader = DataLoader(
        SeededDataset(dataset, cfg.SEED),
        batch_size,
        sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=fast_collate if prefetch else None,
        pin_memory=prefetch,
    )
    if prefetch:
        loader = PrefetchLoader(loader, channels=len(cfg.INPUT.FORMAT), device=device, **_pixel_statistics(cfg))
    return iter(loader)


def build_val_loader(cfg: CfgNode, dataset: Dataset, device: torch.device) -> DataLoader | PrefetchLoader:
    """timm's evaluation loader over this process's share of `dataset`."""
    prefetch = device.type == "cuda"
    return create_loader(
        dataset,
        cfg.INPUT.SIZE,
        max(1, cfg.TEST.IMS_PER_BATCH // distributed.world_size()),
        crop_pct=cfg.INPUT.CROP_PCT,
        interpolation=cfg.INPUT.INTERPOLATION,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        distributed=distributed.world_size() > 1,
        use_prefetcher=prefetch,
        pin_memory=prefetch,
        persistent_workers=False,
        device=device,
        **_pixel_statistics(cfg),
    )


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader | PrefetchLoader, device: torch.device, top_k: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Top-k accuracies in percent, `top1`, `top5`, and the mean cross entropy `loss`, over all processes.

    Args:
        model: gives logits (N, classes); it is evaluated in evaluation mode and left in the mode it was in.
        loader: timm's evaluation loader. What its sampler repeats to give every process equally many samples is not
            counted.
        top_k: each at most the number of classes.
    """
    size = len(loader.dataset)
    left = len(range(distributed.rank(), size, distributed.world_size()))
    sums = dict.fromkeys(["loss", *(f"top{k}" for k in top_k)], 0.0)
    training = model.training
    model.eval()
    for images, targets in tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True):
        images, targets = images[:left].to(device), targets[:left].to(device)
        if left == 0:
            break
        left -= len(targets)
        logits = model(images).float()
        sums["loss"] += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        for k in top_k:
            sums[f"top{k}"] += 100 * (logits.topk(k).indices == targets[:, None]).sum().item()
    model.train(training)
    everyones = distributed.all_gather(sums)
    return {name: sum(each[name] for each in everyones) / size for name in sums}


def _check(cfg: CfgNode) -> None:
    """Refuse values that would fail later, or do something else than they say."""

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(sentence)

    solver, world_size = cfg.SOLVER, distributed.world_size()
    for key, value, least in (
        ("SOLVER.MAX_EPOCH", solver.MAX_EPOCH, 1),
        ("SOLVER.MAX_ITER", solver.MAX_ITER, 0),
        ("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, 1),
        ("SOLVER.CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD, 0),
        ("DATALOADER.IMAGES_PER_CLASS", cfg.DATALOADER.IMAGES_PER_CLASS, 0),
        ("TEST.IMS_PER_BATCH", cfg.TEST.IMS_PER_BATCH, 1),
        ("TEST.EVAL_PERIOD", cfg.TEST.EVAL_PERIOD, 0),
        ("INPUT.SIZE", cfg.INPUT.SIZE, 1),
        ("INPUT.PADDING", cfg.INPUT.PADDING, 0),
        ("DATALOADER.NUM_WORKERS", cfg.DATALOADER.NUM_WORKERS, 0),
        ("SEED", cfg.SEED, 0),
    ):
        need(value >= least, f"{key} must be at least {least}, got {value}")
    for key, value, low, high in (
        ("MODEL.DROP_RATE", cfg.MODEL.DROP_RATE, 0, 1),
        ("SOLVER.LABEL_SMOOTHING", solver.LABEL_SMOOTHING, 0, 1),
        ("SOLVER.WEIGHT_DECAY", solver.WEIGHT_DECAY, 0, math.inf),
        ("SOLVER.SCALE_LR_DIVISOR", solver.SCALE_LR_DIVISOR, 0, math.inf),
        ("INPUT.HFLIP", cfg.INPUT.HFLIP, 0, 1),
        ("INPUT.NORM_GAMMA_INIT", cfg.INPUT.NORM_GAMMA_INIT, 0, 1),
        ("INPUT.MIXUP", cfg.INPUT.MIXUP, 0, math.inf),
        ("INPUT.CUTMIX", cfg.INPUT.CUTMIX, 0, math.inf),
    ):
        need(low <= value <= high, f"{key} must lie between {low} and {high}, got {value}")
    need(
        not (cfg.MODEL.REVISED_INIT and cfg.MODEL.PRETRAINED),
        "MODEL.REVISED_INIT would replace the weights that MODEL.PRETRAINED loads",
    )
    need(
        solver.FILTER_BIAS_AND_BN or not solver.SCALE_LR_DIVISOR,
        "SOLVER.SCALE_LR_DIVISOR sets the decay of norms and biases to 0: it wants FILTER_BIAS_AND_BN True",
    )
    need(solver.BASE_LR > 0, f"SOLVER.BASE_LR must be above 0, got {solver.BASE_LR}")
    scale = cfg.INPUT.SCALE
    need(
        len(scale) == 2 and 0 < scale[0] <= scale[1],
        f"INPUT.SCALE takes two shares of the image's area, the smaller first, got {scale}",
    )
    if cfg.MODEL.NORM:
        try:
            parse_spec(cfg.MODEL.NORM)
        except ValueError as error:
            raise ValueError(f"MODEL.NORM: {error}") from None
    need(
        solver.IMS_PER_BATCH % world_size == 0,
        f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} must be a multiple of the number of processes, {world_size}",
    )
    need(
        0 <= solver.WARMUP_EPOCHS < solver.MAX_EPOCH,
        f"SOLVER.WARMUP_EPOCHS must be from 0 to less than MAX_EPOCH {solver.MAX_EPOCH}, got {solver.WARMUP_EPOCHS}",
    )
    need(min(cfg.MODEL.PIXEL_STD) > 0, f"MODEL.PIXEL_STD must be positive, got {cfg.MODEL.PIXEL_STD}")
    need(0 < cfg.INPUT.CROP_PCT <= 1, f"INPUT.CROP_PCT must be in (0, 1], got {cfg.INPUT.CROP_PCT}")
    need(
        not (cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX) or solver.IMS_PER_BATCH // world_size % 2 == 0,
        f"INPUT.MIXUP and CUTMIX need an even batch in each process, got {solver.IMS_PER_BATCH // world_size}",
    )
    for key, value, accepted in (
        ("INPUT.TRAIN_CROP", cfg.INPUT.TRAIN_CROP, TRAIN_CROPS),
        ("INPUT.INTERPOLATION", cfg.INPUT.INTERPOLATION, ("bilinear", "bicubic", "nearest")),
        ("SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME, SCHEDULERS),
        ("SOLVER.OPTIMIZER", solver.OPTIMIZER, list_optimizers()),
    ):
        need(value in accepted, f"{key} {value!r} is not known; accepted are {', '.join(accepted)}")
    build_train_transform(cfg, prefetch=False)


class ClassificationTrainer:
    """Trains and evaluates what a config describes. Building it checks all input and writes nothing.

    Args:
        cfg: `classification_config` with a file merged in.
        resume: continue from the last checkpoint in OUTPUT_DIR, if there is one, with the settings it began with;
            only the device, the rates, the number of iterations or workers, and when to save and evaluate may change.
        eval_only: only evaluate: MODEL.WEIGHTS, which must fit the whole model, or with `resume` the last checkpoint.

    Raises:
        ValueError, OSError: bad values in the config, missing or damaged files.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False, eval_only: bool = False):
        self.cfg, solver = cfg, cfg.SOLVER
        self.device = distributed.init(cfg.MODEL.DEVICE)
        _check(cfg)
        if self.device.type == "cpu" and cfg.MODEL.NORM.startswith("SyncBN"):
            raise ValueError(
                "SyncBN runs on GPUs only; use BN or, over several processes, SyncFBN(t_sigma=inf) on the CPU"
            )
        previous = os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
        if eval_only and not (cfg.MODEL.WEIGHTS or cfg.MODEL.PRETRAINED or (resume and previous)):
            raise ValueError(
                "nothing to evaluate: set MODEL.WEIGHTS, MODEL.PRETRAINED, or --resume with a checkpoint in OUTPUT_DIR"
            )
        if os.path.exists(cfg.OUTPUT_DIR) and not os.path.isdir(cfg.OUTPUT_DIR):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} is a file, not a folder")
        if previous and not (resume or eval_only):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run; add --resume to continue it, or choose another")
        if previous and resume and not eval_only:
            check_resume(cfg, classification_config(), _MAY_CHANGE)
        self.data = load_image_data(cfg.DATASETS.NAME, cfg.DATASETS.ROOT, cfg.INPUT.FORMAT)
        if not eval_only and len(self.data.train) < solver.IMS_PER_BATCH:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is more than the {len(self.data.train)} training images"
            )
        per_class, world_size = cfg.DATALOADER.IMAGES_PER_CLASS, distributed.world_size()
        if per_class and not eval_only:
            balanced = BalancedSampler(self.data.train, per_class, cfg.SEED).batch_size
            if balanced * world_size != solver.IMS_PER_BATCH:
                raise ValueError(
                    f"DATALOADER.IMAGES_PER_CLASS {per_class} of {len(self.data.classes)} classes in {world_size} "
                    f"processes need SOLVER.IMS_PER_BATCH {balanced * world_size}, got {solver.IMS_PER_BATCH}"
                )
        self.iters_per_epoch = max(1, len(self.data.train) // solver.IMS_PER_BATCH)
        self.max_iter = solver.MAX_EPOCH * self.iters_per_epoch
        if solver.MAX_ITER:
            self.max_iter = min(self.max_iter, solver.MAX_ITER)
        torch.manual_seed(cfg.SEED)
        self.model = create_model(
            cfg.MODEL.NAME,
            cfg.MODEL.NORM,
            num_classes=len(self.data.classes),
            in_chans=len(cfg.INPUT.FORMAT),
            pretrained=cfg.MODEL.PRETRAINED,
            drop_rate=cfg.MODEL.DROP_RATE,
        )
        if cfg.MODEL.REVISED_INIT:
            revised_init(self.model)
        if cfg.INPUT.NORM_GAMMA_INIT:
            prepend_input_norm(self.model, cfg.INPUT.NORM_GAMMA_INIT)
        self.model.to(self.device)
        parameters = self.model
        if solver.SCALE_LR_DIVISOR:
            parameters = param_groups(self.model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
        self.optimizer = create_optimizer_v2(
            parameters,
            solver.OPTIMIZER,
            lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            momentum=solver.MOMENTUM,
            filter_bias_and_bn=solver.FILTER_BIAS_AND_BN,
        )
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            solver.LR_SCHEDULER_NAME,
            num_epochs=solver.MAX_EPOCH,
            decay_milestones=solver.STEPS,
            decay_rate=solver.GAMMA,
            min_lr=solver.MIN_LR,
            warmup_epochs=solver.WARMUP_EPOCHS,
            warmup_lr=solver.WARMUP_FACTOR * solver.BASE_LR,
            step_on_epochs=False,
            updates_per_epoch=self.iters_per_epoch,
        )
        self.scaler = torch.amp.GradScaler(enabled=solver.AMP.ENABLED and self.device.type == "cuda")
        self.checkpointer = AtomicCheckpointer(self.model, cfg.OUTPUT_DIR, optimizer=self.optimizer, scaler=self.scaler)
        self.start_iter = 0
        if resume and previous:
            last = self.checkpointer.get_checkpoint_file()
            state = self.checkpointer.load(last)
            if "iteration" not in state:
                raise ValueError(f"checkpoint {last} is not of a run of this tool: it has no iteration")
            self.start_iter = state["iteration"] + 1
            if self.start_iter > self.max_iter and not eval_only:
                key = "MAX_ITER" if self.max_iter == solver.MAX_ITER else "MAX_EPOCH"
                raise ValueError(
                    f"SOLVER.{key} {solver[key]} ends the training after {self.max_iter} iterations, but the run that "
                    f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds has {self.start_iter}"
                )
        else:
            self.checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[], strict=eval_only)

    def evaluate(self) -> dict[str, float]:
        """`top1`, with more than 5 classes `top5` (both in percent), and `loss` on the validation set."""
        distributed.broadcast_buffers(self.model)
        loader = build_val_loader(self.cfg, self.data.val, self.device)
        return evaluate(self.model, loader, self.device, (1, 5) if len(self.data.classes) > 5 else (1,))

    def describe(self, result: dict[str, float]) -> str:
        """One line that says what `result` was measured with and on."""
        cfg = self.cfg
        model = cfg.MODEL.NAME + (f" with {cfg.MODEL.NORM}" if cfg.MODEL.NORM else "")
        top5 = f", top-5 {result['top5']:.2f} %" if "top5" in result else ""
        images = f"{len(self.data.val)} validation images"
        return f"{model} on {self.data.title}: top-1 {result['top1']:.2f} %{top5}, loss {result['loss']:.4f} ({images})"

    def train(self) -> dict[str, float]:
        """Train from the start, or from where the checkpoint left off, to the end; return the final evaluation.

        Writes config.yaml, log.txt, metrics.json, TensorBoard files, checkpoints and results.json to OUTPUT_DIR.
        On the CPU a run that is interrupted and resumed ends with the same bits as one that is not; on a GPU some
        backward passes add in no fixed order.

        Raises:
            FloatingPointError: the loss is not finite.
            UserError: an image cannot be decoded.
        """
        cfg, solver, data = self.cfg, self.cfg.SOLVER, self.data
        if distributed.is_main():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        distributed.barrier()
        setup_logging(cfg.OUTPUT_DIR)
        logger.info(
            f"{data.title}: {len(data.train)} training images, {len(data.val)} validation images, "
            f"{len(data.classes)} classes; {self.iters_per_epoch} iterations an epoch"
        )
        saver = PeriodicCheckpointer(
            self.checkpointer,
            solver.CHECKPOINT_PERIOD or self.iters_per_epoch,
            self.max_iter,
            max_to_keep=2 if distributed.is_main() else None,  # only one process may delete the older ones
        )
        model: nn.Module = self.model.train()
        if distributed.world_size() > 1:
            model = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        mixup = None
        if cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX:
            mixup = Mixup(
                cfg.INPUT.MIXUP,
                cfg.INPUT.CUTMIX,
                label_smoothing=solver.LABEL_SMOOTHING,
                num_classes=len(data.classes),
            )
        criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup else solver.LABEL_SMOOTHING)
        amp_dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        batches = build_train_loader(cfg, data.train, self.device, self.start_iter)
        result = None
        with TrainingLog(cfg.OUTPUT_DIR, self.max_iter, self.start_iter) as log:
            timer = Timer()
            for iteration in range(self.start_iter, self.max_iter):
                timer()
                images, targets = (tensor.to(self.device) for tensor in next(batches))
                data_time = timer()
                _seed(cfg.SEED, iteration)
                if mixup:
                    images, targets = mixup(images, targets)
                self.scheduler.step_update(iteration)
                with torch.autocast(self.device.type, amp_dtype, enabled=solver.AMP.ENABLED):
                    loss = criterion(model(images), targets)
                self.optimizer.zero_grad()
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()

                losses = distributed.reduce_mean({"total_loss": loss.item()}, self.device)
                if not math.isfinite(losses["total_loss"]):
                    raise FloatingPointError(
                        f"the loss is {losses['total_loss']} at iteration {iteration}; lower SOLVER.BASE_LR"
                    )
                lr = self.optimizer.param_groups[0]["lr"]
                log.step(iteration, **losses, lr=lr, time=data_time + timer(), data_time=data_time)

                epoch, rest = divmod(iteration + 1, self.iters_per_epoch)
                due = rest == 0 and cfg.TEST.EVAL_PERIOD and epoch % cfg.TEST.EVAL_PERIOD == 0
                if due or iteration + 1 == self.max_iter:
                    result = self.evaluate()
                    values = {f"val/{name}": value for name, value in result.items()}
                    log.write(iteration, {"epoch": (iteration + 1) / self.iters_per_epoch, **values})
                    logger.info("epoch %.4g: %s", (iteration + 1) / self.iters_per_epoch, self.describe(result))
                saver.step(iteration)  # after the evaluation, so that a resumed run has not missed it
        if result is None:  # there was nothing left to train
            result = self.evaluate()
        if distributed.is_main():
            record = json.dumps({**self._provenance(), **result}, indent=2)
            atomic_write(os.path.join(cfg.OUTPUT_DIR, "results.json"), record.encode())
        return result

    def _provenance(self) -> dict[str, Any]:
        cfg, cuda = self.cfg, self.device.type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"{platform.machine()} CPU"
        return {
            "dataset": self.data.title,
            "train_images": len(self.data.train),
            "val_images": len(self.data.val),
            "model": cfg.MODEL.NAME,
            "norm": cfg.MODEL.NORM or "the model's own",
            "epochs": self.max_iter / self.iters_per_epoch,
            "iterations": self.max_iter,
            "images_per_batch": cfg.SOLVER.IMS_PER_BATCH,
            "seed": cfg.SEED,
            "hardware": f"{distributed.world_size()} x {device}"
            + (f", {torch.get_num_threads()} threads" * (not cuda)),
            "versions": {"torch": torch.__version__, "timm": timm.__version__},
        }


def _seed(seed: int, iteration: int) -> None:
    """Seed what training draws (dropout, mixup) for one iteration, so that no state has to outlive an interruption."""
    for_torch, for_numpy = np.random.SeedSequence([seed, iteration, distributed.rank()]).generate_state(2)
    torch.manual_seed(int(for_torch))
    np.random.seed(for_numpy)
