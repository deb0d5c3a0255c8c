"""Images as a classification model gets them: timm's transforms and loaders over a config's data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

import torch
from fvcore.common.config import CfgNode
from timm.data import create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fbn_plugin.engine.classification import augmentation
from fbn_plugin.engine.classification.batch import BatchSizes
from fbn_plugin.engine.classification.memory_data import (
    ImagesInMemory,
    MemoryLoader,
    batch_augmentation,
    fits_memory,
    training_stream,
)
from fbn_plugin.engine.data.loaders import shield_workers, training_batches, training_loader
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.rules import refusal

__all__ = ["build_train_loader", "build_train_transform", "build_val_loader", "pixel_statistics"]


def pixel_statistics(cfg: CfgNode) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of the channels in timm's scale, 0..1: 0 and 1 for an input norm."""
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    channels = len(cfg.INPUT.FORMAT)
    for key, values in (("MODEL.PIXEL_MEAN", mean), ("MODEL.PIXEL_STD", std)):
        if len(values) != channels:
            raise refusal(key, f"one value for each channel of INPUT.FORMAT {cfg.INPUT.FORMAT!r}", values)
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
            train_crop_mode=augmentation.TIMMS_CROPS.get(crop),
            scale=cfg.INPUT.SCALE,
            ratio=cfg.INPUT.RATIO,
            hflip=cfg.INPUT.HFLIP,
            vflip=cfg.INPUT.VFLIP,
            color_jitter=cfg.INPUT.COLOR_JITTER or None,
            auto_augment=cfg.INPUT.AUTO_AUGMENT or None,
            interpolation=cfg.INPUT.INTERPOLATION,
            use_prefetcher=prefetch,
            **pixel_statistics(cfg),
        )
    except AssertionError:
        raise refusal("INPUT.AUTO_AUGMENT", "a policy that timm knows", cfg.INPUT.AUTO_AUGMENT) from None
    if crop != "none":
        augmentation.complete(transform.transforms, cfg, prefetch)
    return transform


def build_train_loader(
    cfg: CfgNode, dataset: Dataset, device: torch.device, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The endless batches of this process, from iteration `start` on: images (N, C, H, W) and class indices (N,). With
    SOLVER.ACCUMULATION_STEPS an iteration has as many batches, those of so many processes.

    A small set stays in memory, see DATALOADER.IN_MEMORY; of others the transforms, and on a GPU the prefetching, are
    timm's. The order and the augmentation of a sample depend on the seed and its place in the stream alone (timm's own
    train loader draws them from the state of each worker process), so that a run may be interrupted at any iteration.
    """
    sizes = BatchSizes.of(cfg)
    batches = training_batches(
        dataset,
        cfg.SEED,
        sizes.step,
        start,
        steps=sizes.steps,
        images_per_class=cfg.DATALOADER.IMAGES_PER_CLASS,
        repeats=cfg.INPUT.REPEATED_AUGMENTATIONS,
    )
    images = images_in_memory(cfg, dataset, build_train_transform(cfg, prefetch=False))
    if images is not None:
        return training_stream(images, batches, device)
    prefetch = device.type == "cuda"
    dataset.transform = build_train_transform(cfg, prefetch)
    loader = training_loader(
        dataset,
        cfg.SEED,
        batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=fast_collate if prefetch else None,
        pin_memory=prefetch,
    )
    if prefetch:
        loader = PrefetchLoader(loader, channels=len(cfg.INPUT.FORMAT), device=device, **pixel_statistics(cfg))
    return iter(loader)


def build_val_loader(
    cfg: CfgNode, dataset: Dataset, device: torch.device
) -> DataLoader | PrefetchLoader | MemoryLoader:
    """timm's evaluation loader over this process's share of `dataset`, or one from memory with the same images."""
    size, batch_size = cfg.INPUT.SIZE, max(1, cfg.TEST.IMS_PER_BATCH // distributed.world_size())
    options = {"crop_pct": cfg.INPUT.CROP_PCT, "interpolation": cfg.INPUT.INTERPOLATION, **pixel_statistics(cfg)}
    images = images_in_memory(cfg, dataset, create_transform(size, is_training=False, **options))
    if images is not None:
        return MemoryLoader(images, batch_size, device)
    prefetch = device.type == "cuda"
    loader = create_loader(
        dataset,
        size,
        batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        distributed=distributed.world_size() > 1,
        use_prefetcher=prefetch,
        pin_memory=prefetch,
        persistent_workers=False,
        device=device,
        **options,
    )
    shield_workers(loader.loader if prefetch else loader)
    return loader


def images_in_memory(cfg: CfgNode, dataset: Dataset, transform: Callable) -> ImagesInMemory | None:
    """`dataset` in memory, or None where DATALOADER.IN_MEMORY leaves it on the disk. What has been decoded for a
    transform is there again with the next loader for it, such as the next evaluation's.

    Args:
        transform: timm's, without its prefetcher.
    """
    if cfg.DATALOADER.IN_MEMORY == "never":
        return None
    by_batch = batch_augmentation(transform)
    if by_batch is None:
        return None
    known = _in_memory.setdefault(dataset, {})
    key = str((transform, cfg.INPUT, pixel_statistics(cfg), cfg.SEED))
    if key not in known:
        images = ImagesInMemory(dataset, by_batch, cfg.SEED)
        known[key] = images if cfg.DATALOADER.IN_MEMORY == "always" or fits_memory(images) else None
    return known[key]


_in_memory: WeakKeyDictionary[Dataset, dict[str, ImagesInMemory | None]] = WeakKeyDictionary()
