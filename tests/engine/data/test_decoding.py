"""An image file gives the same pixels to a classifier and to a detector, or both refuse it by the same sentence."""

import io
import os

import numpy as np
import pytest
from image_files import COLOUR, NO_FILES, PIXELS, READ, REFUSED, exif, orientation, saved, taken_in
from PIL import Image, ImageFile

from fbn_plugin.engine.data.coco_data import CocoDataset, CocoDetection
from fbn_plugin.engine.data.decoding import decode_image, enough_memory, image_extensions, read_image, read_label_map
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.data.loaders import data_loader
from fbn_plugin.engine.run.cli import UserError, user_errors


def read(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(decode_image(io.BytesIO(data), "x", mode))


def detection_set(path, width: int, height: int) -> CocoDetection:
    image = {"id": 1, "file_name": path.name, "height": height, "width": width}
    return CocoDetection([CocoDataset("x", None, path.parent, [image], [], [{"id": 1, "name": "x"}])])


@pytest.mark.parametrize("name", READ)
def test_all_tasks_have_the_same_pixels(tmp_path, name):
    data, expected = READ[name]
    if expected is None:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    path = tmp_path / "image"
    path.write_bytes(data)
    image = read_image(path)
    assert image.mode == "RGB" and not image.info and type(image) is Image.Image
    assert np.array_equal(np.asarray(image), expected)
    classified = [Images([(source, 3)])[0] for source in (str(path), data)]
    assert all(label == 3 and np.array_equal(np.asarray(each), expected) for each, label in classified)
    detected, _ = detection_set(path, *image.size)[0]
    assert np.array_equal((detected * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    grey, _ = Images([(str(path), 3)], "L")[0]
    assert grey.mode == "L" and np.abs(np.asarray(image.convert("L"), int) - np.asarray(grey)).max() <= 1


@pytest.mark.parametrize("name", [*REFUSED, *NO_FILES])
def test_all_tasks_refuse_by_the_same_sentence(tmp_path, name):
    path = tmp_path / "image\n1"
    if name in REFUSED:
        data, words = REFUSED[name]
        path.write_bytes(data)
    else:
        make, words = NO_FILES[name]
        make(path)
    sentences = []
    for look in (lambda: read_image(path), lambda: Images([(str(path), 0)])[0], lambda: detection_set(path, 8, 6)[0]):
        with pytest.raises(UserError) as error:
            look()
        sentences.append(str(error.value))
    assert len(set(sentences)) == 1 and sentences[0].startswith(f"image {str(path)!r} ")
    assert words in sentences[0] and "\n" not in sentences[0]
    with pytest.raises(UserError):
        read_label_map(path)


@pytest.mark.parametrize("value", range(12))
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [3, 4])
def test_orientation_is_pillows(value, order, kind):
    """ImageOps.exif_transpose says what each value of the tag means; others than 1 to 8 mean nothing."""
    from PIL import ImageOps

    data = saved(COLOUR, exif=exif(orientation(value, kind, order), order=order))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(read(data), expected)
    assert (expected.shape != PIXELS.shape) == (5 <= value <= 8)


def test_orientation_is_found_where_pillow_finds_it():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = np.rot90(PIXELS, -1)
    block = exif(orientation(6))
    raw = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    from PIL.PngImagePlugin import PngInfo

    text, profile = PngInfo(), PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    profile.add_text("Raw profile type exif", raw.decode())
    for data in (
        saved(COLOUR, pnginfo=text),
        saved(COLOUR, pnginfo=profile),
        saved(COLOUR, "WEBP", lossless=True, xmp=xmp),
        saved(COLOUR, "WEBP", lossless=True, exif=block),
        saved(COLOUR, exif=b"Exif\0\0" + block),  # twice, as some cameras write
    ):
        assert np.array_equal(read(data), turned)
    both = saved(COLOUR, "WEBP", lossless=True, xmp=xmp, exif=exif(orientation(3)))
    assert np.array_equal(read(both), PIXELS[::-1, ::-1])


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", range(14))
@pytest.mark.parametrize("tag", [0x010F, 0x011A, 0x0132, 0x8769, 0x8825, 0xA005])
def test_no_other_tag_stops_a_photo(tag, kind):
    data = saved(COLOUR, "JPEG", exif=exif(orientation(6), (tag, kind, 4, b"72\0\0")))
    assert read(data).shape == (8, 6, 3)


def test_label_maps_are_numbers(tmp_path):
    labels = np.arange(48, dtype=np.uint16).reshape(6, 8) + 200
    path = tmp_path / "labels.png"
    for array in (labels.astype(np.uint8), labels.clip(max=255)):
        Image.fromarray(array).save(path)
        assert np.array_equal(np.asarray(read_label_map(path)), array)
        assert read_label_map(path).mode == "L"
    Image.fromarray(labels + 9).save(path)
    with pytest.raises(UserError, match=r"labels\.png must hold numbers of classes .* got integers up to 256"):
        read_label_map(path)
    Image.fromarray(np.ones((6, 8), np.float32)).save(path, "TIFF")
    with pytest.raises(UserError, match="got floating-point numbers"):
        read_label_map(path)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 300])
