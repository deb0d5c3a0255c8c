"""The smallest classification runs: handwritten digits of 8 pixels on the CPU."""

from fbn_plugin.engine.classification.config import classification_config
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run.config import CfgNode, load_config

_DIGITS = {
    "DATASETS.NAME": "digits",
    "INPUT.FORMAT": "L",
    "INPUT.SIZE": 8,
    "INPUT.TRAIN_CROP": "none",
    "INPUT.CROP_PCT": 1.0,
    "MODEL.PIXEL_MEAN": (70,),
    "MODEL.PIXEL_STD": (100,),
    "MODEL.NAME": "test_byobnet",
    "MODEL.NORM": "FBN",
    "MODEL.DEVICE": "cpu",
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.01,
    "DATALOADER.NUM_WORKERS": 0,
}


def config(folder="unused", **values) -> CfgNode:
    """The config of such a run, with overrides such as SOLVER__MAX_ITER=3."""
    keys = {**_DIGITS, **{key.replace("__", "."): value for key, value in values.items()}, "OUTPUT_DIR": folder}
    return load_config(classification_config(), None, [str(part) for pair in keys.items() for part in pair])


def train(folder, resume=False, command=(), **values) -> tuple[ClassificationTrainer, dict[str, float]]:
    """Train one, with a line of metrics.json every two iterations; the trainer and the last figures."""
    trainer = ClassificationTrainer(config(folder, **values), resume, log_period=2, command=command)
    return trainer, trainer.train()
