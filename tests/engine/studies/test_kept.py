"""Studies that are kept: small, with the same report, and only of studies that have ended."""

import dataclasses
import json
import math

import pytest
from synthetic_study import LOSS, TOP1, changed, draw, product_study

pytest.importorskip("scipy", reason="scipy is not installed")
from fbn_plugin.engine.studies import statistics
from fbn_plugin.engine.studies.kept import keep_again, keep_study, thinned
from fbn_plugin.engine.studies.outcomes import Comparison, Variant, read_outcomes, write_outcomes
from fbn_plugin.engine.studies.report import report_page


def commanded(study, outcomes):
    """Outcomes with commands as jobs have them."""
    begin = f"python tools/train_classification.py --config-file {study.base} DATASETS.NAME cifar10_jpeg MODEL.NORM"
    return [
        dataclasses.replace(
            each, command=f"{begin} 'FBN' SEED {each.config_seed} OUTPUT_DIR 'jobs/{each.variant}/seed-{each.seed}'"
        )
        for each in outcomes
    ]


def test_720_jobs_are_kept_in_a_quarter_of_the_space(tmp_path):
    study = product_study(sets=("one",), seeds=15, metrics={"top1": TOP1, "loss": LOSS})
    outcomes = commanded(study, draw(study, iterations=3))
    write_outcomes(tmp_path / "study.json", study, outcomes)
    kept = keep_study(study, outcomes, tmp_path / "papers/kept.json")
    assert kept.stat().st_size < min(200_000, (tmp_path / "study.json").stat().st_size / 4)
    read, found = read_outcomes(kept)
    assert read == study and [dataclasses.replace(each, curves={}) for each in found] == [
        dataclasses.replace(each, curves={}) for each in outcomes
    ]
    assert sum(line.startswith("[1,") for line in kept.read_text().splitlines()) == 48  # a run is a line


def test_the_report_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 99)
    study = product_study(norms=("BN", "GN"), batches=("2", "16"), sets=("one",), seeds=3)
    outcomes = commanded(study, draw(study, iterations=150))
    outcomes = changed(outcomes, "BN, batch 2", 1, metrics={"top1": math.nan}, curves={"top1": [(500, math.nan)]})
    outcomes = changed(outcomes, "GN, batch 2", 2, state="failed", metrics={}, curves={}, error="no image")
    outcomes = changed(outcomes, "GN, batch 16", 2, hardware="Another", command="python mine.py")
    kept = keep_study(study, outcomes, tmp_path / "kept.json")
    assert report_page(*read_outcomes(kept)) == report_page(study, outcomes)
    assert max(len(curve) for each in thinned(study, outcomes) for curve in each.curves.values()) <= 61
    assert repr(thinned(study, thinned(study, outcomes))) == repr(thinned(study, outcomes))  # NaN is not NaN


def test_what_has_not_ended_or_says_nothing_is_not_kept(tmp_path):
    study = product_study(norms=("BN", "GN"), batches=("2",), sets=("one",), seeds=2)
    outcomes = draw(study, iterations=1)
    with pytest.raises(ValueError, match="Small batches: 1 of 4 jobs are still to end"):
        keep_study(study, changed(outcomes, "BN, batch 2", 1, state="running"), tmp_path / "kept.json")
    with pytest.raises(ValueError, match="1 of 4 jobs are still to end"):
        keep_study(study, outcomes[1:], tmp_path / "kept.json")
    with pytest.raises(ValueError, match="the smoke scale shows that an experiment runs"):
        keep_study(dataclasses.replace(study, scale="smoke"), outcomes, tmp_path / "kept.json")
    assert not (tmp_path / "kept.json").exists()


def test_what_is_kept_is_kept_again_with_other_words(tmp_path):
    study = product_study(
        norms=("BN", "GN"), batches=("2",), sets=("one",), seeds=2, metrics={"top1": TOP1, "loss": LOSS}
    )
    outcomes = draw(study, iterations=3)
    path = keep_study(study, outcomes, tmp_path / "kept.json")
    before = path.read_bytes()
    keep_again(study, path)
    assert path.read_bytes() == before
    now = dataclasses.replace(
        study,
        title="Anew",
        metrics={"top1": dataclasses.replace(TOP1, label="accuracy")},
        comparisons=[Comparison("BN, batch 2", "GN, batch 2")],
    )
    keep_again(now, path)
    only = [
        dataclasses.replace(each, metrics={"top1": each.metrics["top1"]}, curves={"top1": each.curves["top1"]})
        for each in outcomes
    ]
    assert path.read_bytes() == keep_study(now, only, tmp_path / "directly.json").read_bytes() != before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seeds": [1, 2, 3]}, r": seeds: \[1, 2\] then, \[1, 2, 3\] in the study file now"),
        ({"settings": {"SOLVER.MAX_EPOCH": 2}}, ": settings 'SOLVER.BASE_LR': 0.1 then, None in the"),
        ({"variants": {"BN, batch 2": Variant()}}, ": variants 'BN, batch 2': Variant"),
        ({"metrics": {"loss": LOSS}}, ", as nothing was kept of 'loss' as the study file has it"),
        ({"metrics": {"top1": dataclasses.replace(TOP1, of="max")}}, ", as nothing was kept of 'top1' as the study"),
    ],
)
def test_other_jobs_are_not_kept_again(tmp_path, change, sentence):
    study = product_study(norms=("BN", "GN"), batches=("2",), sets=("one",), seeds=2)
    path = keep_study(study, draw(study, iterations=1), tmp_path / "kept.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^Small batches: the jobs in {path} cannot be kept again{sentence}"):
        keep_again(dataclasses.replace(study, **change), path)
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError):
        keep_again(study, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(runs=[]), "runs must be a mapping, got []"),
        (lambda content: content["runs"]["BN, batch 2"].pop("at"), "runs of 'BN, batch 2' are not as they are packed"),
        (lambda content: content["runs"]["BN, batch 2"]["runs"][0].pop(), "runs of 'BN, batch 2' are not as they"),
        (lambda content: content["runs"].update(x=content["runs"]["BN, batch 2"]), "variant 'x' with seed 1 is none"),
    ],
)
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, change, sentence):
    study = product_study(norms=("BN", "GN"), batches=("2",), sets=("one",), seeds=1)
    path = keep_study(study, draw(study, iterations=1), tmp_path / "kept.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_outcomes(path)
    assert str(error.value).startswith(f"{path} is no file of a study's outcomes: ") and sentence in str(error.value)
