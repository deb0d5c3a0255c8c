"""Folding norms into convolutions and linear layers: the same outputs, and no norm folded where they would differ."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fbn_plugin
from fbn_plugin import NormReport, fold_norms, norm_factory

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(model):
    """In evaluation mode, with parameters and statistics as after training."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 2)
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.normal_(0, 0.2)
    return model.eval()


def assert_same_after_folding(model, x, folded, left=(), tolerance=1e-9, example=False):
    """Fold ``model`` in double precision, with its input as an example or not; so many norms are folded, and those left
    are these."""
    model = trained(model).double()
    x = x.double()
    expected = model(x)
    report = NormReport()
    assert fold_norms(model, example=x if example else None, report=report) is model
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    assert (len(report.changed), [entry.name for entry in report.left]) == (folded, list(left)), str(report)
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] or left
    return report


# --- models of the frameworks --------------------------------------------------------------------------------------

TV = torchvision.models
FBN = {"norm_layer": norm_factory("FBN")}


def fpn():
    return TV.detection.backbone_utils.BackboneWithFPN(
        TV.resnet18(**FBN), {"layer3": "0", "layer4": "1"}, [256, 512], 16, norm_layer=norm_factory("FBN")
    )


# The model, its size of images, the norms that are folded and those that are left.
MODELS = {
    "torchvision resnet18": (lambda: TV.resnet18(), 64, 20, 0),
    "torchvision resnet18, FBN": (lambda: TV.resnet18(**FBN), 64, 20, 0),
    "torchvision vgg11_bn": (lambda: TV.vgg.make_layers(TV.vgg.cfgs["A"], batch_norm=True), 32, 8, 0),
    "torchvision mobilenet_v3_small, FBN": (lambda: TV.mobilenet_v3_small(**FBN), 64, 34, 0),
    "torchvision densenet121": (lambda: TV.densenet121(), 32, 59, 62),
    "torchvision FPN": (fpn, 64, 24, 0),
    "timm resnet18": (lambda: timm.create_model("resnet18", **FBN), 64, 20, 0),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet"), 64, None, 0),
    "timm efficientnet, FBN": (lambda: timm.create_model("test_efficientnet", **FBN), 64, None, 0),
    "timm tf_efficientnet_b0": (lambda: timm.create_model("tf_efficientnet_b0"), 64, 49, 0),
    "timm mobilenetv3_small_050": (lambda: timm.create_model("mobilenetv3_small_050"), 64, 34, 0),
    "timm densenet121": (lambda: timm.create_model("densenet121"), 32, 59, 62),
}


@pytest.mark.parametrize("name", MODELS)
def test_frameworks_models_in_single_precision(name):
    build, size, folded, left = MODELS[name]
    fbn_plugin.register()
    try:
        model = trained(build())
    finally:
        fbn_plugin.unregister()
    x = torch.randn(2, 3, size, size)
    expected, report = model(x), NormReport()
    fold_norms(model, report=report)
    outputs = model(x)
    if not isinstance(outputs, dict):
        outputs, expected = {"": outputs}, {"": expected}
    for key, value in outputs.items():
        assert (value - expected[key]).abs().max() < 1e-5 * expected[key].abs().max()
    assert len(report.left) == left
    assert folded is None or len(report.changed) == folded
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == left
    if left:
        assert {entry.reason for entry in report.left} == {"it follows no convolution or linear layer"}


def test_a_detector_that_cannot_be_traced_as_a_whole():
    from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn

    model = trained(mask_rcnn_fpn(norm="FBN", norm_fpn="FBN", norm_mask_head="FBN", min_size=64, max_size=64))
    images = [torch.rand(3, 64, 64)]
    backbone = model.backbone(images[0][None])
    roi_features = torch.randn(2, 256, 14, 14)
    masks = model.roi_heads.mask_head(roi_features)
    report = NormReport()
    fold_norms(model, report=report)
    assert len(report.changed) == 20 + 8 + 4 and not report.left
    for key, value in model.backbone(images[0][None]).items():
        assert (value - backbone[key]).abs().max() < 1e-5 * backbone[key].abs().max()
    assert (model.roi_heads.mask_head(roi_features) - masks).abs().max() < 1e-5 * masks.abs().max()
    model(images)


# --- arithmetic ----------------------------------------------------------------------------------------------------

