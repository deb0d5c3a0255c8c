"""The command lines of tools/loss_landscape.py and tools/moment_consistency.py."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from tiny_classification import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    options = {f"MEASURE__{name}__PERIOD": 2 for name in ("LANDSCAPE", "MOMENTS")}
    options |= {"SOLVER__MAX_ITER": 4, "TEST__EVAL_PERIOD": 0, "MEASURE__MOMENTS__SUBSET": 4}
    for norm in ("BN", "FBN"):
        train(folder / norm, MODEL__NORM=norm, **options)
    train(folder / "without", SOLVER__MAX_ITER=1, TEST__EVAL_PERIOD=0, MODEL__NORM="GN(num_groups=1)")
    return folder


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    names = ("loss_landscape", "moment_consistency")

    def call(name, *arguments):
        return importlib.import_module(name).main([str(argument) for argument in arguments])

    yield call
    for name in names:
        sys.modules.pop(name, None)


def test_landscapes_of_runs(tmp_path, main, runs, capsys):
    found = main("loss_landscape", "--from", runs / "BN", runs / "FBN", "--output", tmp_path / "out")
    said = capsys.readouterr().out
    assert "medians over 2 iterations" in said and "smoothness" in said and "out/landscape.png" in said
    record = json.loads((tmp_path / "out/landscape.json").read_text())
    assert [entry["name"] for entry in record["entries"]] == ["BN", "FBN"] == list(found)
    entry = record["entries"][1]
    assert (entry["norm"], entry["iterations"], entry["images_per_batch"]) == ("FBN", [2, 4], 16)
    assert found["FBN"]["loss_range"] == pytest.approx(sum(entry["curves"]["loss_range"]) / 2)
    assert entry["medians"] == found["FBN"] and "--from" in record["command"] and record["versions"]["torch"]
    assert (tmp_path / "out/landscape.png").read_bytes().startswith(b"\x89PNG")


def test_landscapes_of_checkpoints(tmp_path, main, runs, capsys):
    options = [
        "--batches",
        2,
        "--name",
        "mine",
        "--output",
        tmp_path,
        "--opts",
        "MEASURE.LANDSCAPE.STEPS",
        "(1.0, 0.1)",
    ]
    found = main("loss_landscape", runs / "FBN/model_final.pth", *options)
    assert "means over 2 batches" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "landscape.json").read_text())["entries"]
    assert entry["iteration"] == 3 and entry["weights"].endswith("model_final.pth") and entry["name"] == "mine"
    assert [batch["steps"] for batch in entry["batches"]] == [[1.0, 0.1]] * 2
    assert found["mine"]["smoothness"] == pytest.approx(sum(batch["smoothness"] for batch in entry["batches"]) / 2)


def test_moments(tmp_path, main, runs):
    found = main("moment_consistency", "--from", runs / "BN", "--output", tmp_path)
    record = json.loads((tmp_path / "moments.json").read_text())
    assert list(found) == ["BN, BN", "BN, FBN(t_sigma=2)"] and record["medians"] == found
    layer = next(key.split("/")[0] for key in record["entries"][0]["curves"] if key.count("/") == 2)
    of_layer = main("moment_consistency", "--from", runs / "BN", "--layer", layer, "--output", tmp_path)
    assert of_layer != found and json.loads((tmp_path / "moments.json").read_text())["layer"] == layer

    options = ["--batches", 1, "--output", tmp_path, "--opts", "MEASURE.MOMENTS.NORMS", "('FBN(t_sigma=3)',)"]
    found = main("moment_consistency", runs / "BN", runs / "FBN", *options)
    assert list(found) == ["BN, FBN(t_sigma=3)", "FBN, FBN(t_sigma=3)"]
    entries = json.loads((tmp_path / "moments.json").read_text())["entries"]
    assert entries[1]["means"]["FBN(t_sigma=3)/own_var"] == found["FBN, FBN(t_sigma=3)"]["own_var"] > 0
    assert (tmp_path / "moments.png").is_file()


@pytest.mark.parametrize(
    ("name", "arguments", "sentence"),
    [
        ("loss_landscape", ["nowhere"], "nowhere is not there"),
        ("loss_landscape", ["--from", "nowhere"], "nowhere is no run folder"),
        ("loss_landscape", ["--from", "without"], "see MEASURE.LANDSCAPE.PERIOD"),
        ("loss_landscape", ["--from", "BN", "--batches", "3"], "--batches is for checkpoints, not for --from"),
        ("loss_landscape", ["--from", "BN", "--opts", "SEED", "3"], "--opts is for checkpoints"),
        ("loss_landscape", ["BN", "--batches", "0"], "--batches must be 1 or more, and 1048576 or less, got 0"),
        ("loss_landscape", ["BN", "BN"], "is there more than once"),
        ("loss_landscape", ["BN", "--opts", "MEASURE.LANDSCAPE.STEPS", "0"], "LANDSCAPE.STEPS must be 1 to 100"),
        ("loss_landscape", ["BN", "--opts", "SOLVER.IMS_PER_BATCH", "10000"], "SOLVER.IMS_PER_BATCH must be 1437"),
        ("moment_consistency", ["BN", "--layer", "conv"], "--layer is for --from"),
        ("moment_consistency", ["--from", "BN", "--layer", "conv"], "--layer must be one of "),
        ("moment_consistency", ["without"], "MEASURE.MOMENTS.PERIOD must be 0 with test_byobnet without batch norms"),
        ("moment_consistency", ["BN", "--opts", "MEASURE.MOMENTS.NORMS", "GN"], "'GN' is neither BN nor FBN"),
    ],
)
def test_arguments(tmp_path, main, runs, capsys, monkeypatch, name, arguments, sentence):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stop:
        main(name, "--output", tmp_path / "out", *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
