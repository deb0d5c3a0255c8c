"""timm builds the papers' networks by name."""

import warnings

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import FilteredBatchNorm1d, FilteredBatchNorm2d, norm_factory
from fbn_plugin import frameworks as adapter
from fbn_plugin.engine.classification.model import create_model
from fbn_plugin.frameworks import timm_models
from fbn_plugin.models import NETWORKS, AllCNN, cifar

NAMES = sorted({**NETWORKS, **cifar.NETWORKS})


@pytest.fixture(autouse=True)
def registered():
    adapter.register()
    yield
    adapter.unregister()


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, _BatchNorm)]


def test_names_come_and_go():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timm_models.register()  # a second time
    assert sorted(timm.list_models(module="timm_models")) == NAMES
    assert all(timm.is_model(name) for name in NAMES)
    adapter.unregister()
    adapter.unregister()
    assert not any(timm.is_model(name) for name in NAMES)
    assert not set(NAMES) & set(timm.list_models())
    assert timm.is_model("resnet18") and timm.get_pretrained_cfg("resnet18")
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model("lenet5")


@pytest.mark.parametrize("form", ["fbn", "FBN(t_sigma=4)", "fbn(t_sigma=4)", norm_factory("FBN"), FilteredBatchNorm2d])
def test_norm_layer(form):
    model = timm.create_model("all_cnn_c", norm_layer=form)
    assert type(model) is AllCNN and kinds(model) == [FilteredBatchNorm2d] * 8


def test_norm_layer_of_dense_layers_and_none():
    assert kinds(timm.create_model("mlp_3x100", norm_layer="fbn")) == [FilteredBatchNorm1d] * 3
    assert not kinds(timm.create_model("mlp_3x100", norm_layer=""))
    assert not kinds(timm.create_model("mlp_3x100_plain"))
    with pytest.raises(ValueError, match="did you mean 'fbn'"):
        timm.create_model("all_cnn_c", norm_layer="fbm")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("all_cnn_c_dwck", "all_cnn_c_learned")])
def test_data_config(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    network = {**NETWORKS, **cifar.NETWORKS}[name]
    config = resolve_model_data_config(model)
    assert config["input_size"] == (len(network.mean), network.size, network.size)
    assert (config["mean"], config["std"]) == (network.mean, network.std)
    assert model.num_classes == network.num_classes == model.pretrained_cfg["num_classes"]
    assert model.pretrained_cfg["architecture"] == name
    model.eval()(torch.empty(1, *config["input_size"], device="meta"))


def test_arguments_of_timm():
    model = timm.create_model("lenet5", num_classes=7, in_chans=3, drop_rate=0.5, norm_after="conv1")
    assert model(torch.randn(2, 3, 28, 28)).shape == (2, 7) and model.drop.p == 0.5
    assert [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)] == ["features.conv1.norm"]
    with pytest.raises(RuntimeError, match="pretrained"):
        timm.create_model("lenet5", pretrained=True)


def test_the_training_tool_builds_them_and_puts_the_norm_in():
    adapter.unregister()
    assert kinds(create_model("lenet5_all", "FBN", in_chans=1)) == [FilteredBatchNorm2d] * 2 + [FilteredBatchNorm1d] * 2
    assert kinds(create_model("lenet5_plain", in_chans=1)) == []
    with pytest.raises(ValueError, match="lenet5_plain .*no batch normalization.*FBN"):
        create_model("lenet5_plain", "FBN")
    with pytest.raises(ValueError, match="did you mean 'lenet5'"):
        create_model("lenet", in_chans=1)
