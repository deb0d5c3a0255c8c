"""tools/make_table.py: the paper's figures, ours beside them, and what is said about how far they compare."""

import importlib.util
import json
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fbn_plugin.engine.reports.table import PAPER_AP
from fbn_plugin.engine.torchvision.config import load_detection_config

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "COCO-InstanceSegmentation" / "mask_rcnn_X_101_32x8d_FPN_FBN.yaml"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_table", ROOT / "tools" / "make_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write_run(tmp_path):
    """Makes a run folder of Table I's config, with AP ``base + 1`` for boxes and ``base`` for masks."""
    whole = load_detection_config(str(CONFIG)).dump()

    def write(name, norm="BN", seed=1, evaluations=None, info=None, engine="detectron2", **settings):
        nested = yaml.safe_load(whole)
        settings = {"MODEL__RESNETS__NORM": norm, "SEED": seed, "OUTPUT_DIR": name, **settings}
        for key, value in settings.items():
            *groups, last = key.split("__")
            node = nested
            for group in groups:
                node = node.setdefault(group, {})
            node[last] = value
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump(nested))
        rows = [{"iteration": 19, "total_loss": 2.0}]
        for iteration, base in (evaluations or {}).items():
            figures = {
                f"{task}/{m}": base + up for task, up in (("bbox", 1), ("segm", 0)) for m in ("AP", "AP50", "AP75")
            }
            rows.append({"iteration": iteration - 1, **figures, "segm/APl": None})
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if info is not False:
            content = {
                "engine": engine,
                "hardware": "NVIDIA X",
                "processes": 1,
                "images_per_batch": nested["SOLVER"]["IMS_PER_BATCH"],
                "train_images": {"coco_2017_train": 118287},
                "test_images": {"coco_2017_val": 5000},
                **(info or {}),
            }
            (folder / "run_info.json").write_text(json.dumps(content))
        return folder

    return write


