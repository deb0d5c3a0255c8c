"""tools/train_detection.py as a user runs it: killed and resumed, on two processes, with every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from coco_cases import REFUSED, content, write_case
from full_disk import damage, largest_file

from fbn_plugin.engine.run.logging import read_metrics

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train_detection.py"
CONFIG = """
MODEL:
  DEVICE: cpu
  MASK_ON: True
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: "FBN(t_sigma=4)"}
  FPN: {OUT_CHANNELS: 16}
  RPN: {BATCH_SIZE_PER_IMAGE: 16, POST_NMS_TOPK_TRAIN: 30, POST_NMS_TOPK_TEST: 10}
  ROI_HEADS: {NUM_CLASSES: 2, BATCH_SIZE_PER_IMAGE: 16}
  ROI_BOX_HEAD: {FC_DIM: 16}
  ROI_MASK_HEAD: {NUM_CONV: 1, CONV_DIM: 16}
INPUT: {MIN_SIZE_TRAIN: [48, 64], MIN_SIZE_TEST: 64, MAX_SIZE_TRAIN: 128, MAX_SIZE_TEST: 128}
SOLVER: {IMS_PER_BATCH: 2, BASE_LR: 5e-3, MAX_ITER: 6, CHECKPOINT_PERIOD: 3, WARMUP_ITERS: 2}
DATALOADER: {NUM_WORKERS: 0}
SEED: 3
VERSION: 2
"""
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def arguments(shapes, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"{CONFIG}DATASETS: {{TRAIN: ['{shapes}:train'], TEST: ['{shapes}:val']}}\nOUTPUT_DIR: {tmp_path / 'out'}\n"
    )
    return ["--config-file", str(tmp_path / "run.yaml")]


@pytest.fixture
def main():
    sys.path.insert(0, str(TOOL.parent))
    try:
        import train_detection
    finally:
        sys.path.remove(str(TOOL.parent))
    return train_detection.main


def run(*arguments, launcher=(sys.executable,)):
    command = [*launcher, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def assert_same(one, other):
    assert [name for name in one | other if not torch.equal(one[name], other[name])] == []


def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights(arguments, main, tmp_path, capsys):
    whole = run(*arguments)
    assert whole.returncode == 0, whole.stderr
    output = ["OUTPUT_DIR", str(tmp_path / "killed"), "DATALOADER.NUM_WORKERS", "2"]
    process = subprocess.Popen([sys.executable, str(TOOL), *arguments, *output], env=ENV, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "killed/last_checkpoint").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
        for flags in ([], ["--resume"], ["--eval-only", "--resume"]):
            with pytest.raises(SystemExit) as stop:
                main([*flags, *arguments, *output])
            said = capsys.readouterr().err
            assert stop.value.code == 2 and said.count("\n") == 1
            assert f"OUTPUT_DIR {tmp_path}/killed is in use by process {process.pid} on " in said
        assert before == {path: path.read_bytes() for path in (tmp_path / "killed").iterdir()}
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "killed/model_final.pth").exists()
    resumed = run("--resume", *arguments, *output)
    assert resumed.returncode == 0 and "iteration 4 to 6" in resumed.stdout, resumed.stderr
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "killed"))
    # what a finished run leaves behind
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.yaml", "metrics.json", "log.txt", "model_0000002.pth", "model_final.pth", "last_checkpoint"} < names
    assert "run_info.json" in names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (tmp_path / "out/inference/coco_instances_results.json").exists()
    evaluation = read_metrics(tmp_path / "out/metrics.json")[-1]
    assert evaluation["iteration"] == 5 and {"bbox/AP", "segm/AP"} < evaluation.keys()
    # the saved config alone evaluates the saved weights to the same figures
    again = run(
        *("--config-file", tmp_path / "out/config.yaml", "--eval-only"),
        *("MODEL.WEIGHTS", tmp_path / "out/model_final.pth", "OUTPUT_DIR", tmp_path / "eval"),
    )
    lines = [[line for line in each.stdout.splitlines() if " AP50 " in line] for each in (whole, again)]
    assert len(lines[0]) == 2 and lines[0] == lines[1]
    written = json.loads((tmp_path / "eval/evaluation.json").read_text())
    assert written["weights"] == str(tmp_path / "out/model_final.pth") and written["iteration"] == 5
    assert written["metrics"] == {name: value for name, value in evaluation.items() if name != "iteration"}


def test_a_full_disk_and_damaged_checkpoints(arguments, main, tmp_path, capsys):
    options = [*arguments, "DATASETS.TEST", "()", "SOLVER.CHECKPOINT_PERIOD", "2", "OUTPUT_DIR"]
    main([*options, str(tmp_path / "out"), "SOLVER.MAX_ITER", "4"])
    shutil.copytree(tmp_path / "out", tmp_path / "full")
    with pytest.raises(SystemExit) as stop, largest_file(1_000_000):
        main(["--resume", *options, str(tmp_path / "full")])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error == f"error: {tmp_path}/full/model_0000005.pth cannot be written: File too large\n"
    main(["--resume", *options, str(tmp_path / "out")])

    damage(tmp_path / "full/model_final.pth", tmp_path / "full/model_0000003.pth")
    with pytest.raises(SystemExit) as stop:
        main(["--resume", *options, str(tmp_path / "full")])
    assert stop.value.code == 2
    assert f"--resume auto continues from {tmp_path}/full/model_0000001.pth, the newest" in capsys.readouterr().err
    main(["--resume=auto", *options, str(tmp_path / "full")])
    assert f"continuing from {tmp_path}/full/model_0000001.pth" in (tmp_path / "full/log.txt").read_text()
    assert_same(weights(tmp_path / "out"), weights(tmp_path / "full"))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes_train_together_and_go_on_after_one_was_killed(arguments, tmp_path):
    """With statistics from batches of both, and with a config that is scaled from one process to two."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ["TEST.EVAL_PERIOD", 6, "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1]
    options += ["SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 6]
    options = ["--resume", *arguments, *options, "SOLVER.REFERENCE_WORLD_SIZE", 1]
    whole = run(*options, "OUTPUT_DIR", tmp_path / "whole", launcher=torchrun)
    assert whole.returncode == 0, whole.stderr
    assert ", 2 processes, iteration 1 to 6" in whole.stdout and whole.stdout.count("iteration 6/6") == 1
    assert "SOLVER.REFERENCE_WORLD_SIZE 1, and 2 process" in whole.stdout and "MAX_ITER 6" in whole.stdout

    killed = tmp_path / "killed"
    command = [*torchrun, str(TOOL), *map(str, options), "OUTPUT_DIR", str(killed)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen(command, env=ENV, **pipes)
    try:
        deadline = time.monotonic() + 240
        while not (killed / "last_checkpoint").exists():
            assert launcher.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {}
        for child in children:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks.update({entry: int(child) for entry in environment if entry.startswith(b"RANK=")})
        os.kill(ranks[b"RANK=1"], signal.SIGKILL)
        errors = launcher.communicate(timeout=120)[1]
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 1 and not (killed / "model_final.pth").exists()
    sentences = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1 and "another process of this run stopped" in sentences[0] and "--resume" in sentences[0]

    resumed = run(*options, "OUTPUT_DIR", killed, launcher=torchrun)
    assert resumed.returncode == 0 and "iteration 4 to 6" in resumed.stdout, resumed.stderr
    assert_same(weights(tmp_path / "whole"), weights(killed))
    rows = [
        [r for r in read_metrics(folder / "metrics.json") if "bbox/AP" in r] for folder in (tmp_path / "whole", killed)
    ]
    assert rows[0] == rows[1] and [row["iteration"] for row in rows[0]] == [2, 5]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--config-file", "nowhere.yaml"], "config file nowhere.yaml is not there"),
        (["MODEL.RESNETS.NROM", "FBN"], "unknown config key 'MODEL.RESNETS.NROM'; did you mean 'MODEL.RESNETS.NORM'?"),
        (["MODEL.RESNETS.NORM", "FBM"], "MODEL.RESNETS.NORM must be the spec of a norm, got 'FBM'"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "80"], "NUM_CLASSES must be 2, "),
        (["DATASETS.TRAIN", "nowhere:train"], "there is no folder nowhere"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "checkpoint nowhere.pth is not there"),
        (["MODEL.WEIGHTS", "nowhere.pkl"], "weights nowhere.pkl are not there"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE must be 'GeneralizedRCNN' in this tool"),
        (["TEST.EVAL_ITERATIONS", "(3, 2)"], "TEST.EVAL_ITERATIONS must be increasing"),
        (["SOLVER.BEST_CHECKPOINT_METRIC", "box/AP"], "did you mean 'bbox/AP'?"),
        (["--eval-only"], "nothing to evaluate"),
        (["SOLVER.MAX_ITER"], "pairs KEY VALUE"),
        (["OUTPUT_DIR", "/dev/null/out"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(main, arguments, tmp_path, options, words, capsys):
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *options])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert set(tmp_path.iterdir()) == before


def test_annotations_cut_short_and_weights_of_other_networks_are_one_line(main, arguments, shapes, tmp_path, capsys):
    folder = shutil.copytree(shapes, tmp_path / "set")
    (annotations,) = (folder / "annotations").glob("*_train.json")
    annotations.write_bytes(annotations.read_bytes()[:200])
    torch.save({"model": {"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "other.pth")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "stem.pth")
    before = set(tmp_path.iterdir())
    for options, words in (
        (["DATASETS.TRAIN", f"{folder}:train"], f"{annotations} is not valid JSON, perhaps cut short"),
        (
            ["MODEL.WEIGHTS", tmp_path / "other.pth"],
            "other.pth is of another model: 19 entries do not fit, such as backbone.body.layer1.0.conv1",
        ),
        (["MODEL.WEIGHTS", tmp_path / "stem.pth"], "stem.pth does not fit the backbone"),
        (["--eval-only", "MODEL.WEIGHTS", tmp_path / "stem.pth"], "stem.pth is a backbone; --eval-only wants a whole"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *map(str, options)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("case", ["a polygon with NaN", "runs that end early", "a box of 1e400", "a file name outside"])
@pytest.mark.parametrize("key", ["DATASETS.TRAIN", "DATASETS.TEST"])
def test_wrong_annotations_are_one_line(main, arguments, tmp_path, key, case, capsys):
    change, words = REFUSED[case]
    write_case(tmp_path / "set", content(change))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([*arguments, key, f"{tmp_path / 'set'}:train"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {key}: ") and error.count("\n") == 1 and words in error
    assert set(tmp_path.rglob("*")) == before


def test_an_image_that_breaks_in_a_worker_is_one_line(arguments, shapes, tmp_path):
    folder = shutil.copytree(shapes, tmp_path / "set")
    for path in (folder / "train").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    done = run(*arguments, "DATASETS.TRAIN", f"{folder}:train", "DATALOADER.NUM_WORKERS", 1)
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1].startswith(f"error: image {folder / 'train'}") and "Traceback" not in done.stderr
    )


def test_keys_that_are_not_used_are_reported_in_one_line(main, arguments, capsys):
    keys = ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign", "MODEL.RETINANET.NORM", "BN"]
    with pytest.raises(SystemExit):
        main([*arguments, *keys, "SOLVER.MAX_ITER", "0"])
    printed = capsys.readouterr()
    assert printed.out == "these keys are not used: MODEL.ROI_MASK_HEAD.POOLER_TYPE, MODEL.RETINANET.NORM\n"
    assert printed.err == "error: SOLVER.MAX_ITER must be 1 or more, and 2147483647 or less, got 0\n"


@pytest.mark.parametrize(
    "name, classes, norm",
    [("fruits_nuts", 3, "BN"), ("dsb2018_nuclei_small", 1, "FBN"), ("coco2017_subset", 80, "FBN")],
)
def test_real_data(arguments, tmp_path, real_data, name, classes, norm):
    folder = real_data(name)
    options = {
        "DATASETS.TRAIN": f"{folder}:train",
        "DATASETS.TEST": f"{folder}:val" if name == "fruits_nuts" else "()",
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.RESNETS.NORM": norm,
        "INPUT.MIN_SIZE_TRAIN": 128,
        "INPUT.MIN_SIZE_TEST": 128,
        "SOLVER.MAX_ITER": 2,
        "TEST.DETECTIONS_PER_IMAGE": 300,
    }
    done = run(*arguments, *(part for pair in options.items() for part in pair))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("AP50") == (2 if name == "fruits_nuts" else 0)
