"""Export to ONNX: in evaluation, filtered batch normalization is a plain BatchNormalization node; in training it is the
filter, in ONNX's standard operators."""

import copy

import pytest
import torch
from torch import nn

import fbn_plugin

onnx = pytest.importorskip("onnx", reason="export to ONNX needs the package onnx")
pytest.importorskip("onnxscript", reason="export to ONNX needs the package onnxscript")


def run(path, x):
    """The only output, by onnxruntime or, where that is not installed, by onnx itself."""
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        session = ReferenceEvaluator(path)
        (output,) = session.run(None, {session.input_names[0]: x.numpy()})
    else:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


def exported(model, x, path):
    """The graph, after a comparison of its outputs with the model's."""
    torch.onnx.export(model, (x,), path, dynamo=True, optimize=False, verbose=False)
    torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-5)
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


def by_graph(model, x, path):
    if not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("this exporter of PyTorch 2.6 does not know the operators that it makes of a variance itself")
    sizes = ({0: "n", 2: "h", 3: "w"},)
    torch.onnx.export(model, (x,), path, dynamo=True, optimize=False, verbose=False, dynamic_shapes=sizes)


def by_trace(model, x, path):
    mode = torch.onnx.TrainingMode.TRAINING
    options = {"do_constant_folding": False, "input_names": ["x"], "dynamic_axes": {"x": [0, 2, 3]}}
    torch.onnx.export(model, (x,), path, dynamo=False, training=mode, **options)


@pytest.mark.parametrize("export", [by_graph, by_trace])
def test_training_is_a_function_of_standard_operators(export, tmp_path):
    """Of any number of images and any size."""
    torch.manual_seed(0)
    norms = [
        fbn_plugin.get_norm("FBN(t_sigma=1.5)", 4),
        fbn_plugin.get_norm("FBN(t_sigma=1.5, momentum=None, grad_mode='paper', gaussian_correction=True)", 4),
        fbn_plugin.get_norm("FGN(num_groups=2, t_sigma=1.5)", 4),
        fbn_plugin.FilteredBatchNormAct2d(4, activation="silu", t_sigma=1.5),
    ]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms)
    images = [torch.randn(size) for size in ((4, 3, 6, 6), (3, 3, 9, 7))]
    for x in images:
        x[0, 0] *= 5
    path = str(tmp_path / "model.onnx")
    export(copy.deepcopy(model), images[0], path)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    for x in images:
        filtered = copy.deepcopy(model)(x).detach()
        torch.testing.assert_close(run(path, x), filtered, rtol=1e-4, atol=1e-5)
