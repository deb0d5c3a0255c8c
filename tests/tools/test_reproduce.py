"""The command line of tools/reproduce.py, by an experiment of two jobs, with a tool of milliseconds in the place of the
one that trains."""

import dataclasses
import re
from pathlib import Path

import pytest
from small_studies import TOOL

from fbn_plugin.engine.studies.engines import ENGINES

ROOT = Path(__file__).parents[2]
EXPERIMENT = """ID: P0.fig5
SOURCE: A paper, Fig. 5
TITLE: Two norms
TOOL: classification
BASE: {root}/configs/Digits/lenet5_convs_BN.yaml
SET: {{SOLVER.MAX_ITER: 1, MODEL.DEVICE: cpu}}
VARIANTS: {{BN: {{MODEL.NORM: BN}}, FBN: {{MODEL.NORM: FBN}}}}
SEEDS: 1
CLAIMS: [{{variant: FBN, baseline: BN, is: higher}}]
SCALES:
  paper: {{DATA: {{nowhere/imagenet: ImageNet}}}}
  cpu: {{DESCRIPTION: Reduced.}}
"""


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The tool's main function, in this process, with a folder of one experiment."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/p0_fig5.yaml").write_text(EXPERIMENT.format(root=ROOT))
    monkeypatch.setitem(ENGINES, "classification", dataclasses.replace(ENGINES["classification"], modules=()))
    import reproduce
    import study

    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/train_classification.py").write_text(TOOL)
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return lambda *arguments: reproduce.main(["--experiments", str(tmp_path / "experiments"), *arguments])


def test_from_list_to_report(tmp_path, main, capsys):
    pytest.importorskip("scipy", reason="scipy is not installed")
    assert main("list", "--root", str(tmp_path)) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("P0.fig5", "Two norms", "0 of 2", "0 of 2", "missing for paper: nowhere/imagenet")
    ]
    keep = "keep", "P0.fig5", "--scale", "cpu", "--root", str(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(*keep)
    assert stop.value.code == 2
    assert "2 of 2 jobs are still to end, and a study is kept when all have ended" in capsys.readouterr().err

    assert main("run", "p0.FIG5", "--scale", "cpu", "--jobs", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith("P0.fig5: Two norms (cpu scale, reduced)\n") and "\n2 of 2 jobs done\n" in out
    import study

    report = re.search(
        r"figures lie in output/p0_fig5-cpu; their report: python tools/study.py (report \S+ --scale cpu)\n$", out
    )
    assert study.main(report[1].split()) == 0 and (tmp_path / "output/p0_fig5-cpu/report/report.html").is_file()
    assert (tmp_path / "output/p0_fig5-cpu/jobs/FBN/seed-1/results.json").is_file()
    assert main("run", "P0.fig5", "--scale", "cpu") == 0 and "seed 1" not in capsys.readouterr().out
    assert main(*keep) == 0 and (tmp_path / "benchmarks/papers/p0_fig5-cpu.json").is_file()
    assert main("list", "P0", "--root", str(tmp_path)) == 0 and "| 2 of 2, kept |" in capsys.readouterr().out
    assert main("report", "--root", str(tmp_path)) == 0
    assert (
        "| inconclusive on the reduced setting: 0 of 1 claim reproduced"
        in (tmp_path / "docs/results/index.md").read_text()
    )

    import study

    path = tmp_path / "experiments/p0_fig5.yaml"
    assert study.main(["status", str(path), "--scale", "cpu"]) == 0
    assert "P0.fig5: Two norms (cpu scale, reduced)\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        study.main(["report", "--from", "a.json", "--scale", "cpu"])
    assert stop.value.code == 2 and "--scale is of a study file" in capsys.readouterr().err


def test_wrong_folders_are_refused_and_a_kept_file_of_no_study_is_named(tmp_path, main, capsys):
    pytest.importorskip("scipy", reason="scipy is not installed")
    nowhere = tmp_path / "none"
    for arguments, sentence in (
        (("--experiments", str(nowhere), "list"), f"folder of experiments {nowhere} is not there"),
        (("--experiments", __file__, "list"), f"folder of experiments {__file__} is not a folder"),
        (("--experiments", str(tmp_path), "list"), f"folder of experiments {tmp_path} has no study file with an ID"),
        (("report", "--root", str(nowhere)), f"--root {nowhere} has no benchmarks/papers, where figures are kept"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(*arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(f"error: {sentence}") and error.count("\n") == 1
    assert not nowhere.exists()
    (tmp_path / "benchmarks/papers").mkdir(parents=True)
    (tmp_path / "benchmarks/papers/p0_old-cpu.json").write_text("{}")
    assert main("report", "--root", str(tmp_path)) == 0
    assert "and left out: benchmarks/papers/p0_old-cpu.json\n" in capsys.readouterr().out


def test_of_a_paper_those_run_that_have_the_scale(tmp_path, main, capsys):
    text = EXPERIMENT.format(root=ROOT).replace("P0.fig5", "P0.fig6")
    (tmp_path / "experiments/p0_fig6.yaml").write_text(text.replace("  cpu:", "  gpu:"))
    assert main("run", "P0", "--scale", "gpu", "--jobs", "2") == 0
    said = capsys.readouterr().out
    assert said.startswith("without a scale gpu, and left out: P0.fig5\n") and "P0.fig6" in said


def test_several_go_on_where_one_cannot_run(tmp_path, main, capsys):
    text = EXPERIMENT.format(root=ROOT).replace("P0.fig5", "P0.fig6")
    (tmp_path / "experiments/p0_fig6.yaml").write_text(text.replace("nowhere", "elsewhere"))
    assert main("run", "all", "--scale", "paper") == 2
    captured = capsys.readouterr()
    assert "0 of 2 experiments are done" in captured.out
    assert captured.err.count(".yaml: data are missing, neither here nor below $DETECTRON2_DATASETS") == 2
    assert "nowhere/imagenet (ImageNet)" in captured.err and "elsewhere/imagenet (ImageNet)" in captured.err
    assert not list((tmp_path / "output").rglob("job.json"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "P0.fig7", "--scale", "cpu"], "there is no experiment 'P0.fig7'; did you mean P0.fig5?"),
        (["run", "P0.fig5", "--scale", "gpu"], "P0.fig5 has no scale 'gpu'; it has paper, cpu"),
        (["run", "P0.fig5", "--scale", "cpu", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["keep", "P0.fig5", "--scale", "gpu"], "it has no scale 'gpu': paper, cpu"),
    ],
)
def test_bad_input_is_named(main, capsys, arguments, sentence):
    try:
        code = main(*arguments)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1
