"""The config of a classification run: every key with its default, and what is refused before a run begins. The keys
speak detectron2's vocabulary where it has a word.
"""

import copy
import math

from timm.optim import list_optimizers

from fbn_plugin.analysis.landscape import STEPS
from fbn_plugin.engine.classification import augmentation, datasets, final_evaluation, measuring
from fbn_plugin.engine.classification.data import build_train_transform
from fbn_plugin.engine.classification.memory_data import batch_augmentation
from fbn_plugin.engine.classification.model import check_model_options
from fbn_plugin.engine.classification.optimization import WITH_MIN_LR, optimizer_arguments
from fbn_plugin.engine.run.activation_meter import ACTIVATION_KEYS
from fbn_plugin.engine.run.config import Arguments, CfgNode
from fbn_plugin.engine.run.linear_rule import ScaledKeys
from fbn_plugin.engine.run.loggers import check_loggers
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
    multiple_of,
    one_of,
    or_zero,
    refusal,
)

__all__ = ["LINEAR_RULE", "MAY_CHANGE", "check_config", "classification_config"]

# What a resumed run may have otherwise; the learning rate's schedule is computed anew.
MAY_CHANGE = (
    "MODEL.DEVICE",
    "MODEL.CHANNELS_LAST",
    "MODEL.COMPILE",
    "MODEL.GRAD_CHECKPOINTING",
    "CUDNN_BENCHMARK",
    "FLOAT32_PRECISION",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.BROKEN_IMAGES",  # so that a run which has met one may go on; what is sound is the same
    "SOLVER.MAX_EPOCH",
    "SOLVER.MAX_ITER",
    "SOLVER.BASE_LR",
    "SOLVER.MIN_LR",
    "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.BEST_CHECKPOINT_METRIC",
    "LOGGERS",
    "MEASURE.*",
    "NORM_STATS_PERIOD",
    "TEST.ALSO",
    "TEST.AT_END.*",
    "TEST.EVAL_ITERATIONS",
    "TEST.EVAL_PERIOD",
    "TEST.IMS_PER_BATCH",
    "OUTPUT_DIR",
)

# What SOLVER.REFERENCE_WORLD_SIZE scales, besides the batch: epochs stay.
LINEAR_RULE = ScaledKeys(
    rates=("SOLVER.BASE_LR", "SOLVER.MIN_LR"),
    iterations=("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_ITERATIONS"),
)

_MODEL = {
    "NAME": "resnet50",  # a timm model, or one of fbn_plugin.models
    "NORM": "",  # spec of the norm in place of the model's batch normalization, "FBN(t_sigma=4)"; "": unchanged
    # Layers, by name or pattern ("layer1.*"), in which NORM stands; (): in all. Elsewhere the model keeps its own.
    "NORM_LAYERS": (),
    "PRETRAINED": False,  # start from timm's weights
    "PRETRAINED_PATH": "",  # a file in the place of the download, in timm's form or in that which timm converts
    "WEIGHTS": "",  # start from, or with --eval-only evaluate, this checkpoint (timm's, too) or state dict
    # Batches of training images that the norms of pretrained weights are fitted to before training; 0: none.
    "RECALIBRATE": 0,
    "RESET_CLASSIFIER": False,  # leave the classifier of WEIGHTS out: it is of other classes
    "REVISED_INIT": False,  # convolutions and linear layers start as Davis and Frank (2022) have them
    "DROP_RATE": 0.0,  # dropout before the classifier
    "DROP_PATH_RATE": 0.0,  # stochastic depth: share of the residual branches that are left out, growing with depth
    # Further arguments of what builds the model: {"norm_after": "fc1"} of lenet5, {"drop_block_rate": 0.1} of ResNets.
    "OPTIONS": {},
    "DEVICE": "cuda",  # where there is no GPU: cpu
    "CHANNELS_LAST": False,  # the layout (N, H, W, C) in memory
    "COMPILE": False,  # the forward and backward pass of training through torch.compile
    "GRAD_CHECKPOINTING": False,  # activations are computed again in the backward pass, and not kept
    # A moving average of weights and buffers, timm's ModelEmaV3; WARMUP lets the decay grow to DECAY.
    "EMA": {"ENABLED": False, "DECAY": 0.9999, "WARMUP": False},
    "PIXEL_MEAN": (123.675, 116.28, 103.53),  # of the channels of INPUT.FORMAT, in 0..255
    "PIXEL_STD": (58.395, 57.12, 57.375),
}

