"""tools/train_net.py: what it refuses and in which words, what it hands to detectron2, and whole runs on a CPU."""

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_utils

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_net.py"
CONFIG = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_R_50_FPN_FBN.yaml"
DATA = ROOT.parent / "shared" / "data"

# A model of a few thousand parameters, with every stage of the real one.
TINY = shlex.split("""
    MODEL.WEIGHTS "" MODEL.DEVICE cpu MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.STEM_OUT_CHANNELS 8
    MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.FPN.OUT_CHANNELS 16
    MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 8 MODEL.ROI_MASK_HEAD.NUM_CONV 1
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.RPN.POST_NMS_TOPK_TRAIN 50 MODEL.RPN.POST_NMS_TOPK_TEST 50
    MODEL.ROI_HEADS.SCORE_THRESH_TEST 0.0 TEST.DETECTIONS_PER_IMAGE 20
    INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 96 INPUT.MIN_SIZE_TEST 64 INPUT.MAX_SIZE_TEST 96
    DATALOADER.NUM_WORKERS 0 SOLVER.WARMUP_ITERS 0 SOLVER.STEPS () SEED 1
""")

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data at {DATA.name} next to the repository")


def run_tool(*arguments, **env):
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **env},
        capture_output=True,
        text=True,
    )


def test_without_detectron2(tmp_path):
    """One line that names what is missing and where its guide is; also on a machine where it is installed."""
    hide = "import runpy, sys; sys.modules['detectron2'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
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
    hide = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
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


