"""What a training measures: the trained bits are the same with and without, and a resumed run measures the same."""

import json
import time
from pathlib import Path

import pytest
import torch
from tiny_classification import config, train
from torch import nn

from fbn_plugin.analysis.landscape import measure_landscape
from fbn_plugin.engine.classification import batch_measures, measuring
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.logging import read_metrics

# Dropout and mixup draw numbers, and padded crops too.
RUN = {
    "SOLVER__MAX_ITER": 6,
    "SOLVER__CHECKPOINT_PERIOD": 4,
    "TEST__EVAL_PERIOD": 0,
    "MODEL__DROP_RATE": 0.3,
    "MODEL__EMA__ENABLED": True,
    "INPUT__MIXUP": 0.2,
    "INPUT__TRAIN_CROP": "padded",
    "INPUT__PADDING": 1,
}
MEASURED = {
    "MEASURE__LANDSCAPE__PERIOD": 2,
    "MEASURE__LANDSCAPE__STEPS": (0.02, 0.001),
    "MEASURE__MOMENTS__PERIOD": 2,
    "MEASURE__MOMENTS__SUBSET": 4,
}
MOMENTS = {"MEASURE__MOMENTS__PERIOD": 1}
GROUPS = ("landscape/", "moments/")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rows(folder: Path) -> list[dict]:
    """The rows of what was measured."""
    return [row for row in read_metrics(folder / "metrics.json") if any(key.startswith(GROUPS) for key in row)]


def content(folder: Path) -> dict:
    """All that training leaves behind: weights, statistics and the optimizer's state."""
    return load_file(folder / "model_final.pth")


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def without_log(content: dict) -> dict:
    return {key: value for key, value in content.items() if key != "log_window"}


def test_training_does_not_depend_on_it_and_a_resumed_run_measures_the_same(tmp_path):
    _, plain = train(tmp_path / "plain", **RUN)
    _, measured = train(tmp_path / "measured", **RUN, **MEASURED)
    assert plain == measured and not rows(tmp_path / "plain")
    assert same(without_log(content(tmp_path / "plain")), without_log(content(tmp_path / "measured")))
    found = rows(tmp_path / "measured")
    assert [row["iteration"] for row in found] == [1, 3, 5]
    assert all(row["landscape/loss_range"] > 0 and row["landscape/gradient_min"] > 0 for row in found)
    assert all(row["moments/BN/mean"] > 0 and row["moments/FBN(t_sigma=2)/relative_var"] > 0 for row in found)

    train(tmp_path / "parts", **RUN | {"SOLVER__MAX_ITER": 4}, **MEASURED)
    train(tmp_path / "parts", resume=True, **RUN, **MEASURED)
    assert rows(tmp_path / "parts") == found
    assert same(without_log(content(tmp_path / "parts")), without_log(content(tmp_path / "measured")))


def test_the_landscape_is_that_of_the_step(tmp_path):
    """At the weights before the update, on its images, in training mode: the loss is the one that is recorded."""
    options = {**RUN, "SOLVER__MAX_ITER": 2, "INPUT__MIXUP": 0.0, **MEASURED, "MEASURE__LANDSCAPE__PERIOD": 1}
    trainer, _ = train(tmp_path, **options)
    losses = [row["landscape/loss"] for row in rows(tmp_path)]
    (window,) = [row["total_loss"] for row in read_metrics(tmp_path / "metrics.json") if "total_loss" in row]
    assert sum(losses) / 2 == pytest.approx(window)
    assert "landscape" in json.dumps(rows(tmp_path)[0]) and trainer.model.training


def test_measuring_is_not_part_of_the_time_of_a_step(tmp_path, monkeypatch):
    hours, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * hours[0])

    def slow(*args):
        hours[0] += 1
        return measure_landscape(*args)

    monkeypatch.setattr(batch_measures, "measure_landscape", slow)
    train(tmp_path, **{**RUN, "SOLVER__MAX_ITER": 2}, **MEASURED)
    (step,) = [row["time"] for row in read_metrics(tmp_path / "metrics.json") if "time" in row]
    assert hours[0] == 1 and 0 < step < 600


def test_what_may_change_in_a_resumed_run(tmp_path):
    train(tmp_path, **RUN | {"SOLVER__MAX_ITER": 2})
    train(tmp_path, resume=True, **RUN | {"SOLVER__MAX_ITER": 4}, **MEASURED)
    assert [row["iteration"] for row in rows(tmp_path)] == [3]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"MEASURE__LANDSCAPE__PERIOD": -1}, "MEASURE.LANDSCAPE.PERIOD must be 0 or more, and"),
        ({"MEASURE__LANDSCAPE__STEPS": "(0.1, 0.0)"}, "MEASURE.LANDSCAPE.STEPS must be 1 to 100 values, each above 0"),
        ({"MEASURE__LANDSCAPE__STEPS": "()"}, "MEASURE.LANDSCAPE.STEPS must be 1 to 100 values"),
        ({"MEASURE__MOMENTS__NORMS": "('BN', 'BN')"}, "MEASURE.MOMENTS.NORMS must be 1 to 100 norms, each once"),
        ({"MEASURE__MOMENTS__SUBSET": 1}, "MEASURE.MOMENTS.SUBSET must be 2 or more"),
        ({**MOMENTS, "MEASURE__MOMENTS__NORMS": "GN"}, "MEASURE.MOMENTS.NORMS: 'GN' is neither BN nor FBN"),
        ({**MOMENTS, "MEASURE__MOMENTS__NORMS": "BNX"}, "MEASURE.MOMENTS.NORMS: unknown norm"),
        (MOMENTS, "MEASURE.MOMENTS.SUBSET must be less than 16, the images of a batch, got 16"),
        (
            {**MOMENTS, "MEASURE__MOMENTS__SUBSET": 4, "MODEL__NORM": "GN(num_groups=1)"},
            "MEASURE.MOMENTS.PERIOD must be 0 with test_byobnet without batch norms, got 1",
        ),
    ],
)
def test_refuses(tmp_path, options, sentence):
    with pytest.raises(ValueError) as error:
        ClassificationTrainer(config(tmp_path, **options))
    assert sentence in str(error.value)


def test_refuses_to_measure_a_part_of_the_batch(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    measuring.check_measured(config(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LANDSCAPE.PERIOD must be 0 with 2 processes, each of which .*, got 5"):
        measuring.check_measured(config(MEASURE__LANDSCAPE__PERIOD=5), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="MOMENTS.PERIOD must be 0 with 2 processes, each of which .*, got 5"):
        measuring.check_measured(config(MEASURE__MOMENTS__PERIOD=5), nn.BatchNorm2d(2))
