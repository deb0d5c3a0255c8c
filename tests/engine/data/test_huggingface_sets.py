"""Sets of Hugging Face's datasets, saved or as Parquet: the same images and classes as the package itself gives."""

import importlib
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbn_plugin import internals
from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.run.cli import UserError


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    if not internals.is_installed("datasets"):
        pytest.skip("datasets is not installed")
    module = importlib.import_module("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def picture(value: int) -> dict:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{value}.png"}


def save(datasets, root: Path, form: str, parts: dict[str, list[int]], names=("ant", "bee"), column="label") -> str:
    """Image i of a part, of grey i, with its label."""
    kind = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"id": datasets.Value("string"), "img": datasets.Image(), column: kind})
    tables = datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {"id": ["x"] * len(labels), "img": [picture(i) for i in range(len(labels))], column: labels}, features
            )
            for name, labels in parts.items()
        }
    )
    if form == "saved":
        tables.save_to_disk(str(root))
    else:
        (root / "data").mkdir(parents=True)
        for name, table in tables.items():
            for number in range(2):
                part = table.shard(2, number, contiguous=True)
                part.to_parquet(str(root / f"data/{name}-0000{number}-of-00002.parquet"))
    return str(root)


def contents(images) -> list[tuple[int, int]]:
    return [(np.asarray(image).flat[0].item(), label) for image, label in images]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_parts_and_classes(datasets, tmp_path, form):
    root = save(datasets, tmp_path / "set", form, {"train": [1, 0, 1], "validation": [0, 1], "test": [1, 1]})
    data = load_image_data("hf_datasets", root, "L")
    assert data.title == "set" and data.classes == ("ant", "bee")
    assert contents(data.train) == [(0, 1), (1, 0), (2, 1)]
    assert contents(data.val) == [(0, 0), (1, 1)] and contents(data.test) == [(0, 1), (1, 1)]
    assert data.train[0][0].mode == "L" and data.train.name_of(2).startswith("row 2 of train in ")


def test_numbers_for_classes_and_a_test_part_alone(datasets, tmp_path):
    root = save(datasets, tmp_path / "set", "saved", {"train": [1, 0, 2], "test": [2]}, names=None, column="fine_label")
    data = load_image_data("hf_datasets", root)
    assert data.classes == ("0", "1", "2") and contents(data.val) == [(0, 2)] and data.test is None


def test_a_train_part_alone_where_no_other_is_needed(datasets, tmp_path):
    root = save(datasets, tmp_path / "set", "saved", {"train": [1, 0]})
    data = load_image_data("hf_datasets", root, needs_val=False)
    assert contents(data.train) == [(0, 1), (1, 0)] and data.val is None and data.test is None


def test_a_test_part_without_labels_is_left_out(datasets, tmp_path, caplog):
    root = save(datasets, tmp_path / "set", "saved", {"train": [1, 0], "validation": [1], "test": [-1, -1]})
    assert load_image_data("hf_datasets", root).test is None and "test in " in caplog.text


@pytest.mark.parametrize(
    ("parts", "options", "words"),
    [
        ({"train": [0, -1], "test": [0]}, {}, "train in .* has 1 image without a class: .* got -1"),
        ({"train": [0, 2], "test": [0]}, {"names": None}, "train in .* has labels up to 2, and no image of label 1"),
        ({"train": [0, 1], "test": [2]}, {"names": None}, "train in .* has labels up to 1, and no image of label 2"),
        ({"train": [0, 1]}, {}, "must have a train part, and a validation or test part"),
        (
            {"train": [0], "test": [0]},
            {"names": None, "column": "sort"},
            "has no column of classes, .*'id', 'img', 'sort'",
        ),
    ],
)
def test_what_is_refused(datasets, tmp_path, parts, options, words):
    root = save(datasets, tmp_path / "set", "saved", parts, **options)
    with pytest.raises(ValueError, match=words):
        load_image_data("hf_datasets", root)


def test_damage_and_images_elsewhere(datasets, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither dataset_dict\.json, nor Parquet files"):
        load_image_data("hf_datasets", str(tmp_path))
    root = tmp_path / "saved"
    save(datasets, root, "saved", {"train": [0, 1], "test": [0]})
    (file,) = (root / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read as a set of Hugging Face's datasets: ") as error:
        load_image_data("hf_datasets", str(root))
    assert "\n" not in str(error.value)
    paths = {"img": [{"bytes": None, "path": "/etc/passwd"}] * 2, "label": [0, 1]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "paths").mkdir()
    for name in ("train", "test"):
        table = datasets.Dataset.from_dict(paths, features).cast_column("img", datasets.Image(decode=False))
        table.to_parquet(str(tmp_path / f"paths/{name}.parquet"))
    with pytest.raises(
        (ValueError, UserError), match=r"row 0 of train in .* has no bytes of an image|no column of images"
    ):
        load_image_data("hf_datasets", str(tmp_path / "paths")).train[0]


@pytest.mark.parametrize("place", [None, types.ModuleType("datasets")], ids=["nothing", "a folder of its name"])
def test_without_the_package(tmp_path, monkeypatch, place):
    """A folder ``datasets``, as detectron2's checkout has one, is imported as a package without content."""
    if place is not None:
        place.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "datasets", place)
    with pytest.raises(ValueError, match="needs the package datasets, which is not installed: pip install datasets"):
        load_image_data("hf_datasets", str(tmp_path))
