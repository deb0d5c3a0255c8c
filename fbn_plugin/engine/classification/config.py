"""The config of a classification run: every key with its default, and what is refused before a run begins. The keys
speak detectron2's vocabulary where it has a word.
"""

import copy

from timm.optim import list_optimizers

from fbn_plugin.engine.classification.data import build_train_transform
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import (
    COMMON_RULES,
    MOST_ITERATIONS,
    Rule,
    above,
    at_least,
    between,
    check_norms,
    check_values,
    each,
    exactly,
    from_to_below,
    increasing,
    one_of,
    or_zero,
)

__all__ = ["MAY_CHANGE", "check_config", "classification_config"]

# What a resumed run may have otherwise; the learning rate's schedule is computed anew.
MAY_CHANGE = (
    "MODEL.DEVICE",
    "DATALOADER.NUM_WORKERS",
    "SOLVER.MAX_EPOCH",
    "SOLVER.MAX_ITER",
    "SOLVER.BASE_LR",
    "SOLVER.MIN_LR",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.BEST_CHECKPOINT_METRIC",
    "TEST.EVAL_ITERATIONS",
    "TEST.EVAL_PERIOD",
    "TEST.IMS_PER_BATCH",
    "OUTPUT_DIR",
)


_MODEL = {
    "NAME": "resnet50",  # a timm model, or one of fbn_plugin.models
    "NORM": "",  # spec of the norm in place of the model's batch normalization, "FBN(t_sigma=4)"; "": unchanged
    "PRETRAINED": False,  # start from timm's weights
    "WEIGHTS": "",  # start from, or with --eval-only evaluate, this checkpoint (timm's, too) or state dict
    "REVISED_INIT": False,  # convolutions and linear layers start as Davis and Frank (2022) have them
    "DROP_RATE": 0.0,  # dropout before the classifier
    "DEVICE": "cuda",  # where there is no GPU: cpu
    "PIXEL_MEAN": (123.675, 116.28, 103.53),  # of the channels of INPUT.FORMAT, in 0..255
    "PIXEL_STD": (58.395, 57.12, 57.375),
}

_INPUT = {
    "FORMAT": "RGB",  # or "L", grey
    "SIZE": 224,  # height and width that the model sees, in pixels
    "INTERPOLATION": "bilinear",
    "CROP_PCT": 0.875,  # evaluation: resize the short side to SIZE / CROP_PCT, take the centre
    # Training: "random_resized" crops of SCALE (share of the area) and RATIO; "padded": SIZE, PADDING zeros on each
    # side, a random crop; "none": resize and centre crop, and no augmentation at all.
    "TRAIN_CROP": "random_resized",
    "SCALE": (0.08, 1.0),
    "RATIO": (3 / 4, 4 / 3),
    "PADDING": 4,
    "HFLIP": 0.5,  # probability
    "COLOR_JITTER": 0.0,
    "AUTO_AUGMENT": "",  # timm's policy string, such as "rand-m9-mstd0.5"
    # Above 0: PIXEL_MEAN and PIXEL_STD give way to a norm that learns, with a scale of 0.58 times this number.
    "NORM_GAMMA_INIT": 0.0,
    "MIXUP": 0.0,  # alpha
    "CUTMIX": 0.0,  # alpha
}

_SOLVER = {
    "MAX_EPOCH": 100,
    "MAX_ITER": 0,  # stop early after so many iterations, on the schedule of MAX_EPOCH; 0: do not
    "IMS_PER_BATCH": 256,  # over all processes
    "OPTIMIZER": "momentum",  # timm's names: "momentum" is SGD, "sgd" is SGD with Nesterov's momentum
    "BASE_LR": 0.1,
    "MOMENTUM": 0.9,
    "WEIGHT_DECAY": 1e-4,
    "FILTER_BIAS_AND_BN": True,  # no weight decay on biases and norms
    # The scale of batch norms learns so many times slower (Davis and Frank 2022: 100), and norms and biases are told
    # by their types, not by their shapes; 1 is all at one rate. 0: timm's groups.
    "SCALE_LR_DIVISOR": 0.0,
    "LR_SCHEDULER_NAME": "cosine",  # constant, cosine, multistep, poly or tanh, stepped each iteration
    "STEPS": (30, 60, 90),  # multistep: epochs at which the rate is multiplied with GAMMA
    "GAMMA": 0.1,  # of multistep; the power of poly
    "MIN_LR": 0.0,  # of cosine, poly and tanh
    "WARMUP_EPOCHS": 0,
    "WARMUP_FACTOR": 0.001,  # share of BASE_LR that warm-up starts from
    "LABEL_SMOOTHING": 0.0,
    "CHECKPOINT_PERIOD": 0,  # iterations; 0: an epoch
    "BEST_CHECKPOINT_METRIC": "",  # "top1", "top5" or "loss": the best evaluation so far writes model_best.pth
    "AMP": {"ENABLED": False},  # float16 on a GPU, bfloat16 on a CPU
}


