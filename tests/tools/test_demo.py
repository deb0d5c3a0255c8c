"""The demo's command on a set of a few images and two iterations."""

import subprocess
import sys
from pathlib import Path

import pytest

from fbn_plugin.engine.config import CfgNode
from fbn_plugin.engine.demo_data import make_digits_on_photos

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "Demo"


def demo(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


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
    done = demo("--output", tmp_path / "out", "--data", data, *overrides)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in table] == ["norm", "-----:", "BN", "FBN"]
    page = (tmp_path / "out" / "mine" / "report.html").read_text()
    assert "BN and FBN on mine" in page and page.count("data:image/png;base64,") == 2
    assert (tmp_path / "out" / "mine" / "detections.png").stat().st_size > 10_000


def test_a_folder_that_is_not_there(tmp_path):
    done = demo("--output", tmp_path / "out", "--data", tmp_path / "nowhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and "nowhere" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.mark.parametrize(
    "first, second",
    [
        (CONFIGS / "mask_rcnn_R_18_FPN_BN.yaml", CONFIGS / "mask_rcnn_R_18_FPN_FBN.yaml"),
        *(
            (path, path.with_name(path.name.replace("_BN", f"_{norm}")))
            for path in sorted((ROOT / "configs").glob("*/*_BN.yaml"))
            for norm in ("FBN", "GN", "FGN")
            if path.with_name(path.name.replace("_BN", f"_{norm}")).exists() and path.parent != CONFIGS
        ),
    ],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_sibling_configs_differ_in_the_norm_alone(first, second):
    one, other = (dict(leaves(CfgNode.load_yaml_with_base(str(path)))) for path in (first, second))
    differing = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert differing and all(key.endswith("NORM") or key == "OUTPUT_DIR" for key in differing)
