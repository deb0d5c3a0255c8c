"""Runs of tools/train_net.py on a CPU: what resumes to the same bits, what is measured and evaluated when, what several
processes agree on, and every meta architecture from the config to the metrics."""

import argparse
import copy
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from full_disk import damage, largest_file
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils.events import EventStorage
from tiny_detectron2 import datasets, metrics, prepare

import fbn_plugin
from fbn_plugin.engine.detectron2.hooks import Evaluation
from fbn_plugin.engine.detectron2.processes import launch
from fbn_plugin.engine.detectron2.trainer import Trainer, run
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.run_info import read_run_info

pytestmark = pytest.mark.detectron2

# A few of everything that a resumed run must get right. Norms in the heads too, and frozen stages.
EVERYTHING = [
    *("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.FPN.NORM", "FBN(t_sigma=3)", "SOLVER.IMS_PER_BATCH", 2),
    *("SOLVER.MAX_ITER", 5, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 0.01),
    *("TEST.EVAL_ITERATIONS", "(1, 4)", "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 2),
    *("SOLVER.BEST_CHECKPOINT_METRIC", "bbox/AP", "NORM_STATS_PERIOD", 2),
    *("MEASURE.ACTIVATIONS.PERIOD", 3, "MEASURE.ACTIVATIONS.LAYERS", "('backbone.bottom_up.res4.0.conv1.norm[3]',)"),
]


@pytest.fixture(autouse=True)
def unregistered():
    yield
    fbn_plugin.unregister()


def train(*overrides, resume=False, stop_at=None, seed=1):
    """A run in this process; with ``stop_at``, one that is interrupted before that iteration is finished."""
    cfg = prepare(*overrides, "SEED", seed, resume=resume)
    step = Trainer.run_step

    def run_step(self):
        if self.iter == stop_at:
            raise KeyboardInterrupt
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run_step", run_step)
        arguments = argparse.Namespace(eval_only=False, resume=resume, log_period=1, imports=[])
        if stop_at is None:
            run(cfg, arguments)
        else:
            with pytest.raises(KeyboardInterrupt):
                run(cfg, arguments)
    return cfg


def checkpoint(folder, name="model_final"):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def assert_same_weights(a, b):
    a, b = a["model"], b["model"]
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def without_times(rows):
    """Rows of metrics.json, without what a clock says."""
    return [{k: v for k, v in row.items() if "time" not in k and "eta" not in k} for row in rows]


@pytest.fixture(scope="module")
def resumed(shapes, tmp_path_factory):
    """A run with a seed of its own drawing that was interrupted after a checkpoint, and resumed."""
    out = tmp_path_factory.mktemp("resumed")
    arguments = [*datasets(shapes, 2), "OUTPUT_DIR", out, *EVERYTHING]
    train(*arguments, stop_at=3, seed=-1)
    assert max(row["iteration"] for row in metrics(out)) >= 2
    train(*arguments, resume=True, seed=-1)
    return out


@pytest.fixture(scope="module")
def undisturbed(shapes, resumed, tmp_path_factory):
    """The same run, never stopped."""
    out = tmp_path_factory.mktemp("undisturbed")
    train(*datasets(shapes, 2), "OUTPUT_DIR", out, *EVERYTHING, seed=checkpoint(resumed)["trainer"]["seed"])
    return out


# --- resumption, evaluation, measurement -----------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits(resumed, undisturbed):
    assert_same_weights(checkpoint(resumed), checkpoint(undisturbed))
    assert_same_weights(checkpoint(resumed, "model_best"), checkpoint(undisturbed, "model_best"))


def test_a_resumed_run_leaves_the_same_metrics(resumed, undisturbed):
    theirs, ours = without_times(metrics(undisturbed)), without_times(metrics(resumed))
    assert [row["iteration"] for row in ours] == [0, 1, 2, 3, 4]
    assert json.dumps(ours) == json.dumps(theirs)  # as text: NaN is not equal to itself


def test_evaluations_stand_at_their_iterations(undisturbed):
    rows = metrics(undisturbed)
    assert [row["iteration"] for row in rows if "bbox/AP" in row] == [0, 3, 4]
    assert [row["iteration"] for row in rows if "segm/AP" in row] == [0, 3, 4]
    assert (undisturbed / "inference" / "coco_instances_results.json").is_file()
    assert not (undisturbed / "inference.tmp").exists()


def test_the_best_model_is_kept(undisturbed):
    best = checkpoint(undisturbed, "model_best")
    values = {row["iteration"]: row["bbox/AP"] for row in metrics(undisturbed) if "bbox/AP" in row}
    assert best["metric"] == "bbox/AP" and best["value"] == max(values.values())
    assert values[best["iteration"]] == best["value"]
    assert (undisturbed / "last_checkpoint").read_text() == "model_final.pth"


def test_filtered_shares(undisturbed):
    rows = {row["iteration"]: row for row in metrics(undisturbed)}
    measured = [number for number, row in rows.items() if "filtered/mean" in row]
    assert measured == [1, 3]
    shares = {name: value for name, value in rows[3].items() if name.startswith("filtered/")}
    assert 0 < shares.pop("filtered/mean") < 0.5
    assert all(0 <= share < 0.5 for share in shares.values())
    assert "filtered/backbone.fpn_lateral2.norm" in shares and "filtered/backbone.bottom_up.res3.0.conv1.norm" in shares
    assert not any("stem" in name or "res2" in name for name in shares)  # frozen


def test_activations(undisturbed):
    rows = {row["iteration"]: row for row in metrics(undisturbed)}
    name = "activations/backbone.bottom_up.res4.0.conv1.norm[3]/q"
    assert [number for number, row in rows.items() if f"{name}50" in row] == [2]
    levels = [rows[2][f"{name}{level}"] for level in (0, 25, 50, 75, 100)]
    assert levels == sorted(levels) and levels[0] < -1 < 1 < levels[-1]


def test_population_statistics_of_all_but_frozen_norms(undisturbed, shapes):
    """What the checkpoint holds is not the moving average, but follows from weights, seed and iteration; neither that
    nor an evaluation draws from the generators that training draws from."""
    saved = checkpoint(undisturbed)["model"]
    frozen = [name for name in saved if "running_mean" in name and ("stem" in name or "res2" in name)]
    assert frozen and all((saved[name] == 0).all() for name in frozen)
    cfg = prepare(*datasets(shapes, 2), *EVERYTHING, "OUTPUT_DIR", undisturbed / "again")
    fbn_plugin.register()
    trainer = Trainer(cfg)
    trainer.seed = checkpoint(undisturbed)["trainer"]["seed"]
    trainer.checkpointer.load(str(undisturbed / "model_final.pth"), checkpointables=[])
    model = trainer.bare_model.train()
    for name, buffer in model.named_buffers():
        if "running_mean" in name and name not in frozen:
            buffer.fill_(7)
    trainer.iter = cfg.SOLVER.MAX_ITER - 1
    found = {type(hook).__name__: hook for hook in trainer._hooks}
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with EventStorage() as trainer.storage:
        found["PopulationStatistics"].after_step()
        found["Evaluation"].before_train()
        found["Evaluation"].after_step()
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    for name, value in model.state_dict().items():
        if "running_mean" in name and "roi_heads" not in name:
            assert torch.equal(value, saved[name]), name


def test_run_info(undisturbed, shapes):
    info = read_run_info(undisturbed)
    assert (info["engine"], info["processes"], info["images_per_batch"]) == ("detectron2", 1, 2)
    assert info["train_images"] == {f"{shapes}:train": 7}  # one has no object
    assert info["test_images"] == {f"{shapes}:val": 4}
    assert "norms: " in (log := (undisturbed / "log.txt").read_text()) and ", 0 BN\n" in log


def test_what_a_resumed_run_may_change(undisturbed, shapes, capsys):
    arguments = [*datasets(shapes, 2), "OUTPUT_DIR", undisturbed, *EVERYTHING]
    seed = checkpoint(undisturbed)["trainer"]["seed"]
    for change, words in {
        ("SOLVER.BASE_LR", 0.5): "SOLVER.BASE_LR must be 0.01 as in the run .*, got 0.5",
        ("MODEL.FPN.NORM", "BN"): "MODEL.FPN.NORM must be 'FBN.t_sigma=3.' as in the run .*, got 'BN'",
        ("SOLVER.MAX_ITER", 4): "SOLVER.MAX_ITER must be enough for the 5 iterations .*, got 4",
    }.items():
        with pytest.raises(ValueError, match=words):
            prepare(*arguments, "SEED", seed, *change, resume=True)
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        prepare(*arguments, "SEED", seed)


def test_an_evaluation_that_was_prevented_is_made_up_for(undisturbed, shapes, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    rows = [row for row in metrics(out) if row["iteration"] < 4]
    last = {k: v for k, v in metrics(out)[-1].items() if "/AP" not in k}
    (out / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in [*rows, last]) + '{"iteration": 4, "b')
    # As a run leaves it that was to evaluate elsewhere: without population statistics.
    state = checkpoint(undisturbed)
    for name, buffer in state["model"].items():
        if "running_mean" in name and any(part in name for part in ("res3", "res4", "res5", "fpn")):
            buffer.fill_(7)
    torch.save(state, out / "model_final.pth")
    seed, evaluated = state["trainer"]["seed"], []
    evaluate = Trainer.evaluate

    def look(cfg, model, **options):
        evaluated.append(copy.deepcopy(model.state_dict()))
        return evaluate(cfg, model, **options)

    monkeypatch.setattr(Trainer, "evaluate", staticmethod(look))
    train(*datasets(shapes, 2), *EVERYTHING, "OUTPUT_DIR", out, resume=True, seed=seed)
    assert len(evaluated) == 1
    assert_same_weights({"model": evaluated[0]}, checkpoint(undisturbed))
    made_up = metrics(out)[-1]
    assert made_up["iteration"] == 4
    assert json.dumps(made_up["segm/AP"]) == json.dumps(metrics(undisturbed)[-1]["segm/AP"])
    assert [row["iteration"] for row in metrics(out)] == [0, 1, 2, 3, 4, 4]


def test_results_that_are_not_the_expected_ones_are_kept(shapes, tmp_path):
    expected = ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.1]]", "SOLVER.BEST_CHECKPOINT_METRIC", "bbox/AP"]
    with pytest.raises(SystemExit) as exit:
        train(*datasets(shapes, 2), *EVERYTHING, *expected, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path)
    assert exit.value.code == 1 and "bbox/AP" in metrics(tmp_path)[-1]
    assert (tmp_path / "inference/coco_instances_results.json").exists() and (tmp_path / "model_best.pth").exists()
    assert not (tmp_path / "inference.tmp").exists()


