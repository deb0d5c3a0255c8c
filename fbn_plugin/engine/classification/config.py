"""The config of a classification run: every key with its default, and what is refused before a run begins. The keys
speak detectron2's vocabulary where it has a word.
"""

import math

from fvcore.common.config import CfgNode
from timm.optim import list_optimizers

from fbn_plugin import parse_spec
from fbn_plugin.engine.classification.data import build_train_transform
from fbn_plugin.engine.run import distributed

__all__ = ["MAY_CHANGE", "check_config", "classification_config"]

SCHEDULERS = ("constant", "cosine", "multistep", "poly", "tanh")
TRAIN_CROPS = ("none", "padded", "random_resized")

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


def check_config(cfg: CfgNode) -> None:
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
