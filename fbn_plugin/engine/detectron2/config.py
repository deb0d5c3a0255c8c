"""Config of a detectron2 run, and everything that can be wrong with it, said in one sentence before anything is
written: detectron2 itself answers most of it with a bare error, some of it after hours.
"""

import argparse
import difflib
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetMapper
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager

import fbn_plugin
from fbn_plugin import internals
from fbn_plugin.engine.detectron2.annotation_files import check_annotation_files
from fbn_plugin.engine.detectron2.augmentation import SUFFIX, check_augmentation
from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.detectron2.data import (
    checked,
    has_polygons,
    has_rle,
    metric_names,
    register_datasets,
)
from fbn_plugin.engine.detectron2.model import build_model, build_optimizer
from fbn_plugin.engine.detectron2.rules import RULES, input_rules
from fbn_plugin.engine.detectron2.values import attempt, check_types, differences, is_float, type_sentence
from fbn_plugin.engine.files.literals import literal
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.files.yaml_file import read_yaml
from fbn_plugin.engine.run.activation_meter import build_activation_meter
from fbn_plugin.engine.run.best_checkpoint import BestCheckpoint, check_metric, is_given
from fbn_plugin.engine.run.cli import error_sentence
from fbn_plugin.engine.run.config import check_texts, pairs
from fbn_plugin.engine.run.detection_keys import MAY_CHANGE
from fbn_plugin.engine.run.detection_rules import dependent_rules
from fbn_plugin.engine.run.linear_rule import scale_to_processes
from fbn_plugin.engine.run.lock import hold
from fbn_plugin.engine.run.output_dir import make_output_dir
from fbn_plugin.engine.run.population import check_population_stats
from fbn_plugin.engine.run.refusals import check_enough_iterations, check_run, check_state
from fbn_plugin.engine.run.resuming import checkpoint_to_resume
from fbn_plugin.engine.run.rules import check_norms, check_values, exactly, one_of, refusal
from fbn_plugin.engine.run.schedule import eval_iterations
from fbn_plugin.frameworks.detectron2 import canonical_norm, check_norm
from fbn_plugin.frameworks.detectron2_keys import add_keys

__all__ = ["add_config", "load_checked_config", "load_config", "prepare"]

# What a resumed run may have otherwise: what both engines let change, and a key that torchvision's does not have.
_MAY_CHANGE = (*MAY_CHANGE, "VIS_PERIOD")


def add_config(cfg: CfgNode) -> None:
    """Add to a config of detectron2 the keys that ``build_model``, ``build_optimizer`` and ``tools/train_net.py`` read;
    after :func:`fbn_plugin.register`, ``get_cfg()`` has them by itself.

    - INPUT.NORM_GAMMA_INIT: the ``gamma_init`` of :func:`fbn_plugin.prepend_input_norm`; 0 normalizes by
      MODEL.PIXEL_MEAN and PIXEL_STD.
    - SOLVER.SCALE_LR_DIVISOR: what :func:`fbn_plugin.param_groups` divides the rate of the batch norms' scale by; 0
      leaves all rates and decays as detectron2 has them.
    - SOLVER.BEST_CHECKPOINT_METRIC: name of a metric such as ``"segm/AP"``: an evaluation that beats all before writes
      ``model_best.pth``; "" is off.
    - TEST.EVAL_ITERATIONS: numbers of finished iterations after which to evaluate, beside TEST.EVAL_PERIOD.
    - NORM_STATS_PERIOD: iterations between two measurements of the share of values that each filtered norm leaves out
      (scalars ``filtered/<module>``); 0 is never.
    - MEASURE.ACTIVATIONS.PERIOD, LAYERS and QUANTILES: iterations between two measurements of quantiles of what layers
      compute (scalars ``activations/<layer>/q50`` and so on); 0 is never.
    """
    add_keys(cfg)


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
    given = pairs(overrides)
    cfg = get_cfg()
    add_config(cfg)
    _merge(cfg, config_file, read_yaml(config_file), lambda read: cfg.merge_from_other_cfg(CfgNode(read)))
    for key, value in given:
        _merge(cfg, "KEY VALUE", {key: value}, lambda read: cfg.merge_from_list(list(*read.items())))
    for group in cfg.MODEL.values():
        if "NORM" in _mapping(group):
            group.NORM = canonical_norm(group.NORM)
    return cfg


def _merge(cfg: CfgNode, source: str, values: Mapping[str, Any], merge: Callable[[dict[str, Any]], None]) -> None:
    """Merge values into detectron2's config.

    Args:
        cfg: the config.
        source: what they are from, for the sentence.
        values: keys and values, groups of them nested.
        merge: of the config's methods that which takes them.

    Raises:
        ValueError: one sentence.
    """
    try:
        merge(_for_yacs(values))
    except KeyError as error:
        raise ValueError(f"{source}: {error.args[0]}{_nearest_key(str(error), cfg)}") from None
    except (AssertionError, ValueError) as error:
        sentence = type_sentence(" ".join(error_sentence(error).split()))
        raise ValueError(f"{source}: {sentence}{_nearest_key(sentence, cfg)}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{source} does not have the form of detectron2's config: {error}") from None