def test_an_error_before_the_first_iteration_is_not_hidden(undisturbed, shapes, tmp_path, monkeypatch):
    def fail(hook):
        raise UserError("so")

    monkeypatch.setattr(Evaluation, "before_train", fail)
    trainer = Trainer(prepare(*datasets(shapes, 2), *EVERYTHING, "OUTPUT_DIR", tmp_path))
    with pytest.raises(UserError, match="^so$"):
        trainer.train()


def test_damaged_and_foreign_files_of_a_run(undisturbed, shapes, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    arguments = [*datasets(shapes, 2), *EVERYTHING, "OUTPUT_DIR", out, "SEED", checkpoint(out)["trainer"]["seed"]]
    (out / "model_best.pth").write_bytes(b"half")
    with pytest.raises(ValueError, match="model_best.pth cannot be read"):
        prepare(*arguments, resume=True)
    (out / "model_best.pth").unlink()
    state = checkpoint(out)
    del state["random"], state["trainer"]["seed"]
    torch.save(state, out / "model_final.pth")
    with pytest.raises(ValueError, match="model_final.pth is not of a run of this tool"):
        prepare(*arguments, resume=True)


def test_clipped_gradients_and_no_running_statistics(undisturbed, shapes, tmp_path):
    """Group norms have no population statistics; and clipping changes where the run goes."""
    common = ["MODEL.RESNETS.NORM", "GN(num_groups=4)", "MODEL.FPN.NORM", "FGN(num_groups=4)", "SOLVER.MAX_ITER", 2]
    common += ["TEST.EVAL_ITERATIONS", "()", "DATASETS.TEST", "()", "SOLVER.BEST_CHECKPOINT_METRIC", ""]
    clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-3]
    ends = []
    for name, overrides in {"plain": [], "clipped": clip}.items():
        train(*datasets(shapes, 2), *EVERYTHING, *common, *overrides, "OUTPUT_DIR", tmp_path / name)
        ends.append(checkpoint(tmp_path / name)["model"])
    moved = [max((ends[0][name] - end).abs().max() for name, end in ends[1].items() if end.is_floating_point())]
    assert 0 < moved[0] < 10
    assert not any("running" in name for name in ends[0] if "stem" not in name and "res2" not in name)


