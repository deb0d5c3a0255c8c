#!/usr/bin/env python
"""Train and evaluate detectron2's models with filtered norms: detectron2's DefaultTrainer and command line, after
``fbn_plugin.register()``.

    python tools/train_net.py --config-file configs/COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_FBN.yaml --num-gpus 1
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

Datasets are detectron2's, or COCO-format folders named ``FOLDER:SPLIT``. OUTPUT_DIR gets the config, the log,
metrics.json, TensorBoard events, checkpoints and the COCO results.
"""

import argparse
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Mapping

import torch
import yaml
from pycocotools import mask as mask_utils

import fbn_plugin
from fbn_plugin.engine.cli import user_errors
from fbn_plugin.engine.coco_data import CocoDataset, resolve_dataset

try:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import CfgNode, get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.detection_utils import SizeMismatchError
    from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, launch
    from detectron2.evaluation import COCOEvaluator, verify_results
    from detectron2.structures import BoxMode
    from detectron2.utils import comm
    from detectron2.utils.file_io import PathManager
    from detectron2.utils.logger import setup_logger

    from fbn_plugin.frameworks.detectron2 import check_norm
except ImportError as error:
    found = importlib.util.find_spec("detectron2") is not None
    missing = f"cannot be imported ({error})" if found else "is not installed"
    print(
        f"error: this tool trains detectron2's models, and detectron2 {missing}; its install guide is at "
        "https://detectron2.readthedocs.io/tutorials/install.html (tools/train_detection.py does without it)",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

# Where a meta architecture has its number of classes.
NUM_CLASSES = {
    "GeneralizedRCNN": "ROI_HEADS",
    "PanopticFPN": "ROI_HEADS",
    "RetinaNet": "RETINANET",
    "FCOS": "RETINANET",
}

folders: dict[str, CocoDataset] = {}


class Trainer(DefaultTrainer):
    """detectron2's trainer with COCO evaluation."""

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
    cfg = get_cfg()
    for source, merge, settings in (
        (args.config_file, cfg.merge_from_file, args.config_file),
        ("KEY VALUE", cfg.merge_from_list, args.opts),
    ):
        try:
            merge(settings)
        except KeyError as error:
            raise ValueError(f"{source}: {error.args[0]}") from None
        except (AssertionError, OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{source}: {' '.join(str(error).split())}") from None
        except (AttributeError, RecursionError, TypeError) as error:
            raise ValueError(f"{source} does not have the form of detectron2's config: {error}") from None
    return cfg


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
    if cfg.TEST.AUG.ENABLED:
        raise ValueError("TEST.AUG.ENABLED: this tool has no test-time augmentation")

    workers = args.num_gpus * args.num_machines
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

    check_weights(cfg, args)
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise OSError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {error.strerror}") from None
    cfg.freeze()
    return cfg


def check_weights(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Fetch MODEL.WEIGHTS if the run will load them, before anything is built or written."""
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
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()


def main(argv: list[str] | None = None) -> None:
    args = default_argument_parser().parse_args(argv)
    with user_errors():
        cfg = prepare(args)
    # What may still turn up on the way: a diverged loss, an image that cannot be read or is unlike its annotation.
    with user_errors(FloatingPointError, SizeMismatchError, OSError):
        launch(run, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(cfg, args))


if __name__ == "__main__":
    main()