_INPUT = {
    "FORMAT": "RGB",  # or "L", grey
    "SIZE": 224,  # height and width that the model sees, in pixels
    "STRETCH": 0,  # above 0: first of all, both sides of every image are resized to so many pixels
    "CANVAS": 0,  # above 0: then every image comes into the middle of a black square of so many pixels, or is cut to it
    "BINARY_THRESHOLD": 0,  # above 0: last of all, values of pixels from it on, of 0..255, become 255, and all others 0
    "INTERPOLATION": "bilinear",
    "CROP_PCT": 0.875,  # evaluation: resize the short side to SIZE / CROP_PCT, take the centre
    # Training: "random_resized" crops of SCALE (share of the area) and RATIO; "padded": SIZE, PADDING zeros on each
    # side, a random crop; "scaled": the short side to a length in SHORT_SIDE, a random crop; "resized_center" and
    # "resized_random": resize by SCALE and RATIO for half of the images, then crop or pad; "none": resize and centre
    # crop, and no augmentation at all.
    "TRAIN_CROP": "random_resized",
    "SCALE": (0.08, 1.0),
    "RATIO": (3 / 4, 4 / 3),
    "PADDING": 4,
    "SHORT_SIDE": (256, 480),  # of "scaled", in pixels
    "HFLIP": 0.5,  # probability
    "VFLIP": 0.0,  # probability
    "COLOR_JITTER": 0.0,
    "COLOR_SHIFT": 0.0,  # deviation of a shift along the main directions of ImageNet's colours; Krizhevsky et al.: 0.1
    "AUTO_AUGMENT": "",  # timm's policy string, such as "rand-m9-mstd0.5"
    # timm's random erasing, with this probability for an image, of up to COUNT rectangles: by "const", the mean,
    # "rand", a colour, or "pixel", noise.
    "ERASING": {"PROB": 0.0, "MODE": "const", "COUNT": 1},
    "REPEATED_AUGMENTATIONS": 1,  # so many times in a row, and so in a batch, comes an image, each augmented otherwise
    # Above 0: PIXEL_MEAN and PIXEL_STD give way to a norm that learns, with a scale of 0.58 times this number.
    "NORM_GAMMA_INIT": 0.0,
    "MIXUP": 0.0,  # alpha
    "CUTMIX": 0.0,  # alpha
    "MIXUP_PROB": 1.0,  # of mixing at all
    "MIXUP_SWITCH_PROB": 0.5,  # of CutMix, where both are on
    "MIXUP_MODE": "batch",  # one mix for the "batch", for each "pair" of images, or for each image, "elem"
    "MIXUP_OFF_EPOCH": 0,  # no more mixing from this epoch on, counted from 0; 0: always
}

