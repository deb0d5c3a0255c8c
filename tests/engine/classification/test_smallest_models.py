"""The smallest model of a family, found without a weight."""

import timm
import torch

from fbn_plugin.engine.classification import smallest_models
from fbn_plugin.engine.classification.smallest_models import smallest_model


def test_it_is_the_smallest():
    names = timm.list_models(module="hardcorenas")
    counts = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in names}
    least = min(counts, key=counts.get)
    assert smallest_model(timm.create_model, names) == least
    assert smallest_model(timm.create_model, names, counts[least]) == least
    assert smallest_model(timm.create_model, names, counts[least] - 1) is None
    assert smallest_model(timm.create_model, timm.list_models(module="nest")) is None


def test_meta_models_have_the_same_norms():
    with torch.device("meta"), smallest_models._SkipInit():
        counted = smallest_models.batch_norms(timm.create_model("test_efficientnet"))
    assert counted.keys() == smallest_models.batch_norms(timm.create_model("test_efficientnet")).keys()
