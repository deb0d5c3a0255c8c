"""tools/train_net.py: what it refuses and in which words, what it hands to detectron2, and whole runs on a CPU."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from coco_cases import REFUSED, content, write_case
from PIL import Image
from pycocotools import mask as mask_utils
from tiny_detectron2 import CONFIG, ROOT, TINY, TOOL, datasets, metrics, prepare, run_tool

import fbn_plugin
from fbn_plugin.engine.run.run_folder import read_run


def test_without_detectron2(tmp_path):
    """One line that names what is missing and where its guide is; also on a machine where it is installed."""
    hide = "import runpy, sys; sys.modules['detectron2'] = None; sys.path.insert(0, sys.argv[1].rpartition('/')[0]); "
    hide += "runpy.run_path(sys.argv[1], run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", hide, str(TOOL)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "detectron2 is not installed" in result.stderr and "install.html" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, package", [("train_net.py", "pycocotools"), ("check_timm_families.py", "timm")])
def test_without_an_optional_package(script, package):
    """What a plain installation lacks is named in one line."""
    if script == TOOL.name:
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    hide = f"import runpy, sys; sys.modules[{package!r}] = None; sys.path.insert(0, sys.argv[1].rpartition('/')[0]); "
    hide += "runpy.run_path(sys.argv[1], run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", hide, str(TOOL.with_name(script))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert package in result.stderr


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    spec = importlib.util.spec_from_file_location("train_net", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def unregistered():
    yield
    fbn_plugin.unregister()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A COCO-format set with the oddities that exist: no "info", ids from 0, no "area", RLE next to polygons, a crowd,
    an object without a mask, an image without objects; and two classes with ids 3 and 7."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "annotations").mkdir()
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (folder / split).mkdir()
        images, annotations = [], []
        for i in range(5):
            pixels = rng.integers(0, 60, (64, 80, 3), dtype=np.uint8)
            images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 80})
            for j in range(0 if i == 4 else 3):
                x, y = (int(v) for v in rng.integers(2, (50, 34)))
                w, h = 24, 20
                pixels[y : y + h, x : x + w, j % 3] = 255
                mask = np.zeros((64, 80), np.uint8, order="F")
                mask[y : y + h, x : x + w] = 1
                rle = mask_utils.encode(mask)
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
                if j == 1:
                    segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
                annotation = {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": 7 if j else 3,
                    "bbox": [x, y, w, h],
                    "iscrowd": int(i == 3 and j == 2),
                    "segmentation": segmentation,
                }
                if i == 2 and j == 2:
                    del annotation["segmentation"]
                annotations.append(annotation)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
        categories = [{"id": 7, "name": "square"}, {"id": 3, "name": "disc"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


# --- refusals ------------------------------------------------------------------------------------------------------

BAD_OVERRIDES = {
    "unknown key": (["MODEL.FOO", "1"], ["MODEL.FOO"]),
    "key without value": (["SOLVER.BASE_LR"], ["SOLVER.BASE_LR", "pairs"]),
    "value of another type": (["SOLVER.BASE_LR", "fast"], ["SOLVER.BASE_LR", "fast"]),
    "key inside a value": (["MODEL.MASK_ON.X", "1"], ["KEY VALUE"]),
    "misspelt norm": (["MODEL.RESNETS.NORM", "FBM"], ["MODEL.RESNETS.NORM", "'FBM'", "did you mean 'FBN'", "FrozenBN"]),
    "norm option": (["MODEL.FPN.NORM", "FBN(sigma=3)"], ["MODEL.FPN.NORM", "'sigma'", "t_sigma"]),
    "dataset without folder": (["DATASETS.TRAIN", "('nowhere:train',)"], ["nowhere"]),
    "dataset without name": (["DATASETS.TEST", "('coco_2018',)"], ["coco_2018", "FOLDER:SPLIT"]),
    "detectron2's dataset not there": (["DATASETS.TRAIN", "('coco_2017_train',)"], ["instances_train2017.json"]),
    "dataset of another evaluation": (["DATASETS.TEST", "('lvis_v1_val',)"], ["lvis_v1_val", "AP"]),
    "no dataset": (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN"]),
    "number of classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], ["NUM_CLASSES must be 2", "80", "disc, square"]),
    "weights": (["MODEL.WEIGHTS", "no_such.pth"], ["no_such.pth"]),
    "nearest key": (["MODEL.RESNETS.NORMS", "BN"], ["MODEL.RESNETS.NORMS", "did you mean 'MODEL.RESNETS.NORM'"]),
    "groups that do not divide": (["MODEL.FPN.NORM", "FGN(num_groups=48)"], ["MODEL", "FGN(num_groups=48)", "16"]),
    "no groups": (["MODEL.RESNETS.NORM", "GN(num_groups=0)"], ["MODEL.RESNETS.NORM", "num_groups", "got 0"]),
    "weights of another kind": (["MODEL.WEIGHTS", str(CONFIG)], ["MODEL.WEIGHTS", CONFIG.name]),
    "device": (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "'gpu'", "cuda"]),
    "meta architecture": (["MODEL.META_ARCHITECTURE", "Foo"], ["MODEL", "Foo"]),
    "backbone": (["MODEL.BACKBONE.NAME", "nope"], ["MODEL", "nope"]),
    "depth": (["MODEL.RESNETS.DEPTH", "51"], ["MODEL.RESNETS.DEPTH", "51", "50"]),
    "scheduler": (["SOLVER.LR_SCHEDULER_NAME", "x"], ["SOLVER.LR_SCHEDULER_NAME must be one of 'WarmupM", "got 'x'"]),
    "image format": (["INPUT.FORMAT", "ABC"], ["INPUT.FORMAT", "ABC", "BGR"]),
    "augmentation": (["INPUT.RANDOM_FLIP", "sideways"], ["INPUT", "horiz"]),
    "batch": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH", "0"]),
    "steps": (
        ["SOLVER.STEPS", "('a',)"],
        ["SOLVER.STEPS must be of type tuple of finite number", "got ('a',)"],
    ),
    "a string for a list": (["DATASETS.TRAIN", "mine"], ["DATASETS.TRAIN must be of type tuple of str", "got mine"]),
    "strings for numbers": (
        ["MODEL.PIXEL_STD", "['a', 'b', 'c']"],
        ["MODEL.PIXEL_STD must be of type list of finite"],
    ),
    "numbers for strings": (["DATASETS.TEST", "(1,)"], ["DATASETS.TEST must be of type tuple of str", "(1,)"]),
    "labels without thresholds": (
        ["MODEL.RPN.IOU_LABELS", "[1]"],
        ["MODEL.RPN.IOU_LABELS must be a list of 3 with these IOU_THRESHOLDS, got [1]"],
    ),
    "mask format": (["INPUT.MASK_FORMAT", "png"], ["INPUT.MASK_FORMAT must be one of 'polygon', 'bitmask', got 'png'"]),
    "divisor": (["SOLVER.SCALE_LR_DIVISOR", "-1.0"], ["SOLVER.SCALE_LR_DIVISOR", "-1.0"]),
    "divisor and decay": (
        ["SOLVER.SCALE_LR_DIVISOR", "100.0", "SOLVER.WEIGHT_DECAY_NORM", "0.1"],
        ["SOLVER.WEIGHT_DECAY_NORM must be 0 with SCALE_LR_DIVISOR", "0.1"],
    ),
    "input norm": (["INPUT.NORM_GAMMA_INIT", "1.5"], ["INPUT.NORM_GAMMA_INIT", "1.5"]),
    "augmented evaluation": (
        ["TEST.AUG.ENABLED", "True", "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES", "2"],
        ["MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN' with TEST.AUG.ENABLED", "'RetinaNet'"],
    ),
    "augmented evaluation at no size": (
        ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "()"],
        ["TEST.AUG.MIN_SIZES must be one value or more, each 1 or more, got ()"],
    ),
    "the best augmented evaluation": (
        ["TEST.AUG.ENABLED", "True", "SOLVER.BEST_CHECKPOINT_METRIC", "bbox_TTA/AP"],
        ["SOLVER.BEST_CHECKPOINT_METRIC", "'bbox_TTA/AP'", "bbox/AP"],
    ),
    "evaluations that do not increase": (
        ["TEST.EVAL_ITERATIONS", "(30, 20)"],
        ["TEST.EVAL_ITERATIONS", "increasing", "(30, 20)"],
    ),
    "evaluation before the start": (["TEST.EVAL_ITERATIONS", "(0,)"], ["TEST.EVAL_ITERATIONS", "from 1 on", "(0,)"]),
    "no checkpoints": (["SOLVER.CHECKPOINT_PERIOD", "0"], ["SOLVER.CHECKPOINT_PERIOD", "1 or more", "got 0"]),
    "no batches": (["TEST.PRECISE_BN.NUM_ITER", "0"], ["TEST.PRECISE_BN.NUM_ITER", "1 or more"]),
    "period": (["NORM_STATS_PERIOD", "-1"], ["NORM_STATS_PERIOD", "0 or more", "-1"]),
    "layer": (
        ["MEASURE.ACTIVATIONS.PERIOD", "1", "MEASURE.ACTIVATIONS.LAYERS", "('backbone.bottom_up.res4.0.conv1.nrm',)"],
        ["MEASURE.ACTIVATIONS.LAYERS: the model has no layer", "did you mean 'backbone.bottom_up.res4.0.conv1.norm"],
    ),
    "best of what": (["SOLVER.BEST_CHECKPOINT_METRIC", "mAP"], ["'mAP'", "bbox/AP50, ", "segm/APl"]),
    "best of another task": (
        ["SOLVER.BEST_CHECKPOINT_METRIC", "segm/AP", "MODEL.MASK_ON", "False"],
        ["SOLVER.BEST_CHECKPOINT_METRIC", "'segm/AP'", "bbox/AP"],
    ),
    "best without evaluation": (
        ["SOLVER.BEST_CHECKPOINT_METRIC", "bbox/AP", "DATASETS.TEST", "()"],
        ["SOLVER.BEST_CHECKPOINT_METRIC", "DATASETS.TEST is empty", "'bbox/AP'"],
    ),
    "reference": (
        ["SOLVER.REFERENCE_WORLD_SIZE", "3", "SOLVER.IMS_PER_BATCH", "4"],
        ["SOLVER.REFERENCE_WORLD_SIZE", "3", "multiple"],
    ),
    "sampler": (
        ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"],
        ["DATALOADER.SAMPLER_TRAIN must be one of 'TrainingSampler', 'RepeatFactorTrainingSampler'"],
    ),
    "repeat threshold": (["DATALOADER.REPEAT_THRESHOLD", "1.5"], ["DATALOADER.REPEAT_THRESHOLD", "from 0 to 1", "1.5"]),
    "seed": (["SEED", "9223372036854775808"], ["SEED", "2**63"]),
    "precision": (["FLOAT32_PRECISION", "low"], ["FLOAT32_PRECISION", "'medium'", "'low'"]),
    "keypoints of a folder": (["MODEL.KEYPOINT_ON", "True"], ["shapes", "keypoints", "detectron2's own"]),
    "panoptic data": (["MODEL.META_ARCHITECTURE", "PanopticFPN"], ["shapes", "no semantic classes", "PanopticFPN"]),
    "data of two kinds": (
        ["DATASETS.TEST", "('ade20k_sem_seg_val',)"],
        ["ade20k_sem_seg_val", "AP", "GeneralizedRCNN"],
    ),
    "workers": (["DATALOADER.NUM_WORKERS", "-1"], ["DATALOADER.NUM_WORKERS", "-1"]),
    "size of an image": (["INPUT.MIN_SIZE_TRAIN", "(64, 0)"], ["INPUT.MIN_SIZE_TRAIN", "(64, 0)"]),
    "expected results": (
        ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP70', 1.0, 1.0]]"],
        ["EXPECTED_RESULTS", "AP70", "AP75"],
    ),
    "mixed precision on a CPU": (["SOLVER.AMP.ENABLED", "True"], ["SOLVER.AMP.ENABLED"]),
}


def refusal(tool, capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        tool.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.detectron2
def test_no_warnings_of_others_stand_above_a_refusal(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    options = ["MODEL.RESNETS.NORM", "FBN(4)", "OUTPUT_DIR", tmp_path / "out"]
    done = run_tool("--config-file", CONFIG, *options, PYTHONWARNINGS="")
    assert done.returncode == 2 and "did you mean 'FBN(t_sigma=4)'?" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.detectron2
@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_overrides(tool, folder, capsys, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    overrides, words = BAD_OVERRIDES[case]
    error = refusal(
        tool,
        capsys,
        "--config-file",
        CONFIG,
        *TINY,
        *datasets(folder, 2),
        "OUTPUT_DIR",
        tmp_path / "output",
        *overrides,
    )
    assert all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


@pytest.mark.detectron2
def test_polygons_are_not_cut_without_shapely(tool, folder, tmp_path, monkeypatch):
    """Which fvcore would ask for at the first image; masks of other kinds need none."""
    monkeypatch.setitem(sys.modules, "shapely", None)
    crop = ["INPUT.CROP.ENABLED", True, "OUTPUT_DIR", tmp_path]
    with pytest.raises(ValueError, match="INPUT.CROP.ENABLED must be False where the package shapely is not installed"):
        prepare(*datasets(folder, 2), *crop)
    prepare(*datasets(folder, 2), *crop, "MODEL.MASK_ON", False)


@pytest.mark.detectron2
def test_rle_masks_of_a_registered_file_are_no_polygons(tool, folder, tmp_path, capsys, registered_rle):
    """detectron2's mapper would say so at the first image, with a traceback."""
    data = ["DATASETS.TRAIN", "('rle',)", "DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    command = ["--config-file", CONFIG, *TINY, *data, "OUTPUT_DIR", tmp_path / "output"]
    error = refusal(tool, capsys, *command)
    assert "INPUT.MASK_FORMAT must be 'bitmask', as dataset 'rle' has RLE masks, got 'polygon'" in error
    assert not (tmp_path / "output").exists()
    for accepted in (["INPUT.MASK_FORMAT", "bitmask"], ["MODEL.MASK_ON", False]):
        prepare(*data, *accepted, "OUTPUT_DIR", tmp_path / "output")


@pytest.fixture
def registered_rle(folder):
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("rle", {}, str(folder / "annotations" / "instances_train.json"), str(folder / "train"))
    yield
    DatasetCatalog.remove("rle")
    MetadataCatalog.remove("rle")


BAD_FILES = {
    "not YAML": ("MODEL: [", ["config.yaml"]),
    "a list": ("[1, 2]", ["config.yaml"]),
    "unknown key": ("MODEL: {FOO: 1}", ["config.yaml", "MODEL.FOO"]),
    "another type": ("SOLVER: {MAX_ITER: many}", ["config.yaml", "MAX_ITER", "many"]),
    "no base": ("_BASE_: nowhere.yaml", ["config.yaml", "nowhere.yaml"]),
    "its own base": ("_BASE_: config.yaml", ["config.yaml"]),
}


@pytest.mark.detectron2
@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_config_file(tool, capsys, tmp_path, case):
    content, words = BAD_FILES[case]
    (tmp_path / "config.yaml").write_text(content)
    error = refusal(tool, capsys, "--config-file", tmp_path / "config.yaml", "OUTPUT_DIR", tmp_path / "output")
    assert all(word in error for word in words), error
    assert not (tmp_path / "output").exists()


@pytest.mark.detectron2
def test_bad_arguments(tool, folder, capsys, tmp_path, monkeypatch):
    data = [*TINY, *datasets(folder, 2), "OUTPUT_DIR", tmp_path / "output"]
    assert "--config-file" in refusal(tool, capsys)
    assert "nowhere.yaml" in refusal(tool, capsys, "--config-file", "nowhere.yaml")
    assert "LazyConfig" in refusal(tool, capsys, "--config-file", "model.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = refusal(tool, capsys, "--num-gpus", 99, "--config-file", CONFIG, *data, "MODEL.DEVICE", "cuda")
    assert "--num-gpus 99" in cuda and "has 0 GPUs" in cuda and "MODEL.DEVICE cpu" in cuda
    assert "processes (99)" in refusal(tool, capsys, "--num-gpus", 99, "--config-file", CONFIG, *data)
    sync = ["MODEL.RESNETS.NORM", "SyncBN", "SOLVER.IMS_PER_BATCH", 4]
    assert "SyncFBN" in refusal(tool, capsys, "--num-gpus", 2, "--config-file", CONFIG, *data, *sync)
    assert "MODEL.WEIGHTS" in refusal(tool, capsys, "--eval-only", "--config-file", CONFIG, *data)
    with pytest.raises(SystemExit):
        tool.main(["--log-period", "0"])
    assert "--log-period: must be 1 or more, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--num-machines", "2", "--machine-rank", "2"])
    assert "--machine-rank must be from 0 to --num-machines - 1, got 2 of 2" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert "OUTPUT_DIR" in refusal(tool, capsys, "--config-file", CONFIG, *data, "OUTPUT_DIR", tmp_path / "file")
    assert not (tmp_path / "output").exists()


