"""tools/evaluate.py and tools/make_table.py with folders of classification runs."""

import importlib
import json
from pathlib import Path

import pytest
from tiny_classification import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for norm in ("BN", "FBN"):
        train(folder / norm, MODEL__NORM=norm, SOLVER__MAX_ITER=4, SOLVER__CHECKPOINT_PERIOD=2)
    return folder


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return lambda tool, *arguments: importlib.import_module(tool).main([str(argument) for argument in arguments])


def test_weights_are_evaluated_as_the_run_does_it(tmp_path, main, runs, capsys):
    ((source, figures),) = main("evaluate", runs / "FBN", "--output", tmp_path / "figures.json").items()
    record = json.loads((runs / "FBN/results.json").read_text())
    assert figures == pytest.approx({name: record[name] for name in ("top1", "top5", "loss")}, rel=1e-5)
    assert "handwritten digits" in source and "4 iterations; 360 validation images" in source
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["metrics"] == figures and (written["iteration"], written["conditional"]) == (3, False)
    assert "| top1 |" in capsys.readouterr().out.replace("  ", " ") and not (runs / "FBN/evaluation.json").exists()
    main("evaluate", runs / "BN", "--weights", "model_0000001.pth")
    assert json.loads((runs / "BN/evaluation.json").read_text())["iteration"] == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["FBN", "--dataset", "coco_2017_val"], "FBN is of a classifier: --dataset and --results are for detectors"),
        (["FBN", "--weights", "nothing.pth"], "checkpoint nothing.pth is not there, nor in FBN"),
    ],
)
def test_refused(main, runs, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stop:
        main("evaluate", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error == f"error: {sentence}\n"


def test_a_table_of_classifiers(tmp_path, main, runs):
    text = main("make_table", runs / "BN", runs / "FBN", "--json", tmp_path / "t.json", "--output", tmp_path / "t.md")
    assert text.startswith("## handwritten digits (scikit-learn)\n") and "AP in percent" not in text
    assert "FBN minus BN, seed by seed (n = 1)" in text and "does not tell a difference from chance" in text
    assert (tmp_path / "t.md").read_text() == text + "\n"
    (table,) = json.loads((tmp_path / "t.json").read_text())["tables"]
    assert [row["label"] for row in table["rows"]] == ["BN", "FBN"]