def classification_config() -> CfgNode:
    """Every key of `tools/train_classification.py` with its default."""
    return CfgNode(
        {
            "MODEL": copy.deepcopy(_MODEL),
            "INPUT": copy.deepcopy(_INPUT),
            "DATASETS": {
                "NAME": "image_folder",  # how the images are stored, see image_data.load_image_data
                "ROOT": "imagenet",  # folder, as it is or below $DETECTRON2_DATASETS
            },
            "DATALOADER": {
                "NUM_WORKERS": 4,
                # Above 0: every batch holds so many images of each class (Hajaj and Gillies 2018: 1), in each process.
                "IMAGES_PER_CLASS": 0,
            },
            "SOLVER": copy.deepcopy(_SOLVER),
            "TEST": {
                "EVAL_PERIOD": 1,  # epochs; 0: only at the end
                "EVAL_ITERATIONS": (),  # further numbers of iterations after which to evaluate
                "MAX_IMAGES": 0,  # evaluate on so many, each class in its share; 0: all
                # Normalize by "population" statistics, by those of each "batch" of IMS_PER_BATCH, or of "balanced"
                # batches with DATALOADER.IMAGES_PER_CLASS (or 1) of each class: conditional, as test labels make them.
                "MOMENTS": "population",
                "IMS_PER_BATCH": 256,
            },
            "SEED": 0,
            "OUTPUT_DIR": "./output",
        }
    )


_SECOND_ORDER = ("adahessian",)  # it wants the graph of the backward pass, which training does not keep
_MOST_PIXELS = 2**13  # of a side of an image

_RULES = {
    **COMMON_RULES,
    "DATALOADER.IMAGES_PER_CLASS": at_least(0, 2**20),
    "INPUT.COLOR_JITTER": at_least(0, 10),
    "INPUT.CROP_PCT": between(0.1, 1),
    "INPUT.CUTMIX": or_zero(between(0.001, 1000)),
    "INPUT.FORMAT": one_of("RGB", "L"),
    "INPUT.HFLIP": between(0, 1),
    "INPUT.INTERPOLATION": one_of("bilinear", "bicubic", "nearest"),
    "INPUT.MIXUP": or_zero(between(0.001, 1000)),
    "INPUT.PADDING": at_least(0, _MOST_PIXELS),
    "INPUT.RATIO": Rule(
        "two ratios of width to height, the smaller first", lambda given: len(given) == 2 and 0 < given[0] <= given[1]
    ),
    "INPUT.SCALE": Rule(
        "two shares of the image's area, the smaller first", lambda given: len(given) == 2 and 0 < given[0] <= given[1]
    ),
    "INPUT.SIZE": at_least(1, _MOST_PIXELS),
    "INPUT.TRAIN_CROP": one_of("none", "padded", "random_resized"),
    "MODEL.DROP_RATE": from_to_below(0, 1),
    "MODEL.PIXEL_MEAN": each(between(-(10**6), 10**6)),
    "MODEL.PIXEL_STD": each(between(1e-6, 10**6)),
    "SEED": Rule("0 or more, and below 2**63", lambda given: 0 <= given < 2**63),
    "SOLVER.CHECKPOINT_PERIOD": at_least(0, MOST_ITERATIONS),
    "SOLVER.GAMMA": above(0, 10),
    "SOLVER.LABEL_SMOOTHING": from_to_below(0, 1),
    "SOLVER.LR_SCHEDULER_NAME": one_of("constant", "cosine", "multistep", "poly", "tanh"),
    "SOLVER.MAX_EPOCH": at_least(1, 10**6),
    "SOLVER.MAX_ITER": at_least(0, MOST_ITERATIONS),
    "SOLVER.STEPS": increasing("epochs"),
    "TEST.IMS_PER_BATCH": at_least(1, 2**20),
    "TEST.MAX_IMAGES": at_least(0, 2**31),
    "TEST.MOMENTS": one_of("population", "batch", "balanced"),
}


def check_config(cfg: CfgNode) -> None:
    """Refuse values that would fail later, or do something else than they say.

    Raises:
        ValueError: the first of them, in one sentence.
    """
    check_values(cfg, _RULES)
    check_values(cfg, _dependent_rules(cfg))
    check_norms({"MODEL.NORM": cfg.MODEL.NORM})
    build_train_transform(cfg, prefetch=False)


def _dependent_rules(cfg: CfgNode) -> dict[str, Rule]:
    """Rules that follow from other values of the config."""
    epochs = cfg.SOLVER.MAX_EPOCH
    rules = {
        "SOLVER.MIN_LR": Rule(
            f"from 0 to SOLVER.BASE_LR, {cfg.SOLVER.BASE_LR}", lambda given: 0 <= given <= cfg.SOLVER.BASE_LR
        ),
        "SOLVER.OPTIMIZER": one_of(*(name for name in list_optimizers() if name not in _SECOND_ORDER)),
        "SOLVER.WARMUP_EPOCHS": Rule(f"from 0 to less than MAX_EPOCH, {epochs}", lambda given: 0 <= given < epochs),
    }
    if cfg.MODEL.REVISED_INIT:
        rules["MODEL.PRETRAINED"] = exactly(False, "with REVISED_INIT, which would replace the weights")
    if cfg.SOLVER.SCALE_LR_DIVISOR:
        reason = "with SCALE_LR_DIVISOR, which sets the decay of norms and biases to 0"
        rules["SOLVER.FILTER_BIAS_AND_BN"] = exactly(True, reason)
    if cfg.INPUT.MIXUP or cfg.INPUT.CUTMIX:
        processes = distributed.world_size()
        what = f"an even number for each process ({processes}) with INPUT.MIXUP or CUTMIX"
        rules["SOLVER.IMS_PER_BATCH"] = Rule(what, lambda given: given // processes % 2 == 0)
    return rules
