"""The operator with residual and activation: against the three steps one by one, and what PyTorch asks of operators."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fbn_plugin.layers import FilteredBatchNormAct2d
from fbn_plugin.ops import filtered_batch_norm, filtered_batch_norm_act, filtered_norm, reference
from fbn_plugin.ops.filtered_norm import _filtered_norm_act
from fbn_plugin.ops.reference import ACTIVATIONS, activate


def inputs(dtype=torch.float64, shape=(4, 3, 5, 5)):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1 for _ in range(2))
    x[0, :, 0, 0] = 40.0
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    bias = torch.randn(shape[1], generator=generator, dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias, residual)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_three_steps(activation, add, training):
    x, weight, bias, residual = inputs()
    residual = residual if add else None
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    statistics = [(torch.zeros(3).double(), torch.ones(3).double()) for _ in range(2)]
    y = filtered_batch_norm_act(
        x, weight, bias, *statistics[0], training, t_sigma=2.0, activation=activation, residual=residual
    )
    steps = filtered_batch_norm(x, weight, bias, *statistics[1], training, t_sigma=2.0)
    steps = activate(steps + residual if add else steps, activation, 0.01)
    torch.testing.assert_close(y, steps)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, steps)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(*statistics)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_gradients_without_the_value_before_the_activation(activation, add, mode):
    """The operator itself, which recomputes that value, on its reference backend."""
    x, weight, bias, residual = inputs()
    residual = residual if add else None
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    y, *_ = _filtered_norm_act(x, weight, bias, residual, 0, 2.0, 1e-5, True, mode, activation, 0.1)
    options = {"t_sigma": 2.0, "grad_mode": mode, "gaussian_correction": True}
    steps = filtered_batch_norm(x, weight, bias, training=True, **options)
    steps = activate(steps + residual if add else steps, activation, 0.1)
    torch.testing.assert_close(y, steps)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, steps)]
    torch.testing.assert_close(*gradients)


def test_double_backward_is_refused():
    x, *_ = inputs()
    y, *_ = _filtered_norm_act(x, None, None, None, 0, 2.0, 1e-5, False, "exact", "silu", 0.1)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        first.sum().backward()


@pytest.mark.parametrize("activation, add", [("relu", True), ("silu", True), ("identity", True), ("relu", False)])
def test_operator_contracts(activation, add):
    x, weight, bias, residual = inputs(torch.float32)
    arguments = (x, weight, bias, residual if add else None, 0, 2.0, 1e-5, False, "exact", activation, 0.01)
    torch.library.opcheck(torch.ops.fbn_plugin.filtered_norm_act, arguments)


def test_running_statistics_operator_contract():
    statistics = [torch.zeros(3), torch.ones(3)]
    moments = [torch.randn(3), torch.rand(3), torch.full((3,), 10.0)]
    torch.library.opcheck(torch.ops.fbn_plugin.update_running_stats, (*statistics, *moments, 0.1))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fused", [False, True])
def test_compiles_without_a_graph_break(training, fused, monkeypatch):
    if fused:  # as on a GPU, with the reference in place of the kernels
        monkeypatch.setattr(reference, "refuses", lambda x: None, raising=False)
        monkeypatch.setattr(filtered_norm, "triton", reference)
    x, weight, bias, residual = inputs(torch.float32)

    def step(x, mean, var):
        return filtered_batch_norm_act(x, weight, bias, mean, var, training, t_sigma=2.0, residual=residual)

    eager, compiled = (torch.zeros(3), torch.ones(3)), (torch.zeros(3), torch.ones(3))
    expected = step(x, *eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *compiled)
    assert ("FilteredNormAct" in expected.grad_fn.name().title().replace("_", "")) == (fused and training)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(compiled, eager)
    gradients = [torch.autograd.grad(result.square().sum(), x) for result in (got, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype, fused, monkeypatch):
    if fused:
        monkeypatch.setattr(reference, "refuses", lambda x: None, raising=False)
        monkeypatch.setattr(filtered_norm, "triton", reference)
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), FilteredBatchNormAct2d(4, t_sigma=3.0)
    parameters = [*conv.parameters(), *norm.parameters()]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", dtype=dtype):
        y = norm(conv(torch.randn(4, 3, 8, 8)))
        loss = y.float().square().mean() + y[:, 0].float().mean()
    assert y.dtype == dtype and norm.weight.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0, "no step was skipped"
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(parameters[:1], before[:1]))


def test_residuals_that_kernels_do_not_take_are_added_as_pytorch_adds(monkeypatch):
    monkeypatch.setattr(reference, "refuses", lambda x: None, raising=False)
    monkeypatch.setattr(filtered_norm, "triton", reference)
    x, *_ = inputs(torch.float32)
    for residual in (torch.randn(3, 1, 1), torch.randn(x.shape, dtype=torch.float64)):
        y = filtered_batch_norm_act(x, training=True, t_sigma=2.0, residual=residual)
        expected = (filtered_batch_norm(x, training=True, t_sigma=2.0) + residual).relu()
        torch.testing.assert_close(y, expected)


def test_function_transforms_see_through_the_fused_layer(monkeypatch):
    monkeypatch.setattr(reference, "refuses", lambda x: None, raising=False)
    monkeypatch.setattr(filtered_norm, "triton", reference)
    x, weight, bias, residual = inputs()

    def loss(x, residual):
        y = filtered_batch_norm_act(x, weight, bias, training=True, t_sigma=2.0, residual=residual)
        return y.square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))(x.detach(), residual.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(x, residual), (x, residual)))


@pytest.mark.parametrize("activation, add", [("relu", False), ("relu", True), ("silu", True), ("identity", True)])
def test_keeps_no_more_for_the_backward_pass_than_batch_norm_and_relu(activation, add, monkeypatch):
    monkeypatch.setattr(reference, "refuses", lambda x: None, raising=False)
    monkeypatch.setattr(filtered_norm, "triton", reference)
    x, residual = (torch.randn(4, 8, 16, 16, requires_grad=True) for _ in range(2))
    residual = residual if add else None

    def kept(step):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}), lambda t: t
        ):
            y = step()  # alive, so that no address is taken twice
        return sum(n for n in storages.values() if n >= x.nbytes), y

    layers = FilteredBatchNormAct2d(8, activation=activation), nn.BatchNorm2d(8)
    fused, _ = kept(lambda: layers[0](x, residual))
    native, _ = kept(lambda: F.relu_(layers[1](x) if residual is None else layers[1](x).add_(residual)))
    assert fused <= native
    if activation == "identity" or not add:
        assert fused == x.nbytes, "the input alone, which the layer before has made anyway"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation": "gelu"}, "activation must be one of 'identity', 'relu', 'leaky_relu', 'silu', got 'gelu'"),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, "negative_slope must not be below 0, got -0.1"),
    ],
)
def test_refusals(options, message):
    for build in (
        lambda: filtered_batch_norm_act(torch.randn(4, 2), **options),
        lambda: FilteredBatchNormAct2d(2, **options),
    ):
        with pytest.raises(ValueError, match=message):
            build()
