"""COCO-format data as torchvision's detectors get them: the sets that a config names, checked against its model, and
their batches."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from fbn_plugin.engine.data.coco_data import Augmentation, CocoDataset, CocoDetection
from fbn_plugin.engine.data.dataset_checks import check_named_sets, check_number_of_classes, check_same_classes
from fbn_plugin.engine.data.loaders import data_loader, training_batches, training_loader
from fbn_plugin.engine.data.named_sets import resolve_dataset
from fbn_plugin.engine.data.sampling import repeat_factors
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import get_value, named

__all__ = ["DetectionData"]


class DetectionData:
    """The sets of a detection run.

    Args:
        cfg: from ``load_detection_config``, scaled to the number of processes.
        device: where the batches are going to.
        eval_only: without training images.

    Attributes:
        train, test: the sets.

    Raises:
        FileNotFoundError, ValueError: there is no such set, or it does not fit the model or the others; one sentence.
    """

    def __init__(self, cfg: CfgNode, device: torch.device, eval_only: bool):
        self.cfg = cfg
        self.device = device
        check_named_sets(cfg, eval_only)
        self.test = self._resolve("DATASETS.TEST")
        self.train = [] if eval_only else self._resolve("DATASETS.TRAIN")
        if not eval_only:
            check_same_classes({data.name: data.class_names for data in (*self.train, *self.test)})
            self._images = self._training_images()

    def _resolve(self, key: str) -> list[CocoDataset]:
        with named(key):
            found = [resolve_dataset(name) for name in get_value(self.cfg, key)]
        number = self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        for data in found:
            check_number_of_classes("MODEL.ROI_HEADS.NUM_CLASSES", number, data.name, data.class_names)
            data.say_left_out(self.cfg.MODEL.MASK_ON)
        return found

    def _training_images(self) -> CocoDetection:
        cfg = self.cfg
        augmentation = Augmentation(
            cfg.INPUT.MIN_SIZE_TRAIN,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            cfg.INPUT.RANDOM_FLIP,
        )
        images = CocoDetection(self.train, augmentation, cfg.MODEL.MASK_ON, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        if not len(images):
            raise ValueError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} has an object to train on")
        return images

    def loader(self, seed: int, start: int) -> DataLoader:
        """Batches of this process in the order of a seed, from the ``start``-th on, without end."""
        data, factors = self.cfg.DATALOADER, None
        if data.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
            factors = repeat_factors(self._images.categories, data.REPEAT_THRESHOLD, data.REPEAT_SQRT)
        groups = self._images.is_portrait if self.cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
        size = self.cfg.SOLVER.IMS_PER_BATCH // distributed.world_size()
        batches = training_batches(self._images, seed, size, start, groups, factors=factors)
        return training_loader(self._images, seed, batches, **self._options())

    def test_images(self, data: CocoDataset) -> DataLoader:
        """This process's share of a set's images, one at a time."""
        images = CocoDetection([data], masks=False)
        share = range(distributed.rank(), len(images), distributed.world_size())
        return data_loader(Subset(images, share), batch_size=1, **self._options())

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.cfg.DATALOADER.NUM_WORKERS,
            "collate_fn": _collate,
            "pin_memory": self.device.type == "cuda",
        }


def _collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[tuple, tuple]:
    return tuple(zip(*batch))