def test_the_linear_rule(shapes, tmp_path):
    common = [
        *datasets(shapes, 2),
        "OUTPUT_DIR",
        tmp_path,
        "SOLVER.REFERENCE_WORLD_SIZE",
        8,
        "SOLVER.IMS_PER_BATCH",
        16,
    ]
    common += ["SOLVER.MAX_ITER", 100, "SOLVER.STEPS", "(60, 80)", "SOLVER.WARMUP_ITERS", 10, "SOLVER.BASE_LR", 0.02]
    common += ["TEST.EVAL_PERIOD", 50, "TEST.EVAL_ITERATIONS", "(10, 20, 100)", "SOLVER.CHECKPOINT_PERIOD", 30]
    cfg = prepare(*common, num_gpus=2)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.REFERENCE_WORLD_SIZE) == (4, 0.005, 2)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD) == (400, (240, 320), 40, 120)
    assert (cfg.TEST.EVAL_PERIOD, cfg.TEST.EVAL_ITERATIONS) == (200, (40, 80, 400))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    (tmp_path / "last_checkpoint").write_text("gone.pth")
    with pytest.raises(FileNotFoundError, match="gone.pth"):  # all settings fit
        prepare(*common, num_gpus=2, resume=True)
    with pytest.raises(ValueError, match="made by 2 processes, got 4"):
        prepare(*common, num_gpus=4, resume=True)


