"""The experiments of a folder: their order, their names, and how far they are."""

import json

import pytest
from small_studies import BASE

from fbn_plugin.engine.studies.catalog import (
    Progress,
    data_text,
    find_experiments,
    output_of,
    progress,
    read_catalog,
)

TEXT = """ID: {id}
TITLE: Study {id}
TOOL: classification
BASE: {base}
VARIANTS: {{BN: {{MODEL.NORM: BN}}, FBN: {{MODEL.NORM: FBN}}}}
SEEDS: 1-2
SCALES:
  paper: {{DATA: {{imagenet: ImageNet, {there}: weights}}}}
  cpu: {{DATA: {{imagenet: ImageNet}}, NOT_RUN: No time.}}
  smoke: {{SEEDS: 1, DATA: {{output/made/p: {{made: photographs}}}}}}
"""


def write(folder, name, ids):
    (folder / f"{name}.yaml").write_text(TEXT.format(id=ids, base=BASE, there=folder))


@pytest.fixture
def folder(tmp_path):
    for name, ids in (("p0_fig10", "P0.fig10"), ("p0_fig5", "P0.fig5, P0.fig6"), ("p1_tab2", "P1.tab2")):
        write(tmp_path, name, ids)
    (tmp_path / "digits.yaml").write_text(f"TOOL: classification\nBASE: {BASE}\nVARIANTS: {{a: {{}}}}\nSEEDS: 1\n")
    (tmp_path / "config.yaml").write_text("MODEL: {NORM: BN}\n")
    return tmp_path


def test_study_files_with_an_id_in_the_papers_order(folder):
    found = read_catalog(folder)
    assert [each.ids for each in found] == [["P0.fig5", "P0.fig6"], ["P0.fig10"], ["P1.tab2"]]
    assert list(found[0].scales) == ["paper", "cpu", "smoke"] and found[0].paper == "P0"
    assert found[0].scales["cpu"].not_run == "No time." and found[0].study.scale == "paper"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["p0.FIG5"], ["P0.fig5"]),
        (["P0 fig 6", "p0_fig5"], ["P0.fig5"]),
        (["P1.tab2", "p0"], ["P1.tab2", "P0.fig5", "P0.fig10"]),
        (["all"], ["P0.fig5", "P0.fig10", "P1.tab2"]),
    ],
)
def test_ids_in_any_spelling(folder, given, expected):
    assert [each.id for each in find_experiments(read_catalog(folder), given)] == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("P0.fig11", "there is no experiment 'P0.fig11'; did you mean P0.fig10"),
        ("nothing", "there is no experiment 'nothing'; `list` shows all"),
    ],
)
def test_a_miss_has_the_nearest_names(folder, given, sentence):
    with pytest.raises(ValueError) as error:
        find_experiments(read_catalog(folder), [given])
    assert str(error.value).startswith(sentence)


def test_two_files_of_one_id_and_a_paper_that_is_none(folder):
    write(folder, "other", "P0.fig6")
    with pytest.raises(ValueError, match=r"the id P0\.fig6 is that of .*other\.yaml and of .*p0_fig5\.yaml"):
        read_catalog(folder)
    write(folder, "other", "P9.fig1")
    with pytest.raises(ValueError, match=r"the id P9\.fig1 of .* is of a paper that is none of P0, P1"):
        read_catalog(folder)


def test_how_far_and_which_data(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    experiment = read_catalog(folder)[0]
    assert output_of(experiment, "cpu").as_posix() == "output/p0_fig5-cpu"
    for variant, state in (("BN", "done"), ("FBN", "failed")):
        place = folder / "out/jobs" / variant / "seed-1"
        place.mkdir(parents=True)
        (place / "job.json").write_text(json.dumps({"state": state, "error": None, "seconds": 1.0, "attempts": 1}))
    found = progress(experiment.scales["cpu"].study, folder / "out")
    assert found == Progress(1, 1, 4) and str(found) == "1 of 4, 1 failed"
    assert str(progress(experiment.scales["smoke"].study, folder / "none")) == "0 of 2"
    assert data_text(experiment) == f"missing for paper and cpu: imagenet; there: {folder}"
    (folder / "imagenet").mkdir()
    assert data_text(experiment).startswith("missing for paper and cpu: imagenet;")  # in an empty folder there is none
    (folder / "imagenet/train").mkdir()
    assert data_text(experiment) == f"there: imagenet, {folder}"