def _for_yacs(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values, of which yacs takes text for a Python literal: with what the text stands for, or in quotes."""
    converted = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            converted[name] = _for_yacs(value, f"{prefix}{name}.")
            continue
        value = literal(value) if isinstance(value, str) else value
        if type(value) is int and is_float(prefix + name):  # as YAML has 1 where 1.0 is meant
            value = float(value)
        check_texts(prefix + name, value)
        converted[name] = repr(value) if isinstance(value, str) else value
    return converted


def _nearest_key(sentence: str, cfg: CfgNode) -> str:
    """What to add to detectron2's sentence on an unknown key."""
    unknown = re.search(r"Non-existent (?:config )?key: ([\w.-]+)", sentence)
    if not unknown:
        return ""
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
    cfg = load_checked_config(args.config_file, args.opts)
    norms = _norms(cfg)
    processes = args.num_gpus * args.num_machines
    _choose_device(cfg, args.num_gpus, processes, args.eval_only)
    if not args.eval_only:
        cfg = scale_to_processes(cfg, processes, print)
        cfg.TEST.EVAL_ITERATIONS = eval_iterations(cfg.TEST.EVAL_ITERATIONS, cfg.SOLVER.MAX_ITER, print)

    register_datasets(cfg, args.eval_only)
    _read_rle(cfg)
    if not args.eval_only:
        _check_metrics(cfg)
        _check_cropping(cfg)
    if processes == 1:  # of several, the first one holds it, which is not started yet
        hold(cfg.OUTPUT_DIR)
    continues = check_run(
        *(cfg, norms, cfg.MODEL.DEVICE, processes, args.resume, args.eval_only),
        lambda: load_config(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), []),
        _MAY_CHANGE,
    )
    if cfg.MODEL.WEIGHTS and not continues:
        _fetch_weights(cfg.MODEL.WEIGHTS)
    args.read_in_its_place = check_annotation_files(cfg, args.eval_only)

    _try_out(cfg, args, continues)
    make_output_dir(cfg.OUTPUT_DIR)
    cfg.freeze()
    return cfg


def load_checked_config(config_file: str, overrides: list[str]) -> CfgNode:
    """:func:`load_config`, with every value checked that can be checked without data.

    Raises:
        ValueError, OSError: one sentence.
    """
    cfg = load_config(config_file, overrides)
    check_types(cfg)
    check_values(cfg, RULES)
    check_values(cfg, {**input_rules(cfg), **dependent_rules(cfg)})
    check_augmentation(cfg)
    check_norms(_norms(cfg), check_norm)
    return cfg


def _norms(cfg: CfgNode) -> dict[str, str]:
    """Key -> spec of each norm."""
    return {f"MODEL.{name}.NORM": group.NORM for name, group in cfg.MODEL.items() if "NORM" in _mapping(group)}


def _mapping(group: Any) -> Mapping:
    return group if isinstance(group, Mapping) else {}


def _read_rle(cfg: CfgNode) -> None:
    """Set INPUT.MASK_FORMAT to what the training images have, where their masks are not polygons."""
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        rle = [name for name in cfg.DATASETS.TRAIN if name in checked and has_rle(checked[name])]
        if rle:
            print(f"Dataset {rle[0]!r} has RLE masks: INPUT.MASK_FORMAT is set to bitmask.")
            cfg.INPUT.MASK_FORMAT = "bitmask"


def _check_cropping(cfg: CfgNode) -> None:
    """Refuse INPUT.CROP where the package that cuts polygons is missing: fvcore asks for it at the first image."""
    polygons = any(name not in checked or has_polygons(checked[name]) for name in cfg.DATASETS.TRAIN)
    if cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON and polygons and not internals.is_installed("shapely"):
        reason = "where the package shapely is not installed, as the training images have polygons to cut"
        check_values(cfg, {"INPUT.CROP.ENABLED": exactly(False, reason)})


def _check_metrics(cfg: CfgNode) -> None:
    metric, names = cfg.SOLVER.BEST_CHECKPOINT_METRIC, metric_names(cfg)
    if metric:
        check_metric("SOLVER.BEST_CHECKPOINT_METRIC", metric, names)
    if cfg.TEST.AUG.ENABLED:  # at the end alone, so that there is no best among them
        names = [*names, *metric_names(cfg, SUFFIX)]
    for entry in cfg.TEST.EXPECTED_RESULTS:
        name = "/".join(map(str, entry[:2])) if isinstance(entry, tuple | list) and len(entry) == 4 else None
        figures = all(type(each) in (int, float) and math.isfinite(each) for each in entry[2:]) if name else False
        if not figures or not is_given(name, names):
            metrics = ", ".join(names) or "none, as DATASETS.TEST is empty"
            what = f"entries [task, metric, value, tolerance] of this run's metrics ({metrics})"
            raise refusal("TEST.EXPECTED_RESULTS", what, entry)


