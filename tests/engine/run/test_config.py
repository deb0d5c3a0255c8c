"""Configs: bases and overrides merge in order, values keep their types, a mistake is one sentence."""

import pytest

from fbn_plugin.engine.run.config import CfgNode, load_config, refuse_changes, save_config, saved_config

DEFAULTS = CfgNode(
    {
        "MODEL": {"NORM": "BN", "MEAN": [1.0, 2.0], "MASK_ON": False, "SIZES": [[8]]},
        "SOLVER": {"BASE_LR": 0.1, "STEPS": (1,), "MAX_ITER": 10, "DECAY_BIAS": None},
        "TRAIN": (),
    }
)


def test_file_over_base_over_default_and_override_over_file(tmp_path):
    (tmp_path / "base.yaml").write_text("MODEL: {NORM: GN, MASK_ON: True}\nSOLVER: {MAX_ITER: 5}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.yaml").write_text("_BASE_: ../base.yaml\nMODEL: {NORM: FBN}\n")
    cfg = load_config(DEFAULTS, tmp_path / "sub" / "run.yaml", ["SOLVER.MAX_ITER", "7"])
    assert (cfg.MODEL.NORM, cfg.MODEL.MASK_ON, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == ("FBN", True, 7, 0.1)
    assert DEFAULTS.MODEL.NORM == "BN"
    with pytest.raises(AttributeError):
        cfg.MODEL.NORM = "GN"


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("MODEL.NORM", "FBN(t_sigma=4.0)", "FBN(t_sigma=4.0)"),
        ("MODEL.NORM", "fbn(eps=1e-3)", "FBN(eps=1e-3)"),
        ("MODEL.NORM", "NoSuchNorm", "NoSuchNorm"),
        ("MODEL.NORM", "", ""),
        ("MODEL.NORM", "5", "5"),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
        ("SOLVER.STEPS", "(3, 4)", (3, 4)),
        ("SOLVER.STEPS", "[3, 4]", (3, 4)),
        ("SOLVER.STEPS", "3", (3,)),
        ("MODEL.MEAN", "(3, 4)", [3, 4]),
        ("MODEL.MEAN", "['3', 1e-4]", [3.0, 1e-4]),
        ("MODEL.SIZES", "((8, 16), [32])", [[8, 16], [32]]),
        ("TRAIN", "a/b:train", ("a/b:train",)),
        ("SOLVER.DECAY_BIAS", "0.5", 0.5),
        ("MODEL.MASK_ON", "True", True),
    ],
)
def test_values_take_the_type_of_the_default(key, text, value):
    cfg = load_config(DEFAULTS, None, [key, text])
    for name in key.split("."):
        cfg = cfg[name]
    assert cfg == value and type(cfg) is type(value)


