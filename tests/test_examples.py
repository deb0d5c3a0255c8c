"""The scripts of examples/ run as they are, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import fbn_plugin

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_is_short_enough_to_copy():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 7 and all(30 <= length <= 64 for length in lengths.values()), lengths


def test_timm_finetuning_learns():
    pytest.importorskip("timm")
    assert load("timm_finetune").main() > 90


def test_torchvision_detector_learns():
    pytest.importorskip("torchvision")
    losses = load("torchvision_detector").main()
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_convert_fold_export(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("torchvision")
    folded = load("convert_fold_export").main(str(tmp_path / "model.onnx"))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert "20 norms changed, 0 left" in capsys.readouterr().out
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Conv" in operators and "BatchNormalization" not in operators


def filtered(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules() if "Norm2d" in type(module).__name__}


def test_ultralytics_detector(tmp_path):
    pytest.importorskip("ultralytics")
    model = load("ultralytics_detector").main(str(tmp_path), epochs=1)
    assert filtered(model.model) == {fbn_plugin.FilteredBatchNorm2d}
    assert len(list(tmp_path.rglob("*.torchscript"))) == 1


def test_huggingface_detector(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    try:
        model, loaded, losses = load("huggingface_detector").main(str(tmp_path))
    finally:
        fbn_plugin.unregister()
    assert fbn_plugin.FilteredBatchNorm2d in filtered(model) and filtered(loaded) == filtered(model)
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_mmengine_classifier(tmp_path):
    pytest.importorskip("mmengine")
    pytest.importorskip("mmcv")
    try:
        model = load("mmengine_classifier").main(str(tmp_path))
    finally:
        fbn_plugin.unregister()
    assert filtered(model) == {fbn_plugin.FilteredBatchNorm2d} and model.stem.bn.num_batches_tracked == 30


@pytest.mark.detectron2
def test_detectron2_trainer(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    from detectron2.data import DatasetCatalog

    try:
        trainer = load("detectron2_trainer").main(str(tmp_path))
    finally:
        DatasetCatalog.pop("squares", None)
        fbn_plugin.unregister()
    filtered = [each for each in trainer.model.modules() if isinstance(each, fbn_plugin.FilteredBatchNorm2d)]
    assert len(filtered) == 20 + 8 + 4  # ResNet-18, pyramid, mask head
    assert all(each.num_batches_tracked == 10 for each in filtered if each.num_features == 64)
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