def rows(text):
    """The tables' rows: (task, iterations) -> header -> cell."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    header = lines[0]
    return {(row[0], row[1]): dict(zip(header[2:], row[2:])) for row in lines[2:]}


def test_without_a_run_it_is_the_papers_table(tool):
    found = rows(tool.main([]))
    assert list(found) == [(t, i) for t in ("segm", "bbox") for i in ("50,000", "100,000", "150,000", "270,000")]
    assert all(cell.startswith("not run (") for row in found.values() for cell in row.values())
    # read off the paper's page
    row = found["segm", "100,000"]
    assert [row[key] for key in ("BN AP (paper)", "BN AP50 (paper)")] == ["not run (26.86)", "not run (45.55)"]
    assert [row[key] for key in ("FBN AP (paper)", "FBN AP50 (paper)")] == ["not run (27.34)", "not run (52.40)"]
    assert list(found["bbox", "270,000"].values()) == [f"not run ({v})" for v in ("40.01", "61.32", "41.12", "61.71")]
    gains = [values["FBN"][0] - values["BN"][0] for values in PAPER_AP.values()]
    assert min(gains) > 0, "the paper says that the filter has the higher AP at every iteration"


def test_runs_of_the_papers_size(tool, write_run):
    bn = write_run("bn", "BN", 1, {50_000: 20, 150_000: 28.5})
    fbn = write_run("fbn", "FBN(t_sigma=5.0)", 1, {50_000: 21, 270_000: 37.5})
    # detectron2 writes the evaluation at the end one iteration further
    metrics = fbn / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"iteration": 269999', '"iteration": 270000'))
    text = tool.main([str(bn), str(fbn)])
    found = rows(text)
    assert found["segm", "50,000"]["BN AP (paper)"] == "20.00 (23.87)"
    assert found["bbox", "50,000"]["BN AP (paper)"] == "21.00 (23.63)"
    assert found["segm", "100,000"]["FBN AP50 (paper)"] == "not run (52.40)"
    assert found["segm", "270,000"]["FBN AP (paper)"] == "37.50 (37.06)"
    assert found["segm", "270,000"]["BN AP (paper)"] == "not run (36.47)"
    assert len(found) == 8 and "*" not in text and "educed run" not in text and "configs differ" not in text
    assert "coco_2017_train (118,287 images)" in text and "coco_2017_val (5,000 images)" in text
    assert "270,000 iterations of 2 images a batch" in text and "Hardware: NVIDIA X." in text
    assert "FBN minus BN after 50,000 iterations, seed by seed (n = 1): segm AP +1.00; bbox AP +1.00; one pair" in text


def test_iterations_are_counted_at_two_images(tool, write_run):
    """16 images a batch; and 16 that the number of processes made of 2, which run_info.json alone tells."""
    rule = {"IMS_PER_BATCH": 16, "MAX_ITER": 33_750, "BASE_LR": 0.02, "STEPS": [26_250, 31_250], "WARMUP_ITERS": 125}
    rule = {f"SOLVER__{key}": value for key, value in rule.items()}
    whole = write_run("bn", "BN", evaluations={6250: 20, 33_750: 30}, **rule)
    scaled = write_run("fbn", "FBN", evaluations={6250: 21, 33_750: 31}, info={"images_per_batch": 16, "processes": 8})
    text = tool.main([str(whole), str(scaled)])
    found = rows(text)
    assert [found["segm", "50,000"][f"{n} AP (paper)"] for n in ("BN", "FBN")] == ["20.00 (23.87*)", "21.00 (25.41*)"]
    assert [found["segm", "270,000"][f"{n} AP (paper)"] for n in ("BN", "FBN")] == ["30.00 (36.47*)", "31.00 (37.06*)"]
    assert "33,750 iterations of 16 images a batch" in text and "8 processes, each on NVIDIA X" in text
    line = (
        "Not the paper's setting or, where it is silent, this project's of Table I: 16 images a batch in place of 2.\n"
    )
    assert line in text and "Reduced run" not in text


def test_the_linear_rule_may_round(tool, write_run):
    rule = {"IMS_PER_BATCH": 6, "MAX_ITER": 90_000, "BASE_LR": 0.0075, "STEPS": [70_000, 83_333], "WARMUP_ITERS": 333}
    rule = {f"SOLVER__{key}": value for key, value in rule.items()}
    text = tool.main([str(write_run("fbn", "FBN", evaluations={16_667: 20, 90_000: 30}, **rule))])
    assert rows(text)["segm", "50,000"]["FBN AP (paper)"] == "20.00 (25.41*)" and len(rows(text)) == 8
    assert "Table I: 6 images a batch in place of 2.\n" in text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"SOLVER__BASE_LR": 0.1}, "SOLVER.BASE_LR 0.1 in place of 0.0025"),
        ({"SOLVER__STEPS": [60_000, 80_000]}, "SOLVER.STEPS [60000, 80000] in place of [210000, 250000]"),
        ({"MODEL__WEIGHTS": ""}, "MODEL.WEIGHTS '' in place of 'detectron2://"),
        ({"MODEL__BACKBONE__FREEZE_AT": 0}, "MODEL.BACKBONE.FREEZE_AT 0 in place of 2"),
        ({"MODEL__FPN__NORM": "FBN"}, "MODEL.FPN.NORM 'FBN' in place of ''"),
        ({"MODEL__ROI_BOX_HEAD__NORM": "BN"}, "MODEL.ROI_BOX_HEAD.NORM 'BN' in place of ''"),
        ({"MODEL__ROI_MASK_HEAD__NORM": "BN"}, "MODEL.ROI_MASK_HEAD.NORM 'BN' in place of ''"),
        ({"MODEL__RESNETS__STEM_OUT_CHANNELS": 32}, "MODEL.RESNETS.STEM_OUT_CHANNELS 32 in place of 64"),
        ({"MODEL__RESNETS__RES2_OUT_CHANNELS": 128}, "MODEL.RESNETS.RES2_OUT_CHANNELS 128 in place of 256"),
        ({"INPUT__MIN_SIZE_TRAIN": [800]}, "INPUT.MIN_SIZE_TRAIN [800] in place of [640, 672, 704, 736, 768, 800]"),
        ({"INPUT__MAX_SIZE_TRAIN": 640}, "INPUT.MAX_SIZE_TRAIN 640 in place of 1333"),
        ({"MODEL__MASK_ON": False}, "MODEL.MASK_ON False in place of True"),
        ({"MODEL__FPN__OUT_CHANNELS": 64}, "Reduced run: MODEL.FPN.OUT_CHANNELS 64 in place of 256"),
        ({"MODEL__RESNETS": {"DEPTH": 50, "NORM": "FBN"}}, "a backbone that config.yaml does not tell in place of"),
        ({"MODEL__RPN": {}}, "settings that config.yaml does not tell, such as MODEL.RPN."),
    ],
)
def test_what_is_not_the_papers_setting(tool, write_run, settings, reason):
    text = tool.main([str(write_run("fbn", "FBN", 1, {270_000: 30}, **settings))])
    assert reason in text and "(*) The paper's figure is not comparable" in text
    assert rows(text)["segm", "270,000"]["FBN AP (paper)"] == "30.00 (37.06*)"


def test_what_does_not_matter(tool, write_run):
    """The weights' folder, how often is evaluated, and PRECISE_BN, on which the paper is silent."""
    settings = {"MODEL__WEIGHTS": "/data/X-101-32x8d.pkl", "SOLVER__REFERENCE_WORLD_SIZE": 0}
    settings |= {"TEST__EVAL_PERIOD": 5000, "TEST__PRECISE_BN__ENABLED": False}
    text = tool.main([str(write_run("fbn", "FBN", 1, {270_000: 30}, **settings))])
    assert "in place of" not in text and "*" not in text


