"""The papers' networks: as many parameters and maps of the size that the papers' tables say, norms where they say."""

import copy
import pickle
import re
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import (
    NORMS,
    FilteredBatchNorm1d,
    FilteredBatchNorm2d,
    LearnedStatsNorm2d,
    PerActivationBatchNorm2d,
    norm_factory,
    parse_spec,
)
from fbn_plugin.models import NETWORKS, VGG16, AlexNet, AllCNN, Inception, LeNet5, PooledResNet, SigmoidMLP
from fbn_plugin.models.inception import MODULES

# Figure 5 of Batch normalization as printed: name, output size, #1x1, #3x3 reduce, #3x3, double #3x3 reduce, double
# #3x3, pool + proj.
FIGURE_5 = """
    3a 28x28x256    64  64  64  64  96 avg+32
    3b 28x28x320    64  64  96  64  96 avg+64
    3c 28x28x576     0 128 160  64  96 max
    4a 14x14x576   224  64  96  96 128 avg+128
    4b 14x14x576   192  96 128  96 128 avg+128
    4c 14x14x576   160 128 160 128 160 avg+128
    4d 14x14x576    96 128 192 160 192 avg+128
    4e 14x14x1024    0 128 192 192 256 max
    5a 7x7x1024    352 192 320 160 224 avg+128
    5b 7x7x1024    352 192 320 192 224 max+128
"""


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(name: str, device: str = "cpu", **given) -> nn.Module:
    """On the device "meta", what is large is as quick as what is small."""
    network = NETWORKS[name]
    arguments = {"num_classes": network.num_classes, "in_chans": len(network.mean), **network.arguments, **given}
    with torch.device(device):
        return network.build(**arguments)


def images(name: str, count: int = 2, device: str = "cpu") -> torch.Tensor:
    network = NETWORKS[name]
    return torch.randn(count, len(network.mean), network.size, network.size, device=device)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def expected(layers: list[tuple[int, int, int]], norms: bool) -> int:
    """Parameters of layers (in, out, kernel area), of which the last has no norm: a scale and a shift with a norm, a
    bias without."""
    *hidden, (size, classes, area) = layers
    return sum(i * o * k + (2 if norms else 1) * o for i, o, k in hidden) + size * classes * area + classes


def map_sizes(model: nn.Module, x: torch.Tensor, pattern: str) -> list[tuple[int, int]]:
    """Channels and width of the outputs of the modules whose names match, in the order they are called in."""
    seen, hooks = [], []
    for name, module in model.named_modules():
        if re.fullmatch(pattern, name):
            hooks.append(
                module.register_forward_hook(lambda m, i, output: seen.append((output.shape[1], output.shape[3])))
            )
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


# --- parameters and map sizes against the papers' tables -------------------------------------------------------------

