"""tools/visualize_predictions.py: a picture of a run's detections, and what is refused."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RESULTS = Path("inference", "coco_instances_results.json")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("visualize_predictions", ROOT / "tools" / "visualize_predictions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("*.pth"))


def test_a_run(tool, run, shapes, capsys):
    picture = tool.main([str(run), "--num-images", "2", "--threshold", "0"])
    assert picture == run / "predictions.png"
    assert f"2 images of {shapes}:val" in capsys.readouterr().out
    assert Image.open(picture).size[0] == 2 * (640 + 12) + 12
    blank = tool.main([str(run), "--num-images", "2", "--threshold", "1", "--output", str(run / "blank.png")])
    drawn, empty = (np.asarray(Image.open(path)).astype(int) for path in (picture, blank))
    assert drawn.shape == empty.shape
    changed = np.abs(drawn - empty).max(axis=(0, 2)) > 0
    assert not changed[:652].any(), "the ground truth is the same"
    assert changed[664:].any(), "detections are drawn"


def test_two_runs_and_chosen_images(tool, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    picture = tool.main([str(run), str(other), "--images", "3.png", "0", "--output", str(tmp_path / "both.png")])
    assert Image.open(picture).size[0] == 3 * (640 + 12) + 12
    assert not (run / "predictions.png").exists()


def test_bad_input(tool, run, shapes, tmp_path, capsys):
    def refusal(*arguments):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            tool.main([str(each) for each in arguments])
        error = capsys.readouterr().err
        assert exit.value.code == 2
        assert error.startswith("error: ") and error.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before
        return error

    assert "nowhere is not there" in refusal(tmp_path / "nowhere")
    assert "no config.yaml" in refusal(tmp_path)
    assert "--num-images must be from 1 to 100, got 0" in refusal(run, "--num-images", "0")
    assert "--threshold must be from 0 to 1, got 50.0" in refusal(run, "--threshold", "50")
    assert "no image '9.png'" in refusal(run, "--images", "9.png")
    assert "given more than once" in refusal(run, run)
    assert "no is not there" in refusal(run, "--output", tmp_path / "no" / "a.png")
    (tmp_path / "folder.png").mkdir()
    assert "it is a folder" in refusal(run, "--output", tmp_path / "folder.png")
    assert "must end in .png" in refusal(run, "--output", tmp_path / "a.jpg")
    assert "'nowhere:val'" in refusal(run, "--dataset", "nowhere:val")
    results = (run / RESULTS).read_text()
    (run / RESULTS).write_text(results[:-9])
    assert "cut short" in refusal(run)
    (run / RESULTS).write_text(json.dumps([{**json.loads(results)[0], "image_id": 77}]))
    assert "got 77" in refusal(run)
    (run / RESULTS).unlink()
    assert "has no detections on" in refusal(run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"- {shapes}:val", f"- {shapes}:val\n  - {shapes}:train"))
    assert "name one data set with --dataset" in refusal(run)
