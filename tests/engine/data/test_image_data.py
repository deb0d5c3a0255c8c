"""Every way an image set may be stored is read back to the pixels and labels that were stored, and damage is named."""

import gzip
import hashlib
import io
import pickle
import re
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from fbn_plugin.engine.data.image_data import Images, find_root, load_image_data, read_idx
from fbn_plugin.engine.run.cli import UserError


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def image_bytes(array: np.ndarray, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, file_format)
    return buffer.getvalue()


def colour(value: int) -> np.ndarray:
    return np.full((5, 7, 3), value, np.uint8)


def write_folder(root: Path, split: str, classes: dict[str, list[int]]) -> None:
    for name, values in classes.items():
        (root / split / name).mkdir(parents=True)
        for i, value in enumerate(values):
            (root / split / name / f"{i}.png").write_bytes(image_bytes(colour(value)))


def write_tar(path: Path, classes: dict[str, list[int]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, values in classes.items():
            for i, value in enumerate(values):
                data = image_bytes(colour(value))
                member = tarfile.TarInfo(f"{name}/{i}.png")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", ["image_folder", "hf_folder", "tar", "webdataset"])
def test_training_images_alone_are_a_set_where_no_others_are_needed(tmp_path, name):
    classes = {"0": [10, 20], "1": [30]}
    if name == "tar":
        write_tar(tmp_path / "train.tar", classes)
    elif name == "webdataset":
        with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
            for i, value in enumerate([10, 20, 30]):
                for ending, data in (("png", image_bytes(colour(value))), ("cls", str(i // 2).encode())):
                    member = tarfile.TarInfo(f"{i}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    else:
        write_folder(tmp_path, "train", classes)
    data = load_image_data(name, str(tmp_path), needs_val=False)
    assert data.val is None and data.test is None
    assert contents(data.train) == [(10, 0), (20, 0), (30, 1)]
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path)) + " has no "):
        load_image_data(name, str(tmp_path))


def contents(dataset) -> list[tuple[int, int]]:
    return [(np.asarray(image).flat[0].item(), int(label)) for image, label in dataset]


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=6)), st.booleans())
def test_idx_round_trip(tmp_path_factory, array, compress):
    path = tmp_path_factory.mktemp("idx") / "images"
    data = idx_bytes(array)
    path.with_name("images.gz" if compress else "images").write_bytes(gzip.compress(data) if compress else data)
    read = read_idx(path)
    assert read.dtype == np.uint8 and np.array_equal(read, array)


@pytest.mark.parametrize("cut", [2, 4, 10, -1])
def test_damaged_idx_is_named(tmp_path, cut):
    (tmp_path / "labels").write_bytes(idx_bytes(np.zeros((3, 4), np.uint8))[:cut])
    with pytest.raises(ValueError, match="labels"):
        read_idx(tmp_path / "labels")


def test_cut_gzip_and_missing_idx_are_named(tmp_path):
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx_bytes(np.arange(99, dtype=np.uint8)))[:-20])
    with pytest.raises(ValueError, match=r"labels\.gz is not a whole gzip file"):
        read_idx(tmp_path / "labels")
    with pytest.raises(FileNotFoundError, match=r"images nor images\.gz"):
        read_idx(tmp_path / "images")


@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_mnist(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    stored = {"train": rng.integers(0, 256, (5, 28, 28), np.uint8), "t10k": rng.integers(0, 256, (3, 28, 28), np.uint8)}
    labels = {"train": [5, 0, 4, 1, 9], "t10k": [7, 2, 1]}
    for split in stored:
        for kind, array in (("images-idx3", stored[split]), ("labels-idx1", np.array(labels[split], np.uint8))):
            (tmp_path / folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(array)))
    data = load_image_data("mnist", str(tmp_path), "L")
    assert data.title == "MNIST" and len(data.classes) == 10
    for dataset, split in ((data.train, "train"), (data.val, "t10k")):
        assert [label for _, label in dataset] == labels[split]
        assert all(image.mode == "L" for image, _ in dataset)
        assert np.array_equal(np.stack([np.asarray(image) for image, _ in dataset]), stored[split])