CONVS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.booleans(), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(1, 2), st.integers(1, 2),
    st.integers(0, 2), st.booleans(), st.sampled_from(["zeros", "reflect", "circular"]), st.booleans(),
)  # fmt: skip
def test_any_convolution(dims, transposed, groups, bias, stride, dilation, padding, affine, mode, before):
    assume(mode == "zeros" or not transposed)
    conv = CONVS[dims][transposed](
        4, 8, 3, stride, padding, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
    )
    norm = NORMS[dims](4 if before else 8, affine=affine)
    stays = before and (transposed or (padding and mode == "zeros"))
    model = nn.Sequential(norm, conv) if before else nn.Sequential(conv, norm)
    x = torch.randn(2, 4, *[6] * dims)
    report = assert_same_after_folding(model, x, 0 if stays else 1, ["0"] if stays else [])
    assert stays or str(report).endswith(f"{type(norm).__name__} -> part of {type(conv).__name__}: {1 - before}")


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(bias):
    model = nn.Sequential(nn.Linear(3, 4, bias), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 5, bias))
    assert_same_after_folding(copy.deepcopy(model), torch.randn(6, 3), 2, example=True)
    flat = nn.Sequential(nn.Flatten(), nn.Dropout(), *model)  # what comes in is (N, C) whatever the input is
    assert_same_after_folding(flat, torch.randn(6, 3, 1, 1), 2)


FLATTENED = {
    "flatten": lambda x: x.flatten(1),
    "torch.flatten": lambda x: torch.flatten(x, start_dim=1).relu(),
    "view": lambda x: F.dropout(x.view(x.size(0), -1), training=False),
    "reshape": lambda x: torch.relu(x.reshape((x.shape[0], -1))),
}


@pytest.mark.parametrize("name", FLATTENED)
def test_a_linear_layer_behind_what_makes_a_matrix_is_folded(name):
    model = Net(lambda self, x: self.norm(self.conv(FLATTENED[name](x))), nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert_same_after_folding(model, torch.randn(3, 4, 1), 1, ["other"])


@settings(max_examples=40, deadline=None)
@given(st.booleans(), st.sampled_from([(5, 4), (5, 4, 4), (4, 4)]), st.booleans(), st.booleans(), st.booleans())
def test_a_linear_layer_is_folded_only_if_its_channels_are_the_norms(before, shape, example, frozen, twice):
    norm = fbn_plugin.FrozenBatchNorm1d(4) if frozen else fbn_plugin.FilteredBatchNorm1d(4)
    pair = [norm, nn.Linear(4, 4)] if before else [nn.Linear(4, 4), norm]
    model = nn.Sequential(*pair, *pair) if twice else nn.Sequential(*pair)
    folds = example and len(shape) == 2
    report = assert_same_after_folding(
        model, torch.randn(shape), int(folds), [] if folds else ["0" if before else "1"], example=example
    )
    reason = "has channels in another place" if example else "not known: give an example input"
    assert all(reason in entry.reason for entry in report.left)


def test_norms_for_other_dimensions_than_the_layer_beside_them():
    """A square input without a batch fits by its sizes, but the norm's channels are the layer's rows."""
    cases = [
        (nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4), (3, 4, 4)),
        (nn.Conv3d(3, 4, 1), nn.BatchNorm2d(4), (3, 4, 4, 4)),
        (nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), (3, 4)),
        (nn.ConvTranspose2d(3, 4, 1), fbn_plugin.SyncFilteredBatchNorm(4), (3, 4, 4)),
        (nn.Linear(4, 4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (4, 4)),
    ]
    for layer, norm, shape in cases:
        assert_same_after_folding(nn.Sequential(layer, norm), torch.randn(shape), 0, ["1"], example=True)
    for layer, norm, shape in (cases[0], cases[1], cases[4]):  # without an example, too
        assert_same_after_folding(nn.Sequential(layer, norm), torch.randn(shape), 0, ["1"])
    pair = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4))
    assert_same_after_folding(pair, torch.randn(2, 3, 5), 1, example=True)


def test_an_example_is_run_in_a_copy():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = trained(nn.Sequential(Counting(3, 3), nn.Linear(3, 4), nn.BatchNorm1d(4)))
    fold_norms(model, example=(torch.randn(2, 3), "a target"))
    assert type(model[2]) is nn.Identity and model[0].calls == 0


def test_weights_that_would_not_be_finite():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half())
    model[1].running_var.fill_(1e-6)
    with torch.no_grad():
        model[0].weight.fill_(300.0)
    before, report = copy.deepcopy(model.state_dict()), NormReport()
    fold_norms(model, report=report)
    assert "not finite in torch.float16" in report.left[0].reason
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_lazy_norm_has_to_run_once():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="'1' does not know its channels yet: run the model once, then fold"):
        fold_norms(model.eval())
    model(torch.randn(2, 3, 4, 4))
    assert_same_after_folding(model, torch.randn(2, 3, 4, 4), 1)


