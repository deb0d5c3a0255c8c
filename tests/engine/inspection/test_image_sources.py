"""Images from folders, archives and named sets, whether they have labels or not."""

import tarfile

import pytest
from PIL import Image

from fbn_plugin.engine.inspection.image_sources import find_images, spread


@pytest.fixture
def folder(tmp_path):
    """Images on two depths, and what is none."""
    for name in ("10.png", "9.png", "a/1.jpg", ".hidden/2.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("none")
    return tmp_path / "photos"


def test_a_folder_without_classes(folder):
    images, name = find_images(str(folder), "L")
    assert name == "photos" and [images.name_of(i).removeprefix(f"{folder}/") for i in range(len(images))] == [
        "9.png",
        "10.png",
        "a/1.jpg",
    ]
    assert images[0][0].mode == "L" and images[0][0].size == (8, 6)


def test_an_archive_and_named_sets(folder, tmp_path, shapes):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder / "a", "a")
    images, name = find_images(str(tmp_path / "photos.tar"))
    assert (len(images), name) == (1, f"{tmp_path.name}/photos.tar") and images[0][0].mode == "RGB"
    images, name = find_images("digits", "L")
    assert (len(images), name) == (360, "handwritten digits (scikit-learn), validation")
    images, name = find_images(f"{shapes}:val")
    assert len(images) == 4 and name == f"{shapes}:val" and images[0][0].size == (80, 96)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere", "images 'nowhere' are not there: name a folder"),
        ("nowhere:val", "dataset 'nowhere:val': there is no folder nowhere"),
        ("mnist:nowhere", "'nowhere' does not exist"),
        ("empty", "no images found in empty, nor in folders below it"),
        ("file.txt", "file.txt is neither a folder nor a tar archive"),
    ],
)
def test_what_is_not_there(tmp_path, monkeypatch, source, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        find_images(source)


def test_some_of_them(folder):
    images, _ = find_images(str(folder))
    assert len(spread(images, 0)) == len(spread(images, 3)) == 3
    assert [spread(images, 2).name_of(i)[-6:] for i in (0, 1)] == ["/9.png", "10.png"]
    with pytest.raises(ValueError, match="--max-images must be at most 3 images, as many as there are, got 4"):
        spread(images, 4)