def test_mnist_with_more_labels_than_images(tmp_path):
    for split in ("train", "t10k"):
        (tmp_path / f"{split}-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((2, 28, 28), np.uint8)))
        (tmp_path / f"{split}-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="2 train images but 3 labels"):
        load_image_data("mnist", str(tmp_path))


def test_cifar10_batches(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 3, 32, 32), np.uint8)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    # Two images a batch, under the checksums that torchvision compares with before it unpickles.
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    sums = [
        [name, write(name, {"data": images[2 * i : 2 * i + 2].reshape(2, -1), "labels": [i, 9 - i]})]
        for i, name in enumerate(names)
    ]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    meta = {"label_names": list("abcdefghij")}
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write(CIFAR10.meta["filename"], meta)})

    for root in (tmp_path, folder):
        data = load_image_data("cifar10", str(root))
        assert data.title == "CIFAR-10" and data.classes == tuple("abcdefghij")
        assert [label for _, label in data.train] == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
        assert [label for _, label in data.val] == [5, 4]
        read = np.stack([np.asarray(image) for image, _ in data.val])
        assert np.array_equal(read, images[10:].transpose(0, 2, 3, 1))

    (folder / names[0]).write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="missing, incomplete or damaged"):
        load_image_data("cifar10", str(tmp_path))


