"""Bands, shares and galleries against what they are by definition, on layers whose values are known."""

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fbn_plugin
from fbn_plugin.analysis.bands import SET, batch_probability, measure_bands
from fbn_plugin.analysis.layer_names import LayerName, parse_layer_name

BY_RUNNING = "running statistics"


def images(*counts, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 3, size, size, generator=generator) for count in counts]


def known_norm(channels=3):
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.copy_(torch.linspace(-1, 1, channels))
    norm.running_var.copy_(torch.linspace(0.01, 1, channels))
    nn.init.constant_(norm.weight, 0)  # nothing of it is seen
    return norm


def assert_describes(layer, z):
    z = z.double().numpy().ravel()
    assert layer.count == z.size
    np.testing.assert_allclose([layer.minimum, layer.maximum], [z.min(), z.max()], rtol=1e-5)
    for share, (low, high) in layer.bands.items():
        ends = np.quantile(z, [0.5 - share / 200, 0.5 + share / 200], method="inverted_cdf")
        np.testing.assert_allclose([low, high], ends, rtol=1.1e-3, atol=1e-5)
    for sigma, share in layer.beyond.items():
        assert abs(share - np.mean(np.abs(z) > sigma)) * z.size < 1.5  # what lies at the edge


def test_a_norm_is_measured_before_scale_and_shift():
    norm, batches = known_norm(), images(4, 4, 3)
    batches[1][2, 0] += 100
    model = nn.Sequential(norm, nn.ReLU()).train()
    before = copy.deepcopy(model.state_dict())
    found = measure_bands(model, batches, sigmas=(1.0, 2.5, 14.0))
    x = torch.cat(batches)
    z = (x - norm.running_mean.view(3, 1, 1)) / (norm.running_var.view(3, 1, 1) + norm.eps).sqrt()
    (layer,) = found.layers
    assert (layer.name, layer.kind, layer.normalized_by, layer.units, layer.calls) == ("0", "BN", BY_RUNNING, 3, 1)
    assert_describes(layer, z)
    assert layer.furthest_unit == 0 and layer.beyond[14.0] > 0 and (found.images, found.unreached) == (11, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not norm._forward_pre_hooks


def test_a_layer_without_a_norm_by_its_own_moments():
    torch.manual_seed(0)
    conv, dense = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), dense)
    with torch.no_grad():
        dense.weight[2] = 0  # a unit that is constant
        batches = images(5, 2)
        found = measure_bands(model, batches)
        outputs = conv(torch.cat(batches)), model(torch.cat(batches))
    assert [layer.normalized_by for layer in found.layers] == [SET, SET]
    for layer, y, dims in zip(found.layers, outputs, ((0, 2, 3), (0,))):
        var, mean = torch.var_mean(y.double(), dims, keepdim=True, correction=0)
        assert_describes(layer, ((y - mean) / var.sqrt()).nan_to_num(0))


def test_which_layers():
    """A convolution that a norm follows is measured in the norm, unless it is asked for; names may be patterns."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), known_norm(4), nn.Conv2d(4, 4, 1), nn.ReLU(), known_norm(4), nn.Dropout(0.9)
    )
    names = lambda **options: [layer.name for layer in measure_bands(model, images(2), **options).layers]  # noqa: E731
    assert names() == ["1", "2", "4"]
    assert names(layers=["[14]"]) == ["1", "4"] and names(layers=["2", "4"]) == ["2", "4"]
    assert names(kernels=[LayerName("0", 1)]) == ["0", "1", "2", "4"]


class _Twice(nn.Module):
    """A norm under two names, called three times, and a convolution called twice, of which one output goes to it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.never = nn.Conv2d(3, 3, 1), known_norm(), nn.Linear(2, 2)
        self.alias = self.norm

    def forward(self, x):
        y = self.conv(self.norm(x))
        return self.conv(self.norm(y) + self.norm(input=2 * x))


def test_layers_that_are_used_several_times_or_never():
    torch.manual_seed(1)
    model, (x,) = _Twice(), images(3)
    found = measure_bands(model, [x])
    norm, conv = found.layers
    assert (norm.calls, norm.shared, norm.count) == (3, ("alias",), 9 * x[0].numel())
    assert (conv.name, conv.calls, found.unreached) == ("conv", 2, ["never"])


