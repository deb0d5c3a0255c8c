"""The command line of tools/train_classification.py: one line for bad input, one process or several, resuming."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbn_plugin.engine.run.logging import read_metrics

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/train_classification.py"
DIGITS = ["--config-file", ROOT / "configs/Digits/test_resnet_FBN.yaml"]
QUICK = ["SOLVER.MAX_ITER", "3", "MODEL.NAME", "test_byobnet"]


def run(*arguments, processes: int = 0) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, TOOL, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


@pytest.fixture
def main(monkeypatch):
    """The tool's main function, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import train_classification

    return lambda *arguments: train_classification.main([str(argument) for argument in arguments])


def write_folder(root: Path) -> None:
    """21 training and 7 validation images of several sizes, dark ones and light ones, on disk as ImageNet is."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 21), ("val", 7)):
        for i in range(count):
            folder = root / split / ("dark", "light")[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 90, (40 + i, 50, 3)) + 160 * (i % 2)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


def test_trains_resumes_and_evaluates(tmp_path, main, capsys):
    main(*DIGITS, *QUICK, "OUTPUT_DIR", tmp_path)
    first = capsys.readouterr().out
    assert "iteration 3/3  eta 00:00  total_loss" in first
    summary = first.strip().splitlines()[-1]
    assert summary.startswith("test_byobnet with FBN on handwritten digits (scikit-learn): top-1 ")
    assert summary.endswith("(360 validation images)")

    main(*DIGITS, "--eval-only", "--resume", *QUICK, "OUTPUT_DIR", tmp_path)
    assert capsys.readouterr().out.strip().splitlines()[-1] == summary
    weights = ["MODEL.WEIGHTS", tmp_path / "model_final.pth", "OUTPUT_DIR", tmp_path / "new"]
    main(*DIGITS, "--eval-only", *QUICK, *weights)
    assert capsys.readouterr().out.strip().splitlines()[-1] == summary

    main(*DIGITS, "--resume", *QUICK, "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", "5")
    assert "iteration 5/5" in capsys.readouterr().out
    assert {row["iteration"] for row in read_metrics(tmp_path / "metrics.json")} == {2, 4}
    # The saved config alone describes the run.
    main("--config-file", tmp_path / "config.yaml", "--eval-only", "--resume")
    assert json.loads((tmp_path / "results.json").read_text())["iterations"] == 5


def test_a_bad_config_ends_in_one_line(tmp_path):
    result = run(*DIGITS, "MODEL.NORM", "FBM", "OUTPUT_DIR", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.startswith("error: MODEL.NORM must be the spec of a norm, got 'FBM': unknown norm")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["SOLVER.BASE_LT", "1"], "unknown config key 'SOLVER.BASE_LT'; did you mean 'SOLVER.BASE_LR'?"),
        (["SOLVER.BASE_LR"], "'SOLVER.BASE_LR' has no partner"),
        (["DATASETS.NAME", "tar", "DATASETS.ROOT", "nowhere"], "DATASETS.ROOT 'nowhere' does not exist"),
        (["MODEL.NAME", "resnet5"], "did you mean 'resnet50'?"),
        (["SOLVER.BASE_LR", "0"], "SOLVER.BASE_LR must be above 0"),
        (["SOLVER.IMS_PER_BATCH", "2000"], "SOLVER.IMS_PER_BATCH must be 1437, "),
        (["INPUT.MIXUP", "-1"], "INPUT.MIXUP must be 0, or from 0.001 to 1000, got -1"),
        (["SOLVER.LABEL_SMOOTHING", "3"], "SOLVER.LABEL_SMOOTHING must be from 0 to less than 1, got 3"),
        (["INPUT.SCALE", "(1.0,)"], "INPUT.SCALE must be two shares"),
        (["OUTPUT_DIR", __file__], "is a file, not a folder"),
    ],
)
def test_bad_input_is_named(tmp_path, main, capsys, overrides, sentence):
    with pytest.raises(SystemExit) as stop:
        main(*DIGITS, "OUTPUT_DIR", tmp_path / "out", *overrides)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_on_the_way_ends_in_one_line(tmp_path, main, capsys, workers):
    write_folder(tmp_path / "images")
    (tmp_path / "images/train/dark/2.png").write_bytes(b"not an image")
    data = ["DATASETS.NAME", "image_folder", "DATASETS.ROOT", tmp_path / "images", "DATALOADER.NUM_WORKERS", workers]
    grey = ["SOLVER.IMS_PER_BATCH", "21", "MODEL.NAME", "test_byobnet", "OUTPUT_DIR", tmp_path / "out"]
    with pytest.raises(SystemExit) as stop:
        main(*DIGITS, *data, *grey)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: image dark/2.png cannot be decoded")
    assert error.count("\n") == 1

    with pytest.raises(SystemExit) as stop:
        main(*DIGITS, "OUTPUT_DIR", tmp_path / "nan", *QUICK, "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_FACTOR", "1.0")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: the loss is ") and error.count("\n") == 1
    assert not (tmp_path / "nan/last_checkpoint").exists()


def test_two_processes(tmp_path, main, capsys):
    """A folder of images, on two processes that do not share out the 7 validation images evenly."""
    write_folder(tmp_path / "images")
    arguments = [*DIGITS, "DATASETS.NAME", "image_folder", "DATASETS.ROOT", tmp_path / "images"]
    arguments += [*QUICK, "SOLVER.IMS_PER_BATCH", 6, "SOLVER.MAX_ITER", 12, "SOLVER.BASE_LR", 0.01]
    trained = run(*arguments, "OUTPUT_DIR", tmp_path / "out", processes=2)
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "out/results.json").read_text())
    assert record["dataset"] == "images" and (record["train_images"], record["val_images"]) == (21, 7)
    assert record["hardware"].startswith("2 x ")
    assert record["top1"] in [pytest.approx(100 * hits / 7) for hits in range(8)]
    assert trained.stdout.count("top-1") == 2 + 12 // 3 - 1  # each epoch's, and the last one again; one process prints

    # One process that evaluates rank 0's checkpoint sees each image once, and the same running statistics.
    main("--eval-only", "--resume", *arguments, "OUTPUT_DIR", tmp_path / "out")
    summary = f"top-1 {record['top1']:.2f} %, loss {record['loss']:.4f} (7 validation images)"
    assert summary in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "data", "folder", "title"),
    [
        ("MNIST/test_resnet_FBN.yaml", "mnist", "mnist", "MNIST"),
        ("CIFAR10/test_resnet_FBN.yaml", "cifar10_jpeg", "cifar10_jpeg", "CIFAR-10 (JPEG)"),
        ("TinyImageNet20/test_resnet_FBN.yaml", "tar", "tiny_imagenet_20class", "tiny_imagenet_20class"),
    ],
)
def test_real_data(tmp_path, main, capsys, monkeypatch, real_data, file, data, folder, title):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_data(folder).parent))
    few = ["SOLVER.IMS_PER_BATCH", 8, "DATALOADER.NUM_WORKERS", 0, "MODEL.NAME", "test_byobnet", "INPUT.SIZE", 32]
    source = ["DATASETS.NAME", data, "DATASETS.ROOT", folder]
    result = main("--config-file", ROOT / "configs" / file, *few, *source, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path)
    assert f" on {title}: top-1 {result['top1']:.2f} %" in capsys.readouterr().out
