"""The scales of a study file: what each changes, and what is said of a wrong one."""

import contextlib
import math

import pytest
import yaml
from small_studies import BASE, ROOT, write_study

from fbn_plugin.engine.studies.outcomes import Comparison, Metric
from fbn_plugin.engine.studies.study_file import read_study, read_study_alone

FILE = """ID: P0.fig5
SOURCE: A paper, Fig. 5
TITLE: Two norms
DESCRIPTION: In full.
SET: {SOLVER: {MAX_EPOCH: 9, BASE_LR: 0.5}}
FACTORS:
  norm: {BN: {MODEL.NORM: BN}, FBN: {MODEL.NORM: FBN}, GN: {MODEL.NORM: GN(num_groups=2)}}
  batch: {"8": {SOLVER.IMS_PER_BATCH: 8}, "16": {SOLVER.IMS_PER_BATCH: 16}}
SEEDS: 1-10
COMPARE: {factor: norm, baseline: BN}
SCALES:
  paper:
  cpu:
    DESCRIPTION: Reduced to two epochs.
    SET: {SOLVER.MAX_EPOCH: 2}
    SEEDS: 1-5
    ONLY: {norm: [FBN, BN], batch: ["8"]}
    METRICS: [loss]
  smoke:
    VARIANTS: {BN: {MODEL.NORM: BN}, FBN: {MODEL.NORM: FBN}}
    COMPARE: [[FBN, BN]]
    SEEDS: 1
"""


def read(tmp_path, scale, text=FILE):
    return read_study(write_study(tmp_path, text), ROOT, scale=scale)


def test_the_papers_scale_is_the_file_as_it_stands(tmp_path):
    study = read(tmp_path, "paper").study
    assert len(study.variants) == 6 and len(study.comparisons) == 4 and len(study.seeds) == 10
    assert (study.id, study.source, study.scale, study.is_reduced) == ("P0.fig5", "A paper, Fig. 5", "paper", False)
    assert study.heading == "P0.fig5: Two norms (paper scale)" and study.description == "In full."


def test_a_scale_changes_what_it_names(tmp_path):
    file = read(tmp_path, "cpu")
    study = file.study
    assert list(study.variants) == ["BN, batch 8", "FBN, batch 8"]  # in the file's own order
    assert study.factors == {"norm": ["BN", "FBN"], "batch": ["8"]}
    assert study.comparisons == [Comparison("FBN, batch 8", "BN, batch 8", "batch 8")]
    assert study.seeds == [1, 2, 3, 4, 5] and study.metrics == {"loss": Metric(False, "", "validation loss")}
    assert study.settings == {"SOLVER.MAX_EPOCH": 2, "SOLVER.BASE_LR": 0.5}
    assert file.configs["BN, batch 8"]["SOLVER.MAX_EPOCH"] == 2
    assert study.heading == "P0.fig5: Two norms (cpu scale, reduced)" and study.is_reduced
    assert study.description == "In full. Reduced to two epochs."
    study = read(tmp_path, "smoke").study
    assert list(study.variants) == ["BN", "FBN"] and study.factors == {} and study.seeds == [1]
    assert read_study_alone(write_study(tmp_path, FILE), ROOT, "smoke").study == study


def test_a_scale_has_a_title_and_pictures_of_its_own(tmp_path):
    text = FILE.replace(
        "  cpu:\n", "  cpu:\n    TITLE: Two norms on less\n    TOGETHER: {Loss: {label: loss, rows: {a: x}}}\n"
    )
    study = read(tmp_path, "cpu", text).study
    assert study.heading == "P0.fig5: Two norms on less (cpu scale, reduced)" and list(study.together) == ["Loss"]
    study = read(tmp_path, "paper", text).study
    assert study.title == "Two norms" and study.together == {}


def test_only_some_variants(tmp_path):
    text = """VARIANTS: {a: {MODEL.NORM: FBN}, b: {MODEL.NORM: BN}, c: {MODEL.NORM: IN}}
COMBINE: {a and b: {of: [a, b]}, c in 10: {of: c, crops: 10}}
COMPARE: {baseline: b}
SEEDS: 1
SCALES: {paper: {}, cpu: {ONLY: [b, a]}}
"""
    study = read(tmp_path, "cpu", text).study
    assert list(study.variants) == ["a", "b", "a and b"]
    assert study.comparisons == [Comparison("a", "b"), Comparison("a and b", "b")]


