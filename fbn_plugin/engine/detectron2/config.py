"""Config of a detectron2 run, and everything that can be wrong with it, said in one sentence before anything is
written: detectron2 itself answers most of it with a bare error, some of it after hours.
"""

import argparse
import contextlib
import difflib
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager
from PIL import Image

import fbn_plugin
from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.detectron2.data import (
    check_annotation_files,
    folders,
    has_rle,
    metric_names,
    register_datasets,
)
from fbn_plugin.engine.detectron2.model import build_model, build_optimizer
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import refuse_changes
from fbn_plugin.engine.run.detection_keys import MAY_CHANGE
from fbn_plugin.frameworks.detectron2 import check_norm

__all__ = ["add_config", "load_config", "prepare"]

# What a resumed run may have otherwise: what both engines let change, and a key that torchvision's does not have.
_MAY_CHANGE = (*MAY_CHANGE, "VIS_PERIOD")

# Keys counted in iterations, which the linear rule divides.
_PERIODS = ("SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


def add_config(cfg: CfgNode) -> None:
    """Add to a config of detectron2 what ``build_model``, ``build_optimizer`` and ``tools/train_net.py`` read.

    - INPUT.NORM_GAMMA_INIT: the ``gamma_init`` of :func:`fbn_plugin.prepend_input_norm`; 0 normalizes by
      MODEL.PIXEL_MEAN and PIXEL_STD.
    - SOLVER.SCALE_LR_DIVISOR: what :func:`fbn_plugin.param_groups` divides the rate of the batch norms' scale by; 0
      leaves all rates and decays as detectron2 has them.
    - SOLVER.BEST_CHECKPOINT_METRIC: name of a metric such as ``"segm/AP"``: an evaluation that beats all before writes
      ``model_best.pth``; "" is off.
    - TEST.EVAL_ITERATIONS: numbers of finished iterations after which to evaluate, beside TEST.EVAL_PERIOD.
    - NORM_STATS_PERIOD: iterations between two measurements of the share of values that each filtered norm leaves out
      (scalars ``filtered/<module>``); 0 is never.
    """
    cfg.INPUT.NORM_GAMMA_INIT = 0.0
    cfg.SOLVER.SCALE_LR_DIVISOR = 0.0
    cfg.SOLVER.BEST_CHECKPOINT_METRIC = ""
    cfg.TEST.EVAL_ITERATIONS = ()
    cfg.NORM_STATS_PERIOD = 0


def load_config(config_file: str, overrides: list[str]) -> CfgNode:
    """Read a file and overrides into detectron2's config.

    Raises:
        ValueError, OSError: one sentence on what is wrong with them.
    """
    if not config_file:
        raise ValueError(
            "--config-file is needed, such as configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_FBN.yaml"
        )
    if config_file.endswith(".py"):
        raise ValueError(
            f"{config_file} is a LazyConfig, which detectron2's tools/lazyconfig_train_net.py trains; "
            "call fbn_plugin.register() at its top"
        )
    if not PathManager.isfile(config_file):
        raise FileNotFoundError(f"config file {config_file} is not there")
    if len(overrides) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, and {overrides[-1]!r} has no partner")
    cfg = get_cfg()
    add_config(cfg)
    for source, merge, settings in (
        (config_file, cfg.merge_from_file, config_file),
        ("KEY VALUE", cfg.merge_from_list, overrides),
    ):
        try:
            merge(settings)
        except KeyError as error:
            raise ValueError(f"{source}: {error.args[0]}{_nearest_key(str(error), cfg)}") from None
        except (AssertionError, OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{source}: {' '.join(str(error).split())}{_nearest_key(str(error), cfg)}") from None
        except (AttributeError, RecursionError, TypeError) as error:
            raise ValueError(f"{source} does not have the form of detectron2's config: {error}") from None
    return cfg


def _nearest_key(sentence: str, cfg: CfgNode) -> str:
    """What to add to detectron2's sentence on an unknown key."""
    unknown = re.search(r"Non-existent (?:config )?key: ([\w.-]+)", sentence)
    if not unknown:
        return ""
    if unknown[1].startswith("--"):
        return "; flags go before the KEY VALUE overrides"
    nearest = difflib.get_close_matches(unknown[1], _keys(cfg), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def prepare(args: argparse.Namespace) -> CfgNode:
    """The frozen config, after everything that can be wrong with it is looked at; OUTPUT_DIR is there.

    Raises:
        ValueError, OSError: one sentence.
    """
    cfg = load_config(args.config_file, args.opts)
    _check_values(cfg)
    processes = args.num_gpus * args.num_machines
    _choose_device(cfg, args.num_gpus, processes, args.eval_only)
    if not args.eval_only:
        _scale(cfg, processes)
        _check_iterations(cfg)
        if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % processes:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH must be a positive multiple of the number of processes ({processes}), "
                f"not {cfg.SOLVER.IMS_PER_BATCH}"
            )

    register_datasets(cfg, args.eval_only)
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        rle = [name for name in cfg.DATASETS.TRAIN if name in folders and has_rle(folders[name])]
        if rle:
            print(f"Dataset {rle[0]!r} has RLE masks: INPUT.MASK_FORMAT is set to bitmask.")
            cfg.INPUT.MASK_FORMAT = "bitmask"
    if not args.eval_only:
        _check_metric(cfg)
    previous = os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if previous and not args.eval_only:
        _check_resume(cfg, args.resume)
    _fetch_weights(cfg, args.eval_only, resume=args.resume and previous)
    check_annotation_files(cfg, args.eval_only)

    _try_out(cfg, args.eval_only, resume=args.resume and previous)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
    cfg.freeze()
    return cfg


def _check_values(cfg: CfgNode) -> None:
    """What can be said without data, machine and model."""
    for name, group in cfg.MODEL.items():
        if isinstance(group, Mapping) and "NORM" in group:
            try:
                check_norm(group.NORM)
            except ValueError as error:
                raise ValueError(f"MODEL.{name}.NORM: {error}") from None
    for key, lowest in {
        "SOLVER.MAX_ITER": 1,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "SOLVER.REFERENCE_WORLD_SIZE": 0,
        "TEST.EVAL_PERIOD": 0,
        "TEST.PRECISE_BN.NUM_ITER": 1,
        "NORM_STATS_PERIOD": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": 1,
        "INPUT.MAX_SIZE_TRAIN": 1,
        "INPUT.MIN_SIZE_TEST": 0,
        "INPUT.MAX_SIZE_TEST": 1,
    }.items():
        value = _get(cfg, key)
        if min(value if isinstance(value, tuple | list) else (value,), default=lowest) < lowest:
            raise ValueError(f"{key} must be {lowest} or more, not {value}")
    if not 0 <= cfg.INPUT.NORM_GAMMA_INIT <= 1:
        raise ValueError(f"INPUT.NORM_GAMMA_INIT must be from 0 to 1, not {cfg.INPUT.NORM_GAMMA_INIT}")
    if not 0 <= cfg.SOLVER.SCALE_LR_DIVISOR < math.inf:
        raise ValueError(f"SOLVER.SCALE_LR_DIVISOR must be 0 or more, not {cfg.SOLVER.SCALE_LR_DIVISOR}")
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED: this tool has no test-time augmentation")
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise ValueError(
            f"DATALOADER.SAMPLER_TRAIN must be 'TrainingSampler' in this tool, not {cfg.DATALOADER.SAMPLER_TRAIN!r}: "
            "the others' order cannot be resumed"
        )
    if cfg.SEED >= 2**31:  # NumPy's generator takes 32 bits, and each process adds its number
        raise ValueError(f"SEED must be below 2**31, not {cfg.SEED}")
    if cfg.FLOAT32_PRECISION not in ("", "highest", "high", "medium"):
        raise ValueError(f"FLOAT32_PRECISION must be '', 'highest', 'high' or 'medium', not {cfg.FLOAT32_PRECISION!r}")
    formats = ("BGR", "YUV-BT.601", *Image.MODES)
    if cfg.INPUT.FORMAT not in formats:
        raise ValueError(f"INPUT.FORMAT must be one of {', '.join(formats)}, not {cfg.INPUT.FORMAT!r}")


def _get(cfg: CfgNode, key: str):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _check_iterations(cfg: CfgNode) -> None:
    chosen, last = list(cfg.TEST.EVAL_ITERATIONS), cfg.SOLVER.MAX_ITER
    if not all(isinstance(each, int) and each > 0 for each in chosen) or chosen != sorted(set(chosen)):
        raise ValueError(
            f"TEST.EVAL_ITERATIONS must be increasing numbers of iterations, from 1 on, not {tuple(chosen)}"
        )
    if chosen and chosen[-1] > last:
        late = [number for number in chosen if number > last]
        print(f"TEST.EVAL_ITERATIONS: SOLVER.MAX_ITER is {last}, so there is no evaluation after {late}")


def _check_metric(cfg: CfgNode) -> None:
    metric, names = cfg.SOLVER.BEST_CHECKPOINT_METRIC, metric_names(cfg)
    groups = tuple(name.removesuffix("...") for name in names if name.endswith("..."))
    if metric and metric not in names and not metric.startswith(groups):
        given = ", ".join(names) or "none, as DATASETS.TEST is empty"
        raise ValueError(f"SOLVER.BEST_CHECKPOINT_METRIC is {metric!r}; the metrics of this run are {given}")
    for entry in cfg.TEST.EXPECTED_RESULTS:
        name = "/".join(map(str, entry[:2])) if isinstance(entry, tuple | list) and len(entry) == 4 else None
        if name is None or (name not in names and not name.startswith(groups)):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has {entry!r}; entries are [task, metric, value, tolerance], and the metrics "
                f"of this run {', '.join(names) or 'none, as DATASETS.TEST is empty'}"
            )


def _choose_device(cfg: CfgNode, per_machine: int, processes: int, evaluate_only: bool) -> None:
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"MODEL.DEVICE must be cpu, cuda, cuda:N or another device of PyTorch's, not {name!r}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if per_machine < 1:
        raise ValueError(f"--num-gpus must be 1 or more, not {per_machine}")
    if device.type != "cpu" and processes > 1 and per_machine > gpus:
        raise ValueError(
            f"--num-gpus {per_machine}, and there are {gpus} GPUs here; with MODEL.DEVICE cpu it is the number of "
            "processes on the CPU"
        )
    if device.type == "cuda" and gpus and (device.index or 0) >= gpus:
        raise ValueError(f"MODEL.DEVICE is {name!r}, and there are {gpus} GPUs here")
    if processes > 1 and device.index is not None:
        raise ValueError(
            f"MODEL.DEVICE {name!r} is one GPU, and there are {processes} processes: set it to {device.type}"
        )
    if device.type == "cuda" and not gpus:
        print("No CUDA device: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and not evaluate_only and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError("SOLVER.AMP.ENABLED: detectron2's mixed precision runs on CUDA only")
    if cfg.MODEL.DEVICE == "cpu" and processes > 1:
        for group, values in cfg.MODEL.items():
            if isinstance(values, Mapping) and values.get("NORM") in ("SyncBN", "nnSyncBN"):
                raise ValueError(f"MODEL.{group}.NORM: {values.NORM} runs on GPUs only; SyncFBN and BN run on the CPU")


def _scale(cfg: CfgNode, processes: int) -> None:
    """The linear rule, where SOLVER.REFERENCE_WORLD_SIZE is set.

    The config that a run saves is the scaled one, with the run's number of processes as its reference, so that it means
    the same again.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, processes):
        return
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of SOLVER.REFERENCE_WORLD_SIZE "
            f"{reference}"
        )
    periods = {key: _get(cfg, key) for key in _PERIODS}
    factor = processes / reference
    chosen = [round(iterations / factor) for iterations in cfg.TEST.EVAL_ITERATIONS]
    cfg.merge_from_other_cfg(DefaultTrainer.auto_scale_workers(cfg, processes))
    cfg.TEST.EVAL_ITERATIONS = tuple(dict.fromkeys(chosen))
    for key, old in periods.items():
        if old and not _get(cfg, key):  # rounded away
            cfg.merge_from_list([key, 1])
    solver = cfg.SOLVER
    print(
        f"SOLVER.REFERENCE_WORLD_SIZE {reference}, and {processes} processes: IMS_PER_BATCH {solver.IMS_PER_BATCH}, "
        f"BASE_LR {solver.BASE_LR:g}, MAX_ITER {solver.MAX_ITER}, STEPS {solver.STEPS}, WARMUP_ITERS "
        f"{solver.WARMUP_ITERS}, CHECKPOINT_PERIOD {solver.CHECKPOINT_PERIOD}, EVAL_PERIOD {cfg.TEST.EVAL_PERIOD}, "
        f"EVAL_ITERATIONS {cfg.TEST.EVAL_ITERATIONS}"
    )


def _check_resume(cfg: CfgNode, resume: bool) -> None:
    """Refuse to write over a run, and to continue one with other settings than those that it began with."""
    if not resume:
        raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds a run; add --resume to continue it, or choose another")
    saved = load_config(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), [])
    # Through YAML, which does not tell a tuple from a list.
    refuse_changes(yaml.safe_load(saved.dump()), yaml.safe_load(cfg.dump()), _MAY_CHANGE)


def _fetch_weights(cfg: CfgNode, evaluate_only: bool, resume: bool) -> None:
    """Fetch MODEL.WEIGHTS if the run will load them, before anything is built."""
    weights = cfg.MODEL.WEIGHTS
    if resume:
        return
    if not weights:
        if evaluate_only:
            raise ValueError("--eval-only wants MODEL.WEIGHTS, or --resume with a checkpoint in OUTPUT_DIR")
        return
    try:
        path = PathManager.get_local_path(weights.partition("?")[0])
    except OSError as error:
        raise OSError(f"MODEL.WEIGHTS {weights} cannot be fetched: {error}") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS {weights} is not there")


def _try_out(cfg: CfgNode, evaluate_only: bool, resume: bool) -> None:
    """Build model, input and solver on the CPU and load the weights once, before anything is written.

    What the config may get wrong is spread over all of detectron2, which answers with bare errors. This costs a few
    seconds at the start of a run.

    Raises:
        ValueError: one sentence.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    fbn_plugin.register()
    depths = (18, 34, 50, 101, 152)
    if "resnet" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.RESNETS.DEPTH not in depths:
        raise ValueError(f"MODEL.RESNETS.DEPTH must be one of {depths}, not {cfg.MODEL.RESNETS.DEPTH}")
    with _refused("MODEL"):
        model = build_model(cfg)
    if not evaluate_only:
        with _refused("INPUT"):
            DatasetMapper(cfg, is_train=True)
        with _refused("SOLVER"):
            DefaultTrainer.build_lr_scheduler(cfg, build_optimizer(cfg, model))

    checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    path = checkpointer.get_checkpoint_file() if resume else cfg.MODEL.WEIGHTS
    logging.disable()  # the run itself says what it loads
    try:
        state = checkpointer.load(path, checkpointables=[], strict=resume or evaluate_only)
    except ValueError as error:
        raise ValueError(str(error) if resume else f"MODEL.WEIGHTS: {error}") from None
    finally:
        logging.disable(logging.NOTSET)
    if resume and not evaluate_only:
        if "random" not in state or "seed" not in state.get("trainer", {}):
            raise ValueError(f"{path} is not of a run of this tool: it has no seed and no random states")
        best = os.path.join(cfg.OUTPUT_DIR, "model_best.pth")
        if cfg.SOLVER.BEST_CHECKPOINT_METRIC and os.path.isfile(best):
            load_file(best)  # the hook that keeps the best reads it
        if state["iteration"] + 1 > cfg.SOLVER.MAX_ITER:
            raise ValueError(
                f"SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER} is too few: the run that OUTPUT_DIR {cfg.OUTPUT_DIR} holds "
                f"has {state['iteration'] + 1} iterations"
            )


@contextlib.contextmanager
def _refused(group: str) -> Iterator[None]:
    """Turn detectron2's error on a value of the config into one sentence."""
    try:
        yield
    except (KeyError, ValueError, AssertionError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error.args[0] if error.args else "").split())
        raise ValueError(f"the config's {group} is refused by detectron2: {reason}") from None