_SOLVER = {
    "MAX_EPOCH": 100,  # 0: nothing is trained or saved; the starting weights are evaluated and measured
    "MAX_ITER": 0,  # stop early after so many iterations, on the schedule of MAX_EPOCH; 0: do not
    "IMS_PER_BATCH": 256,  # of one update of the weights: over all processes and accumulation steps
    "ACCUMULATION_STEPS": 1,  # forward and backward passes of each process before an update
    "IMS_PER_NORM": 0,  # refuse any other number of images in the moments of a batch norm; 0: whatever follows
    "REFERENCE_WORLD_SIZE": 0,  # the number of processes that batch and rates are meant for; 0: any
    "OPTIMIZER": "momentum",  # timm's names: "momentum" is SGD, "sgd" is SGD with Nesterov's momentum
    "BASE_LR": 0.1,
    "MOMENTUM": 0.9,  # of optimizers that have one (SGD, RMSProp, LARS, ...); Adam and its kin have betas in OPT_ARGS
    "OPT_ARGS": {},  # further arguments of the optimizer: {"alpha": 0.999} is RMSProp's decay
    "WEIGHT_DECAY": 1e-4,
    "FILTER_BIAS_AND_BN": True,  # no weight decay on biases and norms
    # The scale of batch norms learns so many times slower (Davis and Frank 2022: 100); 1 is all at one rate. 0 is, too,
    # and what has one dimension does not decay, as with timm, besides norms and biases.
    "SCALE_LR_DIVISOR": 0.0,
    "LAYER_DECAY": 0.0,  # above 0: each layer learns at this share of the rate of the layer behind it, as timm has it
    # constant, cosine, exponential, multistep, poly, step or tanh, stepped each iteration; plateau, stepped by a metric
    "LR_SCHEDULER_NAME": "cosine",
    "STEPS": (30, 60, 90),  # multistep: epochs at which the rate is multiplied with GAMMA
    "DECAY_EPOCHS": 30.0,  # step and exponential: epochs in which the rate is multiplied with GAMMA, at once or evenly
    "GAMMA": 0.1,  # of exponential, multistep, plateau and step; the power of poly
    "MIN_LR": 0.0,  # of cosine, plateau, poly and tanh
    "COOLDOWN_EPOCHS": 0,  # of cosine, poly and tanh: the last epochs, at MIN_LR
    "PLATEAU_METRIC": "top1",  # plateau: that of the evaluations which is to get better; top1, top5 or loss
    "PLATEAU_PATIENCE": 10,  # plateau: so many evaluations in which it does not are borne with
    "WARMUP_EPOCHS": 0,
    "WARMUP_FACTOR": 0.001,  # share of BASE_LR that warm-up starts from
    "WARMUP_PREFIX": False,  # the schedule begins behind the warm-up, and ends with MAX_EPOCH all the same
    "LOSS": "cross_entropy",  # or "bce", timm's binary cross entropy of each class
    "BCE": {
        "TARGET_THRESHOLD": 0.0,  # above 0: targets, smoothed or mixed, above it are 1, and all others 0
        "SUM_CLASSES": False,  # the loss is a sum over the classes, not their mean
    },
    "LABEL_SMOOTHING": 0.0,
    "CHECKPOINT_PERIOD": 0,  # iterations; 0: an epoch
    # "top1", "top5" or "loss", of the averaged weights "ema/top1" and so on: the best evaluation writes model_best.pth
    "BEST_CHECKPOINT_METRIC": "",
    "AMP": {"ENABLED": False, "DTYPE": ""},  # "float16" or "bfloat16"; "": float16 on a GPU, bfloat16 on a CPU
    # "norm" of all gradients together, "value" of each element, "agc": of each unit, relative to its weights.
    "CLIP_GRADIENTS": {"ENABLED": False, "CLIP_TYPE": "norm", "CLIP_VALUE": 1.0, "NORM_TYPE": 2.0},
}

# What is measured of the trained model, as final/..., on the test images where there are such, else on those of
# validation; by the weights that were best in validation, where there are test images, else by the last.
_AT_END = {
    "POPULATION": False,  # before it, population statistics over an epoch of training images, for it alone
    "CROPS": 1,  # so many views of an image, whose class probabilities are averaged: 1, 10 or 144
    # By which moments: those of TEST.MOMENTS, and "spread": balanced batches in which each view of an image has other
    # company. final/balanced/top1 and so on.
    "MOMENTS": (),
    "RELABEL": 0,  # rounds of balancing the batches by what is predicted (Hajaj and Gillies 2018, figure 6)
    "WALKS": 0,  # weak and strong images that walk through a confident balanced batch (figure 4)
}

# What is measured while the model trains, in iterations that end a PERIOD; 0: nothing. The weights do not depend on it.
_MEASURE = {
    "LANDSCAPE": {"PERIOD": 0, "STEPS": STEPS},  # range of loss and gradient over step sizes along the gradient
    # Distance of the moments, by NORMS, of SUBSET images from those of all images of the batch.
    "MOMENTS": {"PERIOD": 0, "SUBSET": 16, "NORMS": ("BN", "FBN(t_sigma=2)")},
    "ACTIVATIONS": ACTIVATION_KEYS,  # quantiles of what layers compute
    # After training: bands of each layer's normalized activations over the validation images, in activations.json.
    "BANDS": False,
    "KERNELS": (),  # units of layers, "layer4.1.bn2[453]": BANDS tells their density, and which images pass SIGMA there
    "SIGMA": 14.0,  # deviations
}


