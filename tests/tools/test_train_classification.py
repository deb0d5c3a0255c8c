"""The command line of tools/train_classification.py: one line for bad input, one process or several, resuming."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import damage, largest_file
from PIL import Image

from fbn_plugin.engine.run.lock import let_go
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
        (["configs/Digits/lenet5_BN.yaml", "SEED", "1"], "a file is named by --config-file"),
        (["DATASETS.NAME", "tar", "DATASETS.ROOT", "nowhere"], "DATASETS.ROOT 'nowhere' does not exist"),
        (["MODEL.NAME", "resnet5"], "did you mean 'resnet50' or"),
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
    assert stop.value.code == 2 and "train/dark/2.png cannot be read" in error
    assert error.count("\n") == 1

    with pytest.raises(SystemExit) as stop:
        main(*DIGITS, "OUTPUT_DIR", tmp_path / "nan", *QUICK, "SOLVER.BASE_LR", "1e30", "SOLVER.WARMUP_FACTOR", "1.0")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: the loss is ") and error.count("\n") == 1
    assert not (tmp_path / "nan/last_checkpoint").exists()


def weights(file):
    return torch.load(file)["model"]


def assert_same(one, other):
    assert [name for name in one | other if not torch.equal(one[name], other[name])] == []


SAVES = [*("SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0, "MODEL.NAME", "test_byobnet")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six iterations, with a log line in each, that nothing disturbs; and one of four."""
    folder = tmp_path_factory.mktemp("runs")
    sys.path.insert(0, str(ROOT / "tools"))
    import train_classification

    sys.path.pop(0)
    for name, iterations in (("whole", 6), ("four", 4)):
        arguments = ["--log-period", 1, *DIGITS, *SAVES, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", folder / name]
        train_classification.main([str(argument) for argument in arguments])
    return folder


def goes_on(whole, folder, main, *flags, start=None):
    """A copy of the run of four iterations goes on to six, and ends as the undisturbed one does."""
    main("--log-period", 1, *(flags or ["--resume"]), *DIGITS, *SAVES, "SOLVER.MAX_ITER", 6, "OUTPUT_DIR", folder)
    assert_same(weights(folder / "model_final.pth"), weights(whole / "whole/model_final.pth"))
    rows = [row for row in read_metrics(folder / "metrics.json") if "total_loss" in row]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("size", [0, 300, 700, 1500, 20_000, 1_000_000])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_space(tmp_path, main, capsys, whole, size):
    """In config.yaml, log.txt, metrics.json, TensorBoard's file or the checkpoint, whichever is too large first."""
    folder = tmp_path / "run"
    shutil.copytree(whole / "four", folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    last = (folder / "last_checkpoint").read_bytes()
    with pytest.raises(SystemExit) as stop, largest_file(size):
        goes_on(whole, folder, main)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1, error
    assert error.startswith(f"error: {folder}/") and error.endswith(" cannot be written: File too large\n")
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert (folder / "last_checkpoint").read_bytes() == last
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp") or name == ".lock"]
    goes_on(whole, folder, main)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, main, capsys, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole / "four", folder)
    damage(folder / "model_final.pth", folder / "model_0000003.pth")
    config = (folder / "config.yaml").read_bytes()
    with pytest.raises(SystemExit) as stop:
        goes_on(whole, folder, main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: checkpoint {folder}/model_final.pth cannot be read: it is cut short or damaged")
    assert error.endswith(f"; --resume auto continues from {folder}/model_0000001.pth, the newest sound one before\n")
    assert (folder / "config.yaml").read_bytes() == config
    goes_on(whole, folder, main, "--resume", "auto")
    assert f"continuing from {folder}/model_0000001.pth" in (folder / "log.txt").read_text()
    assert (folder / "model_0000001.pth").exists() is False  # the two newest are kept


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("last_checkpoint", b"", "last_checkpoint must hold the name of a checkpoint"),
        ("last_checkpoint", b"http://localhost:9/model.pth", "last_checkpoint must hold the name of a checkpoint"),
        ("last_checkpoint", b"model_0000099.pth", "model_0000099.pth, which "),
        ("metrics.json", b"\xff\xfe\n{}\n", "metrics.json: line 1 is damaged"),
        ("metrics.json", b"[1]\n", "metrics.json: line 1 has no 'iteration'"),
        ("metrics.json", b'{"iteration": 1.5}\n', "metrics.json: line 1 has no 'iteration'"),
        ("metrics.json", b'{"iteration": 1, "lr": "x"}\n', "metrics.json: line 1: lr must be a number or null"),
        ("config.yaml", b"\xff\xfe\x00", "config.yaml"),
        ("config.yaml", b"- 3", "config.yaml"),
        ("model_best.pth", b"junk", "model_best.pth cannot be read"),
        ("model_best.pth", {"model": {}, "metric": "top1", "value": "high"}, "model_best.pth is no best checkpoint"),
        ("model_best.pth", {"model": {}}, "model_best.pth is no best checkpoint"),
    ],
)
def test_what_else_may_be_damaged_in_a_run_is_said_before_it_goes_on(
    tmp_path, main, capsys, whole, file, content, words
):
    folder = tmp_path / "run"
    shutil.copytree(whole / "four", folder)
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("BEST_CHECKPOINT_METRIC: ''", "BEST_CHECKPOINT_METRIC: top1"))
    torch.save(content, folder / file) if isinstance(content, dict) else (folder / file).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main(
            "--resume",
            *DIGITS,
            *SAVES,
            "SOLVER.MAX_ITER",
            6,
            "SOLVER.BEST_CHECKPOINT_METRIC",
            "top1",
            "OUTPUT_DIR",
            folder,
        )
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    let_go(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


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
