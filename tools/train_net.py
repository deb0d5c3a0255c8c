#!/usr/bin/env python
"""Train and evaluate detectron2's models with filtered norms: detectron2's DefaultTrainer and command line, after
``fbn_plugin.register()``.

    python tools/train_net.py --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_FBN.yaml --num-gpus 1
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

Datasets are detectron2's, or COCO-format folders named ``FOLDER:SPLIT``. OUTPUT_DIR gets the config, the log,
metrics.json, TensorBoard events, checkpoints and the COCO results.
"""

import argparse
import contextlib
import difflib
import importlib.util
import logging
import math
import os
import re
import sys
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import nn

import fbn_plugin
from fbn_plugin.engine.cli import user_errors

try:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
    from detectron2.data.detection_utils import SizeMismatchError
    from detectron2.engine import DefaultTrainer, HookBase, default_argument_parser, default_setup, hooks, launch
    from detectron2.evaluation import COCOEvaluator, verify_results
    from detectron2.structures import BoxMode
    from detectron2.utils import comm
    from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
    from detectron2.utils.file_io import PathManager
    from detectron2.utils.logger import setup_logger

    from fbn_plugin.frameworks.detectron2 import add_config, build_model, build_optimizer, check_norm
except ImportError as error:
    found = importlib.util.find_spec("detectron2") is not None
    missing = f"cannot be imported ({error})" if found else "is not installed"
    print(
        f"error: this tool trains detectron2's models, and detectron2 {missing}; its install guide is at "
        "https://detectron2.readthedocs.io/tutorials/install.html (tools/train_detection.py does without it)",
        file=sys.stderr,
    )
    raise SystemExit(2) from None
with user_errors():
    import yaml
    from PIL import Image
    from pycocotools import mask as mask_utils

    from fbn_plugin.engine.checkpoint import atomic_write
    from fbn_plugin.engine.coco_data import CocoDataset, resolve_dataset

# Where a meta architecture has its number of classes.
NUM_CLASSES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "RETINANET",
}

folders: dict[str, CocoDataset] = {}


class AtomicCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, whose files are whole or not there when a run is interrupted."""

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()}, **kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        atomic_write(path, write=lambda file: torch.save(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        atomic_write(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename.encode())


class Trainer(DefaultTrainer):
    """detectron2's trainer with COCO evaluation, atomic checkpoints and a period for its log.

    Args:
        cfg: config.
        log_period: iterations between two lines of ``metrics.json``; losses are medians over so many iterations.
    """

    def __init__(self, cfg: CfgNode, log_period: int = 20):
        self.log_period = log_period
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        # The hooks keep the checkpointer, so this is where another one can take its place.
        self.checkpointer = AtomicCheckpointer(self.model, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        built = super().build_hooks()
        for hook in built:
            if isinstance(hook, hooks.PeriodicWriter):
                hook._period = self.log_period
        return built

    def build_writers(self) -> list[EventWriter]:
        return [
            CommonMetricPrinter(self.max_iter, window_size=self.log_period),
            JSONWriter(os.path.join(self.cfg.OUTPUT_DIR, "metrics.json"), window_size=self.log_period),
            TensorboardXWriter(self.cfg.OUTPUT_DIR, window_size=self.log_period),
        ]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        logging.getLogger("fbn_plugin").info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        evaluator = COCOEvaluator(
            dataset_name,
            output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"),
            max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        if dataset_name in folders:  # the checked annotations in place of those of the file
            evaluator._coco_api = folders[dataset_name].coco_api(masks=cfg.MODEL.MASK_ON)
        return evaluator


def load_config(args: argparse.Namespace) -> CfgNode:
    """Read the config file and the overrides into detectron2's config.

    Raises:
        ValueError, OSError: one sentence on what is wrong with them.
    """
    if not args.config_file:
        raise ValueError(
            "--config-file is needed, such as configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_FBN.yaml"
        )
    if args.config_file.endswith(".py"):
        raise ValueError(
            f"{args.config_file} is a LazyConfig, which detectron2's tools/lazyconfig_train_net.py trains; "
            "call fbn_plugin.register() at its top"
        )
    if not PathManager.isfile(args.config_file):
        raise FileNotFoundError(f"config file {args.config_file} is not there")
    if len(args.opts) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, and {args.opts[-1]!r} has no partner")
    cfg = get_cfg()
    add_config(cfg)
    for source, merge, settings in (
        (args.config_file, cfg.merge_from_file, args.config_file),
        ("KEY VALUE", cfg.merge_from_list, args.opts),
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


def register_datasets(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Make detectron2 know the datasets that the run needs."""
    needed = ["TEST"] if args.eval_only else ["TRAIN", "TEST"]
    if not cfg.DATASETS[needed[0]]:
        raise ValueError(f"DATASETS.{needed[0]} is empty")
    for name in dict.fromkeys(name for key in needed for name in cfg.DATASETS[key]):
        register_dataset(name, cfg)