CHAINS = {
    "lenet5": [(1, 6, 25), (6, 16, 25), (16 * 5 * 5, 120, 1), (120, 84, 1), (84, 10, 1)],
    "alexnet_cifar": [
        *[(3, 96, 121), (96, 256, 25), (256, 384, 9), (384, 384, 9), (384, 256, 9)],
        *[(256 * 6 * 6, 4096, 1), (4096, 4096, 1), (4096, 10, 1)],
    ],
    "all_cnn_c": [
        *[(3, 96, 9), (96, 96, 9), (96, 96, 9), (96, 192, 9), (192, 192, 9), (192, 192, 9), (192, 192, 9)],
        *[(192, 192, 1), (192, 10, 1)],
    ],
    "mlp_3x100": [(784, 100, 1), (100, 100, 1), (100, 100, 1), (100, 10, 1)],
    "vgg16_all": [
        *[(3, 64, 9), (64, 64, 9), (64, 128, 9), (128, 128, 9), (128, 256, 9), (256, 256, 9), (256, 256, 9)],
        *[(256, 512, 9), *[(512, 512, 9)] * 5, (512 * 7 * 7, 4096, 1), (4096, 4096, 1), (4096, 1000, 1)],
    ],
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_layers_have_the_parameters_of_their_tables(name):
    assert count(build(f"{name}_plain", "meta")) == expected(CHAINS[name], norms=False)
    everywhere = "lenet5_all" if name == "lenet5" else name
    assert count(build(everywhere, "meta")) == expected(CHAINS[name], norms=True)
    assert not norms_of(build(f"{name}_plain", "meta"))


def test_well_known_numbers_of_parameters():
    assert count(build("lenet5_plain", "meta")) == 61_706
    assert count(build("alexnet_cifar_plain", "meta", num_classes=1000)) == 62_378_344
    assert count(build("vgg16_all_plain", "meta")) == 138_357_544


@pytest.mark.parametrize(
    ("name", "depth", "stem", "stages"),
    [
        ("pooled_resnet20", 20, (64, 3), [(64, 3), (128, 3), (256, 3)]),
        ("pooled_resnet44", 44, (64, 3), [(64, 7), (128, 7), (256, 7)]),
        ("pooled_resnet34", 34, (96, 5), [(96, 3), (192, 4), (384, 6), (768, 3)]),
    ],
)
def test_residual_networks_have_the_layers_of_their_tables(name, depth, stem, stages):
    layers = [(3, stem[0], stem[1] ** 2)]
    for width, blocks in stages:
        for _ in range(2 * blocks):
            layers.append((layers[-1][1], width, 9))
    layers.append((layers[-1][1], 10, 1))
    model = build(name, "meta")
    assert len(layers) == len(layers_of(model)) == depth
    assert count(model) == expected(layers, norms=True)
    assert len(norms_of(model)) == depth - 1
    first, sizes = (112, [56, 28, 14, 7]) if name == "pooled_resnet34" else (36, [36, 18, 9])
    seen = map_sizes(model, images(name, device="meta"), r"features\.(stem|stage\d)")
    assert seen == [(stem[0], first), *zip((width for width, _ in stages), sizes)]


def inception_parameters(projections: dict[str, int]) -> int:
    """Of figure 5 with other projections in some rows: weights, and two a channel where a norm is."""
    layers = [(3, 8, 49, 0), (24, 64, 1, 1), (64, 64, 1, 1), (64, 192, 9, 1)]
    channels = 192
    for line in FIGURE_5.split("\n")[1:-1]:
        name, _, one, reduce, three, double_reduce, double, pool = line.split()
        one, reduce, three, double_reduce, double = map(int, (one, reduce, three, double_reduce, double))
        proj = projections.get(name, int(pool.partition("+")[2] or 0))
        layers += [(channels, one, 1, 1), (channels, reduce, 1, 1), (reduce, three, 9, 1), (channels, proj, 1, 1)]
        layers += [(channels, double_reduce, 1, 1), (double_reduce, double, 9, 1), (double, double, 9, 1)]
        channels = one + three + double + (proj or channels)
    return sum(i * o * k + 2 * o * norm for i, o, k, norm in layers) + channels * 1000 + 1000


def test_inception_has_the_parameters_and_maps_of_figure_5():
    model = build("bn_inception", "meta")
    assert count(model) == inception_parameters({"4c": 96, "4d": 96})
    printed = [line.split()[1].split("x") for line in FIGURE_5.split("\n")[1:-1]]
    seen = map_sizes(model, images("bn_inception", device="meta"), r"features\.inception_..")
    halved = {2: 14, 7: 7}  # 3c and 4e print the size of their input
    assert seen == [(int(c), halved.get(i, int(size))) for i, (size, _, c) in enumerate(printed)]
    seen = map_sizes(model, images("bn_inception", device="meta"), r"features\.(conv|pool)\d")
    assert seen == [(64, 112), (64, 56), (192, 56), (192, 28)]
    assert model.num_features == 1024


def test_figure_5_does_not_have_the_parameters_that_its_paper_counts():
    """The text says 13.6 million; the figure has 11.3 with the projections of 4c and 4d, 11.2 with their totals."""
    assert round(inception_parameters({}) / 1e6, 1) == 11.3
    assert round(count(build("bn_inception", "meta")) / 1e6, 1) == 11.2


def test_the_separable_convolution_has_the_parameters_that_googlenet_prints_for_it():
    """Szegedy et al. (2014), table 1: 2.7K. The figure refers to that paper."""
    first = build("bn_inception", "meta").features.conv1
    assert sum(layer.weight.numel() for layer in layers_of(first)) == 2712


def test_inception_pools_as_figure_5_says():
    for line in FIGURE_5.split("\n")[1:-1]:
        name, *_, pool = line.split()
        assert MODULES[name][5] is (nn.AvgPool2d if pool.startswith("avg") else nn.MaxPool2d)


@pytest.mark.parametrize(
    "name", ["bn_inception", "bn_inception_baseline", "bn_inception_plain", "bn_inception_sigmoid_plain"]
)
def test_only_the_first_inceptions_have_dropout_and_local_response_normalization(name):
    model = build(name, "meta")
    lrn = [module for module in model.modules() if isinstance(module, nn.LocalResponseNorm)]
    assert (len(lrn), model.drop.p) == ((0, 0.0) if name == "bn_inception" else (2, 0.4))
    assert bool(norms_of(model)) == (not name.endswith("_plain"))
    assert any(isinstance(module, nn.Sigmoid) for module in model.modules()) == ("sigmoid" in name)
    model(images(name, device="meta"))


def test_all_cnn_c_narrow():
    narrow = build("all_cnn_c_dwck", "meta", width_divisor=4)
    assert narrow(images("all_cnn_c_dwck", device="meta")).shape[-1] == 10
    assert [narrow.features.conv1[0].out_channels, narrow.features.conv8[0].out_channels] == [24, 48]


def test_alexnet_maps():
    seen = map_sizes(build("alexnet_cifar", "meta"), images("alexnet_cifar", device="meta"), r"features\.(conv|pool)\d")
    assert seen == [(96, 55), (96, 27), (256, 27), (256, 13), (384, 13), (384, 13), (256, 13), (256, 6)]
    narrow = build("alexnet_cifar", "meta", width_divisor=4)
    assert narrow(images("alexnet_cifar", device="meta")).shape[-1] == 10
    assert [narrow.features.fc6[0].in_features, narrow.features.fc7[0].out_features] == [36 * 64, 1024]


@pytest.mark.parametrize(
    ("name", "sides"), [("vgg16_all", [112, 56, 28, 14, 7, 7]), ("vgg16_all_cifar", [16, 8, 4, 2, 1, 1])]
)
def test_vgg_maps(name, sides):
    seen = map_sizes(build(name, "meta"), images(name, device="meta"), r"features\.(pool\d|average)")
    assert seen == list(zip((64, 128, 256, 512, 512, 512), sides))


def test_vgg_takes_larger_images_by_averaging():
    model, x = VGG16(dense_size=8, map_size=1, num_classes=2).eval(), torch.randn(2, 3, 64, 64)
    maps = model.features[: list(dict(model.features.named_children())).index("average")](x)
    torch.testing.assert_close(model.features.average(maps)[..., 0, 0], maps.mean((2, 3)))
    assert model(x).shape == (2, 2)


# --- where the norms are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["conv1", "conv2", "fc1", "fc2"])
def test_lenet5_has_one_norm_after_the_chosen_layer(where):
    model = build(f"lenet5_{where}")
    assert list(norms_of(model)) == [f"features.{where}.norm"]
    several = LeNet5("FBN", norm_after=[where, "fc1"])
    assert set(norms_of(several)) == {f"features.{where}.norm", "features.fc1.norm"}


def test_lenet5_has_its_norm_between_the_last_two_dense_layers_by_default():
    assert list(norms_of(LeNet5())) == ["features.fc2.norm"]
    assert len(norms_of(LeNet5(norm_after="all"))) == 4
    assert not norms_of(LeNet5(norm_after=()))


@pytest.mark.parametrize(
    "name", ["alexnet_cifar", "all_cnn_c", "mlp_3x100", "lenet5_all", "bn_inception_sigmoid", "vgg16_all"]
)
def test_every_layer_but_the_logits_has_norm_then_activation_and_no_bias(name):
    model = build(name, "meta")
    activation = nn.Sigmoid if "sigmoid" in name or "mlp" in name else nn.ReLU
    units = [m for m in model.modules() if isinstance(m, nn.Sequential) and hasattr(m, "norm")]
    for unit in units:
        layer, norm, act = unit
        assert layer.bias is None and isinstance(act, activation)
        assert type(norm) is (nn.BatchNorm1d if isinstance(layer, nn.Linear) else nn.BatchNorm2d)
    first = name.startswith("bn_inception")  # the depthwise part of the separable convolution
    assert len(units) == len(norms_of(model)) == len(layers_of(model)) - 1 - first
    assert isinstance(model.get_classifier(), nn.Linear) and model.get_classifier().bias is not None


class StackedNorm(nn.BatchNorm2d):
    """Takes a stack of kernels, and exempts them from weight decay, as ConvNorm2d does."""

    def __init__(self, num_features: int, kernel_sizes: tuple[int, ...] = ()) -> None:
        super().__init__(num_features)
        self.kernel_sizes = kernel_sizes
        self.kernels = nn.ParameterList(torch.zeros(num_features, size, size) for size in kernel_sizes)

    def no_weight_decay(self) -> set[str]:
        return {f"kernels.{i}" for i in range(len(self.kernels))}


def test_all_cnn_c_gives_each_norm_the_kernel_stack_of_the_papers_table():
    model = AllCNN(StackedNorm, kernel_stacks=True)
    stacks = [norm.kernel_sizes for norm in norms_of(model).values()]
    assert stacks == [(4, 2, 2, 2)] * 2 + [(4, 2, 2)] * 3 + [(2, 2)] * 2 + [(2,)]
    sides = [side for _, side in map_sizes(model, images("all_cnn_c"), r"features\.conv\d")]
    assert sides == [32, 32, 16, 16, 16, 8, 8, 8]
    assert [norm.kernel_sizes for norm in norms_of(AllCNN(StackedNorm)).values()] == [()] * 8
    with pytest.raises(ValueError, match="unknown option of BN 'kernel_sizes'"):
        AllCNN("BN", kernel_stacks=True)


def test_weight_decay_leaves_out_what_the_norms_exempt():
    model = AllCNN(StackedNorm, kernel_stacks=True)
    decayed, exempt = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())[::-1]
    kernels = {id(p) for norm in norms_of(model).values() for p in norm.kernels}
    assert len(kernels) == 2 * 4 + 3 * 3 + 2 * 2 + 1 and kernels <= {id(p) for p in exempt["params"]}
    assert {id(p) for p in decayed["params"]} == {id(layer.weight) for layer in layers_of(model)}
    assert AllCNN().no_weight_decay() == set()


