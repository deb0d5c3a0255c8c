"""The demo's command on a set of a few images and two iterations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fbn_plugin.engine.data.demo_data import make_digits_on_photos

ROOT = Path(__file__).parents[2]


def demo(*arguments, path=ROOT):
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_runs_on_data_of_ones_own(tmp_path):
    data = make_digits_on_photos(tmp_path / "mine", num_train=4, num_val=2)
    overrides = [
        "SOLVER.MAX_ITER",
        2,
        "TEST.EVAL_PERIOD",
        2,
        "INPUT.MIN_SIZE_TRAIN",
        "(64,)",
        "INPUT.MIN_SIZE_TEST",
        64,
    ]
    (tmp_path / "of_ones_own.py").write_text("print('imported')\n")
    done = demo("--output", tmp_path / "out", "--data", data, "--import", tmp_path / "of_ones_own.py", *overrides)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" | imported") == 2
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table] == ["norm", "-----:", "BN", "FBN"]
    page = (tmp_path / "out" / "mine" / "report.html").read_text()
    assert "BN and FBN on mine" in page and page.count("data:image/png;base64,") == 2
    assert (tmp_path / "out" / "mine" / "detections.png").stat().st_size > 10_000

    # Once more, the runs are not repeated; other settings and other data are not shown the old runs as theirs.
    again = demo("--output", tmp_path / "out", "--data", data, *overrides)
    assert again.returncode == 0 and [row for row in again.stdout.splitlines() if row.startswith("|")] == table
    other = demo("--output", tmp_path / "out", "--data", data, *overrides, "SEED", 5)
    assert other.returncode == 2 and other.stderr.startswith("error: SEED must be 1 as in the run that OUTPUT_DIR")
    annotations = data / "annotations" / "instances_val.json"
    annotations.write_text(annotations.read_text().replace('"iscrowd": 0', '"iscrowd": 1', 1))
    edited = demo("--output", tmp_path / "out", "--data", data, *overrides)
    assert (edited.returncode, edited.stdout) == (2, "")
    assert edited.stderr == (
        f"error: {tmp_path / 'out' / 'mine'} holds a run on other data; choose another --output or remove it\n"
    )


def test_a_missing_package_is_one_line(tmp_path):
    (tmp_path / "pycocotools.py").write_text("raise ModuleNotFoundError(name='pycocotools')")
    done = demo("--output", tmp_path / "out", path=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: this needs the package 'pycocotools', which is not installed\n",
    )


@pytest.mark.parametrize("name", ["nowhere", "loop"])
def test_a_folder_that_is_not_there(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    done = demo("--output", tmp_path / "out", "--data", tmp_path / name)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and name in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