def test_yaml_numbers_in_scientific_notation_are_numbers(tmp_path):
    (tmp_path / "run.yaml").write_text("SOLVER: {BASE_LR: 1e-4}\n")  # a string to YAML 1.1
    assert load_config(DEFAULTS, tmp_path / "run.yaml").SOLVER.BASE_LR == 1e-4


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["MODEL.NROM", "FBN"], "'MODEL.NROM'; did you mean 'MODEL.NORM'"),
        (["MODEL", "FBN"], "group of MODEL.NORM, MODEL.MEAN"),
        (["SOLVER.MAX_ITER", "2.5"], "SOLVER.MAX_ITER must be of type int, such as 10, got 2.5"),
        (["SOLVER.MAX_ITER", "True"], "SOLVER.MAX_ITER"),
        (["SOLVER.MAX_ITER", "None"], "SOLVER.MAX_ITER"),
        (["MODEL.MASK_ON", "yes"], "MODEL.MASK_ON must be of type bool"),
        (["MODEL.MEAN", "3"], "MODEL.MEAN must be of type list"),
        (["SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR must be of type finite float, such as 0.1, got 'fast'"),
        (["SOLVER.BASE_LR", "nan"], "SOLVER.BASE_LR must be of type finite float, such as 0.1, got 'nan'"),
        (["SOLVER.BASE_LR", "1e999"], "got inf"),
        (["SOLVER.STEPS", "('a',)"], "SOLVER.STEPS must be of type tuple of int, such as (1,), got ('a',)"),
        (["SOLVER.STEPS", "(1, 2.5)"], "SOLVER.STEPS"),
        (["SOLVER.STEPS", "True"], "SOLVER.STEPS"),
        (
            ["MODEL.MEAN", "['a', 2]"],
            "MODEL.MEAN must be of type list of finite float, such as [1.0, 2.0], got ['a', 2]",
        ),
        (["MODEL.SIZES", "[32, 64]"], "MODEL.SIZES must be of type list of list of int, such as [[8]], got [32, 64]"),
        (["MODEL.SIZES", "[[None]]"], "MODEL.SIZES"),
        (["TRAIN", "([1],)"], "TRAIN must be of type tuple of str, such as (), got ([1],)"),
        (["MODEL.NORM"], "pairs KEY VALUE, and 'MODEL.NORM'"),
        (["--resume", "MODEL.NORM"], "'--resume' stands among the KEY VALUE overrides: flags go before them"),
        (["MODEL.NORM", "FBN", "--resume"], "'--resume' stands among"),
        (["MODEL.NORM", "FBN", "--log-period", "5"], "'--log-period' stands among"),
        (["MODEL.NORM", "--resume"], "'--resume' stands among"),
        (["K" * 1000, "1"], "' (1,002 characters) is no key"),
        (["SOLVER.MAX_ITER", "9" * 400], "SOLVER.MAX_ITER must be a whole number of at most 64 bits, got '9999"),
        (["SOLVER.BASE_LR", "9" * 400], "SOLVER.BASE_LR must be of type finite float, such as 0.1, got '9999"),
        (["SOLVER.BASE_LR", " " + "-" * 4000 + "1"], "SOLVER.BASE_LR must be of type finite float"),
        (["SOLVER.MAX_ITER", "[" * 199], "SOLVER.MAX_ITER must be of type int"),
        (["SOLVER.MAX_ITER", "{}"], "SOLVER.MAX_ITER must be of type int, such as 10, got {}"),
        (["MODEL.NORM", "x" * 10_000], "MODEL.NORM must have at most 4,096 characters, got 'xxx"),
        (["TRAIN", "('a', '\\x00')"], "TRAIN must be text that UTF-8 can write, without null characters, got '\\x00'"),
        (["MODEL.NORM", "\udcff"], "MODEL.NORM must be text that UTF-8 can write"),
    ],
)
def test_a_wrong_override_is_named(overrides, words):
    with pytest.raises(ValueError) as error:
        load_config(DEFAULTS, None, overrides)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "must hold a YAML mapping"),
        ("[1, 2]", "must hold a YAML mapping"),
        ("MODEL: {", "not valid YAML"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml, which"),
        ("_BASE_: run.yaml", "includes itself"),
        ("MODEL: {MASKON: True}", "did you mean 'MODEL.MASK_ON'"),
        ("solver: {base_lr: 1}", "unknown config key 'solver.base_lr'; did you mean 'SOLVER.BASE_LR'?"),
        ("SOLVER: {BASE_LR: {}}", "SOLVER.BASE_LR must be of type finite float, such as 0.1, got {}"),
        ("SOLVER: {BASE_LR: {x: 1}}", "unknown config key 'SOLVER.BASE_LR.x'"),
        ("SOLVER: {BASE_LR: 1}\nSOLVER.BASE_LR: 2", "run.yaml has SOLVER.BASE_LR twice"),
        ("SOLVER: {BASE_LR: 1}\nSOLVER: {MAX_ITER: 2}", "line 2 has 'SOLVER' for the second time"),
        ("SOLVER:", "group of SOLVER.BASE_LR"),
        ("GROUP: {}", "unknown config key 'GROUP'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_config(DEFAULTS, tmp_path / "run.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.yaml is not there"):
        load_config(DEFAULTS, tmp_path / "no.yaml")


def test_empty_groups_set_nothing(tmp_path):
    (tmp_path / "run.yaml").write_text("MODEL: {}\nRETINANET: {}\n")
    assert load_config(DEFAULTS, tmp_path / "run.yaml", unused=["RETINANET.*"]) == DEFAULTS


def test_unused_keys_are_reported_in_one_line(caplog):
    cfg = load_config(
        DEFAULTS, None, ["RETINANET.A", "1", "VIS", "2", "MODEL.NORM", "GN"], unused=["RETINANET.*", "VIS"]
    )
    assert [record.message for record in caplog.records] == ["these keys are not used: RETINANET.A, VIS"]
    assert cfg.MODEL.NORM == "GN" and "VIS" not in cfg


def test_a_saved_config_loads_to_the_same(tmp_path):
    cfg = load_config(DEFAULTS, None, ["MODEL.NORM", "FBN(t_sigma=4.0)", "SOLVER.STEPS", "(1, 2)", "TRAIN", "a:b"])
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(DEFAULTS, tmp_path / "config.yaml") == cfg


def test_a_run_is_continued_with_the_settings_it_began_with(tmp_path):
    overrides = ["OUTPUT_DIR", str(tmp_path)]
    defaults = CfgNode({**DEFAULTS, "OUTPUT_DIR": ""})
    with pytest.raises(FileNotFoundError, match=r"config\.yaml is not there"):
        saved_config(tmp_path, defaults)
    save_config(load_config(defaults, None, [*overrides, "SOLVER.STEPS", "(1, 2)"]), tmp_path / "config.yaml")
    saved = saved_config(tmp_path, defaults)
    refuse_changes(saved, load_config(defaults, None, [*overrides, "SOLVER.STEPS", "[1, 2]"]), [])
    refuse_changes({"OUTPUT_DIR": "", "STEPS": [1, (2,)]}, {"OUTPUT_DIR": "", "STEPS": (1, [2])}, [])
    refuse_changes(saved, load_config(defaults, None, overrides), ["SOLVER.*"])
    changed = load_config(defaults, None, [*overrides, "SOLVER.STEPS", "(1, 2)", "MODEL.NORM", "FBN"])
    with pytest.raises(ValueError, match="MODEL.NORM must be 'BN' as in the run that OUTPUT_DIR .* holds, got 'FBN'"):
        refuse_changes(saved, changed, ["SOLVER.*"])


def test_a_run_of_another_number_of_processes(tmp_path):
    defaults = CfgNode({"SOLVER": {"BASE_LR": 0.1, "REFERENCE_WORLD_SIZE": 0}, "OUTPUT_DIR": str(tmp_path)})
    saved = load_config(defaults, None, ["SOLVER.REFERENCE_WORLD_SIZE", "2"])
    scaled = load_config(defaults, None, ["SOLVER.BASE_LR", "0.4", "SOLVER.REFERENCE_WORLD_SIZE", "8"])
    with pytest.raises(ValueError, match="made by 2 processes, got 8: resume it with as many"):
        refuse_changes(saved, scaled, [])