def test_folded_and_fused_and_frozen_norms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), fbn_plugin.FilteredBatchNorm2d(4), nn.ReLU())
    model[1].running_mean.uniform_(), model[1].running_var.uniform_(0.5, 1)
    batches = images(3)
    (plain,) = measure_bands(model, batches).layers
    (fused,) = measure_bands(fbn_plugin.fuse_norm_act(copy.deepcopy(model)), batches).layers
    (frozen,) = measure_bands(fbn_plugin.convert_norm(copy.deepcopy(model), "FrozenBN"), batches).layers
    for other in (fused, frozen):
        assert (other.minimum, other.maximum, other.bands) == (plain.minimum, plain.maximum, plain.bands)
    assert (plain.kind, frozen.kind, frozen.normalized_by) == ("FBN(t_sigma=5)", "FrozenBN", BY_RUNNING)
    (folded,) = measure_bands(fbn_plugin.fold_norms(copy.deepcopy(model).eval()), batches).layers
    assert (folded.name, folded.normalized_by) == ("0", SET)


@pytest.mark.parametrize("spec", ["FGN(num_groups=2, t_sigma=2)", "LN", "IN", "FRN", "LearnedNorm"])
def test_norms_of_a_sample(spec):
    norm = fbn_plugin.get_norm(spec, 4)
    (layer,) = measure_bands(nn.Sequential(nn.Conv2d(3, 4, 1), norm), images(2, 2)).layers
    assert layer.normalized_by == "moments of the sample" and layer.units == 4 and layer.kind.startswith(spec[:3])


class _OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return 7 + super().forward(input)


def test_a_norm_that_is_not_known_is_measured_behind():
    (layer,) = measure_bands(nn.Sequential(_OwnForward(3)), images(2)).layers
    assert layer.normalized_by == SET and "not known by what it normalizes" in layer.note
    assert abs(layer.median) < 1


class _WithActivation(nn.Conv2d):
    """As detectron2's convolution, which holds what follows it."""

    def forward(self, x):
        return self.activation(super().forward(x))


@pytest.mark.parametrize("activation", [torch.relu, nn.ReLU()], ids=["function", "module"])
def test_a_convolution_that_holds_its_activation_is_measured_before_it(activation):
    torch.manual_seed(0)
    model, batches = nn.Sequential(_WithActivation(3, 4, 1), _WithActivation(4, 4, 1)), images(3)
    model[0].activation = model[1].activation = activation
    first, second = measure_bands(model, batches).layers
    with torch.no_grad():
        outputs = nn.Conv2d.forward(model[0], batches[0]), nn.Conv2d.forward(model[1], model[0](batches[0]))
    for layer, y in zip((first, second), outputs):
        var, mean = torch.var_mean(y, (0, 2, 3), keepdim=True, correction=0)
        assert_describes(layer, (y - mean) / var.sqrt())
    assert model[0].activation is activation and not any(each._forward_pre_hooks for each in model.modules())


def test_what_is_not_finite_is_counted_apart():
    (batch,) = images(3)
    batch[0, 1, 0, 0], batch[1, 1, 0, 0] = torch.nan, torch.inf
    found = measure_bands(nn.Sequential(known_norm()), [batch], kernels=[LayerName("0", 1)], sigmas=(0.5,))
    (layer,), (kernel,) = found.layers, found.kernels
    assert (layer.nan, layer.infinite, layer.count) == (1, 1, batch.numel() - 2)
    assert math.isfinite(layer.maximum) and kernel.peaks.isfinite().all() and layer.beyond[0.5] < 1
    nothing = measure_bands(nn.Sequential(known_norm()), [batch * torch.nan]).layers[0]
    assert (nothing.count, nothing.minimum, nothing.bands, nothing.beyond) == (0, None, {}, {})


def test_the_images_that_pass_in_a_kernel():
    batches = images(4, 1, 3)
    z = torch.cat(batches)[:, 2]
    norm = nn.BatchNorm2d(3, eps=0.0)
    wanted = torch.stack([image[image.abs() == image.abs().max()][0] for image in z])
    found = measure_bands(nn.Sequential(nn.Identity(), norm), batches, kernels=[LayerName("1", 2)])
    (kernel,) = found.kernels
    assert torch.equal(kernel.peaks, wanted) and (kernel.layer, kernel.unit, kernel.note) == ("1", 2, "")
    passing = kernel.passing(2.0)
    assert passing == sorted(np.flatnonzero(wanted.abs() > 2), key=lambda number: -abs(wanted[number]))
    edges, density = kernel.density()
    assert (density * edges.diff()).sum() == pytest.approx(1) and len(density) == math.ceil(2 * z.numel() ** (1 / 3))
    np.testing.assert_allclose([edges[0], edges[-1]], [z.min(), z.max()])


