"""The set of a config: parts by class, a test set behind a held-out validation set, and files that are broken."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fbn_plugin.engine.classification.config import check_config, classification_config
from fbn_plugin.engine.classification.data import build_train_loader, build_val_loader
from fbn_plugin.engine.classification.datasets import build_data
from fbn_plugin.engine.classification.trainer import ClassificationTrainer
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.config import load_config
from fbn_plugin.engine.run.logging import TrainingLog, read_metrics

FILE = Path(__file__).parents[3] / "configs/Digits/test_resnet_FBN.yaml"
CPU = torch.device("cpu")
DIGITS = "handwritten digits (scikit-learn)"


def config(output_dir="unused", **overrides):
    flat = [x for key, value in overrides.items() for x in (key.replace("__", "."), str(value))]
    return load_config(classification_config(), FILE, [*flat, "OUTPUT_DIR", str(output_dir)])


def digits(**keys):
    return build_data(config(**{f"DATASETS__{key}": value for key, value in keys.items()}))


def pixels(images) -> list[bytes]:
    return [image.tobytes() for image, _ in images]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_a_share_of_each_class_is_held_out_and_the_sets_own_images_are_the_test_set():
    whole, data = digits(), digits(VAL_SHARE=0.1)
    assert whole.test is None and pixels(data.test) == pixels(whole.val)
    assert sorted(pixels(data.train) + pixels(data.val)) == sorted(pixels(whole.train))
    share = np.bincount(data.val.targets) / np.bincount(whole.train.targets)
    assert np.abs(share - 0.1).max() < 0.005
    assert data.title == f"{DIGITS}, {len(data.train)} of 1437 training images, {len(data.val)} held out"


def test_the_parts_follow_from_the_split_seed_and_from_seed_only_where_told():
    keys = {"DATASETS__VAL_SHARE": 0.1, "DATASETS__TRAIN_IMAGES": 100}
    first, other = build_data(config(**keys, SEED=1)), build_data(config(**keys, SEED=2))
    assert pixels(first.train) == pixels(other.train) and pixels(first.val) == pixels(other.val)
    told = [build_data(config(**keys, DATASETS__SPLIT_SEED=-1, SEED=seed)) for seed in (1, 2)]
    assert pixels(told[0].val) != pixels(told[1].val)
    assert pixels(told[0].val) == pixels(build_data(config(**keys, DATASETS__SPLIT_SEED=1)).val)


def test_parts_by_number_have_all_classes_and_are_said():
    data = digits(TRAIN_IMAGES=50, VAL_IMAGES=20)
    assert np.bincount(data.train.targets).tolist() == [5] * 10 and np.bincount(data.val.targets).tolist() == [2] * 10
    assert data.title == f"{DIGITS}, 50 of 1437 training images, 20 of 360 validation images" and data.test is None


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"TRAIN_IMAGES": 5}, "DATASETS.TRAIN_IMAGES must be 0, or from 10 to 1437, as many as there are, got 5"),
        ({"TRAIN_IMAGES": 1438}, "DATASETS.TRAIN_IMAGES must be 0, or from 10 to 1437, .* got 1438"),
        ({"TRAIN_IMAGES": 1400, "VAL_SHARE": 0.5}, "DATASETS.TRAIN_IMAGES must be 0, or from 10 to 7.., .* got 1400"),
        ({"VAL_IMAGES": 361}, "DATASETS.VAL_IMAGES must be 0, or from 1 to 360, as many as there are, got 361"),
    ],
)
def test_numbers_that_a_set_cannot_give_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        digits(**keys)


@pytest.mark.parametrize(
    ("key", "value"),
    [("VAL_SHARE", 1.0), ("VAL_SHARE", -0.1), ("VAL_IMAGES", -1), ("SPLIT_SEED", -2), ("BROKEN_IMAGES", "x")],
)
def test_values_out_of_bounds_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"DATASETS.{key} must be .* got '?{value}"):
        check_config(config(**{f"DATASETS__{key}": value}))


# --- the test set ----------------------------------------------------------------------------------------------------

PROTOCOL = {
    "DATASETS__VAL_SHARE": 0.1,
    "DATASETS__TRAIN_IMAGES": 160,
    "MODEL__NAME": "test_byobnet",
    "SOLVER__MAX_EPOCH": 4,  # of 5 iterations
    "SOLVER__WARMUP_EPOCHS": 0,
    "SOLVER__BEST_CHECKPOINT_METRIC": "top1",
    "DATALOADER__NUM_WORKERS": 0,
}


def test_the_best_weights_of_validation_are_tested_once_at_the_end(tmp_path, monkeypatch):
    """And a run that is stopped before that does it when it goes on, to the same results."""
    trainer = ClassificationTrainer(config(tmp_path / "a", **PROTOCOL, SOLVER__BASE_LR=0.5))
    result = trainer.train()
    rows = read_metrics(tmp_path / "a/metrics.json")
    tested = [row for row in rows if "test/top1" in row]
    best = max((row for row in rows if "val/top1" in row), key=lambda row: row["val/top1"])
    assert len(tested) == 1 and tested[0]["test/epoch"] == best["epoch"] == result["test/epoch"]
    saved = load_file(tmp_path / "a/model_best.pth")["model"]
    final = load_file(tmp_path / "a/model_final.pth")["model"]
    assert all(torch.equal(value, final[name]) for name, value in trainer.model.state_dict().items())
    again = ClassificationTrainer(config(**PROTOCOL, MODEL__WEIGHTS=tmp_path / "a/model_best.pth"), eval_only=True)
    figures = again.evaluate()
    assert {name: figures[name] for name in ("test/top1", "test/top5", "test/loss")} == {
        name: value for name, value in result.items() if name.startswith("test/") and name != "test/epoch"
    }
    assert figures["top1"] == best["val/top1"] and "weights of epoch" in trainer.describe(result)
    assert any(not torch.equal(saved[name], final[name]) for name in saved) or best["epoch"] == 4
    record = json.loads((tmp_path / "a/results.json").read_text())
    assert record["test_images"] == 360 and record["test/top1"] == result["test/top1"]
    assert record["dataset"].endswith("160 of 1437 training images, 142 held out")

    class Interrupted(Exception):
        pass

    def interrupt(self, iteration, values):
        if "test/top1" in values:
            raise Interrupted
        write(self, iteration, values)

    write = TrainingLog.write
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(TrainingLog, "write", interrupt)
        ClassificationTrainer(config(tmp_path / "b", **PROTOCOL, SOLVER__BASE_LR=0.5)).train()
    cfg = config(tmp_path / "b", **PROTOCOL, SOLVER__BASE_LR=0.5)
    assert ClassificationTrainer(cfg, resume=True).train() == result
    assert ClassificationTrainer(cfg, resume=True).train() == result  # by what the log has
    assert len([row for row in read_metrics(tmp_path / "b/metrics.json") if "test/top1" in row]) == 1


def test_averaged_weights_that_are_tested_are_called_so(tmp_path):
    options = PROTOCOL | {"SOLVER__BEST_CHECKPOINT_METRIC": "ema/top1", "MODEL__EMA__ENABLED": True}
    trainer = ClassificationTrainer(config(tmp_path, **options, SOLVER__MAX_ITER=2))
    result = trainer.train()
    assert result["test/averaged"] == 1 and "averaged weights of epoch" in trainer.describe(result)
    assert trainer.tester(trainer.average.module)["loss"] == result["test/loss"]


def test_without_a_metric_the_last_weights_are_tested(tmp_path):
    options = PROTOCOL | {"SOLVER__BEST_CHECKPOINT_METRIC": "", "SOLVER__MAX_ITER": 2, "MODEL__EMA__ENABLED": True}
    trainer = ClassificationTrainer(config(tmp_path, **options))
    result = trainer.train()
    assert "test/averaged" not in result
    assert result["test/epoch"] == 2 / 5 and {"top1", "ema/top1", "test/top1", "test/ema/top1"} <= set(result)
    assert trainer.tester(trainer.model)["loss"] == result["test/loss"]


# --- files that are broken -------------------------------------------------------------------------------------------


def write_folder(root: Path, train: int = 8, val: int = 4) -> None:
    """Image i of a class is of one grey, so that its pixels say which it is."""
    for split, count in (("train", train), ("val", val)):
        for place, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                grey = np.full((8, 8), 20 * i + 5 * place, np.uint8)
                Image.fromarray(grey).save(root / split / name / f"{i}.png")


def folder_config(root: Path, output_dir="unused", **overrides):
    plain = {"MODEL__PIXEL_MEAN": "[0.0]", "MODEL__PIXEL_STD": "[255.0]", "INPUT__SIZE": 8, "INPUT__TRAIN_CROP": "none"}
    few = {"SOLVER__IMS_PER_BATCH": 4, "DATALOADER__NUM_WORKERS": 0, "MODEL__NAME": "test_byobnet"}
    return config(output_dir, **{**plain, **few, "DATASETS__NAME": "image_folder", "DATASETS__ROOT": root, **overrides})


def test_a_set_of_training_images_alone_is_held_out_of(tmp_path):
    write_folder(tmp_path, val=0)
    shutil.rmtree(tmp_path / "val")
    data = build_data(folder_config(tmp_path, DATASETS__VAL_SHARE=0.25))
    assert np.bincount(data.train.targets).tolist() == [6, 6] and np.bincount(data.val.targets).tolist() == [2, 2]
    assert data.test is None and data.title == f"{tmp_path.name}, 12 of 16 training images, 4 held out"
    assert data.notes == (f"{tmp_path.name} has no validation images of its own: nothing is tested at the end",)
    result = ClassificationTrainer(
        folder_config(
            tmp_path, tmp_path / "out", DATASETS__VAL_SHARE=0.25, SOLVER__MAX_EPOCH=1, SOLVER__WARMUP_EPOCHS=0
        )
    ).train()
    assert "top1" in result and not any(name.startswith("test/") for name in result)
    with pytest.raises(FileNotFoundError, match="has no validation folder"):
        build_data(folder_config(tmp_path))


def greys(cfg, data, batches: int, start: int = 0) -> list[list[int]]:
    loader = build_train_loader(cfg, data.train, CPU, start)
    return [(next(loader)[0][:, 0, 0, 0] * 255).round().int().tolist() for _ in range(batches)]


def test_broken_training_images_give_their_places_to_the_next_of_their_class(tmp_path, caplog):
    write_folder(tmp_path)
    sound = folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip")
    expected = greys(sound, build_data(sound), 8)
    # The one after the last image of a class is its first.
    for name, content in (
        ("ant/2", b"no image"),
        ("ant/3", (tmp_path / "train/ant/3.png").read_bytes()[:50]),
        ("bee/7", b"x"),
    ):
        (tmp_path / f"train/{name}.png").write_bytes(content)
    place = {40: 80, 60: 80, 145: 5}
    expected = [[place.get(grey, grey) for grey in batch] for batch in expected]
    for keep, workers in (("always", 0), ("never", 0), ("never", 2)):
        caplog.clear()
        options = {"DATALOADER__IN_MEMORY": keep, "DATALOADER__NUM_WORKERS": workers}
        data = build_data(cfg := folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip", **options))
        assert greys(cfg, data, 8) == expected
        assert greys(cfg, data, 3, start=5) == expected[5:]
        assert data.train.broken.nonzero().flatten().tolist() == [2, 3, 15]
        assert data.title == tmp_path.name  # all places are taken
        if not workers:  # whose log is their own
            named = [record.getMessage() for record in caplog.records if "takes its place" in record.getMessage()]
            assert len(named) == 3 and any("train/ant/2.png cannot be read" in line for line in named)
    with pytest.raises(UserError, match=r"ant/2\.png cannot be read"):
        build_data(folder_config(tmp_path)).train[2]


def test_broken_images_are_not_evaluated_on(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "val/ant/1.png").write_bytes(b"no image")
    data = build_data(cfg := folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip"))
    assert data.title == f"{tmp_path.name}, 7 of 8 validation images"
    (note,) = data.notes
    assert note.startswith("1 image to evaluate on left out, which cannot be read: ") and "val/ant/1.png" in note
    targets = [label for _, labels in build_val_loader(cfg, data.val, CPU) for label in labels.tolist()]
    assert targets == [0] * 3 + [1] * 4


def test_empty_files_are_refused_before_a_run_or_passed_over(tmp_path):
    write_folder(tmp_path)
    sound = folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip")
    expected = greys(sound, build_data(sound), 4)
    for name in ("train/ant/0", "train/bee/3", "val/bee/0"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"2 image files are empty, .*ant/0\.png, .*bee/3\.png; DATASETS.BROKEN_IMAGES"
    ):
        build_data(folder_config(tmp_path))
    data = build_data(sound)
    assert data.title == f"{tmp_path.name}, 7 of 8 validation images"
    place = {0: 20, 65: 85}
    assert greys(sound, data, 4) == [[place.get(grey, grey) for grey in batch] for batch in expected]


def test_a_class_of_which_nothing_can_be_read(tmp_path):
    write_folder(tmp_path, train=2)
    for path in (tmp_path / "train/ant").iterdir():
        path.write_bytes(b"no image")
    data = build_data(folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip"))
    with pytest.raises(UserError, match=r"no image of the class of .*ant/1\.png can be read"):
        data.train[1]
    for path in tmp_path.glob("val/*/*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"no image to evaluate on can be read: .*val/ant/0\.png"):
        build_data(folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip"))


def test_a_disk_that_fails_is_no_broken_image(tmp_path):
    """It may be another one the next time, and a resumed run another run."""
    write_folder(tmp_path)
    data = build_data(folder_config(tmp_path, DATASETS__BROKEN_IMAGES="skip"))
    (tmp_path / "train/ant/1.png").unlink()
    with pytest.raises(UserError, match=r"ant/1\.png is not there"):
        data.train[1]


def test_one_class_is_none(tmp_path):
    write_folder(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split / "bee").rename(tmp_path / split / "x")
        for path in (tmp_path / split / "x").iterdir():
            path.rename(tmp_path / split / "ant" / f"1{path.name}")
        (tmp_path / split / "x").rmdir()
    with pytest.raises(
        ValueError, match=r"DATASETS.ROOT must be of a set of 2 classes or more; .* has, got \('ant',\)"
    ):
        build_data(folder_config(tmp_path))


def test_a_run_that_a_broken_image_ends_goes_on_without_it(tmp_path):
    """To the bits of one that passed over it from the beginning, and names it once."""
    write_folder(tmp_path / "set")
    options = {"SOLVER__MAX_ITER": 8, "INPUT__SIZE": 32, "DATALOADER__NUM_WORKERS": 1, "SOLVER__CHECKPOINT_PERIOD": 1}
    options |= {"DATALOADER__IN_MEMORY": "never"}
    order = greys(folder_config(tmp_path / "set"), build_data(folder_config(tmp_path / "set")), 4)
    last = order[3][0]  # of an epoch
    name = f"{('ant', 'bee')[last % 20 // 5]}/{last // 20}.png"
    (tmp_path / "set/train" / name).write_bytes(b"no image")
    skip = {"DATASETS__BROKEN_IMAGES": "skip"}
    whole, parts = (tmp_path / folder for folder in ("whole", "parts"))
    ClassificationTrainer(folder_config(tmp_path / "set", whole, **options, **skip)).train()
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        ClassificationTrainer(folder_config(tmp_path / "set", parts, **options)).train()
    trainer = ClassificationTrainer(folder_config(tmp_path / "set", parts, **options, **skip), resume=True)
    assert trainer.start_iter > 0
    trainer.train()
    one, other = (load_file(folder / "model_final.pth")["model"] for folder in (whole, parts))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    log = (whole / "log.txt").read_text()
    assert "1 image could not be read, and others took their places: " in log
    assert log.count(f"{name} cannot be read") == 1  # in two epochs