def test_names_that_no_file_can_have(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read"):
        read_image(f"{tmp_path}/{name}")


def test_a_disk_that_fails_is_a_sentence():
    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match="image x cannot be read: Input/output error"):
        decode_image(Failing(), "x")


def test_size_limit_is_the_users(monkeypatch, recwarn):
    """One bound, where Pillow has a warning and an error; none if the user says so."""
    data = saved(COLOUR)
    for limit, fits in ((24, True), (23, False), (None, True)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        if fits:
            assert np.array_equal(read(data), PIXELS)
        else:
            with pytest.raises(UserError, match="image x has more than 46 pixels, twice .*: it is 8x6"):
                read(data)
    assert not recwarn.list


def test_cut_images_are_read_if_the_user_says_so(monkeypatch):
    data = saved(COLOUR, "JPEG")[:-20]
    with pytest.raises(UserError, match="truncated"):
        read(data)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert read(data).shape == PIXELS.shape


def test_no_program_runs_and_no_other_loader_is_asked(monkeypatch):
    import subprocess

    def fails(*_, **__):
        raise AssertionError("a program was run")

    for name in ("Popen", "check_call", "run", "call"):
        monkeypatch.setattr(subprocess, name, fails)
    monkeypatch.setattr(os, "system", fails)
    with pytest.raises(UserError, match="PostScript"):
        read(REFUSED["postscript"][0])
    assert ".eps" not in image_extensions() and {".jpg", ".jpeg", ".png", ".tif", ".bmp"} <= image_extensions()


def test_sentences_where_pillow_says_little(monkeypatch):
    from PIL import PngImagePlugin

    def decode_with(error):
        def fail(*_):
            raise error

        monkeypatch.setitem(Image.OPEN, "PNG", (fail, Image.OPEN["PNG"][1]))
        with pytest.raises(UserError) as raised:
            read(saved(COLOUR))
        return str(raised.value)

    assert PngImagePlugin
    assert decode_with(KeyError("bits")) == "image x cannot be read: KeyError 'bits'"
    assert decode_with(AssertionError()) == "image x cannot be read: AssertionError"
    assert decode_with(ValueError("a\nb")) == "image x cannot be read: a b"
    assert decode_with(ValueError()) == "image x cannot be read: ValueError"
    assert decode_with(MemoryError()) == "image x needs more memory than there is"


def test_memory_that_is_lacking_is_a_sentence():
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(UserError, match=r"image a/1\.png needs more memory"), enough_memory("a/1.png"):
            raise error
    with pytest.raises(RuntimeError, match="bug"), enough_memory("x"):
        raise RuntimeError("bug")


class _Greedy:
    def __call__(self, image):
        raise MemoryError


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_one_sentence(tmp_path, capsys, workers):
    path = tmp_path / "a.png"
    path.write_bytes(taken_in(1)[:90])
    for transform, words in ((None, "cannot be read"), (_Greedy(), "needs more memory")):
        samples = Images([(str(path), 0)])
        samples.transform = transform
        if transform is not None:
            path.write_bytes(taken_in(1))
        with pytest.raises(SystemExit) as stopped, user_errors(UserError):
            next(iter(data_loader(samples, num_workers=workers)))
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and printed.startswith(f"error: image {path} {words}")
        assert printed.count("\n") == 1


def test_ultralytics_installs_nothing_for_a_damaged_image(monkeypatch):
    """Once imported, its Image.open answers what Pillow cannot identify by installing a package."""

    def asked(*_, **__):
        raise AssertionError("Image.open was called")

    monkeypatch.setattr(Image, "open", asked)
    assert np.array_equal(read(saved(COLOUR)), PIXELS)
    with pytest.raises(UserError, match="image x cannot be read"):
        read(saved(COLOUR)[:20])