@pytest.mark.parametrize(
    ("scale", "old", "new", "sentence"),
    [
        (None, "", "", "it has scales, and one must be named by --scale: paper, cpu, smoke"),
        ("cpi", "", "", "it has no scale 'cpi': paper, cpu, smoke; did you mean 'cpu'?"),
        ("cpu", "SEEDS: 1-5", "SEED: 1", "unknown key of scale cpu 'SEED'; did you mean 'SEEDS'?"),
        ("paper", "SEEDS: 1-5", "SEEDS: []", None),  # of another scale, which says it
        ("cpu", "SEEDS: 1-5", "SEEDS: []", "SEEDS must be one seed or more"),
        ("cpu", "    SET: {SOLVER.MAX_EPOCH: 2}", "    SET: 2", "SET of scale cpu must be of type dict, got 2"),
        ("cpu", '["8"]', '["4"]', "ONLY of factor 'batch' has '4', which is none of 8, 16"),
        ("cpu", '["8"]', "[]", "ONLY of factor 'batch' must be a list of names, got []"),
        ("cpu", "norm: [FBN, BN]", "nom: [FBN]", "unknown factor in ONLY 'nom'; did you mean 'norm'?"),
        ("smoke", "    SEEDS: 1\n", "    SEEDS: 1\n    ONLY: [GN]\n", "ONLY has 'GN', which is none of BN, FBN"),
        ("cpu", "  cpu:", "  CPU:", "a scale must be named by small letters, digits and underscores, got 'CPU'"),
        ("cpu", "  paper:", "  paper: 3", "scale paper must be a mapping such as {SEEDS: 1-5}, got 3"),
        ("cpu", "ID: P0.fig5", "ID: fig5", "ID must be a paper and a table or figure in it, such as P0.fig5"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, scale, old, new, sentence):
    assert old in FILE
    path = write_study(tmp_path, FILE.replace(old, new))
    if sentence is None:
        read_study_alone(path, ROOT, scale)
        return
    with pytest.raises(ValueError) as error:
        read_study(path, ROOT, scale=scale)
    assert str(error.value).startswith(f"study {path}: ") and sentence in str(error.value)


def test_files_without_scales_are_as_before_and_an_id_wants_some(tmp_path):
    text = "VARIANTS: {a: {MODEL.NORM: FBN}, b: {MODEL.NORM: BN}}\nSEEDS: 1\n"
    assert read(tmp_path, None, text).study.scale == ""
    with pytest.raises(ValueError, match="it has no SCALES, so there is no scale 'cpu'"):
        read(tmp_path, "cpu", text)
    with pytest.raises(ValueError, match="it has the ID of a table or figure, and no SCALES"):
        read(tmp_path, None, f"ID: P0.fig5\n{text}")


JUNK = [3, True, None, "x", [], {}, [[]], [{}], [3], {"a": None}, {"a": [[]]}, {"a": {"b": [[]]}}, {"cpu": {"SET": 3}}]
JUNK += [[{"variant": [["a"]], "is": "at_least", "value": 1}], [{"variant": "a", "is": []}], {"a": {"of": [["a"]]}}]
JUNK += [[{"variant": "a", "is": "at_least", "value": math.inf}], {"top1": {"a": math.nan}}, {"a": {"made": 3}}]
KEYS = ["ID", "SCALES", "DATA", "METRICS", "PRINTED", "CLAIMS", "COMBINE", "ONLY", "NOT_RUN", "SOURCE"]


@pytest.mark.parametrize("key", KEYS)
def test_nothing_in_a_key_is_worse_than_a_sentence(tmp_path, key):
    """At the top of the file, and in a scale."""
    keys = {"TOOL": "classification", "BASE": str(BASE), "SEEDS": 1, "VARIANTS": {"a": {}, "b": {"MODEL.NORM": "FBN"}}}
    for junk in JUNK:
        for content, scale in (({**keys, key: junk}, None), ({**keys, "SCALES": {"cpu": {key: junk}}}, "cpu")):
            (tmp_path / "junk.yaml").write_text(yaml.safe_dump(content))
            with contextlib.suppress(ValueError):
                read_study_alone(tmp_path / "junk.yaml", ROOT, scale)