# --- full disks, damaged checkpoints ---------------------------------------------------------------------------------

UNEVALUATED = ["DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 2]


@pytest.fixture(scope="module")
def short(shapes, tmp_path_factory):
    """A run of four iterations."""
    out = tmp_path_factory.mktemp("short")
    train(*datasets(shapes, 2), *UNEVALUATED, "SOLVER.MAX_ITER", 4, "OUTPUT_DIR", out)
    return out


def goes_on(shapes, out, resume=True, **options):
    return train(*datasets(shapes, 2), *UNEVALUATED, "SOLVER.MAX_ITER", 6, "OUTPUT_DIR", out, resume=resume, **options)


def test_a_full_disk_and_damaged_checkpoints(shapes, short, tmp_path, capsys):
    for name in ("whole", "full"):
        shutil.copytree(short, tmp_path / name)
    goes_on(shapes, tmp_path / "whole")
    full = tmp_path / "full"
    before = {path.name: path.read_bytes() for path in full.glob("*.pth")}
    for size, file in ((0, "log.txt"), (1_000_000, "model_0000005.pth")):
        with pytest.raises(SystemExit) as stop, largest_file(size):
            goes_on(shapes, full)
        said = capsys.readouterr()
        assert stop.value.code == 1 and f"error: {full}/{file} cannot be written: File too large\n" in said.err
        assert "Traceback" not in said.err + said.out
        assert {path.name: path.read_bytes() for path in full.glob("*.pth")} == before
        assert not list(full.rglob("*.tmp"))

    damage(full / "model_final.pth", full / "model_0000003.pth")
    advice = f"model_final.pth cannot be read.* --resume auto continues from {full}/model_0000001.pth"
    with pytest.raises(ValueError, match=advice):
        goes_on(shapes, full)
    goes_on(shapes, full, resume="auto")
    assert f"continuing from {full}/model_0000001.pth" in (full / "log.txt").read_text()
    assert_same_weights(checkpoint(full), checkpoint(tmp_path / "whole"))
    assert [row["iteration"] for row in metrics(full)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("way", "value", "words"),
    [
        (["trainer"], [], "it has no iteration"),
        (["trainer", "seed"], "one", "seed must be a whole number"),
        (["trainer", "_trainer"], [], "its trainer does not fit this run"),
        (["trainer", "_trainer", "optimizer", "param_groups"], [], "trainer does not fit this run: its groups have"),
        (["trainer", "hooks"], {}, "hooks has no LRScheduler"),
        (["trainer", "hooks", "LRScheduler", "last_epoch"], "3", "last_epoch must be a whole number"),
        (["random"], {"ranks": [3]}, "its random does not fit this run"),
        (["loss_normalizer"], {"ranks": ["much"]}, "its loss_normalizer does not fit this run"),
        (["iteration"], True, "iteration must be a whole number"),
    ],
)
def test_states_of_another_kind(shapes, short, tmp_path, capsys, way, value, words):
    out = tmp_path / "run"
    shutil.copytree(short, out)
    content = checkpoint(out)
    place = content
    for part in way[:-1]:
        place = place[part]
    place[way[-1]] = value
    torch.save(content, out / "model_final.pth")
    config = (out / "config.yaml").read_bytes()
    with pytest.raises((ValueError, SystemExit)) as error:
        goes_on(shapes, out)
    said = capsys.readouterr().err if isinstance(error.value, SystemExit) else str(error.value)
    assert words in said and f"checkpoint {out}/model_final.pth" in said
    assert (out / "config.yaml").read_bytes() == config


# --- several processes -----------------------------------------------------------------------------------------------

TWO = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.BASE_LR", 0.01]
TWO += ["MODEL.RESNETS.NORM", "FBN(t_sigma=3)", "MODEL.FPN.NORM", "FBN(t_sigma=3)", "NORM_STATS_PERIOD", 4]


def observed_and_killed(cfg, killed_cfg, arguments):
    """In one of several processes: a run that writes down whether they agree on weights and statistics, in training and
    in evaluation; and one whose second process is killed in its fourth iteration."""
    evaluate, step = Trainer.evaluate, Trainer.run_step
    seen = {}

    def look(model, when):
        for what, mark in {"statistics": "running", "weights": "weight"}.items():
            total = sum(v.double().sum().item() for name, v in model.state_dict().items() if mark in name)
            seen[f"{what} in {when}"] = distributed.all_gather(total)

    def observed_step(self):
        step(self)
        look(self.bare_model, "training")

    def observed_evaluate(cfg, model, **options):
        look(model, "evaluation")
        if distributed.is_main():
            with open(os.path.join(cfg.OUTPUT_DIR, "seen.json"), "w") as file:
                json.dump(seen, file)
        return evaluate(cfg, model, **options)

    def killed_step(self):
        if self.iter == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    Trainer.run_step, Trainer.evaluate = observed_step, staticmethod(observed_evaluate)
    run(cfg, arguments)
    Trainer.run_step = killed_step
    run(killed_cfg, arguments)


def test_two_processes_a_killed_one_and_its_resumption(shapes, tmp_path, capfd):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def config(out, resume=False):
        return prepare(*datasets(shapes, 2), *TWO, "OUTPUT_DIR", out, num_gpus=2, resume=resume)

    arguments = argparse.Namespace(eval_only=False, resume=False, log_period=1, imports=[])
    with pytest.raises(SystemExit) as exit:
        both = config(undisturbed), config(killed)
        launch(observed_and_killed, (*both, arguments), 2, device="cpu", folder=str(killed))
    assert exit.value.code == 1
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "Traceback" not in said, said
    assert "process 1 of 2 was killed by SIGKILL" in errors[0] and "--resume continues from the last" in errors[0]
    assert not list(killed.rglob("*.tmp")) and not (killed / "model_final.pth").exists()
    assert (killed / "last_checkpoint").read_text() == "model_0000001.pth"

    seen = json.loads((undisturbed / "seen.json").read_text())
    assert {what: values[0] == values[1] for what, values in seen.items()} == {
        "statistics in training": False,  # of each process's own images
        "weights in training": True,
        "statistics in evaluation": True,
        "weights in evaluation": True,
    }
    rows = metrics(undisturbed)
    assert "filtered/mean" in rows[-1] and "bbox/AP" in rows[-1]
    assert read_run_info(undisturbed)["processes"] == 2

    arguments.resume = True
    launch(run, (config(killed, resume=True), arguments), 2, device="cpu", folder=str(killed))
    assert_same_weights(checkpoint(killed), checkpoint(undisturbed))
    assert json.dumps(without_times(metrics(killed))) == json.dumps(without_times(rows))


# --- meta architectures ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keypoints(shapes):
    """Names of two sets of people of 17 points."""
    rng = np.random.default_rng(0)
    points = [f"point{number}" for number in range(17)]
    names = []
    for split in ("train", "val"):
        content = json.loads((shapes / "annotations" / f"instances_{split}.json").read_text())
        content["info"] = {}
        content["categories"] = [{"id": 1, "name": "person", "keypoints": points, "skeleton": []}]
        for each in content["annotations"]:
            x, y, w, h = each["bbox"]
            xy = rng.integers((x, y), (x + w, y + h), (17, 2))
            each.update(id=each["id"] + 1, category_id=1, num_keypoints=17)
            each["keypoints"] = np.insert(xy, 2, 2, axis=1).flatten().tolist()
        file = shapes / f"people_{split}.json"
        file.write_text(json.dumps(content))
        metadata = {"thing_classes": ["person"], "keypoint_names": points, "keypoint_flip_map": []}
        register_coco_instances(f"people_{split}", metadata, str(file), str(shapes / split))
        names.append(f"people_{split}")
    return names


@pytest.fixture(scope="module")
def panoptic(shapes):
    """Names of two sets with a semantic map of three classes beside the objects."""
    names = []
    for split in ("train", "val"):
        file = shapes / "annotations" / f"instances_{split}.json"
        maps = shapes / f"panoptic_{split}.json"
        images = json.loads(file.read_text())["images"]
        categories = [{"id": number, "name": str(number), "isthing": 0} for number in range(3)]
        segments = [{"id": 1, "category_id": 1, "iscrowd": 0}]
        annotations = [
            {"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments} for image in images
        ]
        maps.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        for image in images:
            map_ = np.zeros((image["height"], image["width"]), np.uint8)
            map_[:, ::2] = 1
            (shapes / f"maps_{split}").mkdir(exist_ok=True)
            Image.fromarray(map_).save(shapes / f"maps_{split}" / image["file_name"])

        def load(file=file, split=split):
            found = load_coco_json(str(file), str(shapes / split))
            labels = {3: 0, 7: 1}
            for image in found:
                name = os.path.basename(image["file_name"])
                image["sem_seg_file_name"] = str(shapes / f"maps_{split}" / name)
                for each in image["annotations"]:
                    each["category_id"] = labels[each["category_id"]]
            return found

        name = f"panoptic_{split}"
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(
            json_file=str(file),
            panoptic_json=str(maps),
            panoptic_root=str(shapes / f"maps_{split}"),
            sem_seg_root=str(shapes / f"maps_{split}"),
            evaluator_type="coco_panoptic_seg",
            thing_classes=["disc", "box"],
            stuff_classes=["things", "even", "odd"],
            thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
            stuff_dataset_id_to_contiguous_id={0: 0, 1: 1, 2: 2},
            ignore_label=255,
        )
        names.append(name)
    return names


def named(train, test):
    return ["DATASETS.TRAIN", f"('{train}',)", "DATASETS.TEST", f"('{test}',)"]


SHORT = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "TEST.PRECISE_BN.ENABLED", True]
SHORT += ["TEST.PRECISE_BN.NUM_ITER", 1, "SOLVER.BASE_LR", 0.001]
CASCADE = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]
CASCADE += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 50]
RETINANET = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
RETINANET += ["MODEL.RESNETS.OUT_FEATURES", "['res3','res4','res5']", "MODEL.FPN.IN_FEATURES", "['res3','res4','res5']"]
RETINANET += [
    "MODEL.RETINANET.NUM_CLASSES",
    2,
    "MODEL.RETINANET.NORM",
    "FBN(t_sigma=4)",
    "MODEL.RETINANET.NUM_CONVS",
    1,
]


