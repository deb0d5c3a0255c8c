"""Data of a detectron2 run: images of rare categories come as often as in its own sampler, and those that cannot be
read are named."""

from collections import Counter
from itertools import islice

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from tiny_detectron2 import datasets, prepare

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
