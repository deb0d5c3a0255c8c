"""The pictures of a network's layers and of its kernels: what is read from a run, what is kept of it, what is drawn."""

import dataclasses
import json
import math

import pytest
from small_studies import study
from synthetic_study import changed, draw, plain_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.figures import x_span
from fbn_plugin.engine.studies.jobs import all_jobs, begin, collect, finish
from fbn_plugin.engine.studies.kept import keep_study
from fbn_plugin.engine.studies.layer_figures import kernels_figure, layers_figure
from fbn_plugin.engine.studies.outcomes import KernelDensity, LayerRange, read_outcomes
from fbn_plugin.engine.studies.report import docs_blocks, report_markdown
from fbn_plugin.engine.studies.svg import figure_file

CONV = LayerRange("conv1", -4.0, 5.0, 0.25, {"50": (-0.5, 0.5), "98": (-2.5, 3.0)})
LAYERS = [CONV, dataclasses.replace(CONV, name="fc1", maximum=40.0)]
KERNEL = KernelDensity("conv1", 3, 2.0, 1000, 7, [-3.0, -1.0, 1.0, 3.0], [0.25, 0.0, 0.25])


@pytest.fixture
def measured(monkeypatch):
    """BN with three runs, of which the first was not measured, and FBN without any."""
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    described = plain_study(("BN", "FBN"), seeds=3)
    outcomes = draw(described, iterations=1)
    outcomes = changed(outcomes, "BN", 2, layers=LAYERS, kernels=[KERNEL])
    return described, changed(outcomes, "BN", 3, layers=LAYERS[:1], kernels=[KERNEL])


def test_layers_and_kernels_are_read_from_the_run(tmp_path):
    file = study(tmp_path, BN=1)
    job = all_jobs(file, tmp_path / "out")[0]
    begin(job)
    (job.folder / "metrics.json").write_text('{"iteration": 9, "val/top1": 40}\n')
    bands = {"50": [-0.5, 0.5], "98": [-2.5, 3.0000001]}
    layer = {"name": "conv1", "count": 9, "minimum": -4.0, "maximum": 5.0, "median": 0.25, "bands": bands, "nan": 0}
    without = {"name": "dead", "count": 0, "minimum": None, "maximum": None, "median": None, "bands": {}}
    kernel = {**dataclasses.asdict(KERNEL), "count": 9, "gallery": []}
    kernel["density"] = {"edges": kernel.pop("edges"), "values": [0.25000000001, *kernel.pop("values")[1:]]}
    dead = {**kernel, "count": 0, "density": {"edges": [], "values": []}}
    content = {"format": 1, "layers": [layer, without], "kernels": [kernel, dead]}
    (job.folder / "activations.json").write_text(json.dumps(content))
    assert collect(file, job).layers == collect(file, job).kernels == []  # as long as it runs
    finish(job, 0, 1.0, "none")
    assert collect(file, job).layers == [CONV] and collect(file, job).kernels == [KERNEL]
    (job.folder / "activations.json").write_text(json.dumps({"layers": [], "kernels": [{"count": 9}]}))
    with pytest.raises(ValueError, match=r"activations\.json is damaged: it has no kernels with their density"):
        collect(file, job)
    (job.folder / "activations.json").write_text('{"layers": [{"name": "conv1", "count": 9}]}')
    with pytest.raises(ValueError, match=r"activations\.json is damaged: it has no layers with their bands"):
        collect(file, job)


def test_those_of_the_first_run_are_kept(measured, tmp_path):
    described, outcomes = measured
    found = read_outcomes(keep_study(described, outcomes, tmp_path / "kept.json"))[1]
    assert {(each.variant, each.seed): each.layers for each in found if each.layers} == {("BN", 2): LAYERS}
    assert {(each.variant, each.seed): each.kernels for each in found if each.kernels} == {("BN", 2): [KERNEL]}


def test_they_are_drawn_for_each_variant_that_has_them(measured):
    described, outcomes = measured
    figure = layers_figure(described, outcomes)
    (panel,) = figure.panels
    lines = {line.label: line for line in panel.lines}
    assert panel.title == "BN" and list(lines) == ["98 %", "50 %", "greatest", "least"]
    assert lines["98 %"].intervals == [(-2.5, 3.0)] * 2 and lines["98 %"].y == [0.25, 0.25]
    assert lines["greatest"].y == [5.0, 40.0] and lines["least"].y == [-4.0, -4.0]
    assert b"median, and bands of 50 and 98 %" in figure_file(figure)
    assert layers_figure(described, draw(described, iterations=1)) is None


def test_reports_show_them(measured):
    described, outcomes = measured
    assert "## Layer by layer\n\n![Activations of each layer](layers.png)" in report_markdown(described, outcomes)
    found = statistics.study_statistics(described, outcomes)
    blocks = docs_blocks(described, outcomes, found, [layers_figure(described, outcomes)], "p-", "kept.json")
    assert "p-layers.svg" in [getattr(each, "file", None) for each in blocks]
    assert "Layer by layer" not in report_markdown(described, draw(described, iterations=1))


def test_the_density_of_a_kernel_is_drawn_as_steps_beside_a_gaussian(measured):
    described, outcomes = measured
    (panel,) = kernels_figure(described, outcomes).panels
    steps, gaussian, *limits = panel.lines
    assert panel.title == "conv1[3]: 7 of 1,000 images beyond 2 deviations" and panel.is_log_y
    assert steps.x == [-3, -1, -1, 1, 1, 3] and steps.y[:2] == steps.y[4:] == [0.25, 0.25]
    assert 0 < steps.y[2] == steps.y[3] < panel.y_range[0] < 0.25  # an empty bin lies below what is shown
    assert max(gaussian.y) == pytest.approx(1 / math.sqrt(2 * math.pi)) and gaussian.x[0] == -gaussian.x[-1]
    assert gaussian.y[0] == pytest.approx(panel.y_range[0])
    assert [each.x for each in limits] == [[-2, -2], [2, 2]]
    assert x_span(panel) == (-3, 3) and b"what counts as passing" in figure_file(kernels_figure(described, outcomes))
    assert "## Kernel by kernel\n\n![Activations of single kernels](kernels.png)" in report_markdown(*measured)
    assert kernels_figure(described, draw(described, iterations=1)) is None
