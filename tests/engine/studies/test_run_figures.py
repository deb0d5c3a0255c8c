"""The figures that a metric takes from a run: how METRICS says so, and what is read from ``metrics.json``."""

import json
import math

import pytest
from small_studies import ROOT, write_study

from fbn_plugin.engine.studies.jobs import all_jobs, begin, collect, finish
from fbn_plugin.engine.studies.outcomes import Metric
from fbn_plugin.engine.studies.run_figures import PICKS, figure_of_run
from fbn_plugin.engine.studies.study_file import read_study

CURVE = [(10, 3.0), (20, 9.0), (30, 5.0), (40, 7.0)]
FIGURES = {"last": 7.0, "best": 9.0, "median": 6.0, "mean": 6.0, "max": 9.0, "min": 3.0}
FIGURES["sd"] = pytest.approx(math.sqrt(20 / 3))
TWO = "VARIANTS: {a: {MODEL.NORM: FBN}, b: {MODEL.NORM: BN}}\nSEEDS: 1\n"


@pytest.mark.parametrize("of", FIGURES)
def test_one_figure_over_the_rows(of):
    assert figure_of_run(Metric(True, of=of), CURVE) == FIGURES[of]
    diverged = figure_of_run(Metric(True, of=of), [*CURVE, (50, math.nan)])
    assert diverged == 9.0 if of == "best" else math.isnan(diverged)


def test_the_best_is_the_lowest_where_lower_is_better():
    assert figure_of_run(Metric(False, of="best"), CURVE) == 3.0
    assert math.isnan(figure_of_run(Metric(False, of="best"), [(1, math.nan)]))


@pytest.mark.parametrize(
    ("of", "threshold", "figure"),
    [("first_at_least", 9.0, 20.0), ("first_at_least", 9.1, math.nan), ("first_at_most", 5.0, 10.0)],
)
def test_iterations_to_a_threshold(of, threshold, figure):
    found = figure_of_run(Metric(False, of=of, threshold=threshold), [*CURVE, (50, math.nan)])
    assert found == figure or (math.isnan(found) and math.isnan(figure))


def test_the_figure_at_an_iteration():
    assert figure_of_run(Metric(True, of="at", threshold=30), CURVE) == 5.0
    assert math.isnan(figure_of_run(Metric(True, of="at", threshold=31), CURVE))


def test_every_pick_is_tested():
    assert set(FIGURES) == set(PICKS)


def metrics(tmp_path, text):
    return read_study(write_study(tmp_path, f"{TWO}METRICS: {text}"), ROOT).study.metrics


def test_options_of_metrics(tmp_path):
    assert metrics(tmp_path, "{top1: {of: best}}") == {
        "top1": Metric(True, "%", "best top-1 accuracy", of="best", row_label="top-1 accuracy (%)"),
    }
    assert metrics(tmp_path, "{steps: {row: test/top1, first_at_least: 72.2}}") == {
        "steps": Metric(
            *(False, "", "iterations to test top-1 accuracy ≥ 72.2 %", "test/top1", "first_at_least", 72.2),
            row_label="test top-1 accuracy (%)",
        ),
    }
    assert metrics(tmp_path, "{early: {row: top1, at: 50000}}") == {
        "early": Metric(True, "%", "top-1 accuracy after 50,000 iterations", "top1", "at", 50000, "top-1 accuracy (%)"),
    }
    assert metrics(tmp_path, "{range: {row: landscape/loss, of: median, higher_is_better: false, label: x}}") == {
        "range": Metric(False, "", "x", "landscape/loss", "median", row_label="landscape/loss"),
    }
    assert metrics(tmp_path, "{swing: {row: top1, of: sd}}") == {
        "swing": Metric(
            *(False, "%", "standard deviation along the run of top-1 accuracy", "top1", "sd"),
            row_label="top-1 accuracy (%)",
        ),
    }
    text = "{range: {row: landscape/loss, of: sd, row_label: loss, higher_is_better: false, label: x}}"
    assert metrics(tmp_path, text) == {"range": Metric(False, "", "x", "landscape/loss", "sd", row_label="loss")}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "{top1: {of: first}}",
            "of of metric 'top1' must be one of last, best, median, mean, max, min, sd, got 'first'",
        ),
        (
            "{top1: {of: best, first_at_least: 3}}",
            "metric 'top1' must have one of of, at, first_at_least and first_at_most",
        ),
        ("{top1: {first_at_least: yes}}", "first_at_least of metric 'top1' must be of type float, got True"),
        ("{range: {row: landscape/loss, of: max}}", "METRICS has 'range', of which higher_is_better must be said"),
    ],
)
def test_wrong_options_are_named(tmp_path, text, sentence):
    with pytest.raises(ValueError) as error:
        metrics(tmp_path, text)
    assert sentence in str(error.value)


def test_rows_of_evaluations_and_of_the_training(tmp_path):
    text = """METRICS:
  top1: {of: best}
  steps: {row: top1, first_at_least: 60}
  never: {row: top1, first_at_least: 95}
  total_loss: {higher_is_better: false, of: mean}
  slope: {row: landscape/slope, of: max, higher_is_better: false}
"""
    file = read_study(write_study(tmp_path, TWO + text), ROOT)
    job = all_jobs(file, tmp_path / "out")[0]
    begin(job)
    rows = [
        {"iteration": 9, "total_loss": 3.0, "time": 1.0},
        {"iteration": 9, "val/top1": 40.0, "landscape/slope": 2.0},
        {"iteration": 19, "total_loss": 1.0, "landscape/slope": 5.0},
        {"iteration": 19, "val/top1": 70.0},
        {"iteration": 29, "val/top1": 65.0},
    ]
    (job.folder / "metrics.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (job.folder / "results.json").write_text('{"top1": 66.0, "total_loss": 9.0}')
    finish(job, 0, 1.0, "none")
    found = collect(file, job)
    never = found.metrics.pop("never")
    assert found.metrics == {"top1": 70.0, "steps": 20.0, "total_loss": 2.0, "slope": 5.0} and math.isnan(never)
    assert found.curves["top1"] == [(10, 40.0), (20, 70.0), (30, 66.0)] == found.curves["never"]
    assert found.curves["slope"] == [(10, 2.0), (20, 5.0)]
