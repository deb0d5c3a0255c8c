"""Batch norms with a small initial scale against PyTorch's and the equations of Davis and Frank (2022)."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fbn_plugin import (
    FilteredBatchNorm2d,
    FilteredBatchNormAct2d,
    InputNorm2d,
    RepresentativeBatchNorm2d,
    ScaledBatchNorm1d,
    ScaledBatchNorm2d,
    ScaledBatchNorm3d,
    ScaledBatchNormA1,
    ScaledBatchNormA2,
)
from fbn_plugin.layers.description import eval_affine

FORMS = [ScaledBatchNorm2d, ScaledBatchNormA1, ScaledBatchNormA2, InputNorm2d]
CASES = [
    (ScaledBatchNorm1d, nn.BatchNorm1d, (6, 4)),
    (ScaledBatchNorm1d, nn.BatchNorm1d, (3, 4, 7)),
    (ScaledBatchNorm2d, nn.BatchNorm2d, (3, 4, 5, 6)),
    (ScaledBatchNorm3d, nn.BatchNorm3d, (3, 4, 2, 3, 4)),
]


def data(shape=(3, 4, 5, 6), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 3 + 1


def randomized(form, **options):
    layer = form(4, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.uniform_(0.3, 1.5, generator=generator)
    return layer


def equation(layer, x):
    """Eq. 1 and the layer's form of the affine transformation, channel by channel in float64."""
    x, y = x.double().numpy(), np.empty(x.shape)
    get = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    for c in range(x.shape[1]):
        values = x[:, c]
        xhat = (values - values.mean()) / np.sqrt(((values - values.mean()) ** 2).mean() + layer.eps)
        gamma, beta = get["weight"][c], get["bias"][c] if "bias" in get else 0.0
        if isinstance(layer, ScaledBatchNormA1):
            y[:, c] = gamma * (xhat + beta)
        elif isinstance(layer, ScaledBatchNormA2):
            y[:, c] = gamma * (get["lambd"][c] * xhat + beta)
        else:
            y[:, c] = gamma * xhat + beta
    return torch.from_numpy(y)


@pytest.mark.parametrize("form", FORMS)
def test_training_is_the_papers_equation(form):
    layer = randomized(form, dtype=torch.float64, eps=1e-3)
    torch.testing.assert_close(layer(data(dtype=torch.float64)).detach(), equation(layer, data(dtype=torch.float64)))


@pytest.mark.parametrize("form", [ScaledBatchNormA1, ScaledBatchNormA2])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 7), (3, 4, 2, 3, 4)])
def test_the_other_forms_take_any_number_of_dimensions(form, shape):
    layer = randomized(form, dtype=torch.float64)
    x = data(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x).detach(), equation(layer, x))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        layer(torch.ones(4))


@pytest.mark.parametrize("scaled, plain, shape", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_the_plain_form_is_batch_norm_with_another_start(scaled, plain, shape, options):
    ours, native = scaled(4, gamma_init=0.25, **options), plain(4, **options)
    if native.affine:
        assert ours.weight.eq(0.25).all() and ours.bias.eq(0).all()
        native.load_state_dict(ours.state_dict())
    for step in range(2):
        assert torch.equal(ours(data(shape, step)), native(data(shape, step)))
    assert list(ours.state_dict()) == list(native.state_dict())
    assert torch.equal(ours.eval()(data(shape)), native.eval()(data(shape)))


def test_what_each_form_starts_at():
    assert ScaledBatchNorm2d(4).weight.eq(0.1).all()
    a2 = ScaledBatchNormA2(4, gamma_init=0.5)
    assert a2.weight.eq(0.5).all() and a2.lambd.eq(1).all() and a2.bias.eq(0).all()
    norm = InputNorm2d()
    torch.testing.assert_close(norm.weight, torch.full((3,), 0.058))
    assert norm.bias is None and [name for name, _ in norm.named_parameters()] == ["weight"]
    torch.testing.assert_close(norm(data((64, 3, 9, 9))).std(), torch.tensor(0.058), rtol=0.01, atol=0)
    assert FilteredBatchNorm2d(4).weight.eq(1).all()
    assert FilteredBatchNorm2d(4, gamma_init=0.1).weight.eq(0.1).all()
    assert FilteredBatchNormAct2d(4, gamma_init=0.1).weight.eq(0.1).all()


@pytest.mark.parametrize("form", [*FORMS, FilteredBatchNorm2d, RepresentativeBatchNorm2d])
def test_resetting_and_copies_keep_the_start(form):
    layer = form(4, gamma_init=0.2)
    start = {name: p.clone() for name, p in layer.named_parameters()}
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin(data())
        for parameter in twin.parameters():
            nn.init.uniform_(parameter)
        assert repr(twin) == repr(layer) and "gamma_init" in repr(layer)
        twin.reset_parameters()
        assert all(torch.equal(p, start[name]) for name, p in twin.named_parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [0, -0.1, 1.5, float("nan"), "small", True, None])
def test_gamma_init_out_of_range(form, bad):
    with pytest.raises(ValueError, match=r"gamma_init .*\(0, 1\]"):
        form(4, gamma_init=bad)


@given(st.floats(0, 1, exclude_min=True))
def test_any_gamma_init_in_range_is_the_start(gamma_init):
    layer = ScaledBatchNorm2d(2, gamma_init=gamma_init, dtype=torch.float64)
    assert layer.weight.tolist() == [gamma_init] * 2


@pytest.mark.parametrize("form", [ScaledBatchNormA1, ScaledBatchNormA2])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_the_other_forms_keep_batch_norms_books(form, options):
    ours, native = form(4, **options), nn.BatchNorm2d(4, **options)
    for step in range(2):
        ours(data(seed=step)), native(data(seed=step))
    for name, buffer in native.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer)
    if ours.affine:
        native.weight.data, native.bias.data = (t.detach() for t in ours.affine_terms())
    torch.testing.assert_close(ours.eval()(data()), native.eval()(data()))
    assert options.get("affine", True) or not list(ours.parameters())


@pytest.mark.parametrize("form", [ScaledBatchNormA1, ScaledBatchNormA2])
@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_is_one_affine_map(form, affine):
    layer = randomized(form, affine=affine)
    layer(data())
    scale, shift = (t.view(1, 4, 1, 1) for t in eval_affine(layer.eval()))
    torch.testing.assert_close(layer(data(seed=1)), (scale * data(seed=1) + shift).float())


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    layer = randomized(form, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    inputs = [data((2, 4, 3, 2), dtype=torch.float64), *(p.detach().clone() for p in layer.parameters())]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), x)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("form", FORMS)
def test_state_dict_round_trip(form, tmp_path):
    layer = randomized(form)
    layer(data())
    torch.save(layer.state_dict(), tmp_path / "weights.pth")
    fresh = form(4)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert torch.equal(fresh.eval()(data()), layer.eval()(data()))


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_and_channels_last(form):
    layer = randomized(form)
    expected = layer(data().bfloat16().float())
    for x in (data().bfloat16(), data().bfloat16().to(memory_format=torch.channels_last)):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and y.stride() == x.stride()
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = nn.Sequential(nn.Conv2d(4, 4, 1), layer)(data())
    assert y.dtype == torch.bfloat16 and layer.running_mean.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_compiles_in_one_graph(form):
    layer = randomized(form)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(data()), layer(data()))
    torch.testing.assert_close(compiled.running_var, layer.running_var)


def test_placement():
    for form in FORMS:
        layer = form(4, device="meta", dtype=torch.float64)
        assert all(p.is_meta and p.dtype == torch.float64 for p in layer.parameters())