def classification_config() -> CfgNode:
    """Every key of `tools/train_classification.py` with its default."""
    cfg = CfgNode(
        {
            "MODEL": copy.deepcopy(_MODEL),
            "INPUT": copy.deepcopy(_INPUT),
            "DATASETS": {
                "NAME": "image_folder",  # how the images are stored, see image_data.load_image_data
                "ROOT": "imagenet",  # folder, as it is or below $DETECTRON2_DATASETS
                # Above 0: this share of each class of the training images is validated on, and the set's own validation
                # images are the test set, which the chosen weights are measured by once, at the end.
                "VAL_SHARE": 0.0,
                "TRAIN_IMAGES": 0,  # train on so many, each class in its share; 0: all
                "VAL_IMAGES": 0,  # the same of the images to validate on
                "SPLIT_SEED": 0,  # which images these three take; -1: SEED
                "BROKEN_IMAGES": "refuse",  # or "skip"
            },
            "DATALOADER": {
                "NUM_WORKERS": 4,
                # "auto": small sets are decoded once, and crops and flips drawn by the batch, without workers, where
                # INPUT has no other augmentation; "always": large ones too; "never".
                "IN_MEMORY": "auto",
                # Above 0: every batch holds so many images of each class (Hajaj and Gillies 2018: 1), in each process.
                "IMAGES_PER_CLASS": 0,
            },
            "SOLVER": copy.deepcopy(_SOLVER),
            "TEST": {
                "EVAL_PERIOD": 1,  # epochs; 0: only at the end
                "EVAL_ITERATIONS": (),  # further numbers of iterations after which to evaluate
                # Normalize by "population" statistics, by those of each "batch" of IMS_PER_BATCH, or of "balanced"
                # batches with DATALOADER.IMAGES_PER_CLASS (or 1) of each class: conditional, as test labels make them.
                "MOMENTS": "population",
                "ALSO": (),  # further ones: each evaluation is done by these, too, as balanced/top1 and so on
                "IMS_PER_BATCH": 256,
                "AT_END": copy.deepcopy(_AT_END),
            },
            "MEASURE": copy.deepcopy(_MEASURE),
            # Iterations between two measurements of the share of values that each filtered norm leaves out; 0 is off.
            "NORM_STATS_PERIOD": 0,
            "CUDNN_BENCHMARK": False,
            "FLOAT32_PRECISION": "",  # of torch.set_float32_matmul_precision, and of cuDNN; "": PyTorch's own
            "LOGGERS": ("tensorboard",),  # besides metrics.json: "csv", "tensorboard", "wandb"
            "SEED": 0,
            "OUTPUT_DIR": "./output",
        }
    )
    cfg.MODEL.OPTIONS, cfg.SOLVER.OPT_ARGS = Arguments(), Arguments()  # of a mapping CfgNode makes one of its own
    return cfg


_SECOND_ORDER = ("adahessian",)  # it wants the graph of the backward pass, which training does not keep
_MOST_PIXELS = 2**13  # of a side of an image

