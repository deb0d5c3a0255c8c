"""tools/evaluate.py: the figures of a run from its weights and from its detections, and what is refused."""

import contextlib
import fcntl
import importlib.util
import io
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from full_disk import damage, largest_file
from pycocotools import mask as mask_utils
from pycocotools.cocoeval import COCOeval

from fbn_plugin.engine.data.coco_eval import evaluate_coco
from fbn_plugin.engine.data.named_sets import resolve_dataset

ROOT = Path(__file__).parents[2]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULTS = Path("inference", "coco_instances_results.json")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "run")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def found(trained_run, shapes, tmp_path_factory):
    """A set whose objects are what the run detects on ``shapes``, shifted by a pixel: with the run's few iterations no
    other gives it an AP above 0. And the run's figures on it, from the detections that the training wrote."""
    folder = tmp_path_factory.mktemp("found")
    shutil.copytree(shapes / "val", folder / "val")
    truth = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    results = json.loads((trained_run / RESULTS).read_text())
    truth["annotations"] = []
    for number, each in enumerate(results[::2]):
        x, y, width, height = each["bbox"]
        mask = each["segmentation"]
        box = [x + 1, y, width, height]
        annotation = {"id": number, "bbox": box, "area": width * height, "iscrowd": 0, "segmentation": mask}
        truth["annotations"].append({**annotation, "image_id": each["image_id"], "category_id": each["category_id"]})
    (folder / "instances_val.json").write_text(json.dumps(truth))
    data = resolve_dataset(f"{folder}:val")
    metrics = evaluate_coco(data, results)
    assert 5 < metrics["bbox/AP"] < 95 and 5 < metrics["segm/AP"] < 95
    return data.name, metrics


def test_weights_give_the_figures_of_the_run(tool, run, found, capsys):
    name, figures = found
    before = content(run)
    metrics = tool.main([str(run), "--dataset", name])
    assert metrics[name] == pytest.approx(figures, nan_ok=True)
    written = json.loads((run / "evaluation.json").read_text())
    known = {key: None if math.isnan(value) else value for key, value in figures.items()}
    assert written["metrics"] == pytest.approx(known)
    assert (written["iteration"], written["weights"]) == (3, str(run / "model_final.pth"))
    assert written["dataset"] == [name] and written["hardware"]
    (run / "evaluation.json").unlink()
    assert content(run) == before

    printed = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"]
    assert table[0] == ["task", *METRICS] and [row[0] for row in table[2:]] == ["bbox", "segm"]
    shown = [f"{figures[f'segm/{name}']:.2f}" for name in METRICS]
    assert table[3][1:] == ["-" if each == "nan" else each for each in shown]


def test_an_earlier_checkpoint_on_two_sets(tool, run, found, shapes, tmp_path, capsys):
    names = [found[0], f"{shapes}:train"]
    output = tmp_path / "out.json"
    metrics = tool.main([str(run), "--weights", "model_0000001.pth", "--dataset", *names, "--output", str(output)])
    assert list(metrics) == names
    assert metrics[names[0]]["bbox/AP"] < found[1]["bbox/AP"]  # not of the weights that found these objects
    printed = capsys.readouterr().out
    assert all(f"\n{name} ({run / 'model_0000001.pth'}, 2 iterations)" in printed for name in names)
    written = json.loads(output.read_text())
    assert written["dataset"] == names and written["iteration"] == 1
    assert written["metrics"][f"{names[0]}/bbox/AP"] == metrics[names[0]]["bbox/AP"]
    assert not (run / "evaluation.json").exists()


def test_without_a_final_model_the_last_checkpoint(tool, run, capsys):
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000001.pth")
    tool.main([str(run)])
    assert json.loads((run / "evaluation.json").read_text())["weights"] == str(run / "model_0000001.pth")


def test_weights_between_two_evaluations(tool, run, capsys):
    """They have running averages of training where the run's own evaluations have population statistics; without
    MODEL.DEVICE in its config, the run is evaluated where it can be."""
    config = run / "config.yaml"
    text = config.read_text().replace("  DEVICE: cpu\n", "")
    config.write_text(text.replace("    ENABLED: false\n    NUM_ITER", "    ENABLED: true\n    NUM_ITER"))
    assert "DEVICE" not in config.read_text() and "ENABLED: true" in config.read_text()
    state = torch.load(run / "model_0000001.pth")
    for iteration, noted in {1: False, 2: True}.items():
        torch.save({"model": state["model"], "iteration": iteration}, run / "between.pth")
        tool.main([str(run), "--weights", "between.pth"])
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(notes) == noted
    sentence = "no evaluation after 3 iterations, so these weights hold the running averages of training, not the"
    assert sentence in notes[0]
    config.write_text(text)
    tool.main([str(run), "--weights", "between.pth"])
    assert "note: " not in capsys.readouterr().out


