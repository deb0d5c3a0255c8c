"""Tables of classification runs: mean and deviation over seeds, settings told apart, notes."""

import json
import math
import statistics

import pytest

from fbn_plugin.engine.classification.run_folder import read_classification_run
from fbn_plugin.engine.reports.classification_table import build_classification_tables
from fbn_plugin.engine.run.run_folder import is_classification


def folder(root, name, norm="BN", seed=1, figures=None, batch=32, evaluations=True, **config):
    """A run folder with two evaluations, the last of which has the given figures."""
    path = root / name
    path.mkdir()
    lines = {"MODEL.NAME": "lenet5", "MODEL.NORM": norm, "DATASETS.NAME": "digits", "SOLVER.IMS_PER_BATCH": batch}
    lines |= {"SEED": seed, **{key.replace("__", "."): value for key, value in config.items()}}
    (path / "config.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))
    info = {
        "engine": "classification",
        "hardware": "a CPU",
        "train_images": {"digits": 90},
        "test_images": {"digits": 9},
    }
    (path / "run_info.json").write_text(json.dumps(info))
    if evaluations:
        figures = figures or {"top1": 90.0 + seed, "top5": 99.0, "loss": 0.5 - seed / 100}
        rows = [
            {"iteration": 4, "val/top1": 1.0, "val/top5": 2.0, "val/loss": 3.0},
            {"iteration": 9, "total_loss": 1.0},
        ]
        rows += [{"iteration": 9, "epoch": 2, **{f"val/{name}": value for name, value in figures.items()}}]
        (path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_classification_run(path)


def test_a_row_is_the_seeds_of_a_norm(tmp_path):
    runs = [folder(tmp_path, f"{norm}{seed}", norm, seed) for norm in ("FBN(t_sigma=5.0)", "BN") for seed in (1, 2, 4)]
    (table,) = build_classification_tables(runs)
    header, *body = table.rows()
    assert header == ["norm", "runs", "top-1 (%)", "top-5 (%)", "loss"]
    deviation = statistics.stdev([91, 92, 94])
    assert [row[:3] for row in body] == [[norm, "3", f"92.33 ± {deviation:.2f}"] for norm in ("BN", "FBN")]
    assert body[0][4] == f"{0.5 - 7 / 300:.4f} ± {deviation / 100:.4f}"
    notes = "\n".join(table.notes())
    assert "lenet5; trained on 90 images, evaluated on 9 images" in notes and "after 10 iterations" in notes
    assert "FBN minus BN, seed by seed (n = 3): top-1 +0.00 ± 0.00" in notes
    assert "configs differ" not in notes
    first = table.as_json()["rows"][0]
    assert first["metrics"]["top1"] == {"n": 3, "mean": pytest.approx(277 / 3), "sd": deviation, "values": [91, 92, 94]}
    assert [run["seed"] for run in first["runs"]] == [1, 2, 4] and first["runs"][0]["iterations"] == 10


def test_settings_are_told_apart_and_what_has_no_effect_is_not(tmp_path):
    runs = [folder(tmp_path, f"bn{batch}-{seed}", "BN", seed, batch=batch) for batch in (2, 32) for seed in (1, 2)]
    runs += [folder(tmp_path, "bn2-3", "BN", 3, batch=2, DATALOADER__NUM_WORKERS=7, TEST__EVAL_PERIOD=3)]
    runs += [folder(tmp_path, "fbn", "FBN", 2, batch=32, TEST__MOMENTS="balanced")]
    (table,) = build_classification_tables(runs)
    labels = [row[0] for row in table.rows()[1:]]
    assert labels == ["BN, SOLVER.IMS_PER_BATCH 2", "BN, SOLVER.IMS_PER_BATCH 32", "FBN"]
    assert [row[1] for row in table.rows()[1:]] == ["3", "2", "1"]
    notes = "\n".join(table.notes())
    assert "FBN: conditional: the test labels balanced the batches." in notes
    assert "SOLVER.IMS_PER_BATCH 2 or 32" in notes and "TEST.MOMENTS 'population' or 'balanced'" in notes
    assert " minus " not in notes  # FBN's setting is none of BN's
    joined = build_classification_tables(runs[:4], {run.folder: "all of BN" for run in runs[:4]})
    assert [row[:2] for row in joined[0].rows()[1:]] == [["all of BN", "4"]]
    with pytest.raises(ValueError, match="label 'x' would average BN and FBN"):
        build_classification_tables(runs, {run.folder: "x" for run in runs})


def test_further_figures_and_runs_that_have_none(tmp_path):
    figures = {"top1": 90.0, "loss": math.nan, "ema/top1": 95.0, "conditional": 1, "bands/minimum": -12.5}
    run = folder(tmp_path, "ema", "GN", figures=figures)
    with (run.folder / "metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 9, "test/top1": 80.0, "test/epoch": 2.0}) + "\n")
    (table,) = build_classification_tables([run, folder(tmp_path, "plain", "GN", 2, {"top1": 91.0, "loss": 0.25})])
    assert table.rows()[0][2:] == [
        *("top-1 (%)", "loss", "bands, minimum", "averaged weights, top-1 (%)", "test, top-1 (%)"),
    ]
    assert table.rows()[1][3:] == ["0.2500 (n = 1)", "-12.50 (n = 1)", "95.00 (n = 1)", "80.00 (n = 1)"]
    assert "Test figures are of the weights that were the last." in table.notes()

    empty = folder(tmp_path, "empty", evaluations=False)
    with pytest.raises(FileNotFoundError, match="neither metrics.json nor evaluation.json"):
        build_classification_tables([empty])
    (empty.folder / "metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    with pytest.raises(ValueError, match="has no evaluation yet"):
        build_classification_tables([empty])


def test_runs_whose_test_set_measured_other_weights_are_not_averaged(tmp_path):
    held = {"DATASETS__VAL_SHARE": 0.1}
    runs = [folder(tmp_path, "last", **held), folder(tmp_path, "best", SOLVER__BEST_CHECKPOINT_METRIC="top1", **held)]
    for run in runs:
        with (run.folder / "metrics.json").open("a") as file:
            file.write(json.dumps({"iteration": 9, "test/top1": 80.0, "test/epoch": 2.0, "test/averaged": 1.0}) + "\n")
    (table,) = build_classification_tables(runs)
    assert [row[1] for row in table.rows()[1:]] == ["1", "1"] and "test, averaged" not in str(table.rows())
    assert "Test figures are of the weights that were the last or the best in validation by top1." in table.notes()


def test_a_folder_of_an_evaluation(tmp_path):
    run = folder(tmp_path, "only", "LN", evaluations=False)
    content = {"iteration": 41, "weights": "a.pth", "metrics": {"top1": 70.0, "top5": None, "loss": 1.0}}
    (run.folder / "evaluation.json").write_text(json.dumps(content))
    assert run.last_evaluation() == (42, {"top1": 70.0, "loss": 1.0})
    (table,) = build_classification_tables([run])
    assert "is an evaluation of weights from elsewhere" in "".join(table.notes())
    for wrong in ({"metrics": []}, {"metrics": {"top1": "x"}}, {"metrics": {}, "iteration": -1}):
        (run.folder / "evaluation.json").write_text(json.dumps({"iteration": None, **wrong}))
        with pytest.raises(ValueError, match="evaluation.json"):
            run.last_evaluation()


def test_which_folders_are_of_classifiers(tmp_path):
    run = folder(tmp_path, "a")
    assert is_classification(run.folder)
    (run.folder / "run_info.json").unlink()
    assert is_classification(run.folder)
    (run.folder / "config.yaml").write_text("MODEL: {RESNETS: {NORM: BN}}\n")
    assert not is_classification(run.folder) and not is_classification(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="MODEL.NORM must be of type str, got 3"):
        (run.folder / "config.yaml").write_text("MODEL: {NORM: 3, NAME: x}\n")
        read_classification_run(run.folder)