@pytest.mark.skipif("ConvNorm" not in NORMS, reason="ConvNorm is not registered")
def test_all_cnn_c_with_conv_norm():
    model = build("all_cnn_c_dwck")
    model(images("all_cnn_c")).sum().backward()
    # One kernel entry a position and channel, beside scale and shift.
    extra = 2 * 96 * (16 + 3 * 4) + (96 + 2 * 192) * (16 + 2 * 4) + 2 * 192 * (4 + 4) + 192 * 4
    assert count(model) == count(build("all_cnn_c")) + extra


def test_all_cnn_c_with_learned_statistics_has_the_parameters_that_the_paper_counts():
    """Esposito and Ganaba, section 5.1: 170 in the first layer, 194 in each of the seven others."""
    model = build("all_cnn_c_learned")
    norms = [module for module in model.modules() if isinstance(module, LearnedStatsNorm2d)]
    assert [count(norm) for norm in norms] == [170] + [194] * 7
    channels = [[conv.out_channels for conv in net if isinstance(conv, nn.Conv1d)] for net in norms[0].children()]
    assert channels == [[4, 4, 1], [4, 4, 1]]
    kernels = [[conv.kernel_size[0] for conv in net if isinstance(conv, nn.Conv1d)] for net in norms[7].children()]
    assert kernels == [[4, 3, 2, 3], [4, 3, 2, 3]]
    model(images("all_cnn_c_learned")).sum().backward()
    scales_and_shifts = sum(2 * norm.num_features for norm in norms_of(build("all_cnn_c")).values())
    assert count(model) == count(build("all_cnn_c")) - scales_and_shifts + 170 + 7 * 194
    # As many as the stacks of kernels, and as batch normalization, have far more of.
    assert count(model) < count(build("all_cnn_c")) < count(build("all_cnn_c_dwck"))