_RULES = {
    **COMMON_RULES,
    **augmentation.RULES,
    **datasets.RULES,
    **final_evaluation.RULES,
    **measuring.RULES,
    "DATALOADER.IMAGES_PER_CLASS": at_least(0, 2**20),
    "DATALOADER.IN_MEMORY": one_of("auto", "always", "never"),
    "FLOAT32_PRECISION": one_of("", "highest", "high", "medium"),
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
    "MODEL.DROP_PATH_RATE": from_to_below(0, 1),
    "MODEL.DROP_RATE": from_to_below(0, 1),
    "MODEL.EMA.DECAY": from_to_below(0, 1),
    "MODEL.RECALIBRATE": at_least(0, 2**20),
    "MODEL.PIXEL_MEAN": each(between(-(10**6), 10**6)),
    "MODEL.PIXEL_STD": each(between(1e-6, 10**6)),
    "NORM_STATS_PERIOD": at_least(0, MOST_ITERATIONS),
    "SEED": Rule("0 or more, and below 2**63", lambda given: 0 <= given < 2**63),
    "SOLVER.ACCUMULATION_STEPS": at_least(1, 2**20),
    "SOLVER.AMP.DTYPE": one_of("", "float16", "bfloat16"),
    "SOLVER.BCE.TARGET_THRESHOLD": from_to_below(0, 1),
    "SOLVER.CHECKPOINT_PERIOD": at_least(0, MOST_ITERATIONS),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("norm", "value", "agc"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above(0, 1e30),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": between(0.1, 1000),
    "SOLVER.DECAY_EPOCHS": between(1e-6, 10**6),
    "SOLVER.GAMMA": above(0, 10),
    "SOLVER.IMS_PER_NORM": at_least(0, 2**30),
    "SOLVER.LABEL_SMOOTHING": from_to_below(0, 1),
    "SOLVER.LAYER_DECAY": or_zero(above(0, 1)),
    "SOLVER.LOSS": one_of("cross_entropy", "bce"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "constant", "cosine", "exponential", "multistep", "plateau", "poly", "step", "tanh"
    ),
    "SOLVER.MAX_EPOCH": at_least(0, 10**6),
    "SOLVER.MAX_ITER": at_least(0, MOST_ITERATIONS),
    "SOLVER.PLATEAU_METRIC": one_of("top1", "top5", "loss"),
    "SOLVER.PLATEAU_PATIENCE": at_least(0, 10**6),
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0, 2**20),
    "SOLVER.STEPS": increasing("epochs"),
    "TEST.IMS_PER_BATCH": at_least(1, 2**20),
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
    check_loggers(cfg.LOGGERS)
    check_model_options(cfg)
    optimizer_arguments(cfg)
    transform = build_train_transform(cfg, prefetch=False)
    final_evaluation.check_final(cfg)
    if cfg.DATALOADER.IN_MEMORY == "always" and batch_augmentation(transform) is None:
        accepted = "'auto' or 'never' with INPUT.COLOR_JITTER and what else is not a crop or a flip"
        raise refusal("DATALOADER.IN_MEMORY", accepted, cfg.DATALOADER.IN_MEMORY)


def _recalibration_rules(cfg: CfgNode) -> dict[str, Rule]:
    if not (cfg.MODEL.PRETRAINED or cfg.MODEL.WEIGHTS):
        return {"MODEL.RECALIBRATE": exactly(0, "without MODEL.PRETRAINED or WEIGHTS, whose norms it is for")}
    frozen = str(cfg.MODEL.NORM).startswith("FrozenBN")
    return {
        "INPUT.NORM_GAMMA_INIT": exactly(0.0, "with MODEL.RECALIBRATE, as pretrained models have no input norm"),
        "MODEL.NORM": Rule("another norm than FrozenBN with MODEL.RECALIBRATE", lambda given: not frozen),
    }


def _dependent_rules(cfg: CfgNode) -> dict[str, Rule]:
    """Rules that follow from other values of the config."""
    epochs = cfg.SOLVER.MAX_EPOCH or math.inf  # without training no schedule ends
    optimizers = [name for name in list_optimizers() if name not in _SECOND_ORDER]
    rules = {
        "SOLVER.MIN_LR": Rule(
            f"from 0 to SOLVER.BASE_LR, {cfg.SOLVER.BASE_LR}", lambda given: 0 <= given <= cfg.SOLVER.BASE_LR
        ),
        "SOLVER.OPTIMIZER": Rule(
            "one of timm.optim.list_optimizers() that takes no second derivatives", optimizers.__contains__, optimizers
        ),
        "SOLVER.WARMUP_EPOCHS": Rule(f"from 0 to less than MAX_EPOCH, {epochs}", lambda given: 0 <= given < epochs),
        **augmentation.augmentation_rules(cfg),
    }
    left = epochs - cfg.SOLVER.WARMUP_EPOCHS
    rules["SOLVER.COOLDOWN_EPOCHS"] = Rule(
        f"from 0 to less than MAX_EPOCH less WARMUP_EPOCHS, {left}", lambda given: 0 <= given < left
    )
    if cfg.SOLVER.LR_SCHEDULER_NAME not in WITH_MIN_LR:
        rules["SOLVER.COOLDOWN_EPOCHS"] = exactly(0, f"but for LR_SCHEDULER_NAME {', '.join(WITH_MIN_LR)}")
    if cfg.SOLVER.LR_SCHEDULER_NAME == "plateau":
        rules["TEST.EVAL_PERIOD"] = at_least(1, MOST_ITERATIONS)
        rules["SOLVER.GAMMA"] = Rule("above 0 and below 1 with plateau", lambda given: 0 < given < 1)
        rules["SOLVER.WARMUP_PREFIX"] = exactly(False, "with plateau, which has no end")
    if not cfg.SOLVER.MAX_EPOCH:
        rules["SOLVER.BEST_CHECKPOINT_METRIC"] = exactly("", "with MAX_EPOCH 0, which saves no weights")
    if not cfg.MODEL.NORM:
        rules["MODEL.NORM_LAYERS"] = Rule("empty without MODEL.NORM", lambda given: not given)
    if not cfg.MODEL.PRETRAINED:
        rules["MODEL.PRETRAINED_PATH"] = exactly("", "without MODEL.PRETRAINED")
    if cfg.MODEL.RECALIBRATE:
        rules |= _recalibration_rules(cfg)
    if cfg.MODEL.REVISED_INIT:
        rules["MODEL.PRETRAINED"] = exactly(False, "with REVISED_INIT, which would replace the weights")
    if cfg.SOLVER.SCALE_LR_DIVISOR:
        reason = "with SCALE_LR_DIVISOR, which sets the decay of norms and biases to 0"
        rules["SOLVER.FILTER_BIAS_AND_BN"] = exactly(True, reason)
    if reference := cfg.SOLVER.REFERENCE_WORLD_SIZE:
        rules["SOLVER.IMS_PER_BATCH"] = multiple_of(reference, f"SOLVER.REFERENCE_WORLD_SIZE, {reference}")
    return rules
