"""Training and evaluation of torchvision's Mask R-CNN from a config in detectron2's vocabulary.

The same keys, defaults, learning rate schedules, weight decay rules and sizes as detectron2 (``config/defaults.py``,
``solver/build.py``, ``data/dataset_mapper.py``), so that one YAML serves both; what torchvision's model does otherwise
(the smooth L1 point, RoIAlign's half pixel, the place of the stride) stays torchvision's.
"""

import json
import logging
import os
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from tqdm import tqdm

from fbn_plugin.engine import distributed
from fbn_plugin.engine.checkpoint import AtomicCheckpointer, PeriodicCheckpointer, RandomState, atomic_write, load_file
from fbn_plugin.engine.coco_data import Augmentation, CocoDataset, CocoDetection, resolve_dataset, scaled_size
from fbn_plugin.engine.coco_eval import coco_results, evaluate_coco
from fbn_plugin.engine.config import CfgNode, check_resume, load_config, save_config
from fbn_plugin.engine.logging import Timer, TrainingLog, read_metrics, setup_logging
from fbn_plugin.engine.sampling import GroupedBatchSampler, InfiniteSampler, SeededDataset
from fbn_plugin.frameworks.torchvision import load_backbone, mask_rcnn_fpn
from fbn_plugin.input_norm import prepend_input_norm
from fbn_plugin.param_groups import param_groups
from fbn_plugin.registry import parse_spec

__all__ = [
    "DetectionTrainer",
    "build_model",
    "build_optimizer",
    "build_scheduler",
    "detection_config",
    "load_detection_config",
]

logger = logging.getLogger(__name__)

_LEVELS = ["p2", "p3", "p4", "p5"]

# Keys with the one value that this engine can do, which is that of detectron2's FPN configs.
_FIXED = {
    "VERSION": 2,
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.LOAD_PROPOSALS": False,
    "MODEL.KEYPOINT_ON": False,
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False] * 4,
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.FUSE_TYPE": "sum",
    "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
    "MODEL.ANCHOR_GENERATOR.NAME": "DefaultAnchorGenerator",
    "MODEL.RPN.HEAD_NAME": "StandardRPNHead",
    "MODEL.RPN.IN_FEATURES": [*_LEVELS, "p6"],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": _LEVELS,
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": True,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": False,
    "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": False,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": False,
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": False,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK": False,
    "INPUT.CROP.ENABLED": False,
    "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "TEST.AUG.ENABLED": False,
    "TEST.PRECISE_BN.ENABLED": False,
}

# detectron2's other keys: they belong to other models, or torchvision's model has no such setting.
_UNUSED = (
    "MODEL.RESNETS.STRIDE_IN_1X1",
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "MODEL.RESNETS.DEFORM_*",
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE",
    "MODEL.ANCHOR_GENERATOR.ANGLES",
    "MODEL.ANCHOR_GENERATOR.OFFSET",
    "MODEL.RPN.BOUNDARY_THRESH",
    "MODEL.RPN.IOU_LABELS",
    "MODEL.RPN.BBOX_REG_*",
    "MODEL.RPN.SMOOTH_L1_BETA",
    "MODEL.RPN.LOSS_WEIGHT",
    "MODEL.ROI_HEADS.IOU_LABELS",
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT",
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA",
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_*",
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE",
    "MODEL.ROI_BOX_CASCADE_HEAD.*",
    "MODEL.ROI_KEYPOINT_HEAD.*",
    "MODEL.SEM_SEG_HEAD.*",
    "MODEL.PANOPTIC_FPN.*",
    "MODEL.RETINANET.*",
    "INPUT.CROP.*",
    "INPUT.MASK_FORMAT",
    "DATASETS.P*",
    "DATALOADER.REPEAT_*",
    "SOLVER.NUM_DECAYS",
    "TEST.EXPECTED_RESULTS",
    "TEST.KEYPOINT_OKS_SIGMAS",
    "TEST.AUG.*",
    "TEST.PRECISE_BN.*",
    "VIS_PERIOD",
    "GLOBAL.*",
)

# What a resumed run may have otherwise. The checkpoint holds the base rate and the decay: a new value would do nothing.
_MAY_CHANGE = (
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.*",
    "OUTPUT_DIR",
    "CUDNN_BENCHMARK",
)

_LOSS_NAMES = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_loc", "loss_classifier": "loss_cls"}