def test_the_ensembles_inceptions():
    """Section 4.2.3 of Batch normalization: norms per activation in the last layers, larger weights, little dropout."""
    with torch.device("meta"):
        model = Inception(per_activation=("5a", "5b"), drop_rate=0.05)
    model(images("bn_inception", device="meta"))
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, PerActivationBatchNorm2d)]
    assert len(norms) == 14 and all(m.positions == 49 for _, m in norms)
    assert {name.split(".")[1] for name, _ in norms} == {"inception_5a", "inception_5b"} and model.drop.p == 0.05
    torch.manual_seed(0)
    plain = Inception(num_classes=2)
    torch.manual_seed(0)
    larger = Inception(num_classes=2, weight_gain=2.0)
    for one, other in zip(layers_of(plain), layers_of(larger), strict=True):
        gain = 2 if isinstance(one, nn.Conv2d) else 1
        torch.testing.assert_close(other.weight, gain * one.weight, rtol=0, atol=0)
    for options, sentence in (({"weight_gain": 0}, "got 0"), ({"per_activation": ["5c"]}, "3a, .*, got '5c'")):
        with pytest.raises(ValueError, match=sentence):
            Inception(**options)


# --- norm_layer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    ["FBN(t_sigma=4)", parse_spec("FBN(t_sigma=4)"), norm_factory("FBN(t_sigma=4)")],
    ids=["spec", "parsed", "factory"],
)
def test_every_form_of_norm_layer_fits_convolutions_and_dense_layers(form):
    norms = list(norms_of(LeNet5(form, norm_after="all")).values())
    assert [type(norm) for norm in norms] == [FilteredBatchNorm2d] * 2 + [FilteredBatchNorm1d] * 2
    assert {norm.t_sigma for norm in norms} == {4.0}


