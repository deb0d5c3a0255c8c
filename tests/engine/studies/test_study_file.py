"""The study file: what it means, and that everything wrong in it is said before a job runs."""

import pytest
from small_studies import BASE, ROOT, write_study

from fbn_plugin.engine.studies.outcomes import Comparison, Metric, Variant
from fbn_plugin.engine.studies.study_file import read_study

FACTORS = """
FACTORS:
  norm: {BN: {MODEL.NORM: BN}, "FBN, T=3": {MODEL.NORM: FBN(t_sigma=3)}}
  batch: {"8": {SOLVER.IMS_PER_BATCH: 8, SOLVER.BASE_LR: 1e-3}, "16": {SOLVER: {IMS_PER_BATCH: 16}}}
"""
TWO = "VARIANTS: {a: {MODEL.NORM: FBN}, b: {MODEL.NORM: BN}}\n"


def test_a_product_of_factors(tmp_path):
    text = f"""SET: {{SOLVER.MAX_EPOCH: 2}}
{FACTORS}
SEEDS: 1-3
METRICS: {{loss: {{label: the loss}}, top1: {{}}}}
COMPARE: {{factor: norm, baseline: BN, with: all}}"""
    file = read_study(write_study(tmp_path, text), ROOT)
    study = file.study
    assert list(study.variants) == ["BN, batch 8", "BN, batch 16", "FBN, T=3, batch 8", "FBN, T=3, batch 16"]
    assert study.variants["BN, batch 16"] == Variant(
        {"norm": "BN", "batch": "16"}, {"MODEL.NORM": "BN", "SOLVER.IMS_PER_BATCH": 16}
    )
    assert study.factors == {"norm": ["BN", "FBN, T=3"], "batch": ["8", "16"]}
    assert study.title == "study" and study.base == "configs/Digits/lenet5_convs_BN.yaml"
    assert study.seeds == [1, 2, 3] and study.seed_rule == "md5" and file.keep == "none"
    assert study.metrics == {"loss": Metric(False, "", "the loss"), "top1": Metric(True, "%", "top-1 accuracy")}
    assert study.comparisons == [
        Comparison("FBN, T=3, batch 8", "BN, batch 8", "batch 8"),
        Comparison("FBN, T=3, batch 16", "BN, batch 16", "batch 16"),
    ]
    config = file.configs["FBN, T=3, batch 8"]
    assert config["SOLVER.BASE_LR"] == 0.001 and config["SOLVER.MAX_EPOCH"] == 2


