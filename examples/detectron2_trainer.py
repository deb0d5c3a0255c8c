"""A detectron2 trainer of your own with filtered batch normalization: one call, and the norm's name in the config.

The data are images with a bright square each, made on the spot: name your set in ``DATASETS.TRAIN`` instead, and leave
``build_train_loader`` out. The network is small. Run: python examples/detectron2_trainer.py [OUTPUT_DIR]
"""

import sys
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.structures import BitMasks, Boxes, Instances

import fbn_plugin


def draw_square(record: dict) -> dict:
    """What a detectron2 model is trained with: an image (3, 64, 64) in 0..255, and its instances."""
    random = torch.Generator().manual_seed(record["image_id"])
    left, top, side = torch.randint(8, 30, (3,), generator=random).tolist()
    image, mask = 100 * torch.rand(3, 64, 64, generator=random), torch.zeros(1, 64, 64, dtype=torch.bool)
    image[:, top : top + side, left : left + side] += 150
    mask[:, top : top + side, left : left + side] = True
    boxes = Boxes(torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32))
    objects = Instances((64, 64), gt_boxes=boxes, gt_classes=torch.tensor([0]), gt_masks=BitMasks(mask))
    return {**record, "image": image, "instances": objects}


class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        return fbn_plugin.apply_gamma_init(super().build_model(cfg))  # for norms such as "FBN(gamma_init=0.1)"

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return build_detection_train_loader(cfg, mapper=draw_square)


def build_config(output_dir: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(Path(__file__).parents[1] / "configs" / "Base-RCNN-FPN.yaml"))
    model, solver, cfg.OUTPUT_DIR = cfg.MODEL, cfg.SOLVER, output_dir
    # The norms, in every place that has one. Nothing is frozen, as there are no weights to start from.
    model.RESNETS.NORM = model.FPN.NORM = model.ROI_MASK_HEAD.NORM = "FBN(t_sigma=5)"
    model.BACKBONE.FREEZE_AT, model.MASK_ON, model.DEVICE, model.ROI_HEADS.NUM_CLASSES = 0, True, "cpu", 1
    model.RESNETS.DEPTH, model.RESNETS.RES2_OUT_CHANNELS, model.FPN.OUT_CHANNELS = 18, 64, 32
    model.ROI_BOX_HEAD.FC_DIM = model.ROI_MASK_HEAD.CONV_DIM = model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 32
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS, cfg.SEED = ("squares",), (), 0, 1
    solver.IMS_PER_BATCH, solver.MAX_ITER, solver.BASE_LR, solver.WARMUP_ITERS, solver.STEPS = 2, 10, 0.005, 0, ()
    return cfg


def main(output_dir: str = "output/squares") -> Trainer:
    DatasetCatalog.register("squares", lambda: [{"image_id": i, "height": 64, "width": 64} for i in range(16)])
    fbn_plugin.register()  # before the model is built
    trainer = Trainer(build_config(output_dir))
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:2])