def test_faster_rcnn_on_two_test_sets(shapes, tmp_path):
    sets = [*named(f"{shapes}:train", f"{shapes}:val"), "DATASETS.TEST", f"('{shapes}:val', '{shapes}:train')"]
    best = ["SOLVER.BEST_CHECKPOINT_METRIC", f"{shapes}:train/bbox/AP", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
    augmented = ["TEST.AUG.ENABLED", True, "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", 96]
    train(*sets, *best, *SHORT, *augmented, "MODEL.MASK_ON", False, "OUTPUT_DIR", tmp_path)
    found = {name for name in metrics(tmp_path)[-1] if name.endswith("/AP")}
    assert found == {f"{shapes}:{part}/{task}/AP" for part in ("val", "train") for task in ("bbox", "bbox_TTA")}
    files = sorted((tmp_path / "inference").glob("*/coco_instances_results.json"))
    assert [file.parent.name.rpartition("_")[2] for file in files] == ["train", "val"]
    with pytest.raises(ValueError, match="METRIC must be one of .*:val/bbox/AP, .*got 'bbox/AP'"):
        prepare(*sets, *best, "SOLVER.BEST_CHECKPOINT_METRIC", "bbox/AP", "MODEL.MASK_ON", False)


def test_cascade_rcnn(shapes, tmp_path):
    train(*datasets(shapes, 2), *SHORT, *CASCADE, "OUTPUT_DIR", tmp_path)
    assert {"loss_cls_stage2", "loss_mask", "bbox/AP", "segm/AP"} <= metrics(tmp_path)[-1].keys()


def test_retinanet_with_statistics_of_each_level(shapes, tmp_path):
    """And resumed to the same bits, with another number of workers and without groups of like images."""
    arguments = [*datasets(shapes, 2), *SHORT, *RETINANET, "SOLVER.CHECKPOINT_PERIOD", 1]
    arguments += ["DATALOADER.ASPECT_RATIO_GROUPING", False]
    train(*arguments, "OUTPUT_DIR", tmp_path / "a")
    train(*arguments, "OUTPUT_DIR", tmp_path / "b", stop_at=1)
    train(*arguments, "OUTPUT_DIR", tmp_path / "b", "DATALOADER.NUM_WORKERS", 1, resume=True)
    assert_same_weights(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    state = checkpoint(tmp_path / "a")["model"]
    means = [state[f"head.cls_subnet.1.{level}.running_mean"] for level in range(5)]
    assert not any(torch.equal(means[0], mean) for mean in means[1:])
    assert all(state[f"head.cls_subnet.1.{level}.num_batches_tracked"] == 2 for level in range(5))
    assert "bbox/AP" in metrics(tmp_path / "a")[-1]


def test_a_head_shared_between_levels(shapes, tmp_path):
    """A norm that is used at five levels: its population statistics are over all of them."""
    shared = ["MODEL.RETINANET.NORM", "ScaledBN-A1", "NORM_STATS_PERIOD", 1]
    train(*datasets(shapes, 2), *SHORT, *RETINANET, *shared, "OUTPUT_DIR", tmp_path)
    state = checkpoint(tmp_path)["model"]
    assert state["head.cls_subnet.1.num_batches_tracked"] == 10
    assert (state["head.cls_subnet.1.running_var"] != 1).all()


def test_keypoints(keypoints, tmp_path):
    model = ["MODEL.MASK_ON", False, "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1]
    model += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)", "SOLVER.BEST_CHECKPOINT_METRIC", "keypoints/AP"]
    train(*named(*keypoints), *SHORT, *model, "OUTPUT_DIR", tmp_path)
    last = metrics(tmp_path)[-1]
    assert {"loss_keypoint", "bbox/AP", "keypoints/AP", "keypoints/APl"} <= last.keys()
    with pytest.raises(ValueError, match="ROI_KEYPOINT_HEAD.NUM_KEYPOINTS must be 17, .*'people_train', got 5"):
        prepare(*named(*keypoints), *model, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5)
    with pytest.raises(ValueError, match="TEST.KEYPOINT_OKS_SIGMAS must be a list of 17, got .0.1, 0.2."):
        prepare(*named(*keypoints), *model, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.2]")


def test_panoptic(panoptic, tmp_path, capfd):
    model = ["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.ROI_HEADS.NUM_CLASSES", 2, "INPUT.MASK_FORMAT", "bitmask"]
    model += ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.SEM_SEG_HEAD.NORM", "FBN", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8]
    train(*named(*panoptic), *SHORT, *model, "OUTPUT_DIR", tmp_path)
    assert {"loss_sem_seg", "bbox/AP", "segm/AP", "sem_seg/mIoU"} <= metrics(tmp_path)[-1].keys()
    try:
        import panopticapi  # noqa: F401
    except ImportError:
        assert "panopticapi is not installed" in capfd.readouterr().out
    else:
        assert "panoptic_seg/PQ" in metrics(tmp_path)[-1]
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
        best = ["SOLVER.BEST_CHECKPOINT_METRIC", "sem_seg/foo", "SOLVER.MAX_ITER", 1]
        train(*named(*panoptic), *SHORT, *model, *best, "OUTPUT_DIR", tmp_path / "foo")
    said = capfd.readouterr().err
    assert (
        exit.value.code == 2
        and "BEST_CHECKPOINT_METRIC must be " in said
        and "sem_seg/mIoU, " in said
        and "got 'sem_seg/foo'" in said
    )
    with pytest.raises(ValueError, match="SEM_SEG_HEAD.NUM_CLASSES must be 3, .*'panoptic_train' .*, got 54"):
        prepare(*named(*panoptic), *model, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 54)