@pytest.mark.detectron2
@pytest.mark.parametrize("norm", ["BN", "FBN"])
def test_the_configs_of_table_one_as_detectron2_reads_them(tool, write_run, norm):
    config = pytest.importorskip("detectron2.config", reason="detectron2 is not installed")
    from fbn_plugin.engine.detectron2.config import add_config

    cfg = config.get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(CONFIG.with_name(CONFIG.name.replace("_FBN", f"_{norm}"))))
    run = write_run("run", norm, 1, {270_000: 30})
    (run / "config.yaml").write_text(cfg.dump())
    text = tool.main([str(run)])
    assert "in place of" not in text and "*" not in text


def test_another_threshold_has_no_figures_of_the_paper(tool, write_run):
    text = tool.main([str(write_run("fbn", "FBN(t_sigma=4)", 1, {270_000: 30}))])
    assert "(paper)" not in text and "FBN(t_sigma=4) in place of BN or FBN at T_sigma = 5" in text


def test_seeds_are_joined_and_compared(tool, write_run, tmp_path):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = {"BN": {1: 30.0, 2: 31.0, 3: 32.5}, "FBN": {1: 31.0, 2: 33.0, 3: 33.0}}
    runs = [
        str(write_run(f"{norm}{seed}", norm, seed, {270_000: value}))
        for norm, each in values.items()
        for seed, value in each.items()
    ]
    unpaired = str(write_run("drawn", "FBN", -1, {50_000: 25.0}))
    text = tool.main([*runs, unpaired, "--json", str(tmp_path / "table.json")])
    mean, sd = statistics.mean(values["BN"].values()), statistics.stdev(values["BN"].values())
    assert rows(text)["segm", "270,000"]["BN AP (paper)"] == f"{mean:.2f} ± {sd:.2f} (36.47)"
    assert rows(text)["segm", "270,000"]["FBN AP (paper)"] == "32.33 ± 1.15 (n = 3) (37.06)"
    assert "FBN: 4 runs, seeds 1, 2, 3 and 1 of a seed that was drawn" in text
    pairs = list(zip(values["FBN"].values(), values["BN"].values()))
    expected = stats.ttest_rel(*zip(*pairs)).pvalue
    gains = [a - b for a, b in pairs]
    line = (
        f"segm AP {statistics.mean(gains):+.2f} ± {statistics.stdev(gains):.2f}, p = {expected:.2g} (two-sided paired"
    )
    assert f"FBN minus BN after 270,000 iterations, seed by seed (n = 3): {line}" in text

    (table,) = json.loads((tmp_path / "table.json").read_text())["tables"]
    cell = {"task": "segm", "iterations": 270_000, "column": "BN", "metric": "AP"}
    (found,) = (each for each in table["cells"] if cell.items() <= each.items())
    assert found["n"] == 3 and found["values"] == list(values["BN"].values()) and found["paper"] == 36.47
    assert (found["mean"], found["sd"]) == (mean, sd)


