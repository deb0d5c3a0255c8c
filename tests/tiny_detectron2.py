"""What the tests of detectron2 runs share: a tiny model, the command line, and the way in without a new process."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "train_net.py"
CONFIG = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_R_50_FPN_FBN.yaml"

# A model of a few thousand parameters, with every stage of the real one.
TINY = shlex.split("""
    MODEL.WEIGHTS "" MODEL.DEVICE cpu MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.STEM_OUT_CHANNELS 8
    MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.FPN.OUT_CHANNELS 16
    MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.ROI_MASK_HEAD.NUM_CONV 1
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TEST 50
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 20
    INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
    DATALOADER.NUM_WORKERS 0 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS () SEED 1
    SOLVER.BEST_CHECKPOINT_METRIC "" TEST.EVAL_ITERATIONS () NORM_STATS_PERIOD 0
    TEST.PRECISE_BN.ENABLED False SOLVER.REFERENCE_WORLD_SIZE 0
""")


def run_tool(*arguments, **env):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **env},
        capture_output=True,
        text=True,
    )


def datasets(folder, num_classes):
    return [
        *("DATASETS.TRAIN", f"('{folder}:train',)", "DATASETS.TEST", f"('{folder}:val',)"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", num_classes),
    ]


def prepare(*overrides, resume=False, eval_only=False, num_gpus=1):
    """The config as the tool makes it."""
    from fbn_plugin.engine.detectron2.config import prepare

    return prepare(
        argparse.Namespace(
            config_file=str(CONFIG),
            opts=[*TINY, *map(str, overrides)],
            resume=resume,
            eval_only=eval_only,
            num_gpus=num_gpus,
            num_machines=1,
        )
    )


def metrics(folder):
    """The rows of metrics.json."""
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
