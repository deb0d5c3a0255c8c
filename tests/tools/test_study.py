"""The command line of tools/study.py, by a study of two jobs of two iterations."""

import json
from pathlib import Path

import pytest

from fbn_plugin.engine.run.logging import read_metrics

ROOT = Path(__file__).parents[2]
STUDY = """TITLE: Two norms
TOOL: classification
BASE: {root}/configs/Digits/lenet5_convs_BN.yaml
SET: {{SOLVER.MAX_ITER: 2, SOLVER.IMS_PER_BATCH: 8, MODEL.DEVICE: cpu}}
FACTORS: {{norm: {{BN: {{MODEL.NORM: BN}}, FBN: {{MODEL.NORM: FBN}}}}}}
SEEDS: 1
METRICS: [top1, loss]
COMPARE: {{factor: norm, baseline: BN}}
"""


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The tool's main function, in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "two.yaml").write_text(STUDY.format(root=ROOT))
    import study

    return lambda *arguments: study.main([str(argument) for argument in arguments])


def test_runs_once_and_says_how_far_it_is(tmp_path, main, capsys):
    place = tmp_path / "two.yaml", "--output", tmp_path / "out"
    assert main("status", *place) == 0
    assert "0 of 2 jobs done; 2 to go\n" in capsys.readouterr().out
    assert main("run", *place, "--jobs", 2) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "2 of 2 jobs done" and "FBN, seed 1: top1 " in out
    folder = tmp_path / "out/jobs/FBN/seed-1"
    assert json.loads((folder / "results.json").read_text())["seed"] == 1869972635
    assert {row["iteration"] for row in read_metrics(folder / "metrics.json")} == {1}
    assert not list(folder.glob("*.pth"))

    written = (folder / "results.json").stat().st_mtime_ns
    assert main("run", *place) == 0 and capsys.readouterr().out == "2 of 2 jobs done\n"
    assert (folder / "results.json").stat().st_mtime_ns == written
    assert main("status", *place) == 0
    table = capsys.readouterr().out
    assert table.startswith("Two norms\n") and table.endswith("\n2 of 2 jobs done\n")

    assert main("report", *place) == 0
    page = (tmp_path / "out/report/report.html").read_text()
    assert "one pair tells nothing of chance" in page and (tmp_path / "out/report/top1-differences.png").is_file()
    kept = tmp_path / "kept.json"
    kept.write_bytes((tmp_path / "out/report/study.json").read_bytes())
    assert main("report", "--from", kept, "--to", tmp_path / "again") == 0
    assert (tmp_path / "again/report.html").read_text() == page and str(tmp_path) not in page
    assert main("report", "--from", kept, "--markdown", tmp_path / "page.md", "--title", "A title") == 0
    text = (tmp_path / "page.md").read_text()
    assert (
        text.startswith("# A title\n") and "## Two norms" in text and (tmp_path / "page-top1-by-variant.svg").is_file()
    )

    (tmp_path / "two.yaml").write_text((tmp_path / "two.yaml").read_text().replace("MAX_ITER: 2", "MAX_ITER: 3"))
    with pytest.raises(SystemExit) as stop:
        main("run", *place)
    assert stop.value.code == 2
    assert "error: BN, seed 1 was run with SOLVER.MAX_ITER 2, and the study file has 3;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml is not there"),
        (["run", "two.yaml", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["run", "two.yaml", "--threads", "-1"], "--threads must be 1 or more, got -1"),
        (["run", "two.yaml", "--executor", "local", "--executor-option", "x"], "must be KEY=VALUE, got 'x'"),
        (["report", "--from", "nowhere/study.json"], "nowhere/study.json"),
    ],
)
def test_bad_input_is_named(tmp_path, main, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "a study file, or --from"),
        (["two.yaml", "--from", "a.json"], "a study file, or --from"),
        (["two.yaml", "--markdown", "a.md"], "neither a study file nor --to"),
        (["--from", "a.json", "--to", "b", "--markdown", "a.md"], "neither a study file nor --to"),
        (["--from", "a.json", "--from", "b.json"], "--markdown names"),
        (["--from", "a.json"], "a report of --from a.json wants a folder, named by --to"),
    ],
)
def test_report_is_of_one_study_or_a_page_of_several(main, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        main("report", *arguments)
    assert stop.value.code == 2 and sentence in capsys.readouterr().err
