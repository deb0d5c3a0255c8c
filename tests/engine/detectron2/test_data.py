"""Training data of a detectron2 run: images of rare categories come as often as detectron2's own sampler has them."""

from collections import Counter
from itertools import islice

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from tiny_detectron2 import datasets, prepare

from fbn_plugin.engine.data.sampling import repeat_factors
from fbn_plugin.engine.detectron2.data import TrainingData

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
