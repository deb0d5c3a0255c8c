"""The operators: what PyTorch asks of them, compilation without a graph break, and the value before an activation that
they do not store."""

import copy
import re
import shutil

import pytest
import torch
from forms import BOTH_FORMS, act_inputs, batch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from fbn_plugin import FilteredBatchNorm2d, FilteredBatchNormAct2d, FilteredGroupNorm
from fbn_plugin.ops import (
    cpu,
    decompositions,
    dispatch,
    filtered_batch_norm,
    filtered_batch_norm_act,
    filtered_group_norm,
    functional,
    library,
    reference,
)
from fbn_plugin.ops.reference import ACTIVATIONS, Options, activate

operators = torch.ops.fbn_plugin


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("mode", ["exact", "paper"])
@pytest.mark.parametrize("num_groups", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_without_the_value_before_the_activation(activation, add, mode, num_groups, dtype):
    """The operator itself, which recomputes that value."""
    x, weight, bias, residual = act_inputs(dtype)
    residual = residual if add else None
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    y, _ = operators.filtered_norm(x, weight, bias, residual, num_groups, 2.0, 1e-5, True, mode, activation, 0.1)
    options = {"t_sigma": 2.0, "grad_mode": mode, "gaussian_correction": True}
    if num_groups:
        steps = filtered_group_norm(x, num_groups, weight, bias, **options)
    else:
        steps = filtered_batch_norm(x, weight=weight, bias=bias, training=True, **options)
    steps = activate(steps + residual if add else steps, activation, 0.1)
    torch.testing.assert_close(y, steps)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, steps)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_decompositions_are_the_operators(mode):
    """Both of them, in a graph with a whole step."""

    def step(x, weight, bias, residual):
        options = 2, 1.5, 1e-5, True, mode, "silu", 0.1
        y, _ = operators.filtered_norm(x, weight, bias, residual, *options)
        return y, *torch.autograd.grad(y.sin().sum(), [x, weight, bias, residual])

    arguments = act_inputs(shape=(4, 4, 5, 5))
    for table, names in (({}, {"filtered_norm", "filtered_norm_backward"}), (decompositions(), set())):
        graph = make_fx(step, decomposition_table=table)(*arguments)
        assert set(re.findall(r"fbn_plugin\.(\w+)", graph.code)) == names
        torch.testing.assert_close(graph(*arguments), step(*arguments))


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_a_decomposed_graph_can_be_trained(mode):
    """By autograd, which differentiates the standard operators."""
    x, weight, bias, _ = act_inputs(shape=(4, 4, 5, 5))

    def call(x):
        return filtered_batch_norm(x, weight=weight.detach(), bias=bias.detach(), training=True, grad_mode=mode)

    graph = make_fx(call, decomposition_table=decompositions())(x.detach())
    assert "fbn_plugin" not in graph.code
    got, expected = (torch.autograd.grad(f(x).sin().sum(), x) for f in (graph, call))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("activation, add", [("relu", True), ("silu", True), ("identity", True), ("relu", False)])
