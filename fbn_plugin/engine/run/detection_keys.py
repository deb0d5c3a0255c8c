"""The keys of a detection run's config and their defaults: detectron2's for Mask R-CNN and Faster R-CNN with a feature
pyramid, without detectron2.

Keys, defaults and meaning are those of detectron2's ``config/defaults.py``, so that one YAML serves both engines; those
that are this project's are in ``frameworks/detectron2_keys.py``.
"""

import copy

from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.frameworks.detectron2_keys import add_keys

__all__ = ["FIXED", "MAY_CHANGE", "detection_config"]

_LEVELS = ["p2", "p3", "p4", "p5"]

# Keys with the one value that the torchvision engine can do, which is that of detectron2's FPN configs.
FIXED = {
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
    "MODEL.RPN.IOU_LABELS": [0, -1, 1],
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": _LEVELS,
    "MODEL.ROI_HEADS.IOU_LABELS": [0, 1],
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
    "TEST.AUG.ENABLED": False,
}

# What a resumed run may have otherwise. The checkpoint holds the base rate and the decay: a new value would do nothing.
MAY_CHANGE = (
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_ITER",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.BEST_CHECKPOINT_METRIC",
    "NORM_STATS_PERIOD",
    "MEASURE.*",
    "TEST.*",
    "OUTPUT_DIR",
    "CUDNN_BENCHMARK",
)


_MODEL = {
    "DEVICE": "cuda",  # the CPU where there is no GPU
    "WEIGHTS": "",
    "MASK_ON": False,
    "PIXEL_MEAN": [103.530, 116.280, 123.675],
    "PIXEL_STD": [1.0, 1.0, 1.0],
    "BACKBONE": {"FREEZE_AT": 2},
    "RESNETS": {
        "DEPTH": 50,
        "NORM": "FrozenBN",
        "NUM_GROUPS": 1,
        "WIDTH_PER_GROUP": 64,
        "STEM_OUT_CHANNELS": 64,
        "RES2_OUT_CHANNELS": 256,
        "STRIDE_IN_1X1": True,  # as MSRA's weights want it; False for Caffe2's and torchvision's
    },
    "FPN": {"OUT_CHANNELS": 256, "NORM": ""},
    "ANCHOR_GENERATOR": {
        "SIZES": [[32], [64], [128], [256], [512]],
        "ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
    },
    "PROPOSAL_GENERATOR": {"MIN_SIZE": 0},
    "RPN": {
        "CONV_DIMS": [-1],
        "BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0),
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "SMOOTH_L1_BETA": 0.0,
        "LOSS_WEIGHT": 1.0,
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
        "BBOX_REG_LOSS_WEIGHT": 1.0,
        "SMOOTH_L1_BETA": 0.0,
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

_INPUT = {
    "MIN_SIZE_TRAIN": (800,),
    "MIN_SIZE_TRAIN_SAMPLING": "choice",
    "MAX_SIZE_TRAIN": 1333,
    "MIN_SIZE_TEST": 800,
    "MAX_SIZE_TEST": 1333,
    "RANDOM_FLIP": "horizontal",
    "FORMAT": "BGR",
}

_SOLVER = {
    # The number of processes that batch, rate and schedule are meant for: see `scale_to_processes`; 0 is off.
    # It stands first: of all that differs when a run is resumed on another number, this is what to say.
    "REFERENCE_WORLD_SIZE": 0,
    "LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "MAX_ITER": 40000,
    "BASE_LR": 0.001,
    "BASE_LR_END": 0.0,
    "MOMENTUM": 0.9,
    "NESTEROV": False,
    "WEIGHT_DECAY": 0.0001,
    "WEIGHT_DECAY_NORM": 0.0,
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

_TEST = {
    "EVAL_PERIOD": 0,
    "DETECTIONS_PER_IMAGE": 100,
    # Before each evaluation, running statistics from so many training batches of each process.
    "PRECISE_BN": {"ENABLED": False, "NUM_ITER": 200},
}


def detection_config() -> CfgNode:
    """detectron2's defaults for the keys that are used here, with the MODEL section of its ``Base-RCNN-FPN.yaml``."""
    cfg = CfgNode(
        {
            "MODEL": copy.deepcopy(_MODEL),
            "INPUT": copy.deepcopy(_INPUT),
            "DATASETS": {"TRAIN": (), "TEST": ()},
            "DATALOADER": {
                "NUM_WORKERS": 4,
                "ASPECT_RATIO_GROUPING": True,
                "FILTER_EMPTY_ANNOTATIONS": True,
                # RepeatFactorTrainingSampler: an epoch has images of categories that fewer than REPEAT_THRESHOLD of the
                # images have more than once, up to the (square root of the) quotient of the two shares.
                "SAMPLER_TRAIN": "TrainingSampler",
                "REPEAT_THRESHOLD": 0.0,
                "REPEAT_SQRT": True,
            },
            "SOLVER": copy.deepcopy(_SOLVER),
            "TEST": copy.deepcopy(_TEST),
            "OUTPUT_DIR": "./output",
            "SEED": -1,
            "CUDNN_BENCHMARK": False,
            "FLOAT32_PRECISION": "",
        }
    )
    for key, value in FIXED.items():
        *groups, name = key.split(".")
        node = cfg
        for group in groups:
            node = node.setdefault(group, CfgNode())
        node[name] = copy.deepcopy(value)
    add_keys(cfg)
    return cfg