def jittered(data):
    """The objects of a set moved by two pixels, with scores that differ; some missed, some false."""
    results = []
    for number, each in enumerate(data.annotations[1:]):
        x, y, width, height = each["bbox"]
        x, y = max(0, x - 2), max(0, y - 2)
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        size = next((i["height"], i["width"]) for i in data.images if i["id"] == each["image_id"])
        rle = mask_utils.merge(mask_utils.frPyObjects([corners], *size))
        results.append(
            {
                "image_id": each["image_id"],
                "category_id": data.category_ids[0] if number % 4 == 0 else each["category_id"],
                "bbox": [x, y, width, height],
                "score": 0.9 - 0.05 * (number % 7),
                "segmentation": {"size": list(size), "counts": rle["counts"].decode()},
            }
        )
    return results


@pytest.fixture
def detections(shapes, tmp_path):
    data = resolve_dataset(f"{shapes}:train")
    path = tmp_path / "detections.json"
    path.write_text(json.dumps(jittered(data)))
    return data, path


def test_detections_of_anyone(tool, detections, tmp_path):
    """Without a run; the same figures as pycocotools' own summary."""
    data, path = detections
    metrics = tool.main(["--results", str(path), "--dataset", data.name, "--output", str(tmp_path / "ap.json")])[
        data.name
    ]
    for task in ("bbox", "segm"):
        truth = data.coco_api(masks=True)
        drop = "segmentation" if task == "bbox" else "bbox"
        with contextlib.redirect_stdout(io.StringIO()):
            loaded = truth.loadRes(
                [{k: v for k, v in each.items() if k != drop} for each in json.loads(path.read_text())]
            )
            evaluation = COCOeval(truth, loaded, task)
            evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
        theirs = [100 * value if value > -1 else math.nan for value in evaluation.stats[:6]]
        assert [metrics[f"{task}/{name}"] for name in METRICS] == pytest.approx(theirs, nan_ok=True)
        assert 5 < metrics[f"{task}/AP"] < 95
    written = json.loads((tmp_path / "ap.json").read_text())
    assert written["results"] == str(path) and written["weights"] is None and written["iteration"] is None
    assert written["metrics"]["bbox/AP"] == metrics["bbox/AP"] and written["metrics"]["bbox/APl"] is None


@pytest.mark.detectron2
def test_detections_as_detectron2_scores_them(tool, detections, tmp_path):
    evaluation = pytest.importorskip("detectron2.evaluation", reason="detectron2 is not installed")
    from detectron2.data import MetadataCatalog

    data, path = detections
    metrics = tool.main(["--results", str(path), "--dataset", data.name])[data.name]
    api = data.coco_api(masks=True)
    (tmp_path / "truth.json").write_text(json.dumps(api.dataset))
    MetadataCatalog.get("shapes of a test").set(json_file=str(tmp_path / "truth.json"))
    try:
        evaluator = evaluation.COCOEvaluator("shapes of a test", distributed=False, use_fast_impl=False)
        evaluator.reset()
        evaluator._predictions = [{"image_id": 0, "instances": json.loads(path.read_text())}]
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = evaluator.evaluate()
    finally:
        MetadataCatalog.remove("shapes of a test")
    for task in ("bbox", "segm"):
        ours = {name: metrics[f"{task}/{name}"] for name in METRICS}
        assert ours == pytest.approx({name: theirs[task][name] for name in METRICS}, nan_ok=True)


def test_detections_of_a_run(tool, run, found, shapes):
    """The ground truth is the config's if no other is named; nothing detected is an AP of 0 for masks too."""
    name, figures = found
    metrics = tool.main([str(run), "--results", str(run / RESULTS), "--dataset", name])
    assert metrics[name] == pytest.approx(figures, nan_ok=True)
    (run / RESULTS).write_text("[]")
    metrics = tool.main([str(run), "--results", str(run / RESULTS)])[f"{shapes}:val"]
    assert metrics["bbox/AP"] == metrics["segm/AP"] == 0