@pytest.mark.parametrize(("seeds", "scipy", "tested"), [(2, True, False), (3, True, True), (3, False, False)])
def test_a_p_value_wants_three_pairs_and_scipy(tool, write_run, monkeypatch, seeds, scipy, tested):
    if scipy:
        pytest.importorskip("scipy.stats", reason="scipy is not installed")
    else:
        monkeypatch.setitem(sys.modules, "scipy.stats", None)
    runs = [write_run(f"{n}{s}", n, s, {270_000: 30 + s * len(n)}) for n in ("BN", "FBN") for s in range(1, seeds + 1)]
    text = tool.main(list(map(str, runs)))
    gain = {2: "segm AP +1.50 ± 0.71", 3: "segm AP +2.00 ± 1.00"}[seeds]
    assert gain in text and (f"{gain}, p = 0.074 (two-sided paired t-test)" in text) == tested == ("p =" in text)


def test_a_seed_that_is_there_twice_is_no_second_run(tool, write_run):
    runs = [write_run("a", "BN", 1, {270_000: 30}), write_run("b", "BN", 1, {270_000: 30}), write_run("c", "FBN", 1)]
    assert "seed 1 more than once" in tool.main(list(map(str, runs)))


def test_a_reduced_run(tool, write_run, tmp_path):
    settings = {"SOLVER__MAX_ITER": 90, "MODEL__RESNETS__DEPTH": 50, "MODEL__RESNETS__NUM_GROUPS": 1}
    settings |= {"MODEL__RESNETS__WIDTH_PER_GROUP": 64, "DATASETS__TRAIN": ["my:train"], "DATASETS__TEST": ["my:val"]}
    run = write_run("fbn", "FBN", 1, {45: 1.0, 90: 2.0}, engine="torchvision", **settings)
    output = tmp_path / "table.md"
    text = tool.main([str(run), "--output", str(output)])
    assert output.read_text() == text + "\n"
    found = rows(text)
    assert list(found) == [("segm", "45"), ("segm", "90"), ("bbox", "45"), ("bbox", "90")]
    assert found["segm", "90"] == {"FBN AP": "2.00", "FBN AP50": "2.00"}
    reduced = "data my:train and my:val in place of COCO 2017; 90 of 270,000 iterations; ResNet-50 in place of"
    assert f"Reduced run: {reduced}" in text and "my:train (number of images not recorded)" in text
    assert text.count("The paper's rows (COCO 2017, 50,000 to 270,000 iterations) are not run; make_table.py") == 1


