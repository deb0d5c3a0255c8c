"""The image set that a config names, as a run trains on it: whole or in part, with validation images held out of the
training images, and without images whose files are broken where the config says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from fvcore.common.config import CfgNode

from fbn_plugin.engine.data.decoding import BrokenImageError
from fbn_plugin.engine.data.image_data import ImageData, Images, load_image_data
from fbn_plugin.engine.data.splits import held_out_by_class, subset_by_class
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.rules import Rule, at_least, between, one_of, or_zero, refusal

__all__ = ["RULES", "build_data", "say_broken"]

logger = logging.getLogger(__name__)

RULES = {
    "DATASETS.BROKEN_IMAGES": one_of("refuse", "skip"),
    "DATASETS.SPLIT_SEED": Rule("0 or more, and below 2**63, or -1, that of SEED", lambda given: -1 <= given < 2**63),
    "DATASETS.TRAIN_IMAGES": at_least(0, 2**31),
    "DATASETS.VAL_IMAGES": at_least(0, 2**31),
    "DATASETS.VAL_SHARE": or_zero(between(0.001, 0.9)),
}


def build_data(cfg: CfgNode) -> ImageData:
    """The images that DATASETS describes; its title says which part of a set they are.

    Which images are held out, or are in a part, follows from their classes and DATASETS.SPLIT_SEED.

    Raises:
        ValueError: fewer than two classes, empty files, or numbers that the set cannot give; see `load_image_data` too.
        FileNotFoundError: files are missing.
    """
    keys = cfg.DATASETS
    whole = load_image_data(keys.NAME, keys.ROOT, cfg.INPUT.FORMAT, needs_val=not keys.VAL_SHARE)
    if len(whole.classes) < 2:
        raise refusal("DATASETS.ROOT", f"of a set of 2 classes or more; {whole.title} has", whole.classes)
    skip = keys.BROKEN_IMAGES == "skip"
    seed = cfg.SEED if keys.SPLIT_SEED < 0 else keys.SPLIT_SEED
    notes, parts = [], {"train": whole.train, "val": whole.val, "test": whole.test}
    for part in parts.values() if not skip else ():
        if part is not None:
            _refuse_empty(part)
    if keys.VAL_SHARE:
        if whole.test is not None:
            what = f"0 with {whole.title}, which has a validation and a test set of its own"
            raise refusal("DATASETS.VAL_SHARE", what, keys.VAL_SHARE)
        stay, taken = held_out_by_class(parts["train"].targets, keys.VAL_SHARE, seed)
        if not len(taken):
            raise refusal("DATASETS.VAL_SHARE", "0 with one training image a class", keys.VAL_SHARE)
        parts = {"train": parts["train"].part(stay), "val": parts["train"].part(taken), "test": parts["val"]}
        if whole.val is None:
            notes.append(f"{whole.title} has no validation images of its own: nothing is tested at the end")
    parts["train"] = _subset(parts["train"], "DATASETS.TRAIN_IMAGES", keys.TRAIN_IMAGES, len(whole.classes), seed)
    parts["val"] = _subset(parts["val"], "DATASETS.VAL_IMAGES", keys.VAL_IMAGES, 1, seed)
    if skip:
        parts["train"].replace_broken()
        parts |= {name: parts[name] and _readable(parts[name], cfg, notes) for name in ("val", "test")}
    title = _title(whole, parts["train"], parts["val"], keys.VAL_SHARE)
    return dataclasses.replace(whole, title=title, notes=tuple(notes), **parts)


def say_broken(images: Images) -> None:
    """Log how many images of a run's training set were broken and replaced so far, over all processes."""
    if images.broken is None:
        return
    everyones = distributed.all_gather(images.broken.nonzero().flatten().tolist())
    if found := sorted({index for each in everyones for index in each}):
        names = _listed([images.name_of(index) for index in found])
        logger.warning("%s could not be read, and others took their places: %s", counted(len(found), "image"), names)


def _title(whole: ImageData, train: Images, val: Images, share: float) -> str:
    """The set's own, and what part of it was taken."""
    said = [whole.title]
    if len(train) < len(whole.train):
        said.append(f"{len(train)} of {len(whole.train)} training images")
    if share:
        said.append(f"{len(val)} held out")
    elif len(val) < len(whole.val):
        said.append(f"{len(val)} of {len(whole.val)} validation images")
    return ", ".join(said)


def _subset(images: Images, key: str, count: int, least: int, seed: int) -> Images:
    if not count:
        return images
    if not least <= count <= len(images):
        raise refusal(key, f"0, or from {least} to {len(images)}, as many as there are", count)
    return images.part(subset_by_class(images.targets, count, seed))


def _refuse_empty(images: Images) -> None:
    empty = [index for index in range(len(images)) if images.size_of(index) == 0]
    if empty:
        names = _listed([images.name_of(index) for index in empty])
        files = "image file is" if len(empty) == 1 else "image files are"
        hint = 'DATASETS.BROKEN_IMAGES "skip" passes over them'
        raise ValueError(f"{len(empty):,} {files} empty, {names}; {hint}")


def _readable(images: Images, cfg: CfgNode, notes: list[str]) -> Images:
    """The images that can be read, which are counted before the first figure: each is decoded once, shared out to the
    processes and in each to as many threads as there are workers."""

    def is_broken(index: int) -> bool:
        with contextlib.suppress(BrokenImageError):
            images[index]
            return False
        return True

    mine = range(distributed.rank(), len(images), distributed.world_size())
    with ThreadPoolExecutor(max(1, cfg.DATALOADER.NUM_WORKERS)) as threads:
        broken = [index for index, found in zip(mine, threads.map(is_broken, mine)) if found]
    broken = {index for each in distributed.all_gather(broken) for index in each}
    if not broken:
        return images
    names = _listed([images.name_of(index) for index in sorted(broken)])
    if len(broken) == len(images):
        raise ValueError(f"no image to evaluate on can be read: {names}")
    notes.append(f"{counted(len(broken), 'image')} to evaluate on left out, which cannot be read: {names}")
    return images.part([index for index in range(len(images)) if index not in broken])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