@pytest.mark.detectron2
def test_a_run_of_detectron2(tool, shapes, tmp_path, capfd):
    """Its tool evaluates, in a process of its own; weights that do not fit are refused before."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.config import get_cfg

    import fbn_plugin
    from fbn_plugin.engine.detectron2.config import add_config
    from fbn_plugin.engine.detectron2.model import build_model

    cfg = get_cfg()
    add_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "Demo" / "mask_rcnn_R_18_FPN_FBN.yaml"))
    small = ["MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    small += ["MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list([*small, "DATASETS.TEST", (f"{shapes}:val",), "TEST.DETECTIONS_PER_IMAGE", 20])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(cfg.dump())
    fbn_plugin.register()
    try:
        weights = build_model(cfg).state_dict()
        torch.save({"model": weights, "iteration": 6}, run / "model_final.pth")
        metrics = tool.main([str(run)])[f"{shapes}:val"]
        printed = capfd.readouterr().out
        theirs = [line.split("copypaste: ")[1] for line in printed.splitlines() if "copypaste: " in line]
        for task, row in (("bbox", theirs[2]), ("segm", theirs[5])):
            assert row == ",".join(f"{metrics[f'{task}/{name}']:.4f}" for name in METRICS)
        assert f"{shapes}:val ({run / 'model_final.pth'}, 7 iterations)" in printed
        assert {path.name for path in run.iterdir()} == {"config.yaml", "model_final.pth", "evaluation.json"}

        del weights["backbone.fpn_lateral2.weight"]
        torch.save({"model": weights}, tmp_path / "other.pth")
        error = refusal(tool, capfd, run, "--weights", tmp_path / "other.pth")
        assert "other.pth is of another model" in error and "backbone.fpn_lateral2.weight" in error
    finally:
        fbn_plugin.unregister()


def refusal(tool, capture, *arguments):
    with pytest.raises(SystemExit) as exit:
        tool.main([str(each) for each in arguments])
    error = capture.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_bad_runs_and_weights(tool, run, shapes, tmp_path, capsys):
    before = content(tmp_path)
    assert f"run folder {tmp_path / 'nowhere'} is not there" in refusal(tool, capsys, tmp_path / "nowhere")
    assert "it has no config.yaml" in refusal(tool, capsys, tmp_path)
    assert "RUN_DIR is needed" in refusal(tool, capsys, "--results", run / RESULTS)
    assert "--weights" in refusal(tool, capsys, run, "--weights", "x.pth", "--results", run / RESULTS)
    assert "x.pth is not there" in refusal(tool, capsys, run, "--weights", "x.pth")
    assert "cannot be read" in refusal(tool, capsys, run, "--weights", run / "config.yaml")
    assert "my:val" in refusal(tool, capsys, run, "--dataset", "my:val")
    # First of all, before the weights that are not there.
    late = (run, "--weights", "x.pth", "--output")
    assert "no is not there" in refusal(tool, capsys, *late, tmp_path / "no" / "file.json")
    assert "it is a folder" in refusal(tool, capsys, *late, tmp_path)
    two = (run, "--results", run / RESULTS, "--dataset", f"{shapes}:val", f"{shapes}:train")
    assert "on one set" in refusal(tool, capsys, *two)
    assert content(tmp_path) == before

    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    before = content(tmp_path)
    assert "this model" in refusal(tool, capsys, run, "--weights", tmp_path / "other.pth")
    assert content(tmp_path) == before

    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("DETECTIONS_PER_IMAGE: 100", "DETECTIONS_PER_IMAGE: many"))
    error = refusal(tool, capsys, run, "--results", run / RESULTS)
    assert "config.yaml: TEST.DETECTIONS_PER_IMAGE must be an integer, got 'many'" in error

    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").unlink()
    assert "has no checkpoint" in refusal(tool, capsys, run)
    (run / "metrics.json").unlink()  # as in a folder of --eval-only
    evaluation = {"iteration": None, "weights": "there/model_final.pth", "dataset": [], "metrics": {}}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    error = refusal(tool, capsys, run)
    assert (
        "no checkpoint, as nothing was trained in it" in error and "--weights, such as there/model_final.pth" in error
    )
    (run / "config.yaml").write_text("MODEL: {ARCHITECTURE: lenet5}")
    assert "no run folder of a detector: its config.yaml has no MODEL.RESNETS.NORM" in refusal(tool, capsys, run)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("last_checkpoint", "http://localhost:9/model.pth", "last_checkpoint must hold the name of a checkpoint"),
        ("last_checkpoint", "../run/model_0000001.pth", "last_checkpoint must hold the name of a checkpoint"),
        ("last_checkpoint", "gone.pth", "gone.pth, which "),
        ("run_info.json", "[" * 100_000, "run_info.json is not valid JSON: its lists or objects are nested too deeply"),
        ("run_info.json", '{"images_per_batch": ' + "9" * 5000 + "}", "run_info.json is not valid JSON"),
        ("run_info.json", "{} " * 4_000_000, "run_info.json is 12,000,000 bytes large"),
        ("config.yaml", "\0", "config.yaml"),
    ],
)
def test_damaged_runs(tool, run, capsys, name, text, words):
    (run / "model_final.pth").unlink()
    (run / name).write_text(text)
    before = content(run)
    assert words in refusal(tool, capsys, run)
    assert content(run) == before


@pytest.mark.parametrize("iteration", [-1, True, "3", math.nan])
def test_weights_that_are_damaged_or_of_no_iteration(tool, run, capsys, iteration):
    state = torch.load(run / "model_final.pth")
    torch.save({**state, "iteration": iteration}, run / "model_final.pth")
    before = content(run)
    assert "model_final.pth: iteration must be a whole number, 0 or more" in refusal(tool, capsys, run)
    damage(run / "model_0000001.pth")
    assert "it is cut short or damaged" in refusal(tool, capsys, run, "--weights", "model_0000001.pth")
    damage(run / "model_0000001.pth")  # back again
    assert content(run) == before


def test_a_full_disk(tool, run, capsys):
    before = content(run)
    with pytest.raises(SystemExit) as exit, largest_file(100):
        tool.main([str(run), "--results", str(run / RESULTS)])
    assert exit.value.code == 1
    assert capsys.readouterr().err == f"error: {run}/evaluation.json cannot be written: File too large\n"
    assert content(run) == before


def test_a_run_that_is_training(tool, run, capsys):
    """Another process holds its folder, which this one writes its figures to all the same."""
    with (run / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        if (child := os.fork()) == 0:
            os._exit(0 if tool.main([str(run), "--results", str(run / RESULTS)]) else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert (run / "evaluation.json").is_file()


BAD_DETECTIONS = {
    "cut short": (lambda text, first: text[:-20], "cut short"),
    "no list": (lambda text, first: "{}", "list of detections"),
    "an image of another set": (lambda text, first: json.dumps([{**first, "image_id": 77}]), "such as 0, got 77"),
    "a class of another set": (lambda text, first: json.dumps([{**first, "category_id": 1}]), "such as 3, got 1"),
    "no score": (lambda text, first: json.dumps([first, {"image_id": 0, "category_id": 3}]), "number 1 lacks 'score'"),
    "a score in words": (lambda text, first: json.dumps([{**first, "score": "high"}]), "'high'"),
    "half a box": (lambda text, first: json.dumps([{**first, "bbox": [1, 2]}]), "[1, 2]"),
    "a polygon": (lambda text, first: json.dumps([{**first, "segmentation": [[0, 0, 1, 0, 1, 1]]}]), "RLE"),
    "a mask of another image": (
        lambda text, first: json.dumps([{**first, "segmentation": {**first["segmentation"], "size": [5, 5]}}]),
        "[5, 5]",
    ),
    "a mask that ends early": (
        lambda text, first: json.dumps([{**first, "segmentation": {**first["segmentation"], "counts": "5"}}]),
        "its 'counts' have runs that add up to 5",
    ),
    "a score that is no number": (lambda text, first: json.dumps([{**first, "score": float("nan")}]), "got nan"),
    "a box without end": (lambda text, first: json.dumps([{**first, "bbox": [0, 0, 10**400, 1]}]), "'bbox' must be 4"),
    "nested deeply": (lambda text, first: "[" * 100_000, "nested too deeply"),
    "a mask for one of two": (
        lambda text, first: json.dumps([first, {k: v for k, v in first.items() if k != "segmentation"}]),
        "number 1 lacks 'segmentation'",
    ),
}


@pytest.mark.parametrize("case", BAD_DETECTIONS)
def test_bad_detections(tool, detections, tmp_path, capsys, case):
    data, path = detections
    change, words = BAD_DETECTIONS[case]
    text = path.read_text()
    path.write_text(change(text, json.loads(text)[0]))
    output = tmp_path / "ap.json"
    error = refusal(tool, capsys, "--results", path, "--dataset", data.name, "--output", output)
    assert words in error and str(path) in error
    assert not output.exists()
    assert "are not there" in refusal(tool, capsys, "--results", tmp_path / "no.json", "--dataset", data.name)