def _choose_device(cfg: CfgNode, per_machine: int, processes: int, evaluate_only: bool) -> None:
    name = cfg.MODEL.DEVICE
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise refusal("MODEL.DEVICE", "cpu, cuda, cuda:N or another device of PyTorch's", name)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if per_machine < 1:
        raise refusal("--num-gpus", "1 or more", per_machine)
    if device.type != "cpu" and processes > 1 and per_machine > gpus:
        raise ValueError(
            f"--num-gpus {per_machine}, and this machine has {counted(gpus, 'GPU')}; with MODEL.DEVICE cpu it is the "
            "number of processes on the CPU"
        )
    if device.type == "cuda" and gpus and (device.index or 0) >= gpus:
        raise refusal("MODEL.DEVICE", f"a GPU of this machine, which has {gpus}", name)
    if processes > 1 and device.index is not None:
        raise refusal("MODEL.DEVICE", f"{device.type!r} for {processes} processes", name)
    if device.type == "cuda" and not gpus:
        print("No CUDA device: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and not evaluate_only and not cfg.MODEL.DEVICE.startswith("cuda"):
        reason = "as detectron2's mixed precision runs on CUDA only"
        check_values(cfg, {"SOLVER.AMP.ENABLED": exactly(False, f"on {cfg.MODEL.DEVICE}, {reason}")})


def _other_values(cfg: CfgNode, config_file: str) -> dict[str, Any]:
    """What each key would be without the command line; of the others, that are not at their default, the default."""
    defaults = get_cfg()
    add_config(defaults)
    others = differences(cfg, load_config(config_file, []))
    others |= {key: value for key, value in differences(cfg, defaults).items() if key not in others}
    others.pop("MODEL.DEVICE", None)  # the model is tried on the CPU
    return others


def _fetch_weights(weights: str) -> None:
    """Fetch MODEL.WEIGHTS before anything is built."""
    try:
        path = PathManager.get_local_path(weights.partition("?")[0])
    except (OSError, RuntimeError) as error:  # RuntimeError: a name that iopath's catalog does not have
        raise OSError(f"MODEL.WEIGHTS {weights} cannot be fetched: {error_sentence(error)}") from None
    if not os.path.isfile(path):
        wrong = "is a folder; name a file in it" if os.path.isdir(path) else "is not there"
        raise FileNotFoundError(f"MODEL.WEIGHTS {weights} {wrong}")


def _try_out(cfg: CfgNode, args: argparse.Namespace, resume: bool) -> None:
    """Build model, input and solver on the CPU and load the weights once, before anything is written.

    What the config may get wrong is spread over all of detectron2, which answers with bare errors. This costs a few
    seconds at the start of a run.

    Raises:
        ValueError: one sentence.
    """
    cfg, evaluate_only = cfg.clone(), args.eval_only
    cfg.MODEL.DEVICE = "cpu"
    others = _other_values(cfg, args.config_file)
    fbn_plugin.register()
    if "resnet" in cfg.MODEL.BACKBONE.NAME:
        check_values(cfg, {"MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152)})
    model = attempt(cfg, "MODEL", build_model, others)
    if not evaluate_only:
        check_population_stats(cfg, model)
        build_activation_meter(cfg, model)
        attempt(cfg, "INPUT", lambda cfg: DatasetMapper(cfg, is_train=True), others)
        attempt(cfg, "SOLVER", lambda cfg: DefaultTrainer.build_lr_scheduler(cfg, build_optimizer(cfg, model)), others)

    checkpointer = AtomicCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    path = checkpoint_to_resume(cfg.OUTPUT_DIR, args.resume)[0] if resume else cfg.MODEL.WEIGHTS
    logging.disable()  # the run itself says what it loads
    try:
        state = checkpointer.load(path, checkpointables=[], strict=resume or evaluate_only)
    except ValueError as error:
        raise ValueError(str(error) if resume else f"MODEL.WEIGHTS: {error}") from None
    finally:
        logging.disable(logging.NOTSET)
    if resume and not evaluate_only:
        trainer = state.get("trainer")
        check_state(path, state)
        check_state(path, trainer if isinstance(trainer, Mapping) else {}, ("iteration", "seed"))
        BestCheckpoint(cfg.OUTPUT_DIR, cfg.SOLVER.BEST_CHECKPOINT_METRIC, resume=True)
        last, finished = cfg.SOLVER.MAX_ITER, state["iteration"] + 1
        check_enough_iterations("SOLVER.MAX_ITER", last, last, finished, cfg.OUTPUT_DIR)
