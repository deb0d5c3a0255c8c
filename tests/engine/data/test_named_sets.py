"""Sets are found by every usual layout, and what is not found is one sentence."""

import shutil
from pathlib import Path

import pytest

from fbn_plugin.engine.data.named_sets import resolve_dataset


@pytest.mark.parametrize(
    "annotations, images",
    [
        ("annotations/instances_train.json", "train"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/train.json", "images"),
        ("annotations/train.json", "images/train"),
        ("annotations/instances_train.json", "train/images"),
        ("annotations/fruit-train_v2.json", "train"),
        ("train.json", "."),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_layouts(shapes, tmp_path, annotations, images):
    (tmp_path / images).mkdir(parents=True, exist_ok=True)
    (tmp_path / annotations).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    shutil.copytree(shapes / "train", tmp_path / images, dirs_exist_ok=True)
    shutil.copy(shapes / "annotations/instances_train.json", tmp_path / annotations)
    # other files that are not the split's instances
    for name in ("trainval.json", "instances_trainval.json", "val.json", "captions_train.json"):
        (tmp_path / "annotations" / name).write_text("{}")
    data = resolve_dataset(f"{tmp_path}:train")
    assert data.json_file == tmp_path / annotations
    assert data.image_root.samefile(tmp_path / images)
    assert data.class_names == ("disc", "box") and data.category_ids == (3, 7)


def test_folders_are_looked_for_below_detectron2_datasets_then_here(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(shapes.parent)
    assert len(resolve_dataset(f"{shapes.name}:val").images) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes.parent))
    assert len(resolve_dataset(f"{shapes.name}:val").images) == 4


def test_detectron2_names(shapes, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"coco/annotations/instances_val2017\.json.*DETECTRON2_DATASETS"):
        resolve_dataset("coco_2017_val")
    shutil.copytree(shapes / "val", tmp_path / "coco/val2017")
    (tmp_path / "coco/annotations").mkdir()
    shutil.copy(shapes / "annotations/instances_val.json", tmp_path / "coco/annotations/instances_val2017.json")
    assert len(resolve_dataset("coco_2017_val").images) == 4


@pytest.mark.parametrize("name", ["shapes", "coco_2017_tarin", ":train", "folder:"])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="use FOLDER:SPLIT"):
        resolve_dataset(name)


def test_a_missing_folder_or_split(shapes, tmp_path):
    copy = Path(shutil.copytree(shapes, tmp_path / "set"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve_dataset(f"{copy}/nowhere:train")
    with pytest.raises(FileNotFoundError, match=r"no annotations for 'test'.*only instances_train\.json"):
        resolve_dataset(f"{copy}:test")
    shutil.copy(copy / "annotations/instances_val.json", copy / "annotations/other-val.json")
    assert resolve_dataset(f"{copy}:val").json_file.name == "instances_val.json"
    (copy / "annotations/instances_val.json").rename(copy / "annotations/val-2.json")
    with pytest.raises(ValueError, match=r"more than one annotation file fits: .*other-val\.json"):
        resolve_dataset(f"{copy}:val")


@pytest.mark.parametrize("name", ["(my_data:train,)", "[my_data:train]", "(mine,)"])
def test_names_in_a_list_want_quotes(name):
    with pytest.raises(ValueError, match="names in a list stand in quotes"):
        resolve_dataset(name)