def test_every_evaluation_is_shown(tool, write_run, tmp_path):
    """In the table among the paper's rows, and in the JSON."""
    bn = write_run("bn", "BN", 1, {60_000: 20, 150_000: 28})
    fbn = write_run("fbn", "FBN", 1, {75_000: 21, 150_000: 29})
    found = rows(tool.main([str(bn), str(fbn), "--json", str(tmp_path / "table.json")]))
    numbers = [50_000, 60_000, 75_000, 100_000, 150_000, 270_000]
    assert [iterations for task, iterations in found if task == "segm"] == [f"{number:,}" for number in numbers]
    assert found["segm", "60,000"]["BN AP (paper)"] == "20.00"
    assert found["segm", "60,000"]["FBN AP (paper)"] == "not run"
    (table,) = json.loads((tmp_path / "table.json").read_text())["tables"]
    values = {(c["iterations"], c["column"]): c["values"] for c in table["cells"] if c["metric"] == "AP"}
    assert sorted({iterations for iterations, _ in values}) == numbers
    assert values[75_000, "FBN"] == [22.0] and values[75_000, "BN"] == []  # boxes


def test_settings_that_differ_are_pointed_out(tool, write_run):
    everywhere = {"MODEL__FPN__NORM": "FBN", "SOLVER__BASE_LR": 0.005, "DATALOADER__NUM_WORKERS": 2}
    bn = write_run("bn", "BN", 1, {270_000: 30}, MODEL__FPN__NORM="BN", DATALOADER__NUM_WORKERS=4)
    fbn = write_run("fbn", "FBN(t_sigma=5.0)", 1, {270_000: 31}, **everywhere)
    text = tool.main([str(bn), str(fbn)])
    line = "The configs differ in more than norm, seed and output folder"
    # The FPN's norm is the backbone's in both, which is one setting.
    assert f"{line}: DATALOADER.NUM_WORKERS 4 or 2; SOLVER.BASE_LR 0.0025 or 0.005." in text
    assert text.count("their configs differ in more than the norm") == 1
    other = write_run("heads", "FBN", 2, {270_000: 31}, DATALOADER__NUM_WORKERS=4)
    assert "MODEL.FPN.NORM 'the norm' or ''" in tool.main([str(bn), str(other)])


def test_runs_of_one_norm_and_two_settings_are_not_averaged(tool, write_run):
    runs = [
        write_run("a", "FBN", 1, {270_000: 30}, DATALOADER__NUM_WORKERS=1),
        write_run("b", "FBN", 2, {270_000: 32}, DATALOADER__NUM_WORKERS=2),
        write_run("c", "FBN", 1, {270_000: 20}, DATALOADER__NUM_WORKERS=1, SOLVER__BASE_LR=0.1),
    ]
    row = rows(tool.main(list(map(str, runs))))["segm", "270,000"]
    assert row["FBN (1) AP (paper)"] == "31.00 ± 1.41 (37.06)" and row["FBN (2) AP (paper)"] == "20.00 (37.06*)"
    labels = ["--label", f"slow={runs[0]}", "--label", f"slow={runs[1]}"]
    row = rows(tool.main([*map(str, runs), *labels]))["segm", "270,000"]
    assert row["slow AP (paper)"] == "31.00 ± 1.41 (37.06)" and row["FBN AP (paper)"] == "20.00 (37.06*)"


