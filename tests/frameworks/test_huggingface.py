"""Hugging Face Transformers: frozen backbones are converted and trained, and come back from ``save_pretrained``."""

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin import FilteredBatchNorm2d, NormReport, convert_norm

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    ResNetForImageClassification,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    TimmBackboneConfig,
)

from fbn_plugin.frameworks import huggingface as adapter  # noqa: E402
from fbn_plugin.frameworks.huggingface import convert_pretrained  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "registered")

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


@pytest.fixture
def registered():
    adapter.register()
    adapter.register()
    yield
    adapter.unregister()
    adapter.unregister()


def detr(timm: bool) -> DetrForObjectDetection:
    backbone = (
        TimmBackboneConfig(backbone="test_resnet", out_indices=[4])
        if timm
        else ResNetConfig(**RESNET, out_features=["stage4"])
    )
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5, "num_labels": 3}
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, **sizes, **HEADS))


def rt_detr() -> RTDetrForObjectDetection:
    backbone = RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    sizes = {"d_model": 16, "encoder_hidden_dim": 16, "decoder_layers": 1, "num_queries": 5, "num_denoising": 0}
    channels = {"encoder_in_channels": [16, 16, 16], "decoder_in_channels": [16, 16, 16], "num_labels": 3}
    return RTDetrForObjectDetection(RTDetrConfig(backbone_config=backbone, **sizes, **channels, **HEADS))


MODELS = {
    "DETR": lambda: detr(timm=False),
    "DETR on timm": lambda: detr(timm=True),
    "RT-DETR": rt_detr,
    "ResNet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=3)),
}
# frozen norms, and norms that are trained: RT-DETR's neck has them
FROZEN = {"DETR": (12, 0), "DETR on timm": (15, 0), "RT-DETR": (15, 42), "ResNet": (0, 12)}