@pytest.mark.parametrize("kernels", [False, True])
def test_operator_contracts_with_an_activation(activation, add, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setitem(dispatch.BACKENDS, "cpu", reference)
    x, weight, bias, residual = act_inputs(torch.float32)
    arguments = (x, weight, bias, residual if add else None, 0, 2.0, 1e-5, False, "exact", activation, 0.01)
    torch.library.opcheck(operators.filtered_norm, arguments)


def test_residuals_that_are_not_like_the_input_are_refused():
    """Kernels read them by address."""
    x, *_ = act_inputs()
    options = 0, 2.0, 1e-5, False, "exact", "relu", 0.0
    for residual in (torch.randn(3, 1, 1), x.float()):
        with pytest.raises(ValueError, match="residual .*torch.float64 of \\(4, 3, 5, 5\\)"):
            operators.filtered_norm(x, None, None, residual, *options)


def test_the_outputs_of_an_operator_share_no_memory(monkeypatch):
    """Whatever a backend gives out: here both sums in one tensor."""
    backward = reference.backward

    def one_tensor(*arguments):
        dx, d_weight, d_bias, dz = backward(*arguments)
        return dx, *torch.stack([d_weight, d_bias]), dz

    monkeypatch.setattr(reference, "backward", one_tensor)
    x, weight, bias, _ = act_inputs()
    options = Options(0, 2.0, 1e-5, False, "exact")
    _, moments = library.normalize(x, weight, bias, None, None, options)
    _, d_weight, d_bias, _ = library.gradients(x.detach(), x.detach(), weight, None, None, moments, options)
    assert d_weight.untyped_storage().data_ptr() != d_bias.untyped_storage().data_ptr()


@pytest.mark.parametrize("num_groups", BOTH_FORMS)
@pytest.mark.parametrize("affine", [True, False])
def test_operator_contracts(num_groups, affine):
    x, weight, bias = (t.requires_grad_() for t in batch((2, 4, 3, 3), dtype=torch.float32))
    if not affine:
        weight = bias = None
    arguments = (x, weight, bias, None, num_groups, 2.0, 1e-5, False, "exact", "identity", 0.0)
    torch.library.opcheck(operators.filtered_norm, arguments)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation, add", [("identity", False), ("relu", True), ("silu", True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_without_a_graph_break(training, activation, add, momentum, fused, monkeypatch):
    monkeypatch.setattr(functional, "_fuses", lambda *_: fused)
    torch.compiler.reset()  # which has a limit for the forms of one function
    x, weight, bias, residual = act_inputs(torch.float32)

    def step(x, *running):
        statistics = dict(zip(("running_mean", "running_var", "num_batches_tracked"), running))
        options = {"training": training, "momentum": momentum, "t_sigma": 2.0, **statistics}
        if activation == "identity":
            return filtered_batch_norm(x, weight=weight, bias=bias, **options).tanh()
        residual_ = residual if add else None
        return filtered_batch_norm_act(
            x, weight=weight, bias=bias, **options, activation=activation, residual=residual_
        )

    def running():
        return torch.zeros(3), torch.ones(3), torch.tensor(3)

    eager, compiled = running(), running()
    expected = step(x, *eager)
    if activation != "identity":
        assert ("_Norm" in expected.grad_fn.name()) == (fused and training)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled, eager)
    assert eager[2] == 3 + training
    gradients = [torch.autograd.grad(result.square().sum(), x) for result in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "layer",
    [FilteredBatchNorm2d(4), FilteredBatchNormAct2d(4), FilteredGroupNorm(2, 4)],
    ids=lambda layer: type(layer).__name__,
)
def test_compiles_for_any_shape(layer):
    """Where the shapes are symbols, so are the numbers among a module's attributes."""
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 4, 9, 7), (2, 4, 5, 6)):
        x = torch.randn(shape, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs one for C++")
def test_a_compiler_may_lay_the_model_out_as_it_likes():
    """It gives convolutions channels-last, and the norms after them with no copy between."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), FilteredBatchNorm2d(8, t_sigma=2.0), nn.ReLU(), nn.Conv2d(8, 8, 3))
    other, x = copy.deepcopy(model), torch.randn(2, 3, 12, 12)
    strides = []

    class Noting:
        def __getattr__(self, name):
            return getattr(cpu, name)

        def forward(self, x, *arguments):
            strides.append(x.stride())
            return reference.forward(x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.BACKENDS, "cpu", Noting())
        y = torch.compile(other, fullgraph=True)(x)
        y.square().sum().backward()
    assert strides == [(800, 1, 80, 8)]
    model(x).square().sum().backward()
    for (name, expected), got in zip(model.named_parameters(), other.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)
    torch.testing.assert_close(dict(other.named_buffers()), dict(model.named_buffers()))
