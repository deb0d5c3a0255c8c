"""RBN, IEBN and their minus forms against the equation of Davis and Frank (2022), section 4.5."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fbn_plugin import GatedBatchNorm2d, InstanceEnhancementBatchNorm2d, RepresentativeBatchNorm2d, get_norm
from fbn_plugin.layers.description import eval_affine, evaluates_by_constants

POOLED = [RepresentativeBatchNorm2d, InstanceEnhancementBatchNorm2d]
ALL = [*POOLED, GatedBatchNorm2d]
SHAPES = [(6, 4), (3, 4, 7), (3, 4, 5, 6), (3, 4, 2, 3, 4)]


def data(shape=(3, 4, 5, 6), seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn((*shape[:2], *[1] * (len(shape) - 2)), generator=generator, dtype=dtype)  # of different means
    return torch.randn(shape, generator=generator, dtype=dtype) * 3 + images + 1


def randomized(form, **options):
    layer = form(4, **{"dtype": torch.float64, **options})
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        parameter.data.uniform_(-1.5, 1.5, generator=generator)
    return layer


def equation(layer, x, training=True):
    """y = gamma * sigmoid(v * GAP(z) + w) * xhat + beta, image by image and channel by channel in float64."""
    x, y = x.double().numpy(), np.empty(x.shape)
    get = {name: t.detach().double().numpy() for name, t in layer.state_dict().items()}
    for c in range(x.shape[1]):
        mean = x[:, c].mean() if training else get["running_mean"][c]
        var = ((x[:, c] - mean) ** 2).mean() if training else get["running_var"][c]
        for n in range(x.shape[0]):
            xhat = (x[n, c] - mean) / math.sqrt(var + layer.eps)
            inner = get["gate_bias"][c]
            if not isinstance(layer, GatedBatchNorm2d):
                z = xhat if isinstance(layer, RepresentativeBatchNorm2d) else x[n, c]
                inner += get["gate_weight"][c] * np.mean(z)
            gate = 1 / (1 + math.exp(-inner))
            y[n, c] = (get["weight"][c] if layer.affine else 1) * gate * xhat + (get["bias"][c] if layer.affine else 0)
    return torch.from_numpy(y)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
def test_training_and_evaluation_are_the_papers_equation(form, shape, affine):
    layer, x = randomized(form, affine=affine, eps=1e-3), data(shape)
    torch.testing.assert_close(layer(x).detach(), equation(layer, x))
    layer.eval()
    torch.testing.assert_close(layer(data(shape, 1)).detach(), equation(layer, data(shape, 1), training=False))


@pytest.mark.parametrize("name, start", [("RBN", 0.731), ("RBN-", 0.731), ("IEBN", 0.269), ("IEBN-", 0.269)])
def test_the_scale_starts_as_printed(name, start):
    x = data(dtype=torch.float32)
    torch.testing.assert_close(get_norm(name, 4)(x), start * nn.BatchNorm2d(4)(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(form, training, memory_format):
    layer = randomized(form).train(training)
    layer.running_var.fill_(2.0)
    names = [name for name, _ in layer.named_parameters()]
    x = data((3, 4, 3, 2)).contiguous(memory_format=memory_format)
    inputs = [x, *(p.detach().clone() for p in layer.parameters())]

    def call(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), x)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("form", POOLED)
@pytest.mark.parametrize("shape, affine", [((6, 4), True), ((3, 4, 5), False), ((2, 4, 2, 2, 2), False)])
def test_gradcheck_of_other_shapes_and_without_affine(form, shape, affine):
    layer = randomized(form, affine=affine)
    assert torch.autograd.gradcheck(layer, data(shape).requires_grad_(), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, data(shape).requires_grad_())
    layer(data(shape)).square().sum().backward()
    assert layer.gate_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"momentum": 0.3, "eps": 0.1}], ids=str)
def test_running_statistics_are_those_of_batch_norm(form, options):
    ours, native = form(4, **options), nn.BatchNorm2d(4, **options)
    for step in range(3):
        x = data(seed=step, dtype=torch.float32)
        ours(x), native(x)
    for name, buffer in native.named_buffers():
        torch.testing.assert_close(dict(ours.named_buffers())[name], buffer)
    before = copy.deepcopy(ours.state_dict())
    ours.eval()(x)
    assert all(torch.equal(before[key], value) for key, value in ours.state_dict().items())


@pytest.mark.parametrize("form", ALL)
def test_without_tracking_evaluation_uses_the_batch(form):
    layer = randomized(form, track_running_stats=False)
    assert torch.equal(layer.eval()(data()), layer.train()(data()))


@pytest.mark.parametrize("form", ALL)
def test_copies_checkpoints_and_resets(form, tmp_path):
    layer = randomized(form)
    layer(data())
    torch.save(layer.state_dict(), tmp_path / "weights.pth")
    fresh = form(4, dtype=torch.float64)
    start = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    for twin in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.eval()(data()), layer.eval()(data()))
        twin.reset_parameters()
        assert all(torch.equal(start[key], value) for key, value in twin.state_dict().items())


@pytest.mark.parametrize("form", ALL)
def test_half_precision_and_channels_last(form):
    layer = randomized(form, dtype=torch.float32)
    half = data().bfloat16()
    expected = layer(half.float())
    gradients = []
    for x in (half, half.to(memory_format=torch.channels_last), half.float()):
        x = x.detach().requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        assert y.dtype == x.grad.dtype == x.dtype and y.stride() == x.stride()
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2)
        assert layer.eval()(x).dtype == x.dtype
        layer.train()
        gradients.append(x.grad.float())
    torch.testing.assert_close(gradients[0], gradients[2], rtol=5e-2, atol=5e-2)
    torch.testing.assert_close(gradients[1], gradients[2], rtol=5e-2, atol=5e-2)
    narrow = randomized(form, dtype=torch.bfloat16)
    narrow(half).float().sum().backward()
    assert narrow.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nn.Sequential(nn.Conv2d(4, 4, 1), layer)(data(dtype=torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", POOLED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_mean_far_from_zero_costs_no_more_than_in_batch_norm(form, memory_format):
    """The gradient's error in float32 is at most twice that of PyTorch's batch normalization at the same place."""
    x = (data((4, 4, 8, 8)) + 300).contiguous(memory_format=memory_format)
    g = data((4, 4, 8, 8), 1)
    errors = {}
    for layer in (randomized(form), nn.BatchNorm2d(4, dtype=torch.float64)):
        grads = []
        for dtype in (torch.float64, torch.float32):
            inputs = x.to(dtype).to(torch.float32).to(dtype).requires_grad_()
            copy.deepcopy(layer).to(dtype)(inputs).backward(g.to(torch.float32).to(dtype))
            grads.append(inputs.grad.double())
        errors[type(layer)] = ((grads[0] - grads[1]).norm() / grads[0].norm()).item()
    assert errors[form] < 2 * errors[nn.BatchNorm2d] + 1e-5, errors


@pytest.mark.parametrize("form", ALL)
def test_compiles_in_one_graph(form):
    layer = randomized(form, dtype=torch.float32)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    inputs = [data(dtype=torch.float32).requires_grad_() for _ in range(2)]
    for module, x in zip((layer, compiled), inputs):
        module(x).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(layer.gate_bias.grad, compiled.gate_bias.grad)
    torch.testing.assert_close(layer.running_var, compiled.running_var)


@pytest.mark.parametrize("form", ALL)
def test_bad_and_empty_inputs(form):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        form(4)(torch.ones(1, 4, 1, 1))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        form(4)(torch.ones(4))
    empty = torch.empty(0, 4, 3, 3, requires_grad=True)
    form(4)(empty).sum().backward()
    assert empty.grad.shape == empty.shape


def test_only_the_minus_forms_have_an_affine_evaluation():
    layer = randomized(GatedBatchNorm2d)
    layer(data())
    scale, shift = (t.view(1, 4, 1, 1) for t in eval_affine(layer.eval()))
    torch.testing.assert_close(layer(data(seed=1)), scale * data(seed=1) + shift)
    assert not any(evaluates_by_constants(form(4)) for form in POOLED)


@pytest.mark.parametrize("form", ALL)
def test_evaluation_exports(form):
    layer = randomized(form, dtype=torch.float32).eval()
    exported = torch.export.export(layer, (data(dtype=torch.float32),))
    torch.testing.assert_close(exported.module()(data(dtype=torch.float32)), layer(data(dtype=torch.float32)))
