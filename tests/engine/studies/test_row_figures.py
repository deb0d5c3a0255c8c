"""Several rows of the runs in one picture: which are read, kept and drawn."""

import dataclasses
import json

import pytest
from small_studies import ROOT, write_study
from synthetic_study import draw, plain_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.jobs import all_jobs, begin, collect, finish
from fbn_plugin.engine.studies.kept import keep_again, keep_study
from fbn_plugin.engine.studies.outcomes import Together, read_outcomes
from fbn_plugin.engine.studies.report import all_figures, report_markdown, write_report
from fbn_plugin.engine.studies.row_figures import together_figures, undrawn_rows
from fbn_plugin.engine.studies.study_file import read_study

FILE = """VARIANTS: {one: {}, two: {SOLVER.MAX_ITER: 3}}
SEEDS: 1
METRICS: {last: {row: act/q100, higher_is_better: false}, top1: {}}
TOGETHER:
  Quantiles: {label: deviations, rows: {greatest: act/q100, median: act/q50}}
"""


@pytest.fixture
def drawn(monkeypatch):
    """BN and FBN, of which a row is drawn beside the metric's."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    together = {"Both": Together("mask AP (%)", {"of the metric": "segm/AP", "lower": "low"})}
    described = dataclasses.replace(plain_study(("BN", "FBN"), seeds=3), together=together)
    outcomes = [
        dataclasses.replace(each, curves={**each.curves, "low": [(at, y - 9) for at, y in each.curves["segm/AP"]]})
        for each in draw(described, iterations=4)
    ]
    return described, outcomes


def test_rows_are_read_beside_those_of_the_metrics(tmp_path):
    file = read_study(write_study(tmp_path, FILE), ROOT)
    assert file.study.curve_rows == {"last": "act/q100", "top1": "top1", "act/q50": "act/q50"}
    job = all_jobs(file, tmp_path / "out")[0]
    begin(job)
    rows = [{"iteration": at, "act/q100": 7 + at, "act/q50": 0.5, "val/top1": 40} for at in range(2)]
    (job.folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(job, 0, 1.0, "none")
    outcome = collect(file, job)
    assert outcome.curves["last"] == [(1, 7), (2, 8)] and outcome.curves["act/q50"] == [(1, 0.5), (2, 0.5)]
    assert outcome.metrics == {"last": 8, "top1": 40}


def test_a_panel_of_the_first_run_of_each_variant_at_one_scale(drawn):
    described, outcomes = drawn
    (figure,) = together_figures(*drawn)
    assert [panel.title for panel in figure.panels] == ["BN", "FBN"] and figure.title == "Both"
    assert figure.panels[0].y_range == figure.panels[1].y_range and figure.panels[0].y_label == "mask AP (%)"
    high, low = figure.panels[1].lines
    assert (high.label, low.label) == ("of the metric", "lower") and not any(low.intervals)
    run = next(each for each in outcomes if each.variant == "FBN" and each.seed == 1)
    assert high.y == pytest.approx([y for _, y in run.curves["segm/AP"]], rel=1e-5)
    assert low.y == pytest.approx([y for _, y in run.curves["low"]], rel=1e-5)
    assert figure.panels[0].y_range[0] == min(y for panel in figure.panels for y in panel.lines[1].y)
    assert undrawn_rows(described, [figure]) == []


def test_rows_that_no_run_has_are_named(drawn):
    described, outcomes = drawn
    rows = {"of the metric": "segm/AP", "lower": "low", "none": "loww"}
    described = dataclasses.replace(
        described, together={"Both": Together("AP", rows), "Neither": Together("x", {"a": "b"})}
    )
    (figure,) = together_figures(described, outcomes)
    assert [label for label, _ in figure.legend] == ["of the metric", "lower"]
    why = "not drawn, as the first run of no variant has 3 values or more of it"
    assert undrawn_rows(described, [figure]) == [f"Both: {why}: loww.", f"Neither: {why}: b."]
    assert f"Neither: {why}: b." in report_markdown(described, outcomes)
    assert together_figures(described, draw(described, iterations=2)) == []  # two points are no curve
    assert len(undrawn_rows(described, together_figures(described, draw(described, iterations=2)))) == 2


def test_their_own_curves_are_not_drawn_as_well(drawn):
    described, outcomes = drawn
    found = statistics.study_statistics(described, outcomes)
    assert [each.kind for each in all_figures(described, outcomes, found)] == ["means", "differences", "together"]
    alone = dataclasses.replace(described, together={})
    assert "curves" in [each.kind for each in all_figures(alone, outcomes, found)]
    assert "## Both\n\n![Both](together-1.png)" in report_markdown(described, outcomes)


def test_they_are_kept(drawn, tmp_path):
    described, outcomes = drawn
    path = keep_study(described, outcomes, tmp_path / "kept.json")
    read, found = read_outcomes(path)
    assert read == described and repr(together_figures(read, found)) == repr(together_figures(*drawn))
    keep_again(dataclasses.replace(described, together={}), path)
    assert not together_figures(*read_outcomes(path)) and "low" not in read_outcomes(path)[1][0].curves
    with pytest.raises(ValueError, match="nothing was kept of 'low' as the study file has it"):
        keep_again(described, path)


def test_the_picture_is_written(drawn, tmp_path):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    assert (tmp_path / "together-1.png") in write_report(*drawn, tmp_path)
