"""What a classification run measures of its activations: while it trains, at its end, and without training at all."""

import json

import pytest
import torch
from tiny_classification import config, train

from fbn_plugin.analysis.bands import batch_probability
from fbn_plugin.engine.classification.run_folder import read_classification_run
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.logging import read_metrics

LAYERS = ("stages.1.0.conv1_1x1.bn", "head.fc[3]")
RUN = {"SOLVER__MAX_ITER": 4, "SOLVER__CHECKPOINT_PERIOD": 2, "TEST__EVAL_PERIOD": 0, "MODEL__NORM": "FBN(t_sigma=2)"}
MEASURED = {
    "MEASURE__ACTIVATIONS__PERIOD": 2,
    "MEASURE__ACTIVATIONS__LAYERS": LAYERS,
    "MEASURE__BANDS": True,
    "MEASURE__KERNELS": ("stages.1.0.conv1_1x1.bn[2]",),
    "MEASURE__SIGMA": 0.05,
    "NORM_STATS_PERIOD": 4,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_is_measured_and_trained_to_the_same_bits(tmp_path):
    _, plain = train(tmp_path / "plain", **RUN)
    _, result = train(tmp_path / "measured", **RUN, **MEASURED)
    plain_weights, weights = (load_file(tmp_path / name / "model_final.pth")["model"] for name in ("plain", "measured"))
    assert all(torch.equal(plain_weights[name], weights[name]) for name in plain_weights)
    assert {name: result[name] for name in plain} == plain

    rows = read_metrics(tmp_path / "measured/metrics.json")
    activations = [row for row in rows if any(name.startswith("activations/") for name in row)]
    assert [row["iteration"] for row in activations] == [1, 3]
    assert {f"activations/{layer}/q{level}" for layer in LAYERS for level in (0, 25, 50, 75, 100)} <= set(
        activations[0]
    )
    assert activations[0][f"activations/{LAYERS[0]}/q0"] < -1 < activations[0][f"activations/{LAYERS[0]}/q50"]
    assert [row["iteration"] for row in rows if "filtered/mean" in row] == [3] and 0 < activations[1][
        "filtered/mean"
    ] < 1

    record = json.loads((tmp_path / "measured/activations.json").read_text())
    assert (record["images"], record["trained"], record["iteration"]) == (360, True, 3)
    assert len(record["layers"]) > 5 and record["layers"][-1]["name"] == "head.fc"
    assert (tmp_path / "measured/bands.png").stat().st_size > 1000
    (kernel,) = record["kernels"]
    assert 0 < kernel["passing"] == record["figures"]["passing"] <= 360 and len(kernel["gallery"]) == kernel["passing"]
    assert record["figures"]["passing_share"] == kernel["passing"] / 360
    assert record["figures"]["batch_probability"] == batch_probability(kernel["passing"], 360, 16)
    assert list((tmp_path / "measured").glob("kernel_*.png"))
    assert 0 < record["figures"]["least_reach"] <= record["figures"]["reach"]
    figures = {f"bands/{name}": value for name, value in record["figures"].items()}
    results = json.loads((tmp_path / "measured/results.json").read_text())
    for given in (result, results, read_classification_run(tmp_path / "measured").last_evaluation()[1]):
        assert {name: given[name] for name in figures} == pytest.approx(figures) and given["top1"] == plain["top1"]

    (tmp_path / "measured/activations.json").write_text("{}")  # it is there, and measured once
    _, again = train(tmp_path / "measured", resume=True, **RUN, **MEASURED)
    assert again == pytest.approx(result) and (tmp_path / "measured/activations.json").read_text() == "{}"


def test_without_training_the_starting_weights_are_measured(tmp_path):
    _, trained = train(tmp_path / "trained", **RUN)
    options = {
        **RUN,
        "SOLVER__MAX_EPOCH": 0,
        "SOLVER__WARMUP_EPOCHS": 5,
        "MODEL__WEIGHTS": tmp_path / "trained/model_final.pth",
        "MEASURE__BANDS": True,
        "MEASURE__ACTIVATIONS__PERIOD": 1,
        "MEASURE__ACTIVATIONS__LAYERS": LAYERS,
    }
    for _ in range(2):  # there is no checkpoint that it would go on from
        _, result = train(tmp_path / "measured", **options)
        assert {name: result[name] for name in trained} == trained and result["bands/minimum"] < -1
        rows = read_metrics(tmp_path / "measured/metrics.json")
        assert [row["iteration"] for row in rows] == [-1, -1] and rows[0]["epoch"] == 0
        assert not list((tmp_path / "measured").glob("*.pth"))
    assert read_classification_run(tmp_path / "measured").last_evaluation() == (0, pytest.approx(result))
    results = json.loads((tmp_path / "measured/results.json").read_text())
    assert (results["iterations"], results["training_seconds"], results["top1"]) == (0, 0, trained["top1"])
    assert json.loads((tmp_path / "measured/activations.json").read_text())["trained"] is True


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"MEASURE__ACTIVATIONS__PERIOD": 1, "MEASURE__ACTIVATIONS__LAYERS": ("stages.1.0.conv1.bn",)},
            "MEASURE.ACTIVATIONS.LAYERS: the model has no layer 'stages.1.0.conv1.bn'; did you mean 'stages.",
        ),
        ({"MEASURE__KERNELS": ("head.fc[1]",)}, "MEASURE.BANDS must be True with MEASURE.KERNELS"),
        ({"MEASURE__BANDS": True, "MEASURE__KERNELS": ("head.fc",)}, "MEASURE.KERNELS: a kernel must be a unit of a"),
        (
            {"MEASURE__BANDS": True, "MEASURE__KERNELS": ("head.fc[99]",)},
            "MEASURE.KERNELS: layer 'head.fc' has units 0 to 9, got 99",
        ),
        ({"MEASURE__ACTIVATIONS__PERIOD": 1}, "MEASURE.ACTIVATIONS.LAYERS must be one layer or more with"),
        ({"MEASURE__ACTIVATIONS__LAYERS": ("a[x]",)}, "MEASURE.ACTIVATIONS.LAYERS must be names of layers, each once"),
        ({"MEASURE__ACTIVATIONS__LAYERS": ("a", "a")}, "MEASURE.ACTIVATIONS.LAYERS must be names of layers, each once"),
        (
            {"MEASURE__ACTIVATIONS__QUANTILES": (0.5, 1.5)},
            "MEASURE.ACTIVATIONS.QUANTILES must be 1 to 100 values, each",
        ),
        ({"NORM_STATS_PERIOD": -1}, "NORM_STATS_PERIOD must be 0 or more"),
        ({"NORM_STATS_PERIOD": 1, "MODEL__COMPILE": True}, "NORM_STATS_PERIOD must be 0 with MODEL.COMPILE, got 1"),
        ({"SOLVER__MAX_EPOCH": -1}, "SOLVER.MAX_EPOCH must be 0 or more"),
        (
            {"SOLVER__MAX_EPOCH": 0, "SOLVER__BEST_CHECKPOINT_METRIC": "top1"},
            "SOLVER.BEST_CHECKPOINT_METRIC must be '' with MAX_EPOCH 0",
        ),
    ],
)
def test_refusals(tmp_path, values, sentence):
    with pytest.raises(ValueError) as error:
        ClassificationTrainer(config(tmp_path / "run", **values))
    assert str(error.value).startswith(sentence) and not (tmp_path / "run").exists()