def register_dataset(name: str, cfg: CfgNode) -> None:
    """Make sure that detectron2 knows the dataset: one of its own, or a folder.

    Raises:
        ValueError, OSError: there is no such dataset, its files are missing or wrong, or it does not fit the model.
    """
    metadata = MetadataCatalog.get(name)
    if name in DatasetCatalog:
        annotations = metadata.get("json_file")
        if annotations is not None and not PathManager.isfile(annotations):
            raise FileNotFoundError(
                f"dataset {name!r} wants {annotations}, which is not there; set DETECTRON2_DATASETS"
            )
    else:
        data = folders[name] = resolve_dataset(name)
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError(f"dataset {name!r}: keypoints are read from detectron2's own datasets only")
        DatasetCatalog.register(name, lambda: records(data, masks=cfg.MODEL.MASK_ON))
        metadata.set(
            json_file=str(data.json_file),
            image_root=str(data.image_root),
            evaluator_type="coco",
            thing_classes=list(data.class_names),
            thing_dataset_id_to_contiguous_id={category: label for label, category in enumerate(data.category_ids)},
        )
    if name in cfg.DATASETS.TEST and metadata.get("evaluator_type") != "coco":
        raise ValueError(f"dataset {name!r} is not evaluated by COCO's box and mask AP, as this tool does")
    group = NUM_CLASSES.get(cfg.MODEL.META_ARCHITECTURE)
    classes = metadata.get("thing_classes")
    if group and classes and len(classes) != cfg.MODEL[group].NUM_CLASSES:
        raise ValueError(
            f"MODEL.{group}.NUM_CLASSES is {cfg.MODEL[group].NUM_CLASSES}, and dataset {name!r} has {len(classes)}: "
            + ", ".join(classes[:10])
            + (", ..." if len(classes) > 10 else "")
        )


def records(data: CocoDataset, masks: bool) -> list[dict]:
    """A folder's images and objects as detectron2's dataset dicts."""
    labels = {category: label for label, category in enumerate(data.category_ids)}
    objects = defaultdict(list)
    for each in data.usable_annotations(masks):
        instance = {
            "bbox": each["bbox"],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": labels[each["category_id"]],
            "iscrowd": each["iscrowd"],
        }
        if masks:
            mask = each["segmentation"]
            if isinstance(mask, dict) and isinstance(mask["counts"], list):
                mask = mask_utils.frPyObjects(mask, *mask["size"])
            instance["segmentation"] = mask
        objects[each["image_id"]].append(instance)
    return [
        {
            "file_name": os.path.join(data.image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": objects[image["id"]],
        }
        for image in data.images
    ]


def prepare(args: argparse.Namespace) -> CfgNode:
    """The frozen config, after everything that can be wrong with it is looked at.

    Raises:
        ValueError, OSError: one sentence.
    """
    cfg = load_config(args)
    for name, group in cfg.MODEL.items():
        if isinstance(group, Mapping) and "NORM" in group:
            try:
                check_norm(group.NORM)
            except ValueError as error:
                raise ValueError(f"MODEL.{name}.NORM: {error}") from None
    if not 0 <= cfg.INPUT.NORM_GAMMA_INIT <= 1:
        raise ValueError(f"INPUT.NORM_GAMMA_INIT must be from 0 to 1, not {cfg.INPUT.NORM_GAMMA_INIT}")
    if not 0 <= cfg.SOLVER.SCALE_LR_DIVISOR < math.inf:
        raise ValueError(f"SOLVER.SCALE_LR_DIVISOR must be 0 or more, not {cfg.SOLVER.SCALE_LR_DIVISOR}")
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED: this tool has no test-time augmentation")

    workers = args.num_gpus * args.num_machines
    check_device(cfg.MODEL.DEVICE)
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        print("No CUDA device: MODEL.DEVICE is set to cpu.")
        cfg.MODEL.DEVICE = "cpu"
    gpus = torch.cuda.device_count() if cfg.MODEL.DEVICE.startswith("cuda") else 0
    if workers > 1 and args.num_gpus > gpus:
        raise ValueError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}, and there are {gpus} GPUs here"
        )
    if cfg.SOLVER.AMP.ENABLED and not gpus:
        raise ValueError("SOLVER.AMP.ENABLED: detectron2's mixed precision runs on CUDA only")

    register_datasets(cfg, args)
    if cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon":
        rle = [name for name in cfg.DATASETS.TRAIN if name in folders and has_rle(folders[name])]
        if rle:
            print(f"Dataset {rle[0]!r} has RLE masks: INPUT.MASK_FORMAT is set to bitmask.")
            cfg.INPUT.MASK_FORMAT = "bitmask"

    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % workers:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of the number of GPUs ({workers}), "
            f"not {cfg.SOLVER.IMS_PER_BATCH}"
        )
    formats = ("BGR", "YUV-BT.601", *Image.MODES)
    if cfg.INPUT.FORMAT not in formats:
        raise ValueError(f"INPUT.FORMAT must be one of {', '.join(formats)}, not {cfg.INPUT.FORMAT!r}")

    fetch_weights(cfg, args)
    try_out(cfg, args)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
    cfg.freeze()
    return cfg


