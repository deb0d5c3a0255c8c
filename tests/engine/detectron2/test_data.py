"""Data of a detectron2 run: images of rare categories come as often as in its own sampler, and those that cannot be
read are named."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import DatasetCatalog, detection_utils
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.data.transforms import AugmentationList
from detectron2.utils.file_io import PathHandler, PathManager
from image_files import NO_FILES, READ, REFUSED
from tiny_detectron2 import datasets, prepare

from fbn_plugin.engine.data.decoding import read_image
from fbn_plugin.engine.data.sampling import repeat_factors
from fbn_plugin.engine.detectron2.data import NamingMapper, TrainingData
from fbn_plugin.engine.run.cli import UserError

pytestmark = pytest.mark.detectron2


@pytest.mark.parametrize("sqrt", [True, False])
def test_repeat_factors_are_detectron2s(shapes, tmp_path, sqrt):
    options = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 1.0]
    options += ["DATALOADER.REPEAT_SQRT", sqrt, "SOLVER.IMS_PER_BATCH", 2, "OUTPUT_DIR", tmp_path]
    cfg = prepare(*datasets(shapes, 2), *options)
    records = [each for each in DatasetCatalog.get(f"{shapes}:train") if each["annotations"]]
    theirs = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 1.0, sqrt=sqrt)
    ours = repeat_factors([{each["category_id"] for each in record["annotations"]} for record in records], 1.0, sqrt)
    assert ours == pytest.approx(theirs.tolist()) and ours.max() > 1
    seen = Counter(each["image_id"] for batch in islice(TrainingData(cfg).loader(0), 150) for each in batch)
    total = sum(seen.values())
    for record, factor in zip(records, ours):
        assert seen[record["image_id"]] / total == pytest.approx(factor / ours.sum(), abs=0.04)


@pytest.mark.parametrize("name", READ)
def test_images_are_those_of_the_other_tasks(shapes, tmp_path, name):
    cfg = prepare(*datasets(shapes, 2), "OUTPUT_DIR", tmp_path, "INPUT.FORMAT", "RGB")
    path = tmp_path / "image"
    path.write_bytes(READ[name][0])
    expected = np.asarray(read_image(path))
    mapper = NamingMapper(cfg, is_train=False)
    mapper.augmentations = AugmentationList([])
    record = {"file_name": str(path), "height": expected.shape[0], "width": expected.shape[1]}
    for image_format, theirs in (("RGB", expected), ("BGR", expected[:, :, ::-1])):
        mapper.image_format = image_format
        assert np.array_equal(mapper(record)["image"].permute(1, 2, 0).numpy(), theirs)
    mapper.image_format = "L"
    assert mapper(record)["image"].shape == (1, *expected.shape[:2])


@pytest.mark.parametrize("name", [*REFUSED, *NO_FILES])
def test_images_are_refused_as_by_the_other_tasks(shapes, tmp_path, name):
    cfg = prepare(*datasets(shapes, 2), "OUTPUT_DIR", tmp_path)
    path = tmp_path / "image"
    if name in REFUSED:
        path.write_bytes(REFUSED[name][0])
    else:
        NO_FILES[name][0](path)
    sentences = []
    for look in (read_image, lambda path: NamingMapper(cfg)({"file_name": str(path), "height": 6, "width": 8})):
        with pytest.raises(UserError) as error:
            look(path)
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1]


def test_label_maps_are_read_as_numbers(shapes, tmp_path):
    """16 bits a pixel too, of which an image has the upper ones."""
    cfg = prepare(*datasets(shapes, 2), "OUTPUT_DIR", tmp_path)
    labels = np.arange(48, dtype=np.uint16).reshape(6, 8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    (tmp_path / "image.png").write_bytes(READ["colour"][0])
    mapper = NamingMapper(cfg, is_train=False)
    mapper.augmentations = AugmentationList([])
    record = {"file_name": str(tmp_path / "image.png"), "sem_seg_file_name": str(tmp_path / "labels.png")}
    assert np.array_equal(mapper(record)["sem_seg"].numpy(), labels)
    (tmp_path / "labels.png").unlink()
    with pytest.raises(UserError, match=r"labels\.png is not there"):
        mapper(record)
    assert detection_utils.read_image.__module__ == detection_utils.__name__  # theirs again


def test_images_of_other_places_go_through_path_manager(shapes, tmp_path):
    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["kept://"]

        def _get_local_path(self, path, **_):
            return str(tmp_path / path.removeprefix("kept://"))

    cfg = prepare(*datasets(shapes, 2), "OUTPUT_DIR", tmp_path)
    (tmp_path / "image.png").write_bytes(READ["colour"][0])
    PathManager.register_handler(Handler(), allow_override=True)
    assert NamingMapper(cfg, is_train=False)({"file_name": "kept://image.png"})["width"] == 8
    with pytest.raises(UserError, match=r"x\.png is not there"):
        NamingMapper(cfg)({"file_name": "kept://x.png"})


def test_images_that_cannot_be_read_are_named(shapes, tmp_path, monkeypatch):
    """Whatever Pillow makes of them; an error that is none of the image's stays what it is."""
    cfg = prepare(*datasets(shapes, 2), "OUTPUT_DIR", tmp_path)
    mapper, (record, *_) = NamingMapper(cfg, is_train=True), DatasetCatalog.get(f"{shapes}:train")
    for content in (b"", b"P6 80 x 255 "):
        (tmp_path / "bad.ppm").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.ppm"):
            mapper({**record, "file_name": str(tmp_path / "bad.ppm")})
    with pytest.raises(UserError, match="Mismatched image shape for image .*0.png"):
        mapper({**record, "width": 1})
    monkeypatch.setattr(mapper, "augmentations", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mapper(record)
    monkeypatch.setattr(mapper, "augmentations", lambda *_: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):
        mapper(record)