@pytest.mark.detectron2
def test_bad_annotation_files(tool, folder, capsys, tmp_path):
    """Cut short, or with other categories than detectron2 knows the dataset by; of folders and of registered sets."""
    from detectron2.data.datasets import register_coco_instances

    content = (folder / "annotations" / "instances_train.json").read_text()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "train.json").write_text(content[:-100])
    whole = tmp_path / "whole.json"
    whole.write_text(content)
    register_coco_instances("cut", {}, str(tmp_path / "cut" / "train.json"), str(folder / "train"))
    register_coco_instances("fewer", {"thing_classes": ["disc"]}, str(whole), str(folder / "train"))
    register_coco_instances("unnamed", {}, str(whole), str(folder / "train"))
    register_coco_instances("renamed", {"thing_classes": ["disc", "cube"]}, str(whole), str(folder / "train"))
    for name, classes, words in (
        (f"{tmp_path / 'cut'}:train", 2, ["train.json", "not valid JSON, perhaps cut short"]),
        ("cut", 2, ["train.json", "not valid JSON, perhaps cut short"]),
        ("fewer", 1, ["'fewer'", "1 category in detectron2", "whole.json has 2", "'square'", "FOLDER:SPLIT"]),
        ("renamed", 2, ["'renamed'", "differ in 'square'"]),
        ("unnamed", 80, ["NUM_CLASSES must be 2", "'unnamed'", "got 80"]),
    ):
        error = refusal(
            tool,
            capsys,
            *("--config-file", CONFIG, *TINY, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"),
            *("MODEL.ROI_HEADS.NUM_CLASSES", classes, "OUTPUT_DIR", tmp_path / "output"),
        )
        assert all(word in error for word in words), error
    assert not (tmp_path / "output").exists()


@pytest.mark.detectron2
@pytest.mark.parametrize("case", ["a polygon far right", "a code of junk", "an area of text"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_wrong_annotations(tool, folder, capsys, tmp_path, case, is_folder):
    from coco_in_detectron2 import forget
    from detectron2.data.datasets import register_coco_instances

    change, words = REFUSED[case]
    file = write_case(tmp_path / "set", content(change))
    name = f"{tmp_path / 'set'}:train" if is_folder else "wrong"
    if not is_folder:
        register_coco_instances(name, {}, str(file), str(tmp_path / "set"))
    data = [*TINY, *datasets(folder, 1), "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()"]
    try:
        error = refusal(tool, capsys, "--config-file", CONFIG, *data, "OUTPUT_DIR", tmp_path / "output")
    finally:
        forget(name)
    assert words in error and str(file) in error
    assert not (tmp_path / "output").exists()


# --- what detectron2 gets ------------------------------------------------------------------------------------------


@pytest.mark.detectron2
def test_adjusts_the_config_to_data_and_machine(tool, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = prepare(*datasets(folder, 2), "MODEL.DEVICE", "cuda", "OUTPUT_DIR", tmp_path)
    said = capsys.readouterr().out
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE" in said
    assert cfg.INPUT.MASK_FORMAT == "bitmask" and "INPUT.MASK_FORMAT" in said
    assert cfg.is_frozen()


@pytest.mark.detectron2
def test_odd_annotations(tool, folder):
    from fbn_plugin.engine.data.named_sets import resolve_dataset
    from fbn_plugin.engine.detectron2.data import records as read

    data = resolve_dataset(f"{folder}:train")
    records = read(data, masks=True)
    assert [len(r["annotations"]) for r in records] == [3, 3, 2, 3, 0]
    assert {a["category_id"] for r in records for a in r["annotations"]} == {0, 1}
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1, 1]
    assert len(read(data, masks=False)[2]["annotations"]) == 3


@pytest.mark.detectron2
@pytest.mark.parametrize(
    "name, split", [("fruits_nuts", "train"), ("dsb2018_nuclei_small", "val"), ("coco2017_subset", "val")]
)
def test_records_are_detectron2s(tool, real_data, name, split):
    """Where detectron2's own loader takes a file, it finds the same in it."""
    from detectron2.data.datasets import load_coco_json

    from fbn_plugin.engine.data.named_sets import resolve_dataset
    from fbn_plugin.engine.detectron2.data import records

    data = resolve_dataset(f"{real_data(name)}:{split}")
    theirs = load_coco_json(str(data.json_file), str(data.image_root), dataset_name=f"loaded {name}")
    ours = sorted(records(data, masks=True), key=lambda record: record["image_id"])
    assert ours == theirs


# --- the configs ---------------------------------------------------------------------------------------------------


@pytest.mark.detectron2
@pytest.mark.parametrize("model", ["R_50", "X_101_32x8d"])
def test_configs_differ_in_the_norm_alone(tool, model):
    from detectron2.config import get_cfg

    from fbn_plugin.engine.detectron2.config import add_config

    configs = []
    for norm in ("BN", "FBN"):
        cfg = get_cfg()
        add_config(cfg)
        cfg.merge_from_file(str(CONFIG.parent / f"mask_rcnn_{model}_FPN_{norm}.yaml"), allow_unsafe=False)
        configs.append(cfg)
    bn, fbn = configs
    assert (bn.SOLVER.IMS_PER_BATCH, bn.SOLVER.MAX_ITER) == (2, 270_000)
    assert bn.TEST.EVAL_ITERATIONS == (50_000, 100_000, 150_000)
    assert (bn.MODEL.RESNETS.NORM, fbn.MODEL.RESNETS.NORM) == ("BN", "FBN(t_sigma=5.0)")
    fbn.MODEL.RESNETS.NORM = "BN"
    assert bn == fbn


# --- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.detectron2
def test_train_and_evaluate(tool, folder, tmp_path):
    """The command line as a user has it, and the evaluation of what it trained: the same figures."""
    out = tmp_path / "output"
    first = run_tool(
        *("--log-period", 1, "--config-file", CONFIG, *TINY, *datasets(folder, 2), "OUTPUT_DIR", out),
        *("SOLVER.MAX_ITER", 3),
    )
    assert first.returncode == 0, first.stderr
    assert "FilteredBatchNorm2d" in first.stdout
    assert "t_sigma=5" in first.stdout
    assert "bbox/AP" in metrics(out)[-1] and "segm/AP" in metrics(out)[-1]
    losses = [row["total_loss"] for row in metrics(out) if "total_loss" in row]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert list(out.glob("events.out.tfevents.*"))
    assert "FBN(t_sigma=5.0)" in (out / "config.yaml").read_text()
    state = torch.load(out / "model_final.pth")
    tracked = {k: v for k, v in state["model"].items() if k.endswith("num_batches_tracked")}
    assert tracked and all(v == 3 for v in tracked.values())

    config = (out / "config.yaml").read_bytes()
    for source, folder in {"file": tmp_path / "eval", "run": out}.items():
        weights = ["MODEL.WEIGHTS", str(out / "model_final.pth")] if source == "file" else []
        resume = ["--resume"] if source == "run" else []
        tool.main(
            ["--config-file", str(out / "config.yaml"), "--eval-only", *resume, *weights, "OUTPUT_DIR", str(folder)]
        )
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["iteration"] == 2 and evaluation["weights"] == str(out / "model_final.pth")
        expected = {k: v for k, v in metrics(out)[-1].items() if k.startswith(("bbox/", "segm/"))}
        assert evaluation["metrics"] == {k: None if math.isnan(v) else v for k, v in expected.items()}
    assert (out / "config.yaml").read_bytes() == config
    run = read_run(tmp_path / "eval")
    (figures,) = run.evaluations(run.test_sets[0]).items()
    assert figures == (3, {key: None if math.isnan(value) else value for key, value in expected.items()})


@pytest.mark.detectron2
def test_small_slow_scales_and_an_input_norm(tool, folder, tmp_path):
    """The keys that are not detectron2's, from the config to the checkpoint and back."""
    out = tmp_path / "output"
    arguments = ["--config-file", CONFIG, *TINY, *datasets(folder, 2), "OUTPUT_DIR", out, "SOLVER.BASE_LR", 0.5]
    arguments += ["MODEL.RESNETS.NORM", "ScaledBN(gamma_init=0.25)", "INPUT.NORM_GAMMA_INIT", 0.25]
    arguments += ["SOLVER.SCALE_LR_DIVISOR", "10000.0", "SOLVER.MAX_ITER", 3]
    tool.main([str(each) for each in arguments])
    state = torch.load(out / "model_final.pth")
    groups = state["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx([1, 1, 1e-4])
    assert state["model"]["input_norm.num_batches_tracked"] == 3
    scale = state["model"]["backbone.bottom_up.stem.conv1.norm.weight"]
    assert (scale != 0.25).any() and torch.allclose(scale, torch.tensor(0.25), atol=1e-2)
    tool.main(["--config-file", str(out / "config.yaml"), "--eval-only", "--resume"])
    evaluation = json.loads((out / "evaluation.json").read_text())["metrics"]
    assert evaluation and all(
        value == metrics(out)[-1][name] for name, value in evaluation.items() if value is not None
    )


@pytest.mark.detectron2
def test_an_interrupted_checkpoint_leaves_the_last_one(tool, tmp_path, monkeypatch):
    from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer

    checkpointer = AtomicCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("model")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before["last_checkpoint"] == b"model.pth"

    def save(data, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.detectron2
def test_real_photographs(tool, tmp_path, real_data):
    """Annotations without "info", whose results pycocotools would not load as they are."""
    arguments = ["--config-file", CONFIG, *TINY, *datasets(real_data("fruits_nuts"), 3), "SOLVER.MAX_ITER", 2]
    tool.main([str(each) for each in (*arguments, "OUTPUT_DIR", tmp_path)])
    assert {"bbox/AP", "bbox/AP-fig", "segm/AP", "segm/AP-date"} <= metrics(tmp_path)[-1].keys()


@pytest.mark.detectron2
def test_an_image_that_cannot_be_read_is_named(tool, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data/train/0.png").write_bytes((folder / "train/0.png").read_bytes()[:60])
    data = datasets(tmp_path / "data", 2)
    arguments = ["--config-file", CONFIG, *TINY, *data, "SOLVER.MAX_ITER", 9, "OUTPUT_DIR", tmp_path / "out"]
    with pytest.raises(SystemExit) as exit:
        tool.main([str(each) for each in (*arguments, "DATALOADER.NUM_WORKERS", 1)])
    assert exit.value.code == 2
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: image .*data/train/0\.png cannot be read: ", sentence)


@pytest.mark.detectron2
def test_what_training_wants_is_not_asked_of_an_evaluation(tool, folder, tmp_path):
    """As many processes as one likes, and mixed precision on a CPU; no further than to the missing weights."""
    amp = ["SOLVER.AMP.ENABLED", True, "OUTPUT_DIR", tmp_path / "out"]
    with pytest.raises(ValueError, match="nothing to evaluate: set MODEL.WEIGHTS"):
        prepare(*datasets(folder, 2), *amp, eval_only=True, num_gpus=3)


@pytest.mark.detectron2
def test_a_diverged_loss_is_one_sentence(tool, folder, tmp_path, capsys):
    arguments = ["--config-file", CONFIG, *TINY, *datasets(folder, 2), "SOLVER.MAX_ITER", 50, "OUTPUT_DIR", tmp_path]
    with pytest.raises(SystemExit) as exit:
        tool.main([str(each) for each in (*arguments, "SOLVER.BASE_LR", "1e30")])
    assert exit.value.code == 2
    assert re.match("error: .*(diverged|infinite or NaN)", capsys.readouterr().err.strip().splitlines()[-1])