def test_variants_by_name_with_configs_of_their_own(tmp_path):
    other = ROOT / "configs/Digits/lenet5_FBN.yaml"
    text = f"VARIANTS: {{deep: {{BASE: {other}, SOLVER.MAX_EPOCH: 2}}, plain: {{}}}}\nSEEDS: 7\nSEED_RULE: plain\n"
    file = read_study(write_study(tmp_path, f"{text}COMPARE: [[deep, plain]]"), ROOT)
    assert file.study.variants["deep"].base == "configs/Digits/lenet5_FBN.yaml"
    assert file.bases == {"deep": other, "plain": BASE} and file.configs["deep"]["MODEL.NAME"] == "lenet5_all"
    assert file.study.comparisons == [Comparison("deep", "plain")] and file.study.metrics.keys() == {"top1"}
    file = read_study(write_study(tmp_path, f"{text}COMPARE: {{baseline: plain}}"), ROOT)
    assert file.study.comparisons == [Comparison("deep", "plain")]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("SEED: 1\n" + TWO, "unknown key 'SEED'; did you mean 'SEEDS'?"),
        (TWO, "SEEDS is missing"),
        (f"{TWO}SEEDS: 99999999999999999999", "SEEDS must be below 2**63, as SEED is, got '99999999999999999999'"),
        (f"{TWO}SEEDS: 1\nSEED_RULE: md6", "SEED_RULE must be one of md5, plain, got 'md6'; did you mean 'md5'?"),
        (f"{TWO}SEEDS: 1\nKEEP: [all]", "KEEP must be text, got ['all']"),
        (f"{TWO}SEEDS: 1\nALPHA: 1", "ALPHA must be above 0 and below 0.5, got 1.0"),
        (f"{TWO}{FACTORS}SEEDS: 1", "either FACTORS, whose product are the variants, or VARIANTS"),
        ("VARIANTS: {}\nSEEDS: 1", "it has no variants"),
        ("FACTORS: {norm: {}}\nSEEDS: 1", "factor 'norm' has no levels"),
        ("FACTORS: {}\nSEEDS: 1", "FACTORS has no factors"),
        ("FACTORS: [norm]\nSEEDS: 1", "FACTORS must be a mapping, got ['norm']"),
        (
            "FACTORS: {a: {'x, y': {}, x: {}}, b: {z: {}, 'y, z': {}}}\nSEEDS: 1",
            "the levels ['x, y', 'z'] and ['x', 'y, z'] give two variants one name, 'x, y, z'",
        ),
        (
            "FACTORS: " + str({f"f{i}": {str(j): {} for j in range(10)} for i in range(12)}) + "\nSEEDS: 1",
            "1,000,000,000,000 variants with 1 seed are more than 100,000 jobs",
        ),
        ("VARIANTS: {a: {MODEL.NORM: BN, MODEL: {NORM: FBN}}}\nSEEDS: 1", "variant 'a': MODEL.NORM is there twice"),
        ("VARIANTS: {\u00e9: {}, e\u0301: {}}\nSEEDS: 1", r"'\xe9' and 'e\u0301' differ in the way Unicode writes"),
        (f"VARIANTS: {{a: {{BASE: {ROOT}}}}}\nSEEDS: 1", "must be a config file; it is a folder"),
        (
            f"VARIANTS: {{a: {{BASE: {ROOT / 'configs/experiments/digits.yaml'}}}}}\nSEEDS: 1",
            "digits.yaml is a study itself, and must be the config of a run",
        ),
        (f"{TWO}SEEDS: 1\nMETRICS: [top1, 5]", "METRICS must be a list of names or a mapping, such as top1: {}, got ["),
        (f"{TWO}SEEDS: 1\nMETRICS: [top1, top1]", "METRICS has 'top1' twice"),
        (f"{TWO}SEEDS: 1\nCOMPARE: {{baseline: a, with: [a]}}", "COMPARE has nothing to compare with 'a'"),
        (f"{TWO}SEEDS: 1\nCOMPARE: {{factor: norm, baseline: a}}", "factor 'norm', and the study has no FACTORS"),
        ("VARIANTS: {a: {MODEL.NOM: FBN}}\nSEEDS: 1", "variant 'a': unknown config key 'MODEL.NOM'; did you mean 'M"),
        ("VARIANTS: {a: {MODEL.NORM: FBM}}\nSEEDS: 1", "variant 'a': MODEL.NORM must be the spec of a norm, got 'FBM'"),
        ("VARIANTS: {a: {SEED: 3}}\nSEEDS: 1", "variant 'a' sets SEED, which the study itself gives each of its jobs"),
        (f"SET: {{OUTPUT_DIR: x}}\n{TWO}SEEDS: 1", "SET sets OUTPUT_DIR, which the study itself gives"),
        ("VARIANTS: {a: FBN}\nSEEDS: 1", "variant 'a' must be a mapping such as {MODEL.NORM: FBN}, got 'FBN'"),
        ("VARIANTS: {a/b: {}}\nSEEDS: 1", "variant 'a/b' must be usable as a folder's name"),
        ("VARIANTS: {..: {}}\nSEEDS: 1", "variant '..' must be usable as a folder's name"),
        (f"VARIANTS: {{{'a' * 150}: {{}}}}\nSEEDS: 1", "must have a name of 1 to 120 bytes"),
        ("VARIANTS: {a: {MODEL.NORM: GN}, A: {}}\nSEEDS: 1", "variants 'a' and 'A' differ in case alone"),
        (
            "VARIANTS: {a: {MODEL.NORM: FBN}, b: {MODEL.NORM: FBN(t_sigma=5.0)}}\nSEEDS: 1",
            "'a' and 'b' have the same s",
        ),
        (
            f"{TWO}SEEDS: 1\nMETRICS: [top2]",
            "of which higher_is_better must be said, or ranked: false, as it is none of",
        ),
        (f"{TWO}SEEDS: 1\nMETRICS: {{top1: {{better: 1}}}}", "unknown option of metric 'top1' 'better'"),
        (f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{rows: [x]}}}}", "rows of TOGETHER 'a' must be of type dict"),
        (f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{rows: {{b: c}}}}}}", "TOGETHER 'a' must have a label for the axis, such as"),
        (
            f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{label: x, rows: {{b: ''}}}}}}",
            "rows of TOGETHER 'a' must be a mapping of n",
        ),
        (f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{label: x}}}}", "rows of TOGETHER 'a' must be a mapping of names to rows"),
        (f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{rows: {{b: 5}}}}}}", "rows of TOGETHER 'a' must be a mapping of names to"),
        (f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{rows: {{b: x, c: x}}}}}}", "rows of TOGETHER 'a' must be different ones"),
        (f"{TWO}SEEDS: 1\nTOGETHER: {{a: {{row: x}}}}", "unknown key of TOGETHER 'a' 'row'; did you mean 'rows'"),
        (f"{TWO}SEEDS: 1\nMETRICS: top1", "METRICS must be a list of names or a mapping"),
        (f"{TWO}SEEDS: 1\nCOMPARE: [[a, c]]", "COMPARE: a pair names 'c', which is none of a, b"),
        (f"{TWO}SEEDS: 1\nCOMPARE: [[a, a]]", "COMPARE: a pair compares 'a' with itself"),
        (f"{TWO}SEEDS: 1\nCOMPARE: a", "COMPARE must be pairs [variant, baseline], or mappings"),
        (
            f"{FACTORS}SEEDS: 1\nCOMPARE: {{factor: nom, baseline: BN}}",
            "factor names 'nom', which is none of norm, batc",
        ),
        (
            f"{FACTORS}SEEDS: 1\nCOMPARE: {{factor: norm, baseline: GN}}",
            "baseline names 'GN', which is none of BN, FBN",
        ),
        ("FACTORS: {a: {x: {SEED_: 1}}, b: {y: {SEED_: 2}}}\nSEEDS: 1", "factors 'a' and 'b' both set SEED_"),
        (f"{TWO}SEEDS: 1\nIMPORT: [my_norms.py]", "unknown key 'IMPORT'"),  # nothing in a file runs
        (
            "VARIANTS: " + str({str(i): {"SOLVER.GAMMA": i / 100} for i in range(1, 12)}) + "\nSEEDS: 0-9999",
            "11 variants with 10,000 seeds are more than 100,000 jobs",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, text, sentence):
    path = write_study(tmp_path, text)
    with pytest.raises(ValueError) as error:
        read_study(path, ROOT)
    assert str(error.value).startswith(f"study {path}: ") and sentence in str(error.value)


