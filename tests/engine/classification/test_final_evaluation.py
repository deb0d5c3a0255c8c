"""TEST.AT_END and TEST.ALSO: what is measured of the trained model, by which moments, and what it leaves as it was."""

import json
import os

import pytest
import torch
from processes import run_processes
from tiny_classification import config, train
from torch.utils.data import TensorDataset

from fbn_plugin import evaluate_balanced, self_label, update_population_stats
from fbn_plugin.engine.classification import final_evaluation
from fbn_plugin.engine.classification.config import check_config
from fbn_plugin.engine.classification.crops import Views, normalized
from fbn_plugin.engine.classification.data import build_train_loader
from fbn_plugin.engine.classification.final_evaluation import FILE, _Seen
from fbn_plugin.engine.classification.run_folder import read_classification_run
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.data.splits import subset_by_class
from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.logging import read_metrics

IMAGES = 60
LEARNS = {
    "MODEL__NAME": "mlp_3x100",
    "MODEL__OPTIONS": "{'image_size': 8}",
    "SOLVER__MAX_ITER": 60,
    "SOLVER__BASE_LR": 0.5,
    "DATASETS__VAL_IMAGES": IMAGES,
    "INPUT__CROP_PCT": 0.8,
}
WANTED = {
    "TEST__AT_END__CROPS": 10,
    "TEST__AT_END__MOMENTS": "('population', 'balanced', 'spread')",
    "TEST__AT_END__RELABEL": 2,
    "TEST__AT_END__WALKS": 3,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that measures nothing more, and one with everything."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "plain", **LEARNS)
    train(folder / "all", **LEARNS, **WANTED, TEST__ALSO="('balanced',)")
    return folder


def seen(cfg):
    """Each of the ten views of the images, normalized, as a data set; and the labels."""
    data, views = load_image_data("digits", mode="L").val, Views(cfg, 10)
    chosen = subset_by_class(data.targets, IMAGES, 0)
    pixels = torch.stack([views(data[index][0]) for index in chosen])
    labels = torch.tensor([data.targets[index] for index in chosen])
    return [TensorDataset(view) for view in normalized(pixels, cfg).unbind(1)], labels


def model_of(folder):
    trainer = ClassificationTrainer(config(folder, **LEARNS, MODEL__WEIGHTS=folder / "model_final.pth"), eval_only=True)
    trainer.checkpointer.load(str(folder / "model_final.pth"), [], strict=True)
    return trainer


def record_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_it_changes_nothing_of_the_training(runs):
    plain, measured = (load_file(runs / name / "model_final.pth")["model"] for name in ("plain", "all"))
    assert all(torch.equal(value, measured[name]) for name, value in plain.items())
    for name in ("top1", "top5", "loss"):
        assert record_of(runs / "plain")[name] == record_of(runs / "all")[name]


def test_figures_are_those_of_the_library(runs):
    trainer, record = model_of(runs / "all"), record_of(runs / "all")
    crops, labels = seen(trainer.cfg)
    for name, spread in (("balanced", False), ("spread", True)):
        expected = evaluate_balanced(trainer.model, crops, labels, spread_crops=spread)
        assert record[f"final/{name}/top1"] == pytest.approx(expected.accuracy)
        assert record[f"final/{name}/conditional"] == 1
    with torch.no_grad():
        scores = sum(trainer.model.eval()(crop.tensors[0]).double().softmax(1) for crop in crops)
    first = scores.argmax(1)
    assert record["final/population/top1"] == pytest.approx(100 * (first == labels).double().mean())
    assert "final/population/conditional" not in record
    rounds = self_label(trainer.model, crops, first, 2, labels)
    assert record["final/relabel/top1"] == pytest.approx(rounds[-1].accuracy)
    kept = json.loads((runs / "all" / FILE).read_text())
    assert kept["relabel"]["top1"][1:] == pytest.approx([each.accuracy for each in rounds])
    assert kept["relabel"]["conditional"] is False and kept["walks"]["conditional"] is True
    assert (kept["images"], kept["crops"]) == (IMAGES, 10)
    assert (len(kept["walks"]["weak"]), len(kept["walks"]["strong"]), len(kept["walks"]["pairs"])) == (3, 3, 1)
    assert record["final/walks/conditional"] == 1 and 0 <= record["final/walks/weak_missing"] <= 100
    single = evaluate_balanced(trainer.model, _Seen(trainer.cfg, trainer.data.val), labels)
    assert record["balanced/top1"] == pytest.approx(single.accuracy) and record["balanced/conditional"] == 1


def test_where_the_figures_stand(runs):
    rows = [
        row for row in read_metrics(runs / "all/metrics.json") if "val/top1" in row or "final/walks/conditional" in row
    ]
    assert all("val/balanced/top1" in row and row["val/balanced/conditional"] == 1 for row in rows[:-1])
    assert rows[-1]["iteration"] == 59 and "final/spread/top1" in rows[-1]
    _, figures = read_classification_run(runs / "all").last_evaluation()
    assert {"top1", "balanced/top1", "final/spread/top1"} <= set(figures)
    assert not any("conditional" in name for name in figures)


def test_a_run_that_is_stopped_in_it_makes_up_for_it(runs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, stopping.handled():
        patched.setattr(stopping, "leavable", lambda work: None)
        with pytest.raises(stopping.Terminated):
            train(folder, **LEARNS, **WANTED)
    assert (folder / "model_final.pth").is_file() and not (folder / "results.json").exists()
    train(folder, resume=True, **LEARNS, **WANTED)
    once, again = record_of(runs / "all"), record_of(folder)
    assert {n: v for n, v in once.items() if n.startswith("final/")} == {
        n: v for n, v in again.items() if n.startswith("final/")
    }
    before = (folder / FILE).stat().st_mtime_ns
    os.remove(folder / "results.json")
    trainer = ClassificationTrainer(config(folder, **LEARNS, **WANTED), resume=True)
    assert trainer.train()["final/spread/top1"] == again["final/spread/top1"]
    assert (folder / FILE).stat().st_mtime_ns == before  # not measured twice


def test_population_statistics_are_lent(tmp_path):
    keys = {
        **LEARNS,
        "TEST__AT_END__MOMENTS": "('population',)",
        "TEST__AT_END__POPULATION": True,
        "SOLVER__MAX_ITER": 6,
    }
    trainer, result = train(tmp_path, **keys)
    kept = load_file(tmp_path / "model_final.pth")["model"]
    assert all(torch.equal(value, kept[name]) for name, value in trainer.model.state_dict().items())
    cfg = trainer.cfg
    update_population_stats(
        trainer.model.train(), build_train_loader(cfg, trainer.data.train, trainer.device), trainer.iters_per_epoch
    )
    assert result["final/population/loss"] == pytest.approx(trainer.evaluate()["loss"], rel=1e-5)
    assert result["final/population/loss"] != pytest.approx(result["loss"], rel=1e-3)


def test_the_test_set_and_the_best_weights(tmp_path):
    keys = {**LEARNS, "DATASETS__VAL_SHARE": 0.2, "DATASETS__VAL_IMAGES": 0, "SOLVER__BEST_CHECKPOINT_METRIC": "loss"}
    _, result = train(tmp_path, **keys, TEST__AT_END__MOMENTS="('population',)", TEST__EVAL_ITERATIONS="(10, 20, 30)")
    assert result["final/population/top1"] == result["test/top1"] != result["top1"]


def test_evaluation_alone(runs, tmp_path):
    keys = {**LEARNS, **WANTED, "MODEL__WEIGHTS": runs / "plain/model_final.pth"}
    trainer = ClassificationTrainer(config(tmp_path, **keys, TEST__ALSO="('batch',)"), eval_only=True)
    trainer.checkpointer.load(str(runs / "plain/model_final.pth"), [], strict=True)
    result, expected = trainer.evaluate(), record_of(runs / "all")
    assert result["final/spread/top1"] == expected["final/spread/top1"] and "batch/top1" in result
    trainer.write_evaluation(result)
    assert "final/spread/top1" in json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert "batch batches: top-1" in trainer.describe(result)


def test_two_processes_measure_what_one_does(runs, tmp_path):
    keys = {**LEARNS, **WANTED, "MODEL__WEIGHTS": runs / "plain/model_final.pth"}

    def evaluate(_=0):
        trainer = ClassificationTrainer(config(tmp_path / "out", **keys), eval_only=True)
        trainer.checkpointer.load(str(runs / "plain/model_final.pth"), [], strict=True)
        return trainer.evaluate()

    one, two = evaluate(), run_processes(evaluate, 2, tmp_path)
    assert two[0] == two[1] and two[0].keys() == one.keys()
    assert {name for name in one if name.startswith("final/")} >= {"final/population/top1", "final/spread/top1"}
    assert two[0] == pytest.approx(one, rel=1e-4)


def test_a_model_that_has_learned_nothing_is_not_lost(tmp_path, monkeypatch):
    """It recognizes no image of most classes, and may take all for one class, so that batches are of one image."""

    def refuse(*args, **kwargs):
        raise ValueError("Expected more than 1 value per channel when training")

    monkeypatch.setattr(final_evaluation, "self_label", refuse)
    keys = {"DATASETS__VAL_IMAGES": 20, "TEST__AT_END__WALKS": 1, "TEST__AT_END__RELABEL": 3}
    _, result = train(tmp_path, SOLVER__MAX_ITER=1, **keys)
    assert not any(name.startswith("final/") for name in result) and "top1" in record_of(tmp_path)
    said = (tmp_path / "log.txt").read_text()
    assert "no image walks: class" in said and "has no image that is recognized" in said
    assert "the batches are not balanced by predictions: Expected more than 1 value per channel" in said


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"TEST__ALSO": "('balance',)"}, r"TEST.ALSO must be some of 'population', 'batch', 'balanced', got"),
        ({"TEST__ALSO": "('population',)"}, "TEST.ALSO must be without 'population', which TEST.MOMENTS is"),
        ({"TEST__AT_END__MOMENTS": "('spread',)"}, "TEST.AT_END.CROPS must be 10 or 144 with MOMENTS 'spread'"),
        ({"TEST__AT_END__MOMENTS": "('all',)"}, "TEST.AT_END.MOMENTS must be some of .*'spread', got"),
        ({"TEST__AT_END__CROPS": 5}, "TEST.AT_END.CROPS must be one of 1, 10, 144, got 5"),
        ({"TEST__AT_END__CROPS": 10}, "TEST.AT_END.CROPS: INPUT.CROP_PCT must be less than 1 for 10 crops"),
        ({"TEST__AT_END__POPULATION": True}, "TEST.AT_END.POPULATION must be False without MOMENTS, RELABEL or WALKS"),
        ({"TEST__AT_END__RELABEL": -1}, "TEST.AT_END.RELABEL must be 0 or more"),
    ],
)
def test_values_that_are_refused(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_config(config(**values))


def test_images_that_do_not_fit_are_refused_before_the_run(tmp_path):
    keys = {"DATASETS__VAL_IMAGES": 9, "TEST__AT_END__MOMENTS": "('balanced',)"}
    with pytest.raises(ValueError, match="TEST.MOMENTS: .*class"):
        ClassificationTrainer(config(tmp_path / "run", **keys))
    assert not (tmp_path / "run").exists()