@pytest.mark.parametrize("none", [None, ""])
def test_no_norm(none):
    model = PooledResNet((1, 1), (4, 8), norm_layer=none)
    assert not norms_of(model) and all(layer.bias is not None for layer in layers_of(model))


@pytest.mark.parametrize("spec", ["GN(num_groups=4)", "LN", "FGN(num_groups=4)", "FLN"])
def test_norms_of_a_sample_in_dense_layers(spec):
    model, x = SigmoidMLP(spec), images("mlp_3x100", 3)
    out = model(x)
    torch.testing.assert_close(out[:1], model(x[:1]))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# --- they run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("all_cnn_c_dwck", "all_cnn_c_learned")])
def test_logits_of_the_papers_images(name):
    model, x = build(name, "meta").eval(), images(name, 3, "meta")
    assert model(x).shape == (3, NETWORKS[name].num_classes)
    head = model.forward_head(model.forward_features(x), pre_logits=True)
    assert head.shape == (3, model.num_features)
    model.reset_classifier(0)
    assert model(x).shape == head.shape


RUNS = ["lenet5_all", "alexnet_cifar", "all_cnn_c", "mlp_3x100", "bn_inception", "pooled_resnet20", "vgg16_all_cifar"]


@pytest.mark.parametrize("name", RUNS)
def test_gradients_reach_every_parameter(name):
    model = build(name, norm_layer="FBN")
    x = images(name)
    if name in ("bn_inception", "pooled_resnet20"):  # of any size, and slow at the paper's
        x = x[..., :40, :40]
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["lenet5", "mlp_3x100", "all_cnn_c"])
def test_copies_and_state(name):
    model = build(name, norm_layer="FBN(t_sigma=3)")
    x = images(name, 4)
    model(x)
    model.eval()
    other = build(name, norm_layer="BN").eval()
    other.load_state_dict(model.state_dict())
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x))