def test_norms_on_both_sides_and_in_a_row():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    report = assert_same_after_folding(model, torch.randn(2, 3, 6, 6), 3)
    assert [change.name for change in report.changed] == ["0", "2", "3"]


@pytest.mark.parametrize("spec", ["FBN(t_sigma=2)", "SyncFBN(t_sigma=2)", "FrozenBN", "BN", "SyncBN"])
def test_every_norm_that_is_a_scale_and_shift(spec):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), fbn_plugin.get_norm(spec, 4), nn.ReLU())
    assert_same_after_folding(model, torch.randn(2, 3, 6, 6), 1)
    assert list(model.state_dict()) == ["0.weight", "0.bias"] and type(model[1]) is nn.Identity


def test_torchvisions_frozen_norm_and_a_norm_with_eval_affine():
    class Doubled(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input) * 2

        def eval_affine(self):
            scale = 2 * self.weight * (self.running_var + self.eps).rsqrt()
            return scale, 2 * self.bias - self.running_mean * scale

    for norm in (torchvision.ops.FrozenBatchNorm2d(4), Doubled(4)):
        assert_same_after_folding(nn.Sequential(nn.Conv2d(3, 4, 3), norm), torch.randn(2, 3, 6, 6), 1)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "identity"])
def test_the_activation_of_a_fused_norm_stays(activation):
    norm = fbn_plugin.FilteredBatchNormAct2d(4, activation=activation, negative_slope=0.3)
    assert_same_after_folding(nn.Sequential(nn.Conv2d(3, 4, 3), norm), torch.randn(2, 3, 6, 6), 1)


def test_timms_norm_with_activation_and_drop():
    norm = timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm)
    assert_same_after_folding(model, torch.randn(2, 3, 6, 6), 1)
    assert [type(m).__name__ for m in model[1]] == ["Dropout2d", "SiLU"]


def test_half_precision_layers_keep_their_type_and_what_is_frozen():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False).bfloat16(), nn.BatchNorm2d(4)))
    model[0].requires_grad_(False)
    x = torch.randn(2, 3, 6, 6).bfloat16()
    expected = model(x)
    fold_norms(model)
    assert model[0].weight.dtype == model[0].bias.dtype == torch.bfloat16 and not model[0].bias.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=0.05, atol=0.05)


def test_channels_last_is_kept():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).to(memory_format=torch.channels_last)
    assert fold_norms(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


# --- what must not be folded ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution and a norm, and a forward that the test gives."""

    def __init__(self, forward, conv=None, norm=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def pooled_weight(self, x):
    return self.norm(self.conv(x)) + self.conv.weight.mean()


USES = {
    "output is used elsewhere": lambda self, x: self.norm(y := self.conv(x)) + y,
    "output into two norms": lambda self, x: self.norm(y := self.conv(x)) * self.other(y),
    "convolution also without a norm": lambda self, x: self.norm(self.conv(x)) + self.conv(x + 1),
    "convolution before two norms": lambda self, x: self.norm(self.conv(x)) + self.other(self.conv(x)),
    "norm also of something else": lambda self, x: self.norm(self.conv(x)) + self.norm(x),
    "weight used elsewhere": pooled_weight,
    "convolution by its weight": lambda self, x: self.norm(F.conv2d(x, self.conv.weight)),
    "an operation in between": lambda self, x: self.norm(self.conv(x).relu()),
}


@pytest.mark.parametrize("name", USES)
def test_is_left_where_it_would_not_be_exact(name):
    report = assert_same_after_folding(Net(USES[name]), torch.randn(2, 4, 5, 5), 0, ["norm", "other"])
    assert all(entry.reason for entry in report.left)


def test_convolution_and_norm_that_are_used_twice_together_are_folded():
    model = Net(lambda self, x: self.norm(self.conv(x)) * self.norm(self.conv(x + 1)))
    report = assert_same_after_folding(model, torch.randn(2, 4, 5, 5), 1, ["other"])
    assert report.left[0].reason == "it is not called where the model can be traced"


def test_a_convolution_with_two_names_is_used_twice():
    conv = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), conv)
    report = assert_same_after_folding(model, torch.randn(2, 4, 5, 5), 0, ["1"])
    assert report.left[0].reason == "the output of the Conv2d before it is used elsewhere too"


