"""The command line of tools/evaluate_classification.py."""

import json
import sys
from pathlib import Path

import pytest
from tiny_classification import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        train(folder / f"seed{seed}", SOLVER__MAX_ITER=4, SEED=seed)
    return folder


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import evaluate_classification

    yield lambda *arguments: evaluate_classification.main([str(argument) for argument in arguments])
    sys.modules.pop("evaluate_classification")


def test_everything_is_written_and_says_how_it_was_measured(tmp_path, main, runs, capsys):
    out = tmp_path / "out"
    options = ["--moments", "balanced", "--val-images", 60, "--ensemble", "--output", out]
    figures = main(runs / "seed1", runs / "seed2/model_final.pth", *options, "--opts", "DATALOADER.IMAGES_PER_CLASS", 2)
    assert list(figures) == ["seed1", "seed2/model_final.pth", "ensemble of 2"]
    said = capsys.readouterr().out
    assert "60 validation images; moments of balanced batches of 20 images; conditional: the test labels" in said
    record = json.loads((out / "evaluation.json").read_text())
    assert (record["moments"], record["conditional"], record["crops"], record["val_images"]) == (
        "balanced",
        True,
        1,
        60,
    )
    assert [each["metrics"] for each in record["entries"]] == list(figures.values())
    first, _, ensemble = record["entries"]
    assert (first["seed"], first["norm"], first["iteration"]) == (1, "FBN", 3)
    assert ensemble["members"] == ["seed1", "seed2/model_final.pth"] and len(first["by_class"]) == 10
    assert sum(each["images"] for each in first["reliability"]) == 60
    matrix = json.loads((out / "confusion_3.json").read_text())
    assert matrix["name"] == "ensemble of 2" and sum(map(sum, matrix["images"])) == 60
    assert "conditional" in (out / "report.html").read_text() and (out / "confusion_3.png").is_file()


def test_what_balanced_batches_show(tmp_path, main, capsys):
    """Of a network that has learned something; a run's own TEST.AT_END and TEST.ALSO are of its end."""
    keys = {"MODEL__NAME": "mlp_3x100", "MODEL__OPTIONS": "{'image_size': 8}", "SOLVER__BASE_LR": 0.5}
    keys |= {"TEST__ALSO": "('balanced',)", "TEST__AT_END__MOMENTS": "('batch',)", "INPUT__CROP_PCT": 0.8}
    train(tmp_path / "run", **keys, SOLVER__MAX_ITER=60, DATASETS__VAL_IMAGES=60)
    capsys.readouterr()
    options = ["--moments", "balanced", "--crops", 10, "--spread-crops", "--relabel", 2, "--walks", 2]
    main(tmp_path / "run", *options, "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "; other company for each view" in said and "2 rounds of balancing the batches by predictions: error" in said
    assert "a weak image takes the missing class in" in said and "conditional: the test labels balanced" in said
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    entry = record["entries"][0]
    assert (record["spread_crops"], record["conditional"], len(entry["relabel"]["top1"])) == (True, True, 3)
    assert len(entry["walks"]["weak"]) == len(entry["walks"]["strong"]) == 2 and len(entry["walks"]["pairs"]) == 1
    for name in ("relabelling.png", "walks_1.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is not there"),
        (["seed1", "--ensemble"], "--ensemble is of two checkpoints or more"),
        (["seed1", "--name", "a", "--name", "b"], "--name must be given once for each PATH, 1 times, got 2"),
        (["seed1", "seed1"], "is there more than once"),
        (["seed1", "--spread-crops"], "--spread-crops must be with --crops 10 or 144 and --moments balanced or batch"),
        (["seed1", "--walks", "-1"], "TEST.AT_END.WALKS must be 0 or more"),
        (["seed1", "--val-images", "0"], None),
        (["seed1", "--val-images", "-1"], "DATASETS.VAL_IMAGES must be 0 or more"),
        (["seed1", "--crops", "10"], "INPUT.CROP_PCT must be less than 1 for 10 crops"),
        (["seed1", "--opts", "MODEL.NORM", "FBM"], "MODEL.NORM must be the spec of a norm"),
        (["seed1", "--opts", "MODEL.NAME", "test_resnet"], "model_final.pth"),
    ],
)
def test_arguments(tmp_path, main, runs, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(runs)
    if sentence is None:
        main(*arguments, "--output", tmp_path / "out")
        assert "; 360 validation images." in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as stop:
        main("--output", tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_evaluation_of_the_training_tool_is_not_written_over(tmp_path, main, runs, capsys):
    before = {path: path.read_bytes() for path in (runs / "seed1").iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        main(runs / "seed1", "--output", runs / "seed1")
    assert stop.value.code == 2 and "holds a run or its evaluation; choose another folder" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (runs / "seed1").iterdir() if path.is_file()}
