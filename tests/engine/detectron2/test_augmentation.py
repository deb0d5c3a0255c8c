"""TEST.AUG: what detectron2 itself makes of test-time augmentation, at the end of a run and in tools/evaluate.py."""

import argparse
import importlib.util
import json

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.modeling import GeneralizedRCNNWithTTA
from tiny_detectron2 import ROOT, datasets, metrics, prepare

import fbn_plugin
from fbn_plugin.engine.detectron2.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.detectron2.trainer import Trainer, run

pytestmark = [pytest.mark.detectron2, pytest.mark.usefixtures("one_thread")]

AUGMENTED = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(48, 64)", "TEST.AUG.MAX_SIZE", 96]


@pytest.fixture(autouse=True)
def unregistered():
    yield
    fbn_plugin.unregister()


def detections(folder):
    return json.loads((folder / "coco_instances_results.json").read_text())


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """The config and the OUTPUT_DIR of a run of two iterations with an evaluation after each."""
    out = tmp_path_factory.mktemp("augmented")
    options = [*datasets(shapes, 2), "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 1, "INPUT.NORM_GAMMA_INIT", 0.5]
    cfg = prepare(*options, *AUGMENTED, "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", out)
    run(cfg, argparse.Namespace(eval_only=False, resume=False, log_period=1, imports=[]))
    return cfg, out


def test_the_last_evaluation_has_it(trained):
    first, last = (row for row in metrics(trained[1]) if "bbox/AP" in row)
    assert not any("_TTA" in name for name in first)
    assert {"bbox_TTA/AP", "segm_TTA/AP50", "bbox_TTA/AP-disc"} <= set(last)
    assert not (trained[1] / "inference.tmp").exists()


def test_it_is_detectron2s(trained, tmp_path):
    """The same detections, others than those of the plain evaluation, and the model is left as it was."""
    cfg, out = trained
    fbn_plugin.register()
    model = Trainer.build_model(cfg)
    AtomicCheckpointer(model).load(str(out / "model_final.pth"))
    own = cfg.clone()
    own.defrost()
    own.OUTPUT_DIR = str(tmp_path)
    (tmp_path / "inference.tmp").mkdir()
    Trainer.test(own, GeneralizedRCNNWithTTA(own, model))
    theirs = detections(tmp_path / "inference.tmp")
    assert theirs == detections(out / "inference_TTA") != detections(out / "inference")
    model.eval()
    Trainer.evaluate(own, model)
    assert not model.training


def test_a_model_that_detects_nothing(trained, shapes, tmp_path, capfd):
    options = [*datasets(shapes, 2), "MODEL.WEIGHTS", trained[1] / "model_final.pth", "INPUT.NORM_GAMMA_INIT", 0.5]
    nothing = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0, "OUTPUT_DIR", tmp_path]
    cfg = prepare(*options, *AUGMENTED, *nothing, eval_only=True)
    run(cfg, argparse.Namespace(eval_only=True, resume=False, log_period=1, imports=[]))
    figures = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert {figures[f"{task}/AP"] for task in ("bbox", "segm", "bbox_TTA", "segm_TTA")} == {0.0}
    assert "nothing was detected" in capfd.readouterr().out


def test_evaluate_shows_both(trained, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools" / "evaluate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (found,) = tool.main([str(trained[1]), "--output", str(tmp_path / "found.json")]).values()
    expected = metrics(trained[1])[-1]
    for name in ("bbox/AP", "bbox_TTA/AP", "segm_TTA/AP50"):
        assert found[name] == pytest.approx(expected[name])
    printed = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert printed == ["task", "---------:", "bbox", "segm", "bbox_TTA", "segm_TTA"]