def check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise ValueError(f"MODEL.DEVICE must be cpu, cuda, cuda:N or another device of PyTorch's, not {name!r}")
    if device.type == "cuda" and torch.cuda.is_available() and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"MODEL.DEVICE is {name!r}, and there are {torch.cuda.device_count()} GPUs here")


def try_out(cfg: CfgNode, args: argparse.Namespace) -> None:
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
    with refused("MODEL"):
        model = build_model(cfg)
    if not args.eval_only:
        with refused("INPUT"):
            DatasetMapper(cfg, is_train=True)
        with refused("SOLVER"):
            Trainer.build_lr_scheduler(cfg, Trainer.build_optimizer(cfg, model))

    checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    resume = args.resume and checkpointer.has_checkpoint()
    logging.disable()  # the run itself says what it loads
    try:
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    except Exception as error:  # unpickling what is no checkpoint may raise anything
        name = checkpointer.get_checkpoint_file() if resume else f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name} cannot be read as a checkpoint: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def refused(group: str) -> Iterator[None]:
    """Turn detectron2's error on a value of the config into one sentence."""
    try:
        yield
    except (KeyError, ValueError, AssertionError, TypeError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error.args[0] if error.args else "").split())
        raise ValueError(f"the config's {group} is refused by detectron2: {reason}") from None


def fetch_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Fetch MODEL.WEIGHTS if the run will load them, before anything is built."""
    if args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        if args.eval_only:
            raise ValueError("--eval-only wants MODEL.WEIGHTS, or --resume with a checkpoint in OUTPUT_DIR")
        return
    try:
        path = PathManager.get_local_path(weights.partition("?")[0])
    except OSError as error:
        raise OSError(f"MODEL.WEIGHTS {weights} cannot be fetched: {error}") from None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"MODEL.WEIGHTS {weights} is not there")


def has_rle(data: CocoDataset) -> bool:
    return any(
        isinstance(each["segmentation"], dict) for each in data.usable_annotations(masks=True) if not each["iscrowd"]
    )


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What one process does: train and evaluate, or evaluate only."""
    fbn_plugin.register()
    register_datasets(cfg, args)  # with several GPUs, this is a new process
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="fbn_plugin")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
    else:
        trainer = Trainer(cfg, args.log_period)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def main(argv: list[str] | None = None) -> None:
    parser = default_argument_parser()
    parser.add_argument(
        "--log-period", type=int, default=20, metavar="N", help="iterations between two lines of metrics.json"
    )
    args = parser.parse_args(argv)
    if args.log_period < 1:
        parser.error(f"--log-period must be 1 or more, not {args.log_period}")
    with user_errors():
        cfg = prepare(args)
    # What may still turn up on the way: a diverged loss, an image that cannot be read or is unlike its annotation.
    with user_errors(FloatingPointError, SizeMismatchError, OSError):
        launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(cfg, args))


if __name__ == "__main__":
    main()