def test_a_base_and_a_tool_that_are_not_there(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("TOOL: classification\nBASE: nowhere.yaml\nVARIANTS: {a: {}}\nSEEDS: 1\n")
    with pytest.raises(ValueError, match=r"BASE .*nowhere\.yaml is not there"):
        read_study(path)
    path.write_text("TOOL: clasification\nVARIANTS: {a: {}}\nSEEDS: 1\n")
    with pytest.raises(ValueError, match="TOOL must be one of .* did you mean 'classification'"):
        read_study(path)
    path.write_text("TOOL: classification\nVARIANTS: {a: {}}\nSEEDS: 1\n")
    with pytest.raises(ValueError, match="BASE is missing"):
        read_study(path)


def test_metrics_of_a_test_set_and_of_averaged_weights_are_known(tmp_path):
    study = read_study(write_study(tmp_path, f"{TWO}SEEDS: 1\nMETRICS: [ema/top1, test/ema/loss]"), ROOT).study
    assert study.metrics == {
        "ema/top1": Metric(True, "%", "top-1 accuracy of averaged weights"),
        "test/ema/loss": Metric(False, "", "test loss of averaged weights"),
    }


def test_a_study_of_torchvisions_detectors(tmp_path):
    base = ROOT / "configs/Demo/mask_rcnn_R_18_FPN_BN.yaml"
    path = tmp_path / "a.yaml"
    path.write_text(f"""TOOL: torchvision
BASE: {base}
VARIANTS: {{BN: {{}}, FBN: {{MODEL.RESNETS.NORM: FBN}}}}
SEEDS: 1-2
METRICS: [segm/AP, my_set/bbox/AP50]
""")
    study = read_study(path, ROOT).study
    assert study.metrics == {
        "segm/AP": Metric(True, "%", "segm/AP"),
        "my_set/bbox/AP50": Metric(True, "%", "my_set/bbox/AP50"),
    }
    path.write_text(path.read_text().replace("RESNETS.NORM: FBN", "RESNET.NORM: FBN"))
    with pytest.raises(ValueError, match="variant 'FBN': unknown config key 'MODEL.RESNET.NORM'; did you mean"):
        read_study(path, ROOT)


FILES = {path: path.read_text() for path in sorted((ROOT / "configs/experiments").glob("*.yaml"))}
STUDIES = [path for path, text in FILES.items() if "\nTOOL:" in text and "\nSCALES:" not in text]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_this_project_can_be_read(path):
    study = read_study(path, ROOT).study
    assert study.comparisons and study.description and len(study.seeds) >= 5