def detection_config() -> CfgNode:
    """detectron2's defaults for the keys that are used here, with the MODEL section of its ``Base-RCNN-FPN.yaml``."""
    cfg = CfgNode()
    cfg.MODEL = CfgNode(
        {
            "DEVICE": "cuda",  # the CPU where there is no GPU
            "WEIGHTS": "",
            "MASK_ON": False,
            "PIXEL_MEAN": [103.530, 116.280, 123.675],
            "PIXEL_STD": [1.0, 1.0, 1.0],
            "BACKBONE": {"FREEZE_AT": 2},
            "RESNETS": {"DEPTH": 50, "NORM": "FrozenBN", "NUM_GROUPS": 1, "WIDTH_PER_GROUP": 64},
            "FPN": {"OUT_CHANNELS": 256, "NORM": ""},
            "ANCHOR_GENERATOR": {
                "SIZES": [[32], [64], [128], [256], [512]],
                "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            },
            "RPN": {
                "CONV_DIMS": [-1],
                "IOU_THRESHOLDS": [0.3, 0.7],
                "BATCH_SIZE_PER_IMAGE": 256,
                "POSITIVE_FRACTION": 0.5,
                "PRE_NMS_TOPK_TRAIN": 2000,
                "PRE_NMS_TOPK_TEST": 1000,
                "POST_NMS_TOPK_TRAIN": 1000,
                "POST_NMS_TOPK_TEST": 1000,
                "NMS_THRESH": 0.7,
            },
            "ROI_HEADS": {
                "NUM_CLASSES": 80,
                "IOU_THRESHOLDS": [0.5],
                "BATCH_SIZE_PER_IMAGE": 512,
                "POSITIVE_FRACTION": 0.25,
                "SCORE_THRESH_TEST": 0.05,
                "NMS_THRESH_TEST": 0.5,
            },
            "ROI_BOX_HEAD": {
                "BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0),
                "POOLER_RESOLUTION": 7,
                "POOLER_SAMPLING_RATIO": 0,
                "NUM_FC": 2,
                "FC_DIM": 1024,
                "NUM_CONV": 0,
                "CONV_DIM": 256,
                "NORM": "",
            },
            "ROI_MASK_HEAD": {
                "POOLER_RESOLUTION": 14,
                "POOLER_SAMPLING_RATIO": 0,
                "NUM_CONV": 4,
                "CONV_DIM": 256,
                "NORM": "",
            },
        }
    )
    cfg.INPUT = CfgNode(
        {
            "MIN_SIZE_TRAIN": (800,),
            "MIN_SIZE_TRAIN_SAMPLING": "choice",
            "MAX_SIZE_TRAIN": 1333,
            "MIN_SIZE_TEST": 800,
            "MAX_SIZE_TEST": 1333,
            "RANDOM_FLIP": "horizontal",
            "FORMAT": "BGR",
            # Above 0: PIXEL_MEAN and PIXEL_STD give way to a norm that learns, with a scale of 0.58 times this number.
            "NORM_GAMMA_INIT": 0.0,
        }
    )
    cfg.DATASETS = CfgNode({"TRAIN": (), "TEST": ()})
    cfg.DATALOADER = CfgNode({"NUM_WORKERS": 4, "ASPECT_RATIO_GROUPING": True, "FILTER_EMPTY_ANNOTATIONS": True})
    cfg.SOLVER = CfgNode(
        {
            "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
            "MAX_ITER": 40000,
            "BASE_LR": 0.001,
            "BASE_LR_END": 0.0,
            "MOMENTUM": 0.9,
            "NESTEROV": False,
            "WEIGHT_DECAY": 0.0001,
            "WEIGHT_DECAY_NORM": 0.0,
            # The scale of batch norms learns so many times slower (Davis and Frank 2022: 100), and neither norms nor
            # biases decay; 1 is all at one rate. 0: detectron2's groups.
            "SCALE_LR_DIVISOR": 0.0,
            "GAMMA": 0.1,
            "STEPS": (30000,),
            "WARMUP_FACTOR": 0.001,
            "WARMUP_ITERS": 1000,
            "WARMUP_METHOD": "linear",
            "RESCALE_INTERVAL": False,
            "CHECKPOINT_PERIOD": 5000,
            "IMS_PER_BATCH": 16,
            "BIAS_LR_FACTOR": 1.0,
            "WEIGHT_DECAY_BIAS": None,
            "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0},
            "AMP": {"ENABLED": False},
        }
    )
    cfg.TEST = CfgNode({"EVAL_PERIOD": 0, "DETECTIONS_PER_IMAGE": 100})
    cfg.OUTPUT_DIR = "./output"
    cfg.SEED = -1
    cfg.CUDNN_BENCHMARK = False
    cfg.FLOAT32_PRECISION = ""
    for key, value in _FIXED.items():
        *groups, name = key.split(".")
        node = cfg
        for group in groups:
            node = node.setdefault(group, CfgNode())
        node[name] = value
    return cfg


def load_detection_config(config_file: str | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """``load_config`` for this engine, with every value checked that can be checked without data.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the key and what it takes.
    """
    cfg = load_config(detection_config(), config_file, overrides, _UNUSED)
    for key, value in _FIXED.items():
        _require(cfg, key, lambda given, value=value: given == value, f"{value!r} in this tool")
    for key, choices in {
        "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
        "MODEL.BACKBONE.FREEZE_AT": tuple(range(6)),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
        "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
        "INPUT.FORMAT": ("BGR", "RGB"),
        "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR"),
        "SOLVER.WARMUP_METHOD": ("linear", "constant"),
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
        "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
    }.items():
        _require(cfg, key, choices.__contains__, f"one of {', '.join(map(repr, choices))}")
    for key in (
        "SOLVER.MAX_ITER",
        "SOLVER.IMS_PER_BATCH",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.BASE_LR",
        "TEST.DETECTIONS_PER_IMAGE",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE",
        "MODEL.FPN.OUT_CHANNELS",
        "INPUT.MAX_SIZE_TRAIN",
        "INPUT.MAX_SIZE_TEST",
        "MODEL.RESNETS.NUM_GROUPS",
        "MODEL.RESNETS.WIDTH_PER_GROUP",
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
        "MODEL.RPN.PRE_NMS_TOPK_TEST",
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_BOX_HEAD.FC_DIM",
        "MODEL.ROI_BOX_HEAD.CONV_DIM",
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION",
        "MODEL.ROI_MASK_HEAD.CONV_DIM",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
    ):
        _require(cfg, key, lambda given: given > 0, "above 0")
    for key in (
        "TEST.EVAL_PERIOD",
        "DATALOADER.NUM_WORKERS",
        "SOLVER.WARMUP_ITERS",
        "SOLVER.WEIGHT_DECAY",
        "SOLVER.WEIGHT_DECAY_NORM",
        "SOLVER.SCALE_LR_DIVISOR",
        "INPUT.MIN_SIZE_TEST",
        "MODEL.ROI_BOX_HEAD.NUM_FC",
        "MODEL.ROI_BOX_HEAD.NUM_CONV",
        "MODEL.ROI_MASK_HEAD.NUM_CONV",
    ):
        _require(cfg, key, lambda given: given >= 0, "0 or more")
    for key in (
        "SOLVER.WARMUP_FACTOR",
        "INPUT.NORM_GAMMA_INIT",
        "MODEL.RPN.NMS_THRESH",
        "MODEL.RPN.POSITIVE_FRACTION",
        "MODEL.ROI_HEADS.NMS_THRESH_TEST",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        "MODEL.ROI_HEADS.POSITIVE_FRACTION",
    ):
        _require(cfg, key, lambda given: 0 <= given <= 1, "from 0 to 1")
    for key, length in {
        "MODEL.PIXEL_MEAN": 3,
        "MODEL.PIXEL_STD": 3,
        "MODEL.RPN.IOU_THRESHOLDS": 2,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": 1,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": 4,
    }.items():
        _require(cfg, key, lambda given, length=length: len(given) == length, f"a list of {length}")
    for key in ("MODEL.RPN.IOU_THRESHOLDS", "MODEL.ROI_HEADS.IOU_THRESHOLDS"):
        _require(cfg, key, lambda given: [0, *given, 1] == sorted([0, *given, 1]), "increasing from 0 to 1")
    _require(cfg, "MODEL.PIXEL_STD", lambda given: min(given) > 0, "above 0 for each channel")
    _require(cfg, "MODEL.DEVICE", re.compile(r"cpu|cuda(:\d+)?").fullmatch, "'cuda', 'cuda:0' and the like, or 'cpu'")
    _require(cfg, "SEED", lambda given: given < 2**63, "below 2**63")
    _require(
        cfg,
        "SOLVER.WEIGHT_DECAY_BIAS",
        lambda given: given is None or (isinstance(given, int | float) and 0 <= given < float("inf")),
        "None, or a number that is 0 or more",
    )
    if cfg.SOLVER.SCALE_LR_DIVISOR:
        for key, values in {"WEIGHT_DECAY_NORM": (0,), "WEIGHT_DECAY_BIAS": (None, 0), "BIAS_LR_FACTOR": (1,)}.items():
            what = f"{values[0]} with SCALE_LR_DIVISOR, which sets the decay of norms and biases to 0"
            _require(cfg, f"SOLVER.{key}", values.__contains__, what)
    _require(cfg, "INPUT.MIN_SIZE_TRAIN", lambda given: given and all(size > 0 for size in given), "sizes above 0")
    _require(cfg, "SOLVER.STEPS", lambda given: list(given) == sorted(set(given)), "increasing iterations")
    own = (-1, cfg.MODEL.FPN.OUT_CHANNELS)
    _require(cfg, "MODEL.RPN.CONV_DIMS", lambda given: all(dim in own for dim in given), f"a list of -1 or {own[1]}")
    for key in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        norm = cfg.MODEL[key].NORM
        if norm and norm != "FrozenBN":
            try:
                parse_spec(norm)
            except ValueError as error:
                raise ValueError(f"MODEL.{key}.NORM: {error}") from None
    return cfg


def _require(cfg: CfgNode, key: str, accept, what: str) -> None:
    value = cfg
    for name in key.split("."):
        value = value[name]
    if not accept(value):
        raise ValueError(f"{key} must be {what}, not {value!r}")


class DetectionTransform(GeneralizedRCNNTransform):
    """torchvision's step before the backbone, for images that are float RGB in 0..1 of any size.

    Training images come resized by the data loader; for evaluation they are resized here, antialiased as there, so that
    detections come out in the pixels of the image as given.
    """

    def __init__(self, min_size: int, max_size: int, mean: Sequence[float], std: Sequence[float], bgr: bool):
        super().__init__(min_size, max_size, [value / 255 for value in mean], [value / 255 for value in std])
        self.bgr = bgr

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.flip(0) if self.bgr else image)

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        short = self.min_size[0]
        if self.training or short == 0:
            return image, target
        size = scaled_size(*image.shape[-2:], short, self.max_size)
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0], target