def datasets(folder, num_classes):
    return [
        *("DATASETS.TRAIN", f"('{folder}:train',)", "DATASETS.TEST", f"('{folder}:val',)"),
        *("MODEL.ROI_HEADS.NUM_CLASSES", num_classes),
    ]


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
    "dataset of another evaluation": (["DATASETS.TEST", "('ade20k_sem_seg_val',)"], ["ade20k_sem_seg_val", "AP"]),
    "no dataset": (["DATASETS.TRAIN", "()"], ["DATASETS.TRAIN"]),
    "number of classes": (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], ["80", "has 2", "disc, square"]),
    "weights": (["MODEL.WEIGHTS", "no_such.pth"], ["no_such.pth"]),
    "nearest key": (["MODEL.RESNETS.NORMS", "BN"], ["MODEL.RESNETS.NORMS", "did you mean 'MODEL.RESNETS.NORM'"]),
    "groups that do not divide": (["MODEL.FPN.NORM", "FGN(num_groups=48)"], ["MODEL", "FGN(num_groups=48)", "16"]),
    "no groups": (["MODEL.RESNETS.NORM", "GN(num_groups=0)"], ["MODEL.RESNETS.NORM", "num_groups", "got 0"]),
    "weights of another kind": (["MODEL.WEIGHTS", str(CONFIG)], ["MODEL.WEIGHTS", CONFIG.name]),
    "device": (["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "'gpu'", "cuda"]),
    "meta architecture": (["MODEL.META_ARCHITECTURE", "Foo"], ["MODEL", "Foo"]),
    "backbone": (["MODEL.BACKBONE.NAME", "nope"], ["MODEL", "nope"]),
    "depth": (["MODEL.RESNETS.DEPTH", "51"], ["MODEL.RESNETS.DEPTH", "51", "50"]),
    "scheduler": (["SOLVER.LR_SCHEDULER_NAME", "x"], ["SOLVER", "scheduler: x"]),
    "image format": (["INPUT.FORMAT", "ABC"], ["INPUT.FORMAT", "ABC", "BGR"]),
    "augmentation": (["INPUT.RANDOM_FLIP", "sideways"], ["INPUT", "horiz"]),
    "batch": (["SOLVER.IMS_PER_BATCH", "0"], ["SOLVER.IMS_PER_BATCH", "0"]),
    "steps": (["SOLVER.STEPS", "('a',)"], ["SOLVER", "str"]),
    "divisor": (["SOLVER.SCALE_LR_DIVISOR", "-1.0"], ["SOLVER.SCALE_LR_DIVISOR", "-1.0"]),
    "divisor and decay": (
        ["SOLVER.SCALE_LR_DIVISOR", "100.0", "SOLVER.WEIGHT_DECAY_NORM", "0.1"],
        ["SOLVER.SCALE_LR_DIVISOR", "WEIGHT_DECAY_NORM 0"],
    ),
    "input norm": (["INPUT.NORM_GAMMA_INIT", "1.5"], ["INPUT.NORM_GAMMA_INIT", "1.5"]),
    "augmented evaluation": (["TEST.AUG.ENABLED", "True"], ["TEST.AUG.ENABLED"]),
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
def test_bad_arguments(tool, folder, capsys, tmp_path):
    data = [*TINY, *datasets(folder, 2), "OUTPUT_DIR", tmp_path / "output"]
    assert "--config-file" in refusal(tool, capsys)
    assert "nowhere.yaml" in refusal(tool, capsys, "--config-file", "nowhere.yaml")
    assert "LazyConfig" in refusal(tool, capsys, "--config-file", "model.py")
    assert "GPUs" in refusal(tool, capsys, "--num-gpus", 99, "--config-file", CONFIG, *data)
    assert "MODEL.WEIGHTS" in refusal(tool, capsys, "--eval-only", "--config-file", CONFIG, *data)
    with pytest.raises(SystemExit):
        tool.main(["--log-period", "0"])
    assert "--log-period must be 1 or more, not 0" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert "OUTPUT_DIR" in refusal(tool, capsys, "--config-file", CONFIG, *data, "OUTPUT_DIR", tmp_path / "file")
    assert not (tmp_path / "output").exists()


# --- what detectron2 gets ------------------------------------------------------------------------------------------


def prepare(tool, *overrides):
    return tool.prepare(
        argparse.Namespace(
            config_file=str(CONFIG),
            opts=[*TINY, *map(str, overrides)],
            resume=False,
            eval_only=False,
            num_gpus=1,
            num_machines=1,
        )
    )


@pytest.mark.detectron2
def test_adjusts_the_config_to_data_and_machine(tool, folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = prepare(tool, *datasets(folder, 2), "MODEL.DEVICE", "cuda", "OUTPUT_DIR", tmp_path)
    said = capsys.readouterr().out
    assert cfg.MODEL.DEVICE == "cpu" and "MODEL.DEVICE" in said
    assert cfg.INPUT.MASK_FORMAT == "bitmask" and "INPUT.MASK_FORMAT" in said
    assert cfg.is_frozen()


@pytest.mark.detectron2
def test_odd_annotations(tool, folder):
    records = tool.records(tool.resolve_dataset(f"{folder}:train"), masks=True)
    assert [len(r["annotations"]) for r in records] == [3, 3, 2, 3, 0]
    assert {a["category_id"] for r in records for a in r["annotations"]} == {0, 1}
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1, 1]
    assert len(tool.records(tool.resolve_dataset(f"{folder}:train"), masks=False)[2]["annotations"]) == 3


@needs_data
@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["fruits_nuts:train", "dsb2018_nuclei_small:val", "coco2017_subset:val"])
def test_records_are_detectron2s(tool, monkeypatch, name):
    """Where detectron2's own loader takes a file, it finds the same in it."""
    from detectron2.data.datasets import load_coco_json

    monkeypatch.setenv("DETECTRON2_DATASETS", str(DATA))
    data = tool.resolve_dataset(name)
    theirs = load_coco_json(str(data.json_file), str(data.image_root), dataset_name=f"loaded {name}")
    ours = sorted(tool.records(data, masks=True), key=lambda record: record["image_id"])
    assert ours == theirs


# --- the configs ---------------------------------------------------------------------------------------------------


@pytest.mark.detectron2
@pytest.mark.parametrize("model", ["R_50", "X_101_32x8d"])
def test_configs_differ_in_the_norm_alone(tool, model):
    from detectron2.config import get_cfg

    configs = []
    for norm in ("BN", "FBN"):
        cfg = get_cfg()
        cfg.merge_from_file(str(CONFIG.parent / f"mask_rcnn_{model}_FPN_{norm}.yaml"), allow_unsafe=False)
        configs.append(cfg)
    bn, fbn = configs
    assert (bn.SOLVER.IMS_PER_BATCH, bn.SOLVER.MAX_ITER, bn.TEST.EVAL_PERIOD) == (2, 270_000, 50_000)
    assert (bn.MODEL.RESNETS.NORM, fbn.MODEL.RESNETS.NORM) == ("BN", "FBN(t_sigma=5.0)")
    fbn.MODEL.RESNETS.NORM = "BN"
    assert bn == fbn


# --- whole runs ----------------------------------------------------------------------------------------------------


def copypaste(output):
    """The figures that detectron2 prints after an evaluation."""
    return [line.split("copypaste: ")[1] for line in output.splitlines() if "copypaste: " in line]


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.detectron2
def test_train_resume_evaluate(tool, folder, tmp_path):
    out = tmp_path / "output"
    arguments = ["--config-file", CONFIG, *TINY, *datasets(folder, 2), "OUTPUT_DIR", out]

    first = run_tool("--log-period", 1, *arguments, "SOLVER.MAX_ITER", 3)
    assert first.returncode == 0, first.stderr
    assert "FilteredBatchNorm2d" in first.stdout
    assert "t_sigma=5" in first.stdout
    assert "bbox/AP" in metrics(out)[-1] and "segm/AP" in metrics(out)[-1]
    losses = [row["total_loss"] for row in metrics(out) if "total_loss" in row]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert list(out.glob("events.out.tfevents.*"))
    assert "FBN(t_sigma=5.0)" in (out / "config.yaml").read_text()

    resumed = run_tool("--resume", *arguments, "SOLVER.MAX_ITER", 5)
    assert resumed.returncode == 0, resumed.stderr
    assert "Starting training from iteration 3" in resumed.stdout
    state = torch.load(out / "model_final.pth", weights_only=False)
    assert state["iteration"] == 4
    tracked = {k: v for k, v in state["model"].items() if k.endswith("num_batches_tracked")}
    assert tracked and all(v == 5 for v in tracked.values())

    again = run_tool(
        "--eval-only", *arguments, "MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path / "eval"
    )
    assert again.returncode == 0, again.stderr
    assert len(copypaste(again.stdout)) == 6
    assert copypaste(again.stdout) == copypaste(resumed.stdout)


@pytest.mark.detectron2
def test_small_slow_scales_and_an_input_norm(tool, folder, tmp_path):
    """The keys that are not detectron2's, from the config to the checkpoint and back."""
    out = tmp_path / "output"
    arguments = ["--config-file", CONFIG, *TINY, *datasets(folder, 2), "OUTPUT_DIR", out, "SOLVER.BASE_LR", 0.5]
    arguments += ["MODEL.RESNETS.NORM", "ScaledBN(gamma_init=0.25)", "INPUT.NORM_GAMMA_INIT", 0.25]
    first = run_tool(*arguments, "SOLVER.SCALE_LR_DIVISOR", "10000.0", "SOLVER.MAX_ITER", 3)
    assert first.returncode == 0, first.stderr
    state = torch.load(out / "model_final.pth")
    groups = state["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert [group["lr"] / groups[0]["lr"] for group in groups] == pytest.approx([1, 1, 1e-4])
    assert state["model"]["input_norm.num_batches_tracked"] == 3
    scale = state["model"]["backbone.bottom_up.stem.conv1.norm.weight"]
    assert (scale != 0.25).any() and torch.allclose(scale, torch.tensor(0.25), atol=1e-2)
    again = run_tool("--config-file", out / "config.yaml", "--eval-only", "--resume")
    assert again.returncode == 0, again.stderr
    assert copypaste(again.stdout) == copypaste(first.stdout)


@pytest.mark.detectron2
def test_an_interrupted_checkpoint_leaves_the_last_one(tool, tmp_path, monkeypatch):
    checkpointer = tool.AtomicCheckpointer(torch.nn.Linear(2, 2), str(tmp_path))
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


@needs_data
@pytest.mark.detectron2
def test_real_photographs(tool, tmp_path):
    """Annotations without "info", whose results pycocotools would not load as they are."""
    result = run_tool(
        *("--config-file", CONFIG, *TINY, *datasets("fruits_nuts", 3), "SOLVER.MAX_ITER", 2),
        *("OUTPUT_DIR", tmp_path),
        DETECTRON2_DATASETS=str(DATA),
    )
    assert result.returncode == 0, result.stderr
    assert {"bbox/AP", "bbox/AP-fig", "segm/AP", "segm/AP-date"} <= metrics(tmp_path)[-1].keys()


@pytest.mark.detectron2
def test_a_diverged_loss_is_one_sentence(tool, folder, tmp_path):
    result = run_tool(
        *("--config-file", CONFIG, *TINY, *datasets(folder, 2), "SOLVER.MAX_ITER", 50),
        *("SOLVER.BASE_LR", "1e30", "OUTPUT_DIR", tmp_path),
    )
    assert result.returncode == 2
    assert re.match("error: .*(diverged|infinite or NaN)", result.stderr.strip().splitlines()[-1])
