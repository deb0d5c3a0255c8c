"""Export to ONNX: in evaluation, filtered batch normalization is a plain BatchNormalization node."""

import pytest
import torch
from torch import nn

import fbn_plugin

onnx = pytest.importorskip("onnx", reason="export to ONNX needs the package onnx")
pytest.importorskip("onnxscript", reason="export to ONNX needs the package onnxscript")


def exported(model, x, path):
    """The graph, after a comparison of its outputs with the model's where onnxruntime is installed."""
    torch.onnx.export(model, (x,), path, dynamo=True, optimize=False, verbose=False)
    try:
        import onnxruntime
    except ImportError:
        pass
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)
    return onnx.load(path).graph


def network(spec):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), fbn_plugin.get_norm(spec, 4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("spec", ["FBN(t_sigma=2)", "FrozenBN"])
def test_is_plain_batch_normalization(spec, tmp_path):
    model = network(spec)
    kinds = [node.op_type for node in exported(model, torch.randn(2, 3, 6, 6), str(tmp_path / "model.onnx")).node]
    assert kinds == ["Conv", "BatchNormalization", "Relu", "Conv"]


def test_a_folded_model_has_no_norm_left(tmp_path):
    model = fbn_plugin.fold_norms(network("FBN"))
    kinds = [node.op_type for node in exported(model, torch.randn(2, 3, 6, 6), str(tmp_path / "model.onnx")).node]
    assert [kind for kind in kinds if kind != "Identity"] == ["Conv", "Relu", "Conv"]