def build_model(cfg: CfgNode) -> nn.Module:
    """The Mask R-CNN (without MODEL.MASK_ON: Faster R-CNN) that the config describes, with random weights, on the CPU.

    It takes float RGB images in 0..1 of any size, whatever INPUT.FORMAT, and classes count from 1.
    """
    m = cfg.MODEL
    options = {}
    if (m.RESNETS.NUM_GROUPS, m.RESNETS.WIDTH_PER_GROUP) != (1, 64):
        if m.RESNETS.DEPTH < 50:
            raise ValueError(
                f"MODEL.RESNETS.NUM_GROUPS and WIDTH_PER_GROUP must be 1 and 64 at DEPTH {m.RESNETS.DEPTH}"
            )
        options = {"groups": m.RESNETS.NUM_GROUPS, "width_per_group": m.RESNETS.WIDTH_PER_GROUP}
    if m.ROI_BOX_HEAD.NORM and not m.ROI_BOX_HEAD.NUM_CONV:
        logger.warning("MODEL.ROI_BOX_HEAD.NORM has no effect: the box head has no convolution (NUM_CONV 0)")
    model = mask_rcnn_fpn(
        f"resnet{m.RESNETS.DEPTH}",
        m.RESNETS.NORM,
        m.FPN.NORM,
        m.ROI_BOX_HEAD.NORM,
        m.ROI_MASK_HEAD.NORM,
        num_classes=m.ROI_HEADS.NUM_CLASSES + 1,
        masks=m.MASK_ON,
        trainable_layers=5 - m.BACKBONE.FREEZE_AT,
        backbone_options=options,
        fpn_channels=m.FPN.OUT_CHANNELS,
        anchor_sizes=m.ANCHOR_GENERATOR.SIZES,
        aspect_ratios=m.ANCHOR_GENERATOR.ASPECT_RATIOS,
        rpn_convs=len(m.RPN.CONV_DIMS),
        box_convs=[m.ROI_BOX_HEAD.CONV_DIM] * m.ROI_BOX_HEAD.NUM_CONV,
        box_fcs=[m.ROI_BOX_HEAD.FC_DIM] * m.ROI_BOX_HEAD.NUM_FC,
        box_resolution=m.ROI_BOX_HEAD.POOLER_RESOLUTION,
        box_sampling_ratio=m.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
        mask_convs=[m.ROI_MASK_HEAD.CONV_DIM] * m.ROI_MASK_HEAD.NUM_CONV,
        mask_resolution=m.ROI_MASK_HEAD.POOLER_RESOLUTION,
        mask_sampling_ratio=m.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO,
        rpn_pre_nms_top_n_train=m.RPN.PRE_NMS_TOPK_TRAIN,
        rpn_pre_nms_top_n_test=m.RPN.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_train=m.RPN.POST_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_test=m.RPN.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=m.RPN.NMS_THRESH,
        rpn_bg_iou_thresh=m.RPN.IOU_THRESHOLDS[0],
        rpn_fg_iou_thresh=m.RPN.IOU_THRESHOLDS[1],
        rpn_batch_size_per_image=m.RPN.BATCH_SIZE_PER_IMAGE,
        rpn_positive_fraction=m.RPN.POSITIVE_FRACTION,
        box_score_thresh=m.ROI_HEADS.SCORE_THRESH_TEST,
        box_nms_thresh=m.ROI_HEADS.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_fg_iou_thresh=m.ROI_HEADS.IOU_THRESHOLDS[0],
        box_bg_iou_thresh=m.ROI_HEADS.IOU_THRESHOLDS[0],
        box_batch_size_per_image=m.ROI_HEADS.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=m.ROI_HEADS.POSITIVE_FRACTION,
        bbox_reg_weights=m.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
    )
    model.transform = DetectionTransform(
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, m.PIXEL_MEAN, m.PIXEL_STD, cfg.INPUT.FORMAT == "BGR"
    )
    if cfg.INPUT.NORM_GAMMA_INIT:
        prepend_input_norm(model, cfg.INPUT.NORM_GAMMA_INIT)
    return model


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD with detectron2's parameter groups: norms decay by WEIGHT_DECAY_NORM, biases by WEIGHT_DECAY_BIAS if that is
    set, and biases learn BIAS_LR_FACTOR times as fast; or, with SCALE_LR_DIVISOR, with those of `param_groups`."""
    solver = cfg.SOLVER
    if solver.SCALE_LR_DIVISOR:
        parameters = param_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
        return torch.optim.SGD(parameters, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    seen = set()
    for module in model.modules():
        is_norm = isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY_NORM if is_norm else solver.WEIGHT_DECAY
            if name == "bias":
                lr *= solver.BIAS_LR_FACTOR
                decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
            groups.setdefault((lr, decay), []).append(parameter)
    parameters = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    return torch.optim.SGD(parameters, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """detectron2's WarmupMultiStepLR or WarmupCosineLR, one step an iteration."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        schedule: ParamScheduler = MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)
    else:
        schedule = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if warmup > 0:
        start = solver.WARMUP_FACTOR * schedule(0.0)
        end = schedule(0.0 if solver.RESCALE_INTERVAL else warmup)
        rise = LinearParamScheduler(start, end) if solver.WARMUP_METHOD == "linear" else ConstantParamScheduler(start)
        if warmup == 1.0:
            schedule = rise
        else:
            scaling = ["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"]
            schedule = CompositeParamScheduler([rise, schedule], [warmup, 1 - warmup], scaling)
    # fvcore's schedules end before 1; the rate after the last iteration is asked for, and not used.
    last = solver.MAX_ITER - 1
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda it: schedule(min(it, last) / solver.MAX_ITER))