def test_any_norms(tool, write_run):
    """Plain before filtered, in the registry's order; options that are the default are no other norm."""
    norms = ["Custom", "FGN(t_sigma=5)", "FBN(t_sigma=2)", "GN"]
    runs = [write_run(f"run{i}", norm, 1, {270_000: 30 + i}) for i, norm in enumerate(norms)]
    text = tool.main([*map(str, runs), "--all-metrics"])
    header = text.splitlines()[2]
    order = ["FBN(t_sigma=2) AP", "GN AP", "FGN AP", "Custom AP"]
    assert [cell.strip() for cell in header.split("|")[3:-1:2]] == order
    assert "(paper)" not in header and "not run" not in text
    assert "FGN minus GN after 270,000" in text and "FBN(t_sigma=2) minus" not in text
    table = text.split("At the last evaluation:")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    assert lines[0] == ["task", "norm", "iterations", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert ["segm", "GN", "270,000", "33.00", "33.00", "33.00", "-", "-", "-"] in lines


def test_every_data_set_and_framework_has_its_table(tool, write_run):
    two = write_run("two", "BN", DATASETS__TEST=["coco_2017_val", "my:val"])
    row = {"iteration": 49_999, "coco_2017_val/segm/AP": 20.0, "my:val/segm/AP": 40.0}
    (two / "metrics.json").write_text(
        '{"iteration": 19, "tot\n' + json.dumps(row) + '\n{"iteration": 50'
    )  # two crashes
    one = write_run("one", "FBN", 1, {50_000: 30}, engine="torchvision")
    text = tool.main([str(two), str(one)])
    first, second, third = text.split("## ")[1:]
    assert first.startswith("coco_2017_train → coco_2017_val, detectron2")
    assert rows(first)["segm", "50,000"]["BN AP (paper)"] == "20.00 (23.87)"
    assert rows(second)["segm", "50,000"]["BN AP"] == "40.00" and len(rows(second)) == 2
    assert rows(third)["segm", "50,000"]["FBN AP (paper)"] == "30.00 (25.41*)"
    assert rows(first)["bbox", "50,000"]["BN AP (paper)"] == "- (23.63)"  # evaluated, and not for boxes


def test_old_runs_without_run_info(tool, write_run):
    """What trained them is seen from the config."""
    ours = write_run("a", "BN", 1, {270_000: 30}, info=False)
    theirs = write_run("b", "BN", 1, {270_000: 30}, info=False, MODEL__RETINANET__NUM_CLASSES=80)
    text = tool.main([str(ours), str(theirs)])
    assert "coco_2017_val, torchvision" in text and "coco_2017_val, detectron2" in text
    assert text.count("Hardware: not recorded.") == 2


def test_a_run_of_the_engine(tool, trained_run):
    found = rows(tool.main([str(trained_run)]))
    assert list(found) == [("segm", "2"), ("segm", "4"), ("bbox", "2"), ("bbox", "4")]
    assert found["segm", "4"]["FBN AP"] == "0.00"


@pytest.mark.usefixtures("one_thread")
def test_folders_of_evaluations(tool, trained_run, tmp_path):
    """The figures of the weights at their iterations, beside the run that they are of; a run's folder stays one."""
    spec = importlib.util.spec_from_file_location("train_detection", ROOT / "tools" / "train_detection.py")
    train_detection = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_detection)
    run, folder = shutil.copytree(trained_run, tmp_path / "run"), tmp_path / "evaluated"
    weights = run / "model_0000001.pth"

    def evaluate(*overrides):
        options = ["--config-file", str(run / "config.yaml"), "--eval-only", *map(str, overrides)]
        return train_detection.main([*options, "MODEL.WEIGHTS", str(weights)])

    before = (run / "config.yaml").read_bytes(), (run / "run_info.json").read_bytes()
    evaluate("OUTPUT_DIR", run)
    assert before == ((run / "config.yaml").read_bytes(), (run / "run_info.json").read_bytes())
    assert list(rows(tool.main([str(run)]))) == [("segm", "2"), ("segm", "4"), ("bbox", "2"), ("bbox", "4")]
    metrics = evaluate("OUTPUT_DIR", folder)
    text = tool.main([str(folder)])
    assert rows(text) == {(task, "2"): {f"FBN {m}": f"{metrics[f'{task}/{m}']:.2f}" for m in ("AP", "AP50")}
                          for task in ("segm", "bbox")}  # fmt: skip
    assert f"{folder} is an evaluation of {weights}.\n" in text and "4 images" in text
    state = torch.load(weights)
    weights = tmp_path / "untold.pth"
    torch.save(state["model"], weights)
    evaluate("OUTPUT_DIR", folder, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    text = tool.main([str(run), str(folder)])
    assert "they do not tell their iterations, for which its SOLVER.MAX_ITER 4 is taken" in text
    assert f"{folder}, the last evaluation on" in text and "nothing was detected, so its average precisions" in text
    assert rows(text)["bbox", "4"]["FBN (2) AP"] == "0.00"


def test_bad_input(tool, write_run, tmp_path, capsys):
    run = write_run("run", "BN", 1, {270_000: 30})
    output = ["--output", str(tmp_path / "table.md"), "--json", str(tmp_path / "table.json")]

    def refusal(*arguments):
        with pytest.raises(SystemExit) as exit:
            tool.main([*output, *map(str, arguments)])
        printed = capsys.readouterr()
        assert exit.value.code == 2 and printed.out == ""
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
        assert not (tmp_path / "table.md").exists() and not (tmp_path / "table.json").exists()
        return printed.err

    assert "nowhere is not there" in refusal(run, tmp_path / "nowhere")
    assert "no config.yaml" in refusal(tmp_path)
    assert "more than once" in refusal(run, f"{run}/../run")
    assert "LABEL=RUN_DIR" in refusal(run, "--label", "mine")
    assert "none of the run folders" in refusal(run, "--label", "mine=other")
    other = write_run("other", "FBN", 1, {270_000: 30})
    both = ("--label", f"x={run}", "--label", f"x={other}")
    assert "label 'x' would average BN and FBN" in refusal(run, other, *both)
    assert "is not there" in refusal(run, "--output", tmp_path / "no" / "table.md")
    assert "it is a folder" in refusal(run, "--json", tmp_path)
    assert "two outputs" in refusal(run, "--json", tmp_path / "table.md")
    never = write_run("never", DATASETS__TEST=[])
    assert "DATASETS.TEST is empty" in refusal(never)
    (never / "config.yaml").write_text("[1, 2]")
    assert "YAML mapping" in refusal(never)
    wrong = write_run("wrong", SOLVER__MAX_ITER="many")
    assert "SOLVER.MAX_ITER must be of type int, got 'many'" in refusal(wrong)
    (run / "run_info.json").write_text('{"images_per_batch": 0}')
    assert "images_per_batch must be 1 or more" in refusal(run)
    (run / "run_info.json").write_text('{"train_images": [3]}')
    assert "run_info.json: train_images must be of type dict, got [3]" in refusal(run)
    (run / "run_info.json").unlink()
    (run / "metrics.json").write_text('{"iteration": 3, "bbox/AP": "hi"}\n')
    assert "metrics.json: line 1: bbox/AP must be a number or null, got 'hi'" in refusal(run)
    (run / "metrics.json").write_text('{"bbox/AP": 3}\n')
    assert "metrics.json: line 1 has no 'iteration'" in refusal(run)
    for line, words in (
        ('{"iteration": 3, "segm/AP": true}', "line 1: segm/AP must be a number or null, got True"),
        ("\x00\x01\n{}", "line 1 is damaged"),
        ("[3]", "line 1 has no 'iteration'"),
        ('{"iteration": -4}', "line 1 has no 'iteration'"),
    ):
        (run / "metrics.json").write_text(line + "\n")
        assert f"metrics.json: {words}" in refusal(run)
    (run / "metrics.json").unlink()
    assert "has neither metrics.json nor evaluation.json" in refusal(run)
    (run / "evaluation.json").write_text("{")
    assert "evaluation.json is not valid JSON" in refusal(run)
    content = {"iteration": 3, "weights": None, "dataset": ["coco_2017_val"], "metrics": {"bbox/AP": "hi"}}
    (run / "evaluation.json").write_text(json.dumps(content))
    assert "evaluation.json: bbox/AP must be a number or null, got 'hi'" in refusal(run)
    (run / "evaluation.json").write_text(json.dumps({**content, "metrics": {"bbox/AP": 10**400}}))
    assert "evaluation.json: bbox/AP must be a number or null, got 1000" in refusal(run)
    (run / "evaluation.json").write_text(json.dumps({**content, "dataset": None}))
    assert "evaluation.json is no evaluation: it has no 'dataset' of the right type" in refusal(run)
