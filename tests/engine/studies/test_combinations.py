"""Evaluations of several jobs together: their order, their checkpoints, what is read from them, by tools of
milliseconds."""

import json

import pytest
from small_studies import ROOT, tool, write_study

from fbn_plugin.engine.studies.engines import ENGINES
from fbn_plugin.engine.studies.jobs import EVALUATION, all_jobs, record
from fbn_plugin.engine.studies.outcomes import Combination, read_outcomes, write_outcomes
from fbn_plugin.engine.studies.report import report_markdown
from fbn_plugin.engine.studies.running import Resources, outcomes_of, run_study
from fbn_plugin.engine.studies.study_file import read_study

TEXT = """VARIANTS: {BN: {MODEL.NORM: BN, SOLVER.MAX_ITER: 1}, FBN: {MODEL.NORM: FBN, SOLVER.MAX_ITER: 1}}
COMBINE:
  both: {of: [BN, FBN]}
  144 crops: {of: BN, crops: 144, moments: batch}
SEEDS: 1-2
METRICS: [top1, loss]
COMPARE: {baseline: BN}
"""


def file_of(tmp_path, text=TEXT):
    return read_study(write_study(tmp_path, text), ROOT)


def run(tmp_path, file, **options):
    found = run_study(
        file, tmp_path / "out", tool(tmp_path), Resources(2), forks=False, say=lambda line: None, **options
    )
    return {(each.variant, each.seed): each for each in found}


def checkpoints(tmp_path):
    return sorted(str(path.parent.relative_to(tmp_path / "out/jobs")) for path in tmp_path.rglob("model_final.pth"))


def test_they_follow_what_they_evaluate_and_their_figures_are_read(tmp_path):
    file = file_of(tmp_path)
    found = run(tmp_path, file)
    assert {each.state for each in found.values()} == {"done"} and len(found) == 8
    assert found["both", 1].metrics == {"top1": 99.0} and found["144 crops", 2].metrics == {"top1": 50.0, "loss": 1.0}
    assert found["both", 1].curves == {} and found["both", 1].hardware == "a CPU"
    assert found["144 crops", 1].command == (
        "python tools/evaluate_classification.py jobs/BN/seed-1 --output 'jobs/144 crops/seed-1' --name BN --crops 144 "
        "--moments batch"
    )
    assert found["both", 2].command == (
        "python tools/evaluate_classification.py jobs/BN/seed-2 jobs/FBN/seed-2 --output jobs/both/seed-2 --name BN "
        "--name FBN --crops 1 --ensemble"
    )
    assert checkpoints(tmp_path) == []  # KEEP is none
    assert file.study.variants["144 crops"].combines == Combination(["BN"], 144, "batch")

    pytest.importorskip("scipy", reason="scipy is not installed")
    outcomes = outcomes_of(file, tmp_path / "out")
    text = report_markdown(file.study, outcomes)
    assert "both: final checkpoints of BN and FBN, evaluated together" in text
    assert "144 crops: final checkpoints of BN, evaluated, 144 crops, batch moments" in text
    write_outcomes(tmp_path / "a.json", file.study, outcomes)
    assert read_outcomes(tmp_path / "a.json") == (file.study, outcomes)


def test_figures_of_balanced_test_batches_are_called_conditional(tmp_path):
    pytest.importorskip("scipy", reason="scipy is not installed")
    text = TEXT.replace("moments: batch", "moments: balanced").replace("{MODEL.NORM: FBN, ", "{MODEL.NORM: FBN, {}")
    study = file_of(tmp_path, text.replace("{}", "TEST.MOMENTS: balanced, ")).study
    assert study.conditional == ["FBN", "144 crops"]
    said = "**Conditional**: the test labels balanced the batches that FBN; 144 crops are evaluated on."
    assert said in report_markdown(study, []) and "onditional" not in report_markdown(file_of(tmp_path).study, [])