def build(name: str) -> nn.Module:
    """In evaluation mode, with statistics and scales that are not the first ones."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
    return model


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def kinds(model: nn.Module) -> Counter:
    return Counter(type(module).__name__ for module in model.modules() if "Norm2d" in type(module).__name__)


def train_a_step(model: nn.Module) -> torch.Tensor:
    if isinstance(model, ResNetForImageClassification):
        labels = torch.tensor([0, 1])
    else:
        box = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
        labels = [box, box]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss = model.train()(images(), labels=labels).loss
    loss.backward()
    optimizer.step()
    model.eval()
    return loss


@pytest.mark.parametrize("name", MODELS)
def test_converted_it_computes_the_same_and_trains(name):
    model = build(name).requires_grad_(True)
    expected = model(images()).logits
    frozen, trained = FROZEN[name]
    assert sum("Frozen" in kind for kind in kinds(model).elements()) == frozen
    assert kinds(model)["BatchNorm2d"] == trained
    if frozen:
        assert convert_norm(model, "FBN", sources="FrozenBN") is model
        assert kinds(model)["FilteredBatchNorm2d"] == frozen and kinds(model)["BatchNorm2d"] == trained
    if trained:
        convert_norm(model, "FBN")
    norms = [module for module in model.modules() if isinstance(module, FilteredBatchNorm2d)]
    assert len(norms) == frozen + trained == sum(kinds(model).values()) and {norm.eps for norm in norms} == {1e-5}
    torch.testing.assert_close(model(images()).logits, expected, rtol=1e-4, atol=1e-4)
    before = [norm.running_mean.clone() for norm in norms]
    assert train_a_step(model).isfinite()
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before))
    assert all(norm.weight.grad.isfinite().all() for norm in norms)


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name, tmp_path):
    model = build(name).requires_grad_(True)  # when it is loaded, DETR freezes parts of its backbone
    report = NormReport()
    assert convert_pretrained(model, "FBN(t_sigma=3)", report=report) is model
    assert kinds(model)["FilteredBatchNorm2d"] == len(report.changed) > 8
    train_a_step(model)
    expected = model(images()).logits
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert kinds(loaded) == kinds(model) and {m.t_sigma for m in loaded.modules() if hasattr(m, "t_sigma")} == {3}
    assert torch.equal(loaded(images()).logits, expected)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    train_a_step(loaded)

    adapter.unregister()  # where nobody has heard of this package, it is the model that it was
    plain = type(model).from_pretrained(tmp_path).eval()
    assert kinds(plain) == kinds(MODELS[name]())
    torch.testing.assert_close(plain(images()).logits, expected, rtol=1e-4, atol=1e-4)
    convert_norm(plain.requires_grad_(True), "FBN", sources=("BN", "FrozenBN"))
    assert kinds(plain) == kinds(model)
    torch.testing.assert_close(plain(images()).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_automatic_classes_and_a_part_of_the_model(tmp_path):
    model = convert_pretrained(build("DETR").requires_grad_(True), "FBN")
    model.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForObjectDetection.from_pretrained(tmp_path).eval()(images()).logits, model(images()).logits
    )
    body = AutoModel.from_pretrained(tmp_path).eval()
    assert kinds(body) == kinds(model) and kinds(model)["FilteredBatchNorm2d"] > 8
    assert torch.equal(body(images()).last_hidden_state, model.model(images()).last_hidden_state)


def test_only_what_was_converted(tmp_path):
    model = convert_pretrained(build("RT-DETR"), "FBN", sources="BN")
    model.save_pretrained(tmp_path)
    loaded = RTDetrForObjectDetection.from_pretrained(tmp_path)
    assert kinds(loaded) == kinds(model) == {"RTDetrFrozenBatchNorm2d": 15, "FilteredBatchNorm2d": 42}


@pytest.mark.parametrize("spec", ["ScaledBN-A1", "FGN", "ConvNorm", "FrozenBN", "LearnedNorm(affine=True)"])
def test_norms_with_other_parameters_come_back(spec, tmp_path):
    model = convert_pretrained(build("ResNet"), spec, sources="BN")
    if spec != "FrozenBN":
        train_a_step(model)
    model.save_pretrained(tmp_path)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert kinds(loaded) == kinds(model)
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_conversions_are_repeated_in_their_order(tmp_path):
    model = build("RT-DETR")
    convert_pretrained(model, "FBN", sources="FrozenBN")
    convert_pretrained(model, "FGN", sources="BN")
    convert_pretrained(model, "FLN", sources="GN")
    model.save_pretrained(tmp_path)
    assert kinds(RTDetrForObjectDetection.from_pretrained(tmp_path)) == kinds(model) == {"FilteredLayerNorm2d": 57}
    with pytest.raises(ValueError, match="unknown norm 'FBM'"):
        convert_pretrained(model, "FBM")
    assert len(model.config.fbn_plugin) == 3  # what failed is not noted


def test_every_frozen_norm_of_the_package_is_known():
    """They are copies of one class, each in the module of its model."""
    files = sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    files = [file for file in files if "FrozenBatchNorm2d(nn.Module)" in file.read_text("utf-8")]
    assert len(files) >= 10
    for file in files:
        module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        (cls,) = (value for key, value in vars(module).items() if key.endswith("FrozenBatchNorm2d"))
        norm = cls(4)
        for value in norm._buffers.values():
            value.uniform_(0.5, 1.5)
        norm.running_var.mul_(1e-4)  # so that eps counts
        model, x = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval(), torch.randn(2, 3, 4, 4)
        expected = model(x)
        torch.testing.assert_close(fbn_plugin.fold_norms(model)(x), expected, rtol=1e-4, atol=1e-4)
        model = convert_norm(nn.Sequential(norm), "FBN", sources="FrozenBN")
        assert type(model[0]) is FilteredBatchNorm2d
        x = torch.randn(2, 4, 4, 4)
        torch.testing.assert_close(model.eval()(x), norm(x), rtol=1e-4, atol=1e-4)


def test_weight_decay_of_the_trainer_is_that_of_batch_normalization():
    """Its rule goes by names, and by ``nn.LayerNorm``: norms called ``normalization`` are decayed, BN as FBN."""
    names = importlib.import_module("transformers.trainer_pt_utils").get_parameter_names
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    for name in ("ResNet", "RT-DETR"):
        plain = names(build(name), [nn.LayerNorm], patterns)
        assert names(convert_norm(build(name), "FBN"), [nn.LayerNorm], patterns) == plain


def test_unregister():
    assert transformers.PreTrainedModel.post_init is adapter._post_init
    adapter.unregister()
    assert transformers.PreTrainedModel.post_init is adapter._transformers_post_init
