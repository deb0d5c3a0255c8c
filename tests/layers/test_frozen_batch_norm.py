"""Frozen batch normalization against its equation in NumPy, batch normalization in evaluation and torchvision's."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from fbn_plugin import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d, get_norm

CASES = [
    (FrozenBatchNorm1d, nn.BatchNorm1d, (5, 4)),
    (FrozenBatchNorm1d, nn.BatchNorm1d, (5, 4, 3)),
    (FrozenBatchNorm2d, nn.BatchNorm2d, (2, 4, 3, 5)),
    (FrozenBatchNorm3d, nn.BatchNorm3d, (2, 4, 3, 2, 3)),
]


def randomized(norm):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        norm.running_var.copy_(torch.rand(4, generator=generator) + 0.5)
    return norm


@pytest.mark.parametrize("cls, batch_norm, shape", CASES)
def test_is_batch_normalization_in_evaluation(cls, batch_norm, shape):
    theirs = randomized(batch_norm(4, eps=1e-3, dtype=torch.float64)).eval()
    ours = cls(4, eps=1e-3, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())  # with a num_batches_tracked
    x = torch.randn(shape, dtype=torch.float64)
    w, b, m, v = (
        getattr(theirs, key).detach().numpy().reshape(-1, *[1] * (len(shape) - 2)) for key in ours.state_dict()
    )
    expected = (x.numpy() - m) / np.sqrt(v + 1e-3) * w + b
    for flag in (True, False):
        np.testing.assert_allclose(ours.train(flag)(x).numpy(), expected, rtol=1e-12, atol=1e-12)
        with_grad = x.clone().requires_grad_()
        np.testing.assert_allclose(ours(with_grad).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(ours, with_grad)
    assert not list(ours.parameters())
    assert torch.equal(ours.running_mean, theirs.running_mean), "the statistics do not move"


def test_keys_and_values_are_torchvisions():
    theirs = torchvision.ops.FrozenBatchNorm2d(4)
    ours = FrozenBatchNorm2d(4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    theirs.load_state_dict(randomized(ours).state_dict())
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))


def test_copies_and_pickles():
    norm, x = randomized(FrozenBatchNorm2d(4)), torch.randn(2, 4, 3, 3)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert torch.equal(twin(x), norm(x))


@pytest.mark.parametrize("grad", [False, True])
def test_half_precision_and_memory_format(grad):
    norm = randomized(FrozenBatchNorm2d(4))
    x = torch.randn(2, 4, 5, 6).to(memory_format=torch.channels_last)
    expected = norm(x)
    half = x.bfloat16().requires_grad_(grad)
    for layer in (norm, copy.deepcopy(norm).bfloat16()):
        y = layer(half)
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(norm(x.requires_grad_(grad)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once_in_training_as_in_evaluation(dtype):
    norm = randomized(FrozenBatchNorm2d(4))
    norm.running_mean.copy_(torch.tensor([-20.0, 10.0, 5.0, 40.0]))
    x = (torch.randn(8, 4, 32, 32) + norm.running_mean.view(-1, 1, 1)).to(dtype).requires_grad_()
    exact = copy.deepcopy(norm).double().eval()(x.detach().double())
    training, evaluation = (norm.train(flag)(x).detach() for flag in (True, False))
    shift = (training.double() - exact).mean((0, 2, 3)).abs().max()
    assert shift <= 1.5 * (evaluation.double() - exact).mean((0, 2, 3)).abs().max() + 1e-6
    grad = torch.randn_like(x)
    norm.train()(x).backward(grad)
    torch.testing.assert_close(
        x.grad, (grad.double() * exact_scale(norm)).to(dtype), rtol=torch.finfo(dtype).eps, atol=0
    )


def exact_scale(norm):
    return copy.deepcopy(norm).double().eval_affine()[0].view(-1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_keeps_nothing_of_the_size_of_the_input(dtype):
    norm, x = randomized(FrozenBatchNorm2d(4)), torch.randn(2, 4, 9, 9, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        norm(x)
    assert sum(kept) <= 2 * norm.num_features


@pytest.mark.parametrize("layer", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_training_takes_an_input_of_another_precision(layer, given):
    norm, x = randomized(FrozenBatchNorm2d(4)).to(layer), torch.randn(2, 4, 3, 3, dtype=given, requires_grad=True)
    y = norm(x)
    assert y.dtype == given
    torch.testing.assert_close(y.double(), copy.deepcopy(norm).double()(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_transforms_follow(dtype):
    norm, x = randomized(FrozenBatchNorm2d(4)), torch.randn(3, 2, 4, 3, 3, dtype=dtype)
    x.requires_grad_()
    expected = norm.eval_affine()[0].view(-1, 1, 1).to(dtype).expand_as(x[0])
    if dtype is torch.float32:  # of mixed precisions torch has no rules for nn.BatchNorm2d either
        torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x.flatten(0, 1)).view_as(x))
        torch.testing.assert_close(torch.func.jvp(norm, (x[0],), (torch.ones_like(x[0]),))[1], expected)
    torch.testing.assert_close(torch.func.grad(lambda x: norm(x).sum())(x[0]), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = norm(torch.autograd.forward_ad.make_dual(x[0], torch.ones_like(x[0])))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)
    first = torch.autograd.grad(norm(x[0]).sum(), x, create_graph=True)[0]
    assert not first.requires_grad or not torch.autograd.grad(first.sum(), x)[0].any()


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_without_a_graph_break(grad):
    norm, x = randomized(FrozenBatchNorm2d(4)), torch.randn(2, 4, 5, 6, requires_grad=grad)
    torch.testing.assert_close(torch.compile(norm, backend="aot_eager", fullgraph=True)(x), norm(x))


def test_feature_extraction_takes_it_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), randomized(FrozenBatchNorm2d(4)), nn.ReLU())
    import fbn_plugin

    fbn_plugin.register()
    try:
        features = torchvision.models.feature_extraction.create_feature_extractor(model, {"1": "norm"})
    finally:
        fbn_plugin.unregister()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(features(x)["norm"], model[:2](x))


def test_spec_and_refusal():
    norm = get_norm("FrozenBN(eps=1e-3)", 4)
    assert type(norm) is FrozenBatchNorm2d and repr(norm) == "FrozenBatchNorm2d(4, eps=0.001)"
    with pytest.raises(ValueError, match="expected 4D input \\(got 2D input\\)"):
        norm(torch.randn(2, 4))
