"""The JSON file of a study and its jobs: what is written is read back, and what is no such file is refused."""

import json
import math

import pytest

from fbn_plugin.engine.studies.outcomes import (
    Comparison,
    Metric,
    Outcome,
    Study,
    Variant,
    read_outcomes,
    write_outcomes,
)

STUDY = Study(
    title="Norms",
    description="",
    tool="classification",
    base="configs/a.yaml",
    settings={"INPUT.SCALE": [0.1, 1.0], "MODEL.NORM": None},
    factors={"norm": ["BN", "FBN"]},
    variants={name: Variant({"norm": name}, {"MODEL.NORM": name}) for name in ("BN", "FBN")},
    seeds=[1, 2],
    seed_rule="md5",
    metrics={"top1": Metric(higher_is_better=True, unit="%", label="top-1 accuracy")},
    comparisons=[Comparison("FBN", "BN", "all")],
)
OUTCOMES = [
    Outcome(
        "BN",
        1,
        7,
        "done",
        {"norm": "BN"},
        metrics={"top1": 61.5},
        curves={"top1": [(10, 40.0), (20, 61.5)]},
        seconds=3.0,
        command="python tools/train_classification.py SEED 7",
        hardware="a CPU",
        versions={"torch": "2.6"},
    ),
    Outcome("FBN", 1, 7, "failed", error="no image"),
    Outcome("FBN", 2, 9, "waiting"),
]


def test_what_is_written_is_read_back(tmp_path):
    write_outcomes(tmp_path / "study.json", STUDY, OUTCOMES)
    assert read_outcomes(tmp_path / "study.json") == (STUDY, OUTCOMES)
    # A job is a line, so that a new one is a line of the difference.
    lines = (tmp_path / "study.json").read_text().splitlines()
    assert sum('"config_seed"' in line for line in lines) == len(OUTCOMES)


def test_nan_is_null(tmp_path):
    outcome = Outcome("BN", 1, 7, "done", metrics={"top1": math.nan}, curves={"top1": [(1, math.nan)]})
    write_outcomes(tmp_path / "study.json", STUDY, [outcome])
    json.loads((tmp_path / "study.json").read_text(), parse_constant=pytest.fail)
    ((read,),) = read_outcomes(tmp_path / "study.json")[1:]
    assert math.isnan(read.metrics["top1"]) and math.isnan(read.curves["top1"][0][1])


def test_a_file_from_before_there_were_scales_and_claims_is_read(tmp_path):
    write_outcomes(tmp_path / "study.json", STUDY, OUTCOMES)
    content = json.loads((tmp_path / "study.json").read_text())
    for part, names in (
        (content["study"], ("id", "source", "scale", "printed", "claims")),
        (content["study"]["metrics"]["top1"], ("row", "of", "threshold")),
        (content["study"]["variants"]["BN"], ("combines",)),
    ):
        for name in names:
            del part[name]
    (tmp_path / "study.json").write_text(json.dumps(content))
    assert read_outcomes(tmp_path / "study.json") == (STUDY, OUTCOMES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(format=3), "it has no 'format' of 1 or 2"),
        (lambda content: content["study"].pop("seeds"), "study has no 'seeds'"),
        (lambda content: content["study"].update(alpha="small"), "study.alpha must be of type float, got 'small'"),
        (lambda content: content["study"].update(alpha=None), "study.alpha must be above 0 and below 0.5, got nan"),
        (lambda content: content["study"].update(metrics={}), "the study has no metrics"),
        (lambda content: content["study"].update(seed_rule="sha"), "seed_rule must be one of md5, plain, got 'sha'"),
        (lambda content: content["study"]["seeds"].append(1), "study.seeds must be different whole numbers"),
        (lambda content: content["study"].update(factors={"norm": ["x"]}), "has other levels than the study's factors"),
        (lambda content: content["study"]["comparisons"].extend(content["study"]["comparisons"]), "or there twice"),
        (lambda content: content["outcomes"][0]["metrics"].update(top1=10**400), "must be of type float, got 1000"),
        (lambda content: content["study"].update(seed=1), "study has 'seed', which is none of title, "),
        (lambda content: content["study"]["variants"].update(BN=3), "study.variants['BN'] must be a mapping, got 3"),
        (lambda content: content["study"]["comparisons"][0].update(baseline="GN"), "'GN', which is none of the var"),
        (lambda content: content["outcomes"][0].update(machine=9), "outcomes[0] has no 'machine' that is one of the 2"),
        (lambda content: content["outcomes"][0].update(seed=3), "variant 'BN' with seed 3 is none of the study's jobs"),
        (lambda content: content["outcomes"][0].update(state="lost"), "state must be one of done, failed, running, w"),
        (lambda content: content["outcomes"].append(content["outcomes"][0]), "variant 'BN' with seed 1 is there twice"),
        (lambda content: content["outcomes"][0]["curves"].update(top1=[[1]]), "must be of type tuple, got [1]"),
        (lambda content: content.pop("outcomes"), "it has no lists 'outcomes' and 'machines'"),
    ],
)
def test_other_files_are_refused_in_a_sentence(tmp_path, change, sentence):
    path = tmp_path / "study.json"
    write_outcomes(path, STUDY, OUTCOMES)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        read_outcomes(path)
    assert str(error.value).startswith(f"{path} is no file of a study's outcomes: ") and sentence in str(error.value)