def test_images_of_28_pixels_are_put_in_the_middle_of_32():
    model, x = LeNet5().eval(), torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model(x), model(F.pad(x, (2, 2, 2, 2))))


def test_dropout():
    for name, inside in (("alexnet_cifar", ("drop6", "drop7")), ("lenet5", ()), ("vgg16_all", ("drop6",))):
        model = build(name, "meta", drop_rate=0.25)
        assert [getattr(model.features, drop).p for drop in inside] == [0.25] * len(inside)
        assert model.drop.p == (0.0 if name == "alexnet_cifar" else 0.25)


@pytest.mark.parametrize(
    ("make", "size", "words"),
    [
        (LeNet5, (1, 30, 30), "LeNet5 .*28x28 or 32x32.*30x30"),
        (AlexNet, (3, 227, 224), "AlexNet .*227x227.*227x224"),
        (SigmoidMLP, (1, 32, 32), "SigmoidMLP .*28x28.*32x32"),
    ],
)
def test_images_of_another_size(make, size, words):
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        make()(torch.zeros(1, *size))


def test_bad_arguments():
    with pytest.raises(ValueError, match="norm_after .*conv1, conv2, fc1, fc2 or all.*'fc3'"):
        LeNet5(norm_after=["fc1", "fc3"])
    with pytest.raises(ValueError, match="did you mean 'FBN'"):
        AllCNN("FBM")


# --- initial weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all_cnn_c_plain", "pooled_resnet20", "vgg16_all_cifar_plain"])
def test_rectified_networks_start_with_the_variance_that_keeps_their_signal(name):
    model = build(name)
    *convolutions, last = layers_of(model)
    for conv in convolutions:
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() * (fan_in / 2) ** 0.5 == pytest.approx(1, abs=0.1)
    assert last.weight.abs().max() <= (6 / last.in_features) ** 0.5 + 1e-6
    assert last.weight.std().item() * (last.in_features / 2) ** 0.5 == pytest.approx(1, abs=0.1)
    assert all(layer.bias is None or not layer.bias.any() for layer in layers_of(model))


def test_the_sigmoid_network_starts_with_small_gaussian_weights():
    for model, std in ((SigmoidMLP(), 0.1), (SigmoidMLP(None, init_std=0.02), 0.02)):
        for layer in layers_of(model):
            assert layer.weight.std().item() / std == pytest.approx(1, abs=0.1)
            assert layer.weight.abs().max() > 2.2 * std  # as no uniform distribution has
            assert layer.bias is None or not layer.bias.any()


# --- they learn ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "BN", "FBN(t_sigma=3)"])
@pytest.mark.parametrize("make", [LeNet5, lambda norm: AllCNN(norm, in_chans=1)], ids=["lenet5", "all_cnn_c"])
def test_they_learn_digits(make, norm):
    data = load_digits()
    x = torch.tensor(data.images[:32], dtype=torch.float32)[:, None] / 8 - 1
    x = F.interpolate(x, scale_factor=4 if make is LeNet5 else 1)
    y = torch.tensor(data.target[:32])
    model = make(norm)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_importing_the_networks_brings_in_no_framework():
    code = "import fbn_plugin.models, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "torchvision", "detectron2"} & set(modules)