def test_checkpoints_stay_until_they_are_evaluated(tmp_path):
    file = file_of(tmp_path)
    (tmp_path / "broken").touch()
    found = run(tmp_path, file)
    assert found["both", 1].state == "failed" and found["both", 1].error == "no checkpoint"
    assert checkpoints(tmp_path) == ["BN/seed-1", "BN/seed-2", "FBN/seed-1", "FBN/seed-2"]
    (tmp_path / "broken").unlink()
    attempts = [record(job.folder)["attempts"] for job in all_jobs(file, tmp_path / "out")]
    assert {each.state for each in run(tmp_path, file, retry=True).values()} == {"done"}
    assert [record(job.folder)["attempts"] for job in all_jobs(file, tmp_path / "out")] == [
        n + (job.parts != ()) for n, job in zip(attempts, all_jobs(file, tmp_path / "out"))
    ]
    assert checkpoints(tmp_path) == []


def test_what_failed_is_not_evaluated_and_the_others_are(tmp_path):
    file = file_of(tmp_path, TEXT.replace("MODEL.NORM: FBN, SOLVER.MAX_ITER: 1", "MODEL.NORM: FBN, SOLVER.MAX_ITER: 2"))
    found = run(tmp_path, file)
    assert [found[name, 1].state for name in file.study.variants] == ["done", "failed", "waiting", "done"]
    (tmp_path / "mended").touch()
    assert {each.state for each in run(tmp_path, file, retry=True).values()} == {"done"}


def test_kept_checkpoints_stay(tmp_path):
    run(tmp_path, file_of(tmp_path, f"{TEXT}KEEP: final\n"))
    assert len(checkpoints(tmp_path)) == 4


def test_another_combination_under_the_same_name_is_refused(tmp_path):
    run(tmp_path, file_of(tmp_path))
    for old, new, sentence in (
        ("crops: 144", "crops: 10", "144 crops, seed 1 was evaluated with crops 144, and the study file has 10"),
        ("[BN, FBN]", "[FBN, BN]", r"both, seed 1 was evaluated with variants \['BN', 'FBN'\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(tmp_path, file_of(tmp_path, TEXT.replace(old, new)))


def test_a_damaged_evaluation_is_named(tmp_path):
    file = file_of(tmp_path)
    run(tmp_path, file)
    (tmp_path / "out/jobs/both/seed-1/evaluation.json").write_text(json.dumps({"entries": []}))
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged: its last entry has no metrics"):
        outcomes_of(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("combine", "sentence"),
    [
        ("{x: {of: [BN]}}", "COMBINE 'x' must be of different variants, or of one with other crops or moments"),
        ("{x: {of: [BN, BN]}}", "COMBINE 'x' must be of different variants"),
        ("{x: {of: [BN, GN]}}", "COMBINE 'x' is of 'GN', which is none of BN, FBN"),
        ("{BN: {of: [BN, FBN]}}", "COMBINE 'BN' is a variant, too"),
        ("{x: {of: BN, crops: 5}}", "crops of COMBINE 'x' must be one of 1, 10, 144, got 5"),
        ("{x: {of: BN, moments: all}}", "moments of COMBINE 'x' must be one of population, batch, balanced"),
        ("{x: {of: BN, crop: 10}}", "unknown key of COMBINE 'x' 'crop'; did you mean 'crops'?"),
        ("{x: [BN, FBN]}", "COMBINE 'x' must be a mapping such as {of: [a, b], crops: 144}"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, combine, sentence):
    text = "VARIANTS: {BN: {MODEL.NORM: BN}, FBN: {MODEL.NORM: FBN}}\nSEEDS: 1\nCOMBINE: "
    with pytest.raises(ValueError) as error:
        file_of(tmp_path, text + combine)
    assert sentence in str(error.value)


def test_they_are_of_variants_of_classifiers(tmp_path):
    text = "FACTORS: {norm: {BN: {MODEL.NORM: BN}, FBN: {MODEL.NORM: FBN}}}\nSEEDS: 1\nCOMBINE: {x: {of: [BN, FBN]}}"
    with pytest.raises(ValueError, match="COMBINE goes with VARIANTS and TOOL classification alone"):
        file_of(tmp_path, text)
    assert (ROOT / "tools" / EVALUATION).is_file() and EVALUATION not in {each.script for each in ENGINES.values()}