class _Rows(nn.Module):
    """Cuts each image into rows, as a detector's heads and windowed attention do, and normalizes these."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(x.movedim(2, 1).flatten(0, 1))


def test_rows_that_are_no_images():
    together, alone = (
        measure_bands(_Rows(), batches, kernels=[LayerName("norm", 0)]).kernels[0] for batches in (images(3), images(1))
    )
    assert together.peaks is None and together.passing(1) == []
    assert together.note == "it works on 18 rows where a batch has 3 images"
    assert len(alone.peaks) == 1 and together.sketch.count == 3 * alone.sketch.count


def test_batches_of_other_kinds():
    model = nn.Sequential(known_norm())
    x = torch.cat(images(4))
    plain = measure_bands(model, [x])
    labelled = measure_bands(model, [(x[:1], torch.zeros(1)), (x[1:], torch.zeros(3))])
    records = [[{"image": image} for image in x]]
    by_forward = measure_bands(model, records, forward=lambda m, batch: m(torch.stack([r["image"] for r in batch])))
    assert plain.as_dict() == labelled.as_dict() == by_forward.as_dict() and by_forward.images == 4


def test_as_json():
    found = measure_bands(nn.Sequential(known_norm()), images(2), sigmas=(2, 2.5)).as_dict()
    (layer,) = found["layers"]
    assert list(layer["bands"]) == ["50", "75", "98"] and list(layer["beyond"]) == ["2", "2.5"]
    assert found["images"] == 2 and layer["shared"] == []


def test_probability_of_a_batch():
    assert batch_probability(51, 50000) == pytest.approx(1 - math.comb(49949, 16) / math.comb(50000, 16), rel=1e-9)
    assert [batch_probability(0, 5, 2), batch_probability(4, 5, 2), batch_probability(5, 5)] == [0, 1, 1]
    assert batch_probability(1, 4, 2) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loader": iter(())}, "passed over twice: give a loader"),
        ({"loader": []}, "there is no image to measure"),
        ({"sigmas": (3, -1)}, "sigmas must be above 0 and finite, got -1"),
        ({"layers": ["layr"]}, "is called 'layr'; did you mean 'layer'"),
        ({"kernels": [LayerName("lajer", 0)]}, "no layer 'lajer'; did you mean 'layer'"),
        ({"kernels": [LayerName("layer", 3)]}, "layer 'layer' has units 0 to 2, got 3"),
        ({"kernels": [LayerName("act", 0)]}, "layer 'act' is a ReLU, and must be a norm"),
    ],
)
def test_errors(options, sentence):
    model = nn.Sequential()
    model.add_module("layer", known_norm())
    model.add_module("act", nn.ReLU())
    options = {"loader": images(2), **options}
    with pytest.raises(ValueError, match=sentence.replace("'", ".")):
        measure_bands(model, options.pop("loader"), **options)
    assert not model.layer._forward_pre_hooks


@pytest.mark.parametrize("text", ["a[", "a[-1]", "a]b", "a[1][2]", "a@sides", "a@input@output", "a[x]", 7])
def test_names_that_are_none(text):
    with pytest.raises(ValueError, match="a layer must be named as 'layer', 'layer.7.'"):
        parse_layer_name(text)


@pytest.mark.parametrize("text", ["a.0.b", "a[453]", "fc3.act@input[7]", "fc3@output", "0[0]"])
def test_names_there_and_back(text):
    assert str(parse_layer_name(text)) == text


_FIFTY_THOUSAND = """
import resource, torch
from torch import nn
from fbn_plugin.analysis.bands import measure_bands

class Images:
    def __init__(self, batches):
        self.batches = batches
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(1000, 1, 6, 6, generator=generator) for _ in range(self.batches))

torch.set_num_threads(1)
convolution = nn.Conv2d(1, 16, 1, bias=False)
nn.init.ones_(convolution.weight)
model = nn.Sequential(convolution, nn.BatchNorm2d(16, eps=0.0), nn.Flatten(), nn.Linear(576, 64))
peaks = []
for batches in (5, 50):
    found = measure_bands(model, Images(batches))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(found.images, found.layers[0].count, found.layers[0].bands[98][1], peaks[1] - peaks[0])
"""


def test_fifty_thousand_images_take_the_memory_of_five_thousand():
    pytest.importorskip("resource", reason="the system does not say how much memory a process had")
    ended = subprocess.run([sys.executable, "-c", _FIFTY_THOUSAND], capture_output=True, text=True, check=True)
    number, values, end, kibibytes = map(float, ended.stdout.split())
    assert (number, values) == (50_000, 50_000 * 576)
    assert abs(end / 2.3263 - 1) < 2e-3  # a Gaussian's; 1e-3 for the sketch, and what chance does
    assert kibibytes < 20_000  # the values of that layer alone are 115 MB
