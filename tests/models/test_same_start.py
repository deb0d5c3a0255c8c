"""One seed, one start: the weights of convolutions and dense layers do not depend on which norm stands between them."""

import functools

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

import fbn_plugin
from fbn_plugin.engine.classification.model import create_model
from fbn_plugin.frameworks import timm_models
from fbn_plugin.layers.description import describe
from fbn_plugin.layers.random_start import separate_stream
from fbn_plugin.models.base import unit

NORMS = [name for name, _ in fbn_plugin.NORMS]


def layers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all convolutions and dense layers that are not in a norm."""
    inside = {part for norm in model.modules() if describe(norm) is not None for part in norm.modules()}
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd | nn.Linear) and module not in inside
    }


def start(build) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Those weights with a seed, and the state of the stream that all later draws come from."""
    torch.manual_seed(3)
    return layers_of(build()), torch.get_rng_state()


def assert_same_start(build, other) -> None:
    (weights, state), (expected, expected_state) = start(build), start(other)
    assert weights and weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    assert torch.equal(state, expected_state)


@functools.cache
def converted_plain(name: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return start(lambda: create_model(name, "BN"))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", ["lenet5_convs", "all_cnn_c", "test_resnet", "test_efficientnet"])
def test_all_norms_start_alike(network, norm):
    """By conversion, as the classification tool builds them, and by ``norm_layer``."""
    weights, state = start(lambda: create_model(network, norm))
    expected, expected_state = converted_plain(network)
    assert weights.keys() == expected.keys() and torch.equal(state, expected_state)
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
    if network in ("all_cnn_c", "test_resnet"):
        fbn_plugin.register()
        assert_same_start(lambda: timm.create_model(network, norm_layer=norm), lambda: create_model(network, "BN"))


@pytest.mark.parametrize("network", ["resnet18_cifar", "mobilenetv2_100_cifar", "pooled_resnet20"])
def test_the_papers_networks_with_norms_that_draw_numbers(network):
    for norm in ("ConvNorm(kernel_sizes=(2, 2))", "LearnedNorm"):
        assert_same_start(lambda norm=norm: create_model(network, norm), lambda: create_model(network, "FBN"))


def test_networks_that_differ_in_their_norms_alone():
    timm_models.register()
    for first, *others in (
        ("all_cnn_c", "all_cnn_c_dwck", "all_cnn_c_learned", "all_cnn_c_plain"),
        ("lenet5", "lenet5_all", "lenet5_plain"),
        ("vgg16_all_cifar", "vgg16_all_cifar_plain"),
    ):
        for other in others:
            assert_same_start(lambda name=other: timm.create_model(name), lambda name=first: timm.create_model(name))


def test_norms_draw_by_the_seed_and_differ():
    def kernels(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        model = create_model("test_resnet", "ConvNorm(kernel_sizes=(2, 2))")
        return [p.flatten() for name, p in model.named_parameters() if "kernel" in name]

    first, again, other = kernels(0), kernels(0), kernels(1)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    assert len({tuple(kernel[:8].tolist()) for kernel in first}) == len(first) > 10


def test_a_norm_of_ones_own_that_draws_numbers():
    class Drawn(nn.BatchNorm2d):
        def reset_parameters(self):
            super().reset_parameters()
            nn.init.uniform_(self.weight)

    torch.manual_seed(0)
    nn.Conv2d(3, 4, 3, bias=False)
    plain = torch.get_rng_state()
    torch.manual_seed(0)
    unit(3, 4, Drawn, kernel_size=3)
    assert torch.equal(torch.get_rng_state(), plain)


def test_a_separate_stream_is_none_of_the_others_numbers():
    torch.manual_seed(0)
    with separate_stream():
        inside = torch.rand(3)
        with separate_stream():
            assert not torch.equal(torch.rand(3), inside)
    assert not torch.equal(torch.rand(3), inside)
