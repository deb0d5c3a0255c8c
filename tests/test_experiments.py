"""The experiments of configs/experiments, study files that have the ID of a table or figure: each is read at all of its
scales as ``tools/study.py`` reads it, and its smoke scale needs nothing that is not made."""

import re
from pathlib import Path

import pytest

from fbn_plugin.engine.studies.catalog import jobs_of, read_catalog
from fbn_plugin.engine.studies.claims import ABOUT_PAIRS
from fbn_plugin.engine.studies.outcomes import FULL_SCALE, Printed
from fbn_plugin.engine.studies.study_file import read_study

ROOT = Path(__file__).parents[1]
CATALOG = read_catalog(ROOT / "configs/experiments", ROOT)
SCALES = [pytest.param(each, scale, id=f"{each.id}-{scale}") for each in CATALOG for scale in each.scales]
MOST_SMOKE_JOBS = 16
MOST_SMOKE_ITERATIONS = 10


def test_every_table_and_figure_of_the_papers_is_an_experiment():
    wanted = [f"P0.fig{number}" for number in range(1, 13)] + [f"P0.S{number}" for number in range(1, 10)]
    wanted += ["P0.tab1", "P0.time", "P1.tab2", "P1.tab3", "P1.tab5", "P1.fig2", "P1.fig3", "P1.fig4", "P1.fig6"]
    wanted += ["P2.tab1a", "P2.tab1b", "P2.tab2a", "P2.tab2b", "P2.input", "P2.A1", "P2.A2", "P2.ablations"]
    wanted += ["P2.strong", "P3.fig1", "P3.fig2", "P3.fig3", "P3.fig4", "P4.tab", "P4.appC"]
    wanted += ["P4.fig4", "P4.fig5", "P4.fig6"]
    wanted += ["X.detection", "X.gaussian_correction", "X.gradients", "X.scaled", "X.filtered", "X.where"]
    found = [name for each in CATALOG for name in each.ids]
    assert set(wanted) <= set(found) and len(set(found)) == len(found)


@pytest.mark.parametrize("experiment", CATALOG, ids=lambda each: each.id)
def test_an_experiment_says_what_it_is(experiment):
    first = FULL_SCALE if experiment.paper != "X" else "cpu"  # what no paper asks has no scale of a paper
    assert {first, "smoke"} <= experiment.scales.keys()
    study = experiment.study
    assert study.source and study.description and study.scale == first
    assert experiment.path.stem == re.sub(r"\W", "_", experiment.id).lower()
    for name, each in experiment.scales.items():
        if name != FULL_SCALE:
            assert "reduced" in each.study.description.lower(), f"{name} says what is reduced"


@pytest.mark.parametrize(("experiment", "scale"), SCALES)
def test_each_scale_is_read_with_its_configs(experiment, scale):
    if experiment.scales[scale].study.tool == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    file = read_study(experiment.path, ROOT, scale=scale)
    if scale != "smoke":
        return
    assert jobs_of(file.study) <= MOST_SMOKE_JOBS and all(each.made for each in file.wanted)
    for config in file.configs.values():
        assert config["MODEL.DEVICE"] == "cpu" and config["DATALOADER.NUM_WORKERS"] == 0
        images, epochs = config.get("DATASETS.TRAIN_IMAGES", 0), config.get("SOLVER.MAX_EPOCH", 1)
        iterations = config["SOLVER.MAX_ITER"] or images / config["SOLVER.IMS_PER_BATCH"] * epochs
        assert epochs == 0 or 0 < iterations <= MOST_SMOKE_ITERATIONS  # without epochs there is no training


@pytest.mark.parametrize("experiment", CATALOG, ids=lambda each: each.id)
def test_no_claim_is_one_that_the_printed_figures_contradict(experiment):
    for claim, printed in (
        (claim, each.study.printed) for each in experiment.scales.values() for claim in each.study.claims
    ):
        first = printed.get(claim.metric, {}).get(claim.variant)
        if claim.kind in ABOUT_PAIRS:
            second = printed.get(claim.than or claim.metric, {}).get(claim.baseline or claim.variant)
        else:
            second = Printed(claim.value)
        if first and second:
            difference = first.value - second.value
            assert {
                "higher": difference > 0,
                "lower": difference < 0,
                "alike": abs(difference) <= (claim.value or 0),
                "at_least": difference >= 0,
                "at_most": difference <= 0,
                "printed": difference == 0,
            }[claim.kind], claim


# Training images of sets that are named by an experiment, of which a run takes all.
IMAGES = {"cifar10": 50_000, "mnist": 60_000}


@pytest.mark.parametrize(("experiment", "scale"), SCALES)
def test_figures_at_an_iteration_are_of_one_that_is_evaluated(experiment, scale):
    study = experiment.scales[scale].study
    rows = [(metric.row or name, metric.threshold) for name, metric in study.metrics.items() if metric.of == "at"]
    at = {iteration for row, iteration in rows if not row.startswith("activations/")}
    measured = {iteration for row, iteration in rows if row.startswith("activations/")}
    if not rows or scale == "smoke":  # of a run that short nothing is late
        return
    if study.tool == "detectron2":
        pytest.importorskip("detectron2", reason="detectron2 is not installed")
    for name, config in read_study(experiment.path, ROOT, scale=scale).configs.items():
        evaluated = {*map(int, config["TEST.EVAL_ITERATIONS"]), config["SOLVER.MAX_ITER"]}
        if study.tool == "classification" and config["TEST.EVAL_PERIOD"]:
            images = config["DATASETS.TRAIN_IMAGES"] or IMAGES[config["DATASETS.NAME"]]
            epoch = images // config["SOLVER.IMS_PER_BATCH"] * config["TEST.EVAL_PERIOD"]
            evaluated |= {epoch * i for i in range(1, config["SOLVER.MAX_EPOCH"] + 1)}
        assert at <= evaluated, name
        assert all(iteration % config["MEASURE.ACTIVATIONS.PERIOD"] == 0 for iteration in measured), name