def _collate(batch: list[tuple[Tensor, dict[str, Any]]]) -> tuple[tuple, tuple]:
    return tuple(zip(*batch))


class DetectionTrainer:
    """One run: data, model, optimizer and checkpoints of a config.

    Everything that bad input can break happens in the constructor; the output folder is made only after it all fits.

    Args:
        cfg: from ``load_detection_config``.
        resume: continue from OUTPUT_DIR's last checkpoint, if there is one, with the settings it began with;
            only the device, the number of iterations or workers, and how often to save or evaluate may change. On the
            CPU the run then ends with the same bits as one that was never stopped; on a GPU some backward passes add in
            no fixed order.
        eval_only: only evaluate: MODEL.WEIGHTS, or with ``resume`` the last checkpoint.
        log_period: iterations between two lines of ``metrics.json``.

    Raises:
        FileNotFoundError, ValueError: bad data, weights or settings, in one sentence.
    """

    def __init__(self, cfg: CfgNode, resume: bool = False, eval_only: bool = False, log_period: int = 20):
        self.cfg = cfg
        self.log_period = log_period
        self.device = distributed.init(cfg.MODEL.DEVICE)
        images, world = cfg.SOLVER.IMS_PER_BATCH, distributed.world_size()
        self.batch_size, rest = divmod(images, world)
        if rest:
            raise ValueError(f"SOLVER.IMS_PER_BATCH {images} must be a multiple of the number of processes, {world}")
        norms = [cfg.MODEL[part].NORM for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
        if self.device.type == "cpu" and any(norm.startswith("SyncBN") for norm in norms):
            raise ValueError(
                "SyncBN runs on GPUs only; use BN or, over several processes, SyncFBN(t_sigma=inf) on the CPU"
            )
        previous = os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
        if eval_only and not (cfg.MODEL.WEIGHTS or (resume and previous)):
            raise ValueError("nothing to evaluate: set MODEL.WEIGHTS, or --resume with a checkpoint in OUTPUT_DIR")
        if os.path.exists(cfg.OUTPUT_DIR) and not os.path.isdir(cfg.OUTPUT_DIR):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} is a file, not a folder")
        if previous and not (resume or eval_only):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run; add --resume to continue it, or choose another")
        if previous and resume and not eval_only:
            check_resume(cfg, detection_config(), _MAY_CHANGE)
        self.test_sets = [self._dataset(name) for name in cfg.DATASETS.TEST]
        if eval_only and not self.test_sets:
            raise ValueError("DATASETS.TEST is empty; set it to a dataset such as 'my_data:val'")
        if not eval_only:
            self.train_set = self._training_data()
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        if cfg.FLOAT32_PRECISION:
            torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)

        seed = cfg.SEED if cfg.SEED >= 0 else int.from_bytes(os.urandom(4), "little")
        self.seed = distributed.broadcast_object(seed)
        self._seed_generators(self.seed)  # the same weights on every rank
        self.model = build_model(cfg).to(self.device)
        self._seed_generators(self.seed + distributed.rank())
        self.optimizer = build_optimizer(cfg, self.model)
        self.scheduler = build_scheduler(cfg, self.optimizer)
        fp16 = cfg.SOLVER.AMP.ENABLED and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.checkpointer = AtomicCheckpointer(
            self.model,
            cfg.OUTPUT_DIR,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            scaler=self.scaler,
            random=RandomState(),
        )
        self.start = 0
        if resume and previous:
            last = self.checkpointer.get_checkpoint_file()
            state = self.checkpointer.load(last, checkpointables=[] if eval_only else None, strict=True)
            if not {"iteration", "seed"} <= state.keys():
                raise ValueError(f"checkpoint {last} is not of a run of this tool: it has no iteration")
            self.start, self.seed = state["iteration"] + 1, state["seed"]
            if self.start > cfg.SOLVER.MAX_ITER and not eval_only:
                raise ValueError(
                    f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is too few: the run that OUTPUT_DIR {cfg.OUTPUT_DIR} holds "
                    f"has {self.start} iterations"
                )
        elif cfg.MODEL.WEIGHTS:
            self._load_weights(cfg.MODEL.WEIGHTS, strict=eval_only)
        elif cfg.MODEL.BACKBONE.FREEZE_AT > 0:
            logger.warning(
                "MODEL.BACKBONE.FREEZE_AT %d freezes random weights, as MODEL.WEIGHTS is empty; 0 trains all of them",
                cfg.MODEL.BACKBONE.FREEZE_AT,
            )
        if distributed.is_main():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            if not eval_only:
                save_config(cfg, os.path.join(cfg.OUTPUT_DIR, "config.yaml"))
        distributed.barrier()
        setup_logging(cfg.OUTPUT_DIR)

    def train(self) -> dict[str, float]:
        """Train to SOLVER.MAX_ITER with checkpoints and evaluations on the way; return the last evaluation's metrics.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        cfg = self.cfg
        model = self.model
        if distributed.world_size() > 1:
            model = DistributedDataParallel(model, [self.device] if self.device.type == "cuda" else None)
        periodic = PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER)
        path = os.path.join(cfg.OUTPUT_DIR, "metrics.json")
        logger.info(
            "training on %s, %d process(es), iteration %d to %d, seed %d",
            self.device,
            distributed.world_size(),
            self.start + 1,
            cfg.SOLVER.MAX_ITER,
            self.seed,
        )
        with TrainingLog(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, self.start, self.log_period) as log:
            # An interruption after a checkpoint and before its evaluation.
            metrics = self._recorded(path) if self._evaluates_after(self.start) else {}
            if self._evaluates_after(self.start) and not metrics:
                log.write(self.start - 1, metrics := self.evaluate())
            loader = iter(self._loader())
            model.train()
            timer = Timer()
            for iteration in range(self.start, cfg.SOLVER.MAX_ITER):
                timer()
                images, targets = next(loader)
                data_time = timer()
                lr = self.optimizer.param_groups[0]["lr"]
                losses = self._step(model, iteration, images, targets)
                log.step(iteration, **losses, lr=lr, time=data_time + timer(), data_time=data_time)
                periodic.step(iteration, seed=self.seed)
                if self._evaluates_after(iteration + 1):
                    log.write(iteration, metrics := self.evaluate())
                    model.train()
        return metrics

    def evaluate(self) -> dict[str, float]:
        """COCO AP in percent on every set of DATASETS.TEST: ``bbox/AP``, ``segm/AP50``, ..., the same on every process.

        With more than one set, each key has the set's name in front. The detections go to OUTPUT_DIR/inference. Draws
        no random numbers, so that training goes on as if there had been no evaluation.
        """
        distributed.broadcast_buffers(self.model)
        self.model.eval()
        metrics = {}
        for data in self.test_sets:
            results = [each for part in distributed.all_gather(self._detect(data)) for each in part]
            values = None
            if distributed.is_main():
                name = re.sub(r"\W+", "_", data.name) if len(self.test_sets) > 1 else ""
                folder = os.path.join(self.cfg.OUTPUT_DIR, "inference", name)
                os.makedirs(folder, exist_ok=True)
                atomic_write(os.path.join(folder, "coco_instances_results.json"), json.dumps(results).encode())
                limit = max(100, self.cfg.TEST.DETECTIONS_PER_IMAGE)
                values = evaluate_coco(data, results, self.cfg.MODEL.MASK_ON, limit)
                for task in ("bbox", "segm") if self.cfg.MODEL.MASK_ON else ("bbox",):
                    line = "  ".join(
                        f"{n} {values[f'{task}/{n}']:.2f}" for n in ("AP", "AP50", "AP75", "APs", "APm", "APl")
                    )
                    logger.info("%s %s: %s", data.name, task, line)
            values = distributed.broadcast_object(values)
            prefix = f"{data.name}/" if len(self.test_sets) > 1 else ""
            metrics.update({prefix + name: value for name, value in values.items()})
        return metrics

    def _dataset(self, name: str) -> CocoDataset:
        data = resolve_dataset(name)
        count, classes = len(data.class_names), self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        if count != classes:
            listed = ", ".join(data.class_names[:5]) + (", ..." if count > 5 else "")
            raise ValueError(f"MODEL.ROI_HEADS.NUM_CLASSES is {classes}, but dataset {name!r} has {count}: {listed}")
        return data

    def _training_data(self) -> CocoDetection:
        cfg = self.cfg
        if not cfg.DATASETS.TRAIN:
            raise ValueError("DATASETS.TRAIN is empty; set it to a dataset such as 'my_data:train'")
        sets = [self._dataset(name) for name in cfg.DATASETS.TRAIN]
        for other in [*sets[1:], *self.test_sets]:
            if other.class_names != sets[0].class_names:
                raise ValueError(f"datasets {sets[0].name!r} and {other.name!r} have different classes")
        augmentation = Augmentation(
            cfg.INPUT.MIN_SIZE_TRAIN,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            cfg.INPUT.RANDOM_FLIP,
        )
        data = CocoDetection(sets, augmentation, cfg.MODEL.MASK_ON, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
        if not len(data):
            raise ValueError(f"no image of {', '.join(cfg.DATASETS.TRAIN)} has an object to train on")
        return data

    def _loader(self) -> DataLoader:
        """Batches of this rank from ``self.start`` on."""
        rank, world = distributed.rank(), distributed.world_size()
        if self.cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            stream = InfiniteSampler(len(self.train_set), self.seed, rank, world)
            batches = GroupedBatchSampler(stream, self.train_set.is_portrait, self.batch_size, skip=self.start)
            how = {"batch_sampler": batches}
        else:
            first = self.start * self.batch_size
            how = {"sampler": InfiniteSampler(len(self.train_set), self.seed, rank, world, first)}
            how["batch_size"] = self.batch_size
        return self._data_loader(SeededDataset(self.train_set, self.seed), **how)

    def _data_loader(self, dataset, **how) -> DataLoader:
        # A generator of its own: the loader's draw would move the global one, and a run resumed here would differ.
        return DataLoader(
            dataset,
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),
            **how,
        )

    def _step(
        self, model: nn.Module, iteration: int, images: Sequence[Tensor], targets: Sequence[dict]
    ) -> dict[str, float]:
        images = [image.to(self.device, non_blocking=True) for image in images]
        targets = [
            {name: value.to(self.device, non_blocking=True) for name, value in target.items() if name != "image_id"}
            for target in targets
        ]
        with torch.autocast(self.device.type, enabled=self.cfg.SOLVER.AMP.ENABLED):
            losses = model(images, targets)
            total = sum(losses.values())
        values = {_LOSS_NAMES.get(name, name): loss.item() for name, loss in losses.items()}
        values = distributed.reduce_mean({"total_loss": sum(values.values()), **values}, self.device)
        if not np.isfinite(values["total_loss"]):
            listed = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise FloatingPointError(
                f"the loss is not finite at iteration {iteration} ({listed}); lower SOLVER.BASE_LR, or clip gradients"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        self._clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return values

    def _clip_gradients(self) -> None:
        clip = self.cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED:
            self.scaler.unscale_(self.optimizer)
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:  # each parameter by itself, as detectron2
                    if clip.CLIP_TYPE == "value":
                        nn.utils.clip_grad_value_(parameter, clip.CLIP_VALUE)
                    else:
                        nn.utils.clip_grad_norm_(parameter, clip.CLIP_VALUE, clip.NORM_TYPE)

    @torch.inference_mode()
    def _detect(self, data: CocoDataset) -> list[dict[str, Any]]:
        """This rank's share of the detections on a set."""
        dataset = CocoDetection([data], masks=False)
        share = range(distributed.rank(), len(dataset), distributed.world_size())
        loader = self._data_loader(Subset(dataset, share), batch_size=1)
        results = []
        for images, targets in tqdm(loader, "evaluating", leave=False, disable=None if distributed.is_main() else True):
            (output,) = self.model([images[0].to(self.device)])
            results += coco_results(data, targets[0]["image_id"], output)
        return results

    def _load_weights(self, path: str, strict: bool) -> None:
        if path.startswith("detectron2://") or path.endswith(".pkl"):
            raise ValueError(
                f"MODEL.WEIGHTS {path!r} is detectron2's; use a file of torchvision or of this tool, or ''"
            )
        local = self.checkpointer.path_manager.get_local_path(path) if "://" in path else path
        weights = load_file(local)["model"]
        if "conv1.weight" in weights and not strict:
            load_backbone(self.model.backbone.body, weights)
            if self.cfg.INPUT.FORMAT == "BGR":
                logger.warning(
                    "torchvision's ImageNet weights want INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] "
                    "and MODEL.PIXEL_STD [58.395, 57.12, 57.375]"
                )
            return
        if not weights.keys() & self.model.state_dict().keys():
            raise ValueError(f"MODEL.WEIGHTS {path!r} has no entry of this model")
        self.checkpointer.load(local, checkpointables=[], strict=strict)

    def _evaluates_after(self, iterations: int) -> bool:
        period = self.cfg.TEST.EVAL_PERIOD
        due = iterations == self.cfg.SOLVER.MAX_ITER or (period > 0 and iterations % period == 0)
        return bool(self.test_sets) and iterations > 0 and due

    def _recorded(self, path: str) -> dict[str, float]:
        """The evaluation that ``metrics.json`` holds for the iteration before this run's first, on every process."""
        rows = [row for row in read_metrics(path) if row["iteration"] == self.start - 1]
        found = {key: np.nan if value is None else value for row in rows for key, value in row.items() if "/" in key}
        return distributed.broadcast_object(found)

    @staticmethod
    def _seed_generators(seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
