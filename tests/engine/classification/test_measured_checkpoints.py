"""Measures at a checkpoint are those that its own training makes there."""

import math
from pathlib import Path

import pytest
import torch
from tiny_classification import train

from fbn_plugin.analysis.moments import flat_distances
from fbn_plugin.engine.classification.measured_checkpoints import checkpoint_landscape, checkpoint_moments
from fbn_plugin.engine.classification.measured_runs import MeasuredRun, common_iterations, medians, read_measured_run
from fbn_plugin.engine.classification.predictions import find_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of four iterations of two steps, measured in each, with a checkpoint after the second."""
    place = tmp_path_factory.mktemp("run")
    options = {f"MEASURE__{name}__PERIOD": 1 for name in ("LANDSCAPE", "MOMENTS")}
    draws = {"MODEL__DROP_RATE": 0.3, "INPUT__MIXUP": 0.2, "INPUT__TRAIN_CROP": "padded", "INPUT__PADDING": 1}
    draws |= {"SOLVER__ACCUMULATION_STEPS": 2, "SOLVER__IMS_PER_BATCH": 32}
    length = {"SOLVER__MAX_ITER": 4, "SOLVER__CHECKPOINT_PERIOD": 2, "TEST__EVAL_PERIOD": 0}
    train(place, **options, **draws, **length, MEASURE__MOMENTS__SUBSET=4)
    return place


def at(run: MeasuredRun, finished: int) -> dict[str, float]:
    return {name: values[run.iterations.index(finished)] for name, values in run.curves.items()}


def test_the_run_goes_on_as_is_measured_at_its_checkpoint(folder):
    """Seeds, mixing, dropout and the images drawn are those of the iterations that follow."""
    checkpoint = find_checkpoint(folder / "model_0000001.pth")
    found = checkpoint_landscape(checkpoint, 1)
    assert found.iteration == 1 and found.title == "handwritten digits (scikit-learn)"
    run = read_measured_run(folder, "run", "landscape")
    assert found.batches[0].figures() == pytest.approx(at(run, 3), rel=1e-5)
    moments = read_measured_run(folder, "run", "moments")
    (distances,) = checkpoint_moments(checkpoint, 1).batches
    assert flat_distances(distances) == pytest.approx(at(moments, 3), rel=1e-5)
    assert moments.iterations == [1, 2, 3, 4]


def test_batches_are_the_first_steps_of_iterations(folder):
    found = checkpoint_landscape(find_checkpoint(folder / "model_0000001.pth"), 3)
    assert len({batch.loss for batch in found.batches}) == 3
    later = folder / "later.pth"
    content = torch.load(folder / "model_0000001.pth", weights_only=True)
    torch.save({"model": content["model"], "iteration": 3}, later)
    assert checkpoint_landscape(find_checkpoint(later), 1).batches[0] == found.batches[2]


def test_weights_without_an_iteration_are_measured_on_the_first_batches(folder, tmp_path):
    content = torch.load(folder / "model_final.pth", weights_only=True)
    torch.save(content["model"], tmp_path / "weights.pth")
    found = checkpoint_landscape(find_checkpoint(tmp_path / "weights.pth", folder / "config.yaml"), 1)
    assert found.iteration is None and math.isfinite(found.batches[0].loss)


def test_refuses_what_cannot_be_measured(folder):
    options = ["MEASURE.MOMENTS.PERIOD", "1", "MEASURE.MOMENTS.SUBSET", "16"]
    with pytest.raises(ValueError, match="SUBSET must be less than 16"):
        checkpoint_moments(find_checkpoint(folder, None, options), 1)


def test_a_run_without_measures_is_refused(tmp_path):
    train(tmp_path, SOLVER__MAX_ITER=1, TEST__EVAL_PERIOD=0)
    with pytest.raises(ValueError, match="has no landscape/... in its metrics.json: nothing was .* see MEASURE.LANDSC"):
        read_measured_run(tmp_path, "run", "landscape")


def test_what_has_no_number_is_no_median(folder):
    path = folder / "metrics.json"
    text = path.read_text()
    path.write_text(text.replace('"landscape/loss_range": ', '"landscape/loss_range": null, "landscape/other": ', 1))
    run = read_measured_run(folder, "run", "landscape")
    path.write_text(text)
    assert math.isnan(run.curves["loss_range"][0]) and all(map(math.isnan, run.curves["other"][1:]))
    found = medians(run, ["loss", "loss_range", "missing"], [1, 2, 3, 4])
    assert math.isnan(found["loss_range"]) and math.isnan(found["missing"])
    low, high = sorted(run.curves["loss"])[1:3]
    assert found["loss"] == pytest.approx((low + high) / 2)
    assert medians(run, ["loss_range"], [2])["loss_range"] == run.curves["loss_range"][1]


def test_runs_are_compared_where_all_were_measured(folder):
    run = read_measured_run(folder, "run", "landscape")
    other = MeasuredRun("other", run.run, [3, 4, 5], {})
    assert common_iterations([run, other]) == [3, 4] and common_iterations([run]) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="run, late have no iteration in common"):
        common_iterations([run, MeasuredRun("late", run.run, [7], {})])