def test_cifar100_has_the_fine_classes(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder, sums = tmp_path / CIFAR100.base_folder, {}
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), np.uint8)
    contents = {
        "train": {"data": images[:3].reshape(3, -1), "fine_labels": [0, 99, 5], "coarse_labels": [1, 1, 2]},
        "test": {"data": images[3:].reshape(1, -1), "fine_labels": [7], "coarse_labels": [0]},
        "meta": {"fine_label_names": [f"fine{i}" for i in range(100)], "coarse_label_names": ["coarse"]},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(data := pickle.dumps(content))
        sums[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": sums["meta"]})
    data = load_image_data("cifar100", str(tmp_path))
    assert data.title == "CIFAR-100" and data.classes[99] == "fine99" and len(data.classes) == 100
    assert [label for _, label in data.train] == [0, 99, 5] and [label for _, label in data.val] == [7]
    assert np.array_equal(np.asarray(data.val[0][0]), images[3].transpose(1, 2, 0))
    (folder / "meta").write_bytes(b"damaged")
    with pytest.raises(FileNotFoundError, match="cifar-100-python is missing, incomplete or damaged"):
        load_image_data("cifar100", str(tmp_path))


def test_cifar10_jpeg_is_labelled_as_such(tmp_path):
    def pack(images):
        encoded = [image_bytes(image, "JPEG") for image in images]
        return np.frombuffer(b"".join(encoded), np.uint8), np.cumsum([0, *map(len, encoded)])

    train, test = [colour(10), colour(200), colour(90)], [colour(50)]
    arrays = {"class_names": np.array(["cat", "dog"])}
    for split, images, labels in (("train", train, [0, 1, 1]), ("test", test, [1])):
        arrays[f"{split}_jpeg"], arrays[f"{split}_offsets"] = pack(images)
        arrays[f"{split}_labels"] = np.array(labels, np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    data = load_image_data("cifar10_jpeg", str(tmp_path))
    assert data.title == "CIFAR-10 (JPEG)" and data.classes == ("cat", "dog")
    assert contents(data.train) == [(10, 0), (200, 1), (90, 1)] and contents(data.val) == [(50, 1)]

    arrays.pop("test_jpeg")
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    with pytest.raises(ValueError, match="test_jpeg"):
        load_image_data("cifar10_jpeg", str(tmp_path / "cifar10_jpeg.npz"))


def jpegs(**changes) -> dict[str, np.ndarray]:
    """Arrays of a sound set of two images a split, but for the changes."""
    image = image_bytes(colour(9), "JPEG")
    arrays = {"class_names": np.array(["ant", "bee"])}
    for split in ("train", "test"):
        arrays[f"{split}_jpeg"] = np.frombuffer(2 * image, np.uint8)
        arrays[f"{split}_offsets"] = np.array([0, len(image), 2 * len(image)])
        arrays[f"{split}_labels"] = np.array([0, 1])
    return arrays | changes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_offsets": np.array([0, 9, 9])}, "train_offsets must increase from 0 or more to"),
        ({"test_offsets": np.array([0, 9, 10**6])}, "test_offsets must increase"),
        ({"test_offsets": np.array([-1, 9, 10])}, "test_offsets must increase"),
        ({"test_offsets": np.array([0.0, 9, 10])}, r"test_offsets must be a list of whole numbers, got float64"),
        ({"test_offsets": np.array([0, 9])}, "2 test_labels and 2"),
        ({"test_offsets": np.array([0]), "test_labels": np.array([], int)}, "0 test_labels"),
        ({"train_labels": np.array([0, 2])}, "train_labels must be .* from 0 to 1, got 0 to 2"),
        ({"train_labels": np.array([-1, 0])}, "train_labels must be .* got -1 to 0"),
        ({"train_labels": np.array([[0], [1]])}, r"train_labels must be a list .* of shape \(2, 1\)"),
        ({"train_jpeg": np.zeros((3, 4), np.uint8)}, "train_jpeg must be a list of unsigned bytes"),
        ({"train_jpeg": np.zeros(30)}, "train_jpeg must be a list of unsigned bytes, got float64"),
        ({"train_jpeg": np.zeros(3 * 10**7, np.uint8)}, "its arrays have more than"),
        ({"class_names": np.array([1, 2])}, "class_names must be a list of text, got int64"),
        ({"class_names": np.array(["ant", None], dtype=object)}, "class_names.npy must hold numbers or text"),
    ],
)
def test_jpeg_archives_of_other_content_are_refused(tmp_path, changes, words):
    path = tmp_path / "cifar10_jpeg.npz"
    np.savez_compressed(path, **jpegs())
    assert contents(load_image_data("cifar10_jpeg", str(path)).train) == [(9, 0), (9, 1)]
    np.savez_compressed(path, **jpegs(**changes))
    with pytest.raises(ValueError, match=words) as error:
        load_image_data("cifar10_jpeg", str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_jpeg_in_an_archive_is_named(tmp_path):
    path = tmp_path / "cifar10_jpeg.npz"
    arrays = jpegs()
    arrays["test_offsets"][1] -= 5
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=rf"test image of {path}, number 1 cannot be read"):
        load_image_data("cifar10_jpeg", str(path)).val[1]


def npy_header(shape: tuple[int, ...], descr: str = "|u1") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


@pytest.mark.parametrize("shape, descr", [((10**12,), "|u1"), ((2**40, 2**40), "|u1"), ((5,), "|u1"), ((9**9,), "<U0")])
def test_the_bytes_of_an_array_are_counted_before_it_is_made(tmp_path, shape, descr):
    path = tmp_path / "cifar10_jpeg.npz"
    np.savez(path, **{name: array for name, array in jpegs().items() if name != "train_jpeg"})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_jpeg.npy", npy_header(shape, descr) + bytes(9 if descr == "|u1" else 0))
    with pytest.raises(ValueError, match="train_jpeg.npy must hold numbers or text of its shape"):
        load_image_data("cifar10_jpeg", str(path))


def write_mnist(root: Path, **changes) -> None:
    for split in ("train", "t10k"):
        parts = {"images_idx3": np.ones((2, 28, 28), np.uint8), "labels_idx1": np.array([0, 9], np.uint8)}
        for kind, array in parts.items():
            array = changes.get(f"{split}_{kind}", array)
            data = array if isinstance(array, bytes) else idx_bytes(array)
            (root / f"{split}-{kind.replace('_', '-')}-ubyte").write_bytes(data)


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"train_labels_idx1": np.array([0, 10], np.uint8)},
            "train-labels-idx1-ubyte must hold labels from 0 to 9, got 10",
        ),
        ({"t10k_images_idx3": np.ones((2, 14, 14), np.uint8)}, r"training images of \(28, 28\) pixels .* \(14, 14\)"),
        ({"t10k_images_idx3": np.ones((2, 0, 28), np.uint8)}, "t10k-images-idx3-ubyte has no pixels"),
        ({"t10k_images_idx3": np.ones((2, 784), np.uint8)}, "t10k-images-idx3-ubyte must have 3 dimensions, got 2"),
        ({"t10k_images_idx3": b"\0\0\x0d\3" + bytes(12)}, "not an IDX file of unsigned bytes"),
        ({"t10k_images_idx3": b"\0\0\x08\3" + b"\xff" * 12 + bytes(100)}, "fewer bytes than its shape"),
        ({"t10k_images_idx3": idx_bytes(np.ones((2, 28, 28), np.uint8)) + b"x"}, "more bytes than its shape"),
    ],
)
def test_mnist_of_other_content_is_refused(tmp_path, changes, words):
    write_mnist(tmp_path)
    assert len(load_image_data("mnist", str(tmp_path)).val) == 2
    write_mnist(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        load_image_data("mnist", str(tmp_path))


def test_a_gzip_bomb_is_read_as_far_as_its_header_says(tmp_path):
    bomb = gzip.compress(idx_bytes(np.zeros((2, 28, 28), np.uint8)) + bytes(10**8))
    (tmp_path / "images.gz").write_bytes(bomb)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more bytes than its shape"):
        read_idx(tmp_path / "images")
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()
    (tmp_path / "images.gz").write_bytes(gzip.compress(b"\0\0\x08\3" + b"\x7f" * 12))
    with pytest.raises(ValueError, match="fewer bytes than its shape"):
        read_idx(tmp_path / "images")


def test_digits_are_a_fixed_split_without_overlap():
    first, second = load_image_data("digits", mode="L"), load_image_data("digits", mode="L")
    assert (len(first.train), len(first.val), len(first.classes)) == (1437, 360, 10)
    pixels = [[np.asarray(image).tobytes() for image, _ in split] for split in (first.train, first.val)]
    assert pixels == [[np.asarray(image).tobytes() for image, _ in split] for split in (second.train, second.val)]
    assert max(max(image) for image in pixels[0]) == 255
    # Stratified: every class has its tenth of both parts.
    for split in (first.train, first.val):
        counts = np.bincount([label for _, label in split]) / len(split)
        assert np.abs(counts - 0.1).max() < 0.01

    from sklearn.datasets import load_digits

    whole = load_digits()
    stored = sorted(zip((np.round(whole.images * 255 / 16).astype(np.uint8)).reshape(1797, -1).tolist(), whole.target))
    split = [(np.asarray(image).ravel().tolist(), label) for part in (first.train, first.val) for image, label in part]
    assert sorted(split) == stored


@pytest.mark.parametrize("store", ["image_folder", "tar"])
def test_a_class_without_validation_images_does_not_shift_the_others(tmp_path, store):
    train, val = {"ant": [1, 2], "bee": [3], "cow": [4]}, {"cow": [5], "ant": [6]}
    for split, classes in (("train", train), ("val", val)):
        if store == "tar":
            write_tar(tmp_path / f"{split}.tar", classes)
        else:
            write_folder(tmp_path, split, classes)
    data = load_image_data(store, str(tmp_path))
    assert data.title == tmp_path.name and data.classes == ("ant", "bee", "cow")
    assert contents(data.train) == [(1, 0), (2, 0), (3, 1), (4, 2)]
    assert contents(data.val) == [(6, 0), (5, 2)]


def test_folder_names_accepted_and_refused(tmp_path):
    write_folder(tmp_path, "train", {"ant": [1]})
    with pytest.raises(FileNotFoundError, match="no validation folder"):
        load_image_data("image_folder", str(tmp_path))
    write_folder(tmp_path, "validation", {"ant": [2]})
    assert contents(load_image_data("image_folder", str(tmp_path)).val) == [(2, 0)]

    write_folder(tmp_path, "val", {"dog": [3]})
    with pytest.raises(ValueError, match="lacks: 'dog'"):
        load_image_data("image_folder", str(tmp_path))
    (tmp_path / "val/dog/0.png").rename(tmp_path / "val/0.png")
    with pytest.raises(ValueError, match="outside of class folders"):
        load_image_data("image_folder", str(tmp_path))
    (tmp_path / "val/0.png").unlink()
    with pytest.raises(ValueError, match="no images found"):
        load_image_data("image_folder", str(tmp_path))


@pytest.mark.parametrize("store", ["image_folder", "tar"])
def test_classes_that_vanish_are_named(tmp_path, store, caplog):
    """A class of no training image is refused; one of no validation image is said."""
    train, val = {"ant": [1], "bee": [2], "cow": [3]}, {"bee": [2], ".git": [1]}
    for split, classes in (("train", train), ("val", val)):
        if store == "tar":
            write_tar(tmp_path / f"{split}.tar", classes)
        else:
            write_folder(tmp_path, split, classes)
    assert contents(load_image_data(store, str(tmp_path)).val) == [(2, 1)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "1 entry left out: 1 hidden (such as .git" in messages[0]
    assert "has no image of 2 classes of 3: 'ant', 'cow'" in messages[1]
    if store == "image_folder":
        for number in range(7):
            (tmp_path / f"train/empty{number}").mkdir()
        with pytest.raises(ValueError, match="train has folders without images, 'empty0', .*'empty4' and 2 more: "):
            load_image_data(store, str(tmp_path))


def test_damaged_or_empty_tar_is_named(tmp_path):
    write_tar(tmp_path / "train.tar", {"ant": [1]})
    with pytest.raises(FileNotFoundError, match=r"val archive \(val\.tar\)"):
        load_image_data("tar", str(tmp_path))
    for content in (b"no archive", b""):
        (tmp_path / "val.tar").write_bytes(content)
        with pytest.raises(ValueError, match=r"no images found in .*val\.tar"):
            load_image_data("tar", str(tmp_path))


def test_roots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("datasets/imagenet", "elsewhere/imagenet"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert find_root("imagenet").resolve() == tmp_path / "datasets/imagenet"
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")
    assert find_root("imagenet").resolve() == tmp_path / "elsewhere/imagenet"
    assert find_root(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match="elsewhere/cifar"):
        find_root("cifar")
    with pytest.raises(FileNotFoundError, match=r"DATASETS\.ROOT is empty"):
        find_root("")


def test_wrong_names_list_what_is_accepted():
    with pytest.raises(ValueError, match="DATASETS.NAME must be .*'image_folder', 'tar', .* got 'minst'"):
        load_image_data("minst")
    with pytest.raises(ValueError, match="INPUT.FORMAT must be one of 'RGB', 'L', got 'BGR'"):
        load_image_data("digits", mode="BGR")


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    write_folder(tmp_path, "train", {"ant": [1, 2]})
    write_folder(tmp_path, "val", {"ant": [1]})
    damaged = tmp_path / "train/ant/1.png"
    damaged.write_bytes(damaged.read_bytes()[:45])
    data = load_image_data("image_folder", str(tmp_path))
    for content in (damaged.read_bytes(), b"P6 80 x 255 "):
        damaged.write_bytes(content)
        with pytest.raises(UserError, match=r"ant/1\.png cannot be read"):
            data.train[1]
    with pytest.raises(UserError, match="number 0 cannot be read"):
        Images([(b"no image", 3)])[0]


def test_real_mnist(real_data):
    data = load_image_data("mnist", str(real_data("mnist")), "L")
    assert (len(data.train), len(data.val)) == (60000, 10000)
    images, labels = zip(*data.val.samples)
    assert [label for _, label in data.train.samples[:5]] == [5, 0, 4, 1, 9] and labels[:4] == (7, 2, 1, 0)
    assert hashlib.md5(idx_bytes(np.stack(images))).hexdigest() == "2646ac647ad5339dbf082846283269ea"


def test_real_cifar10_jpeg(real_data):
    data = load_image_data("cifar10_jpeg", str(real_data("cifar10_jpeg")))
    assert data.title == "CIFAR-10 (JPEG)" and data.classes[:2] == ("airplane", "automobile")
    assert np.bincount([label for _, label in data.train.samples]).tolist() == [5000] * 10
    assert np.bincount([label for _, label in data.val.samples]).tolist() == [1000] * 10
    image, label = data.val[-1 + len(data.val)]
    assert image.size == (32, 32) and image.mode == "RGB" and label == 9


def test_real_tiny_imagenet(real_data):
    data = load_image_data("tar", str(real_data("tiny_imagenet_20class")))
    assert (len(data.train), len(data.val), len(data.classes)) == (10000, 1000, 20)
    assert data.classes == tuple(sorted(data.classes)) and data.classes[0] == "n01443537"
    image, label = data.val[999]
    assert image.size == (64, 64) and image.mode == "RGB" and label == 19
