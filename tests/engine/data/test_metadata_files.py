"""Folders whose classes stand in metadata: the classes are right, and what leads beyond the folder is refused."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.data.metadata_files import images_by_metadata


def write_image(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())


def write_set(folder: Path, labels: list, kind: str = "csv", columns=("file_name", "label")) -> None:
    """Image i, of grey i, with its label in the metadata."""
    rows = [dict(zip(columns, (f"sub/{i}.png", label))) for i, label in enumerate(labels)]
    for i in range(len(labels)):
        write_image(folder / f"sub/{i}.png", i)
    if kind == "csv":
        text = "\n".join([",".join(columns), *(",".join(map(str, row.values())) for row in rows)])
    else:
        text = "\n".join(map(json.dumps, rows))
    (folder / f"metadata.{kind}").write_text(text)


def contents(images) -> list[tuple[int, int]]:
    return [(np.asarray(image).flat[0].item(), label) for image, label in images]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("names", [["ant", "bee"], [0, 1]])
def test_train_validation_and_test(tmp_path, kind, names):
    ant, bee = names
    write_set(tmp_path / "train", [bee, ant, bee], kind)
    write_set(tmp_path / "validation", [ant], kind)
    write_set(tmp_path / "test", [bee, ant], kind)
    data = load_image_data("hf_folder", str(tmp_path))
    assert data.classes == (str(ant), str(bee))
    assert contents(data.train) == [(0, 1), (1, 0), (2, 1)]
    assert contents(data.val) == [(0, 0)] and contents(data.test) == [(0, 1), (1, 0)]


def test_class_folders_and_a_test_folder_alone(tmp_path):
    for split, values in (("train", {"ant": 1, "bee": 2}), ("test", {"bee": 3})):
        for name, value in values.items():
            write_image(tmp_path / split / name / "x.png", value)
    data = load_image_data("hf_folder", str(tmp_path))
    assert contents(data.train) == [(1, 0), (2, 1)] and contents(data.val) == [(3, 1)] and data.test is None


def test_one_file_for_the_whole_set(tmp_path):
    rows = ["file_name,label"]
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            write_image(tmp_path / split / f"{i}.png", i)
            rows.append(f"{split}/{i}.png,{i % 2}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    data = load_image_data("hf_folder", str(tmp_path))
    assert contents(data.train) == [(0, 0), (1, 1), (2, 0)] and contents(data.val) == [(0, 0)]


def test_images_that_are_not_in_the_metadata_are_counted(tmp_path, caplog):
    write_set(tmp_path, ["ant", "bee"])
    write_image(tmp_path / "sub/new.png", 9)
    found = images_by_metadata(tmp_path)
    assert len(found.images) == 2
    assert "1 entry left out: 1 not in metadata.csv (such as sub/new.png)" in caplog.text
    caplog.clear()
    (tmp_path / "sub/new.png").unlink()
    images_by_metadata(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.csv", "file_name,label\n../a.png,x", "line 2: .file_name. must be a path inside of the folder"),
        ("metadata.csv", "file_name,label\n/etc/passwd,x", ".file_name. must be a path inside of the folder"),
        ("metadata.csv", "file_name,label\nb.png,x", r"names b\.png, which is not there"),
        ("metadata.csv", "file_name,label\nfolder,x", "names folder, which is not a file"),
        ("metadata.csv", "file_name,label\npipe,x", "names pipe, which is not a file"),
        ("metadata.csv", "file_name,label\na.png,x\n./a.png,y", "line 3 names a.png a second time"),
        ("metadata.csv", "file_name,text\na.png,x", "line 2 has no 'label'; it has 'file_name', 'text'"),
        ("metadata.csv", "file_name,label\na.png", "line 2 has no 'label'"),
        ("metadata.csv", "file_name,label\na.png,x,y", "line 2 has more values than there are columns"),
        ("metadata.csv", "file_name,label,label\na.png,x,y", "3 columns, of which two have one name"),
        ("metadata.csv", 'file_name,label\n"a.png,x', "is no CSV file"),
        ("metadata.csv", "file_name,label\na.png," + "x" * 200_000, "is no CSV file: field larger"),
        ("metadata.csv", b"file_name,label\na.png,\xff", "is no CSV file: byte .* is not UTF-8"),
        ("metadata.csv", "", "no images found in .*; expected are those that .*metadata.csv names"),
        ("metadata.jsonl", '{"file_name": "a.png"}', "line 1 has no 'label'; it has 'file_name'"),
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1.5}', "line 1: the label must be a number .*, got 1.5"),
        ("metadata.jsonl", '{"file_name": 3, "label": 1}', "line 1: .file_name. must be the name of a file"),
        ("metadata.jsonl", '\n{"file_name": "a.png", "label"', "line 2 is not valid JSON"),
        ("metadata.jsonl", "[1]", "line 1 is no JSON object"),
        ("metadata.jsonl", " " * 2**21, "line 1 has 1,048,576 bytes or more"),
    ],
)
def test_what_is_refused(tmp_path, name, text, words):
    write_image(tmp_path / "a.png", 1)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as error:
        images_by_metadata(tmp_path)
    assert "\n" not in str(error.value)


def test_two_files_of_metadata(tmp_path):
    for kind in ("csv", "jsonl"):
        write_set(tmp_path, ["a", "b"], kind)
    with pytest.raises(ValueError, match=r"has both metadata\.csv and metadata\.jsonl"):
        images_by_metadata(tmp_path)


def test_no_folder_to_validate_on(tmp_path):
    write_set(tmp_path / "train", ["a", "b"])
    with pytest.raises(FileNotFoundError, match="has no validation folder"):
        load_image_data("hf_folder", str(tmp_path))