def test_a_norm_that_a_plain_list_holds_too():
    model = Net(lambda self, x: self.norms[0](self.conv(x)))
    model.norms = [model.norm]
    report = assert_same_after_folding(model, torch.randn(2, 4, 5, 5), 0, ["norm", "other"])
    assert report.left[0].reason == "'norms' holds it too"


@pytest.mark.parametrize("place", ["", "0", "1"])
def test_a_forward_that_was_put_on_a_module(place):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    module = model.get_submodule(place)
    own, x = module.forward, torch.randn(2, 3, 5, 5)
    module.forward = lambda input: own(2 * input)
    expected, report = model(x), NormReport()
    fold_norms(model, report=report)
    torch.testing.assert_close(model(x), expected)
    assert len(report.left) == 1
    module.forward = own  # as who wanted another for one call leaves it
    assert type(fold_norms(model)[1]) is nn.Identity


def test_hooks_and_parametrizations():
    for place in (0, 1):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        model[place].register_forward_hook(lambda module, args, output: output + 1)
        assert "has hooks" in assert_same_after_folding(model, torch.randn(2, 3, 5, 5), 0, ["1"]).left[0].reason
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))  # on what holds the convolution
    assert_same_after_folding(model, torch.randn(2, 3, 5, 5), 0, ["1"])
    torch.testing.assert_close(seen[0], seen[-1])
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    assert "parametrization" in assert_same_after_folding(model, torch.randn(2, 3, 5, 5), 0, ["1"]).left[0].reason


def test_norms_that_look_at_their_input():
    for norm in (
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        *(fbn_plugin.get_norm(name, 4) for name in ("LN", "FIN", "FRN", "FFRN", "LearnedNorm")),
    ):
        report = assert_same_after_folding(nn.Sequential(nn.Conv2d(3, 4, 1), norm), torch.randn(2, 3, 5, 5), 0, ["1"])
        assert report.left[0].reason == "in evaluation it takes moments of its input"


def test_a_forward_of_its_own_is_not_trusted():
    class Loud(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Loud(4))
    report = assert_same_after_folding(model, torch.randn(2, 3, 5, 5), 0, ["1"])
    assert report.left[0].reason == "its evaluation is not known to be a scale and shift of each channel"


def test_training_mode():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match="fold_norms .*evaluation mode.*model.eval"):
        fold_norms(model)
    model.eval()[1].train()
    report = NormReport()
    fold_norms(model, report=report)
    assert report.left[0].reason == "it is in training mode"


def test_fused_norm_that_adds_a_residual_is_left():
    model = fbn_plugin.fuse_norm_act(TV.resnet18(**FBN))
    report = NormReport()
    model, x = trained(model).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = model(x)
    fold_norms(model, report=report)
    torch.testing.assert_close(model(x), expected)
    assert len(report.changed) == 12 and {left.reason for left in report.left} == {
        "it is called with more than its input"
    }


def test_modules_that_behave_otherwise_at_each_call_are_left():
    class Cycle(nn.ModuleList):
        at = 0

        def forward(self, x):
            self.at = (self.at + 1) % len(self)
            return self[self.at - 1](x)

    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Sequential(nn.Conv2d(3, 4, 1), Cycle([nn.BatchNorm2d(4), nn.BatchNorm2d(4)]))
            self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            if x.mean() > 1e9:  # cannot be traced
                return x
            x = self.stem(x)
            return torch.stack([self.head(x), self.head(x + 1)])

    model = Levels()
    assert_same_after_folding(model, torch.randn(2, 3, 5, 5), 1, ["head.1.0", "head.1.1"])
    assert model.head[1].at == 0


def test_optional_arguments_have_their_defaults():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x, mask=None, scale=1.0):
            x = self.conv(x)
            if mask is not None:
                x = x * mask
            return self.norm(x) * scale if scale > 0 else x

    assert_same_after_folding(Masked(), torch.randn(2, 3, 5, 5), 1)


def test_folding_twice_changes_nothing():
    model = fold_norms(trained(TV.resnet18()))
    before, report = copy.deepcopy(model.state_dict()), NormReport()
    fold_norms(model, report=report)
    assert not report.changed and not report.left
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_in_a_list_of_a_module_that_cannot_be_traced():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))])
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return x if x.mean() > 1e9 else self.norm(self.convs[0](x)) + self.convs[1](x)

    report = assert_same_after_folding(Heads(), torch.randn(2, 3, 6, 6), 1, ["norm"])
    assert report.changed[0].name == "convs.1.1"
    assert report.left[0].reason == "it is not called where the model can be traced"
