"""Traced and exported norms: recorded at one size of the input and right at others, in training too, and without this
package's operators in what is written."""

import copy
import functools
import io
import warnings

import pytest
import torch
from every_norm import ONE_SIZE, OPTIONS, SPECS, data, layer
from torch import nn

SIZES = ((3, 6, 5), (1, 12, 9), (4, 3, 16))  # images, height and width
NO_TRAINING = ("SyncBN", "ConvNorm")  # the first is for GPUs, the second has a function of Python's
TRACED = [spec for spec in SPECS + OPTIONS if spec not in ONE_SIZE]
# What the norm itself allows: SyncBN is PyTorch's, and in evaluation its BatchNorm.
EXPORTED = [spec for spec in SPECS if spec not in ("SyncBN", *ONE_SIZE)]
# In evaluation the others are batch normalization, or one of these without its filter.
TO_ONNX = ["FBN", "FrozenBN", "FGN(num_groups=4)", "FLN", "FIN", "FFRN", "LearnedNorm", "RBN"]


def traced(norm):
    """A copy of ``norm`` as ``torch.jit.trace`` sees it on two images of 7 x 8, stored and read."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of checks, which are not recorded
        warnings.simplefilter("ignore", FutureWarning)
        recorded = torch.jit.trace(copy.deepcopy(norm), data(2, 7, 8), check_trace=False)
        torch.jit.save(recorded, file)
        file.seek(0)
        return torch.jit.load(file)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spec", TRACED)
def test_traced_at_one_size_and_run_at_three(spec, training):
    if training and spec in NO_TRAINING:
        pytest.skip("it trains in Python only")
    norm = layer(spec).train(training)
    recorded = traced(norm)
    assert "fbn_plugin::" not in str(recorded.inlined_graph)
    if training and getattr(norm, "num_batches_tracked", None) is not None:
        norm(data(2, 7, 8))  # recording is a step
    for size in SIZES:
        results = []
        for module in (norm, recorded):
            module.zero_grad()
            x = data(*size).requires_grad_()
            y = module(x)
            y.square().sum().backward()
            results.append((y, x.grad, [p.grad for p in module.parameters()]))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(list(recorded.buffers()), list(norm.buffers()))


class EveryNorm(nn.Module):
    """The outputs of all norms for one input: exported together, as each export takes seconds."""

    def __init__(self, specs):
        super().__init__()
        self.norms = nn.ModuleList(layer(spec) for spec in specs)

    def forward(self, x):
        return tuple(norm(x) for norm in self.norms)


def open_sizes():
    return {0: torch.export.Dim("n", max=64), 2: torch.export.Dim("h", max=64), 3: torch.export.Dim("w", max=64)}


def test_exported_with_sizes_left_open():
    specs = EXPORTED if hasattr(torch.compiler, "is_exporting") else [spec for spec in EXPORTED if spec != "IN"]
    model = EveryNorm(specs).eval()
    program = torch.export.export(model, (data(2, 7, 8),), dynamic_shapes=(open_sizes(),)).module()
    for size in SIZES:
        for spec, output, expected in zip(specs, program(data(*size)), model(data(*size))):
            torch.testing.assert_close(output, expected, msg=functools.partial("{}: {}".format, spec))


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_with_sizes_left_open(dynamo, tmp_path):
    pytest.importorskip("onnxscript", reason="export to ONNX needs the package onnxscript")
    if dynamo and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("the exporter by graphs of PyTorch 2.6 cannot write what filters")
    onnxruntime = pytest.importorskip("onnxruntime", reason="what ONNX computes is asked of onnxruntime")
    model, path = EveryNorm(TO_ONNX).eval(), str(tmp_path / "norms.onnx")
    if dynamo:
        options = {"dynamic_shapes": (open_sizes(),), "optimize": False}
    else:
        options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n", 2: "h", 3: "w"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (data(2, 7, 8),), path, dynamo=dynamo, verbose=False, **options)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in SIZES:
        outputs = session.run(None, {session.get_inputs()[0].name: data(*size).numpy()})
        for spec, output, expected in zip(TO_ONNX, outputs, model(data(*size)), strict=True):
            output, say = torch.from_numpy(output), functools.partial("{}: {}".format, spec)
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, msg=say)
