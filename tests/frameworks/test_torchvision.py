"""torchvision: its models take a norm or are converted, detectors honour ``norm_layer=``, and feature extraction
follows."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import detection, feature_extraction, resnet
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn as held_by_name
from torchvision.ops import FrozenBatchNorm2d

import fbn_plugin
from fbn_plugin import NORMS, FilteredBatchNorm2d, convert_norm, norm_factory, summarize
from fbn_plugin.frameworks import torchvision as adapter

pytestmark = pytest.mark.usefixtures("one_thread")

TAKE_A_NORM = ["resnet18", "resnext50_32x4d", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"]
ARE_CONVERTED = ["vgg11_bn", "densenet121", "mnasnet0_5", "shufflenet_v2_x0_5", "googlenet", "efficientnet_v2_s"]


def check_same_network(model, reference):
    assert not [m for m in model.modules() if isinstance(m, _BatchNorm) and not isinstance(m, FilteredBatchNorm2d)]
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    model.load_state_dict(reference.state_dict())
    x = torch.rand(2, 3, 64, 64)
    model.eval(), reference.eval()
    assert torch.equal(model(x), reference(x))
    model.train()
    output = model(x)
    output = output if torch.is_tensor(output) else output.logits
    output.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert output.isfinite().all() and gradients and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", TAKE_A_NORM)
def test_classification_models_take_a_norm_factory(name):
    build = getattr(torchvision.models, name)
    # its own norm has these settings, as EfficientNetV2's has, and a norm_layer takes its place
    spec = "FBN(t_sigma=4, eps=1e-3, momentum=0.01)" if name == "mobilenet_v3_small" else "FBN(t_sigma=4)"
    model = build(norm_layer=norm_factory(spec))
    kinds = {
        type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__ and "Activation" not in type(m).__name__
    }
    assert kinds == {"FilteredBatchNorm2d"}
    assert {m.t_sigma for m in model.modules() if isinstance(m, FilteredBatchNorm2d)} == {4.0}
    check_same_network(model, build())


def test_the_layer_norms_of_convnext_convert():
    model = nn.Sequential(torchvision.models.convnext.LayerNorm2d(6, eps=1e-3)).eval()
    nn.init.normal_(model[0].weight)
    nn.init.normal_(model[0].bias)
    input = torch.randn(2, 6, 4, 5)
    expected = model(input)
    convert_norm(model, "FLN(t_sigma=100)", sources="LN")
    assert isinstance(model[0], fbn_plugin.FilteredLayerNorm2d)
    torch.testing.assert_close(model(input), expected)


@pytest.mark.parametrize("name", ARE_CONVERTED)
def test_other_classification_models_are_converted(name):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    build = getattr(torchvision.models, name)
    check_same_network(convert_norm(build(**options), "FBN"), build(**options))


@pytest.mark.parametrize("norm", ["FGN", "GN"])
@pytest.mark.parametrize("name", ["efficientnet_b0", "regnet_y_400mf"])
def test_group_norms_where_32_groups_do_not_divide_the_channels(name, norm):
    model = getattr(torchvision.models, name)(norm_layer=norm_factory(norm))
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert any(module.num_channels % 32 for module in norms)
    assert all(module.num_groups == max(g for g in range(1, 33) if module.num_channels % g == 0) for module in norms)


@pytest.mark.parametrize("norm", ["FBN", "SyncFBN", "FGN", "FFRN", "ConvNorm", "LearnedNorm", "RBN", "ScaledBN"])
def test_feature_extraction_sees_the_norms_as_batch_norm(norm):
    names = feature_extraction.get_graph_node_names(torchvision.models.resnet18())
    model = torchvision.models.resnet18(norm_layer=norm_factory(norm))
    assert feature_extraction.get_graph_node_names(model) == names
    extractor = feature_extraction.create_feature_extractor(model, ["layer1", "fc"])
    x = torch.rand(2, 3, 32, 32)
    model.eval(), extractor.eval()
    features = extractor(x)
    torch.testing.assert_close(features["fc"], model(x))
    whole = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    torch.testing.assert_close(features["layer1"], whole)
    extractor.train()(x)["fc"].sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
def test_classification_models_in_torchscript(block, fused):
    model = resnet.ResNet(block, [1, 1, 1, 1], norm_layer=norm_factory("FBN(t_sigma=4)")).double()
    model = fbn_plugin.fuse_norm_act(model) if fused else model
    scripted, x = torch.jit.script(copy.deepcopy(model)), torch.rand(2, 3, 64, 64).double()
    for mode in (True, False):
        torch.testing.assert_close(scripted.train(mode)(x), model.train(mode)(x))


class Halved(nn.BatchNorm2d):
    """A norm of one's own, which tracing cannot follow."""

    def forward(self, input):
        return 0.5 * super().forward(input)


def test_feature_extraction_of_registered_norms_of_ones_own_needs_register():
    NORMS.register(Halved)
    model = torchvision.models.resnet18(norm_layer=norm_factory("Halved"))
    try:
        for _ in range(2):
            assert "torchvision" in fbn_plugin.register()
        extractor = feature_extraction.create_feature_extractor(model, ["layer1"])
        x = torch.rand(2, 3, 32, 32)
        model.eval(), extractor.eval()
        whole = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        assert torch.equal(extractor(x)["layer1"], whole)
    finally:
        adapter.unregister()
        NORMS._obj_map.pop("Halved")
    adapter.unregister()
    assert not hasattr(feature_extraction._get_leaf_modules_for_ops, "__wrapped__")
    with pytest.raises(torch.fx.proxy.TraceError):
        feature_extraction.create_feature_extractor(model, ["layer1"])


# --- norm_layer= of the builders -------------------------------------------------------------------------------------

HELD = functools.partial(held_by_name, weights_backbone=None)
FASTER = detection.fasterrcnn_resnet50_fpn
IMAGENET = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
COCO = detection.FasterRCNN_ResNet50_FPN_Weights.COCO_V1


@pytest.fixture
def registered():
    fbn_plugin.register()
    yield
    fbn_plugin.unregister()


def lines(build, *specs, **kwargs):
    return [summarize(build(norm_layer=spec, **kwargs)).line for spec in specs]


DETECTORS = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": "46 FBN(t_sigma=4), 0 BN",
    "fasterrcnn_mobilenet_v3_large_fpn": "46 FBN(t_sigma=4), 0 BN",
    "fasterrcnn_resnet50_fpn": "53 FBN(t_sigma=4), 0 BN",
    "fasterrcnn_resnet50_fpn_v2": "65 FBN(t_sigma=4), 0 BN",
    "fcos_resnet50_fpn": "53 FBN(t_sigma=4), 8 GN, 0 BN",
    "keypointrcnn_resnet50_fpn": "53 FBN(t_sigma=4), 0 BN",
    "maskrcnn_resnet50_fpn": "53 FBN(t_sigma=4), 0 BN",
    "maskrcnn_resnet50_fpn_v2": "69 FBN(t_sigma=4), 0 BN",
    "retinanet_resnet50_fpn": "53 FBN(t_sigma=4), 0 BN",
    "retinanet_resnet50_fpn_v2": "53 FBN(t_sigma=4), 8 GN, 0 BN",
    "ssd300_vgg16": None,
    "ssdlite320_mobilenet_v3_large": "70 FBN(eps=0.001, momentum=0.03, t_sigma=4), 0 BN",
    "deeplabv3_resnet50": "60 FBN(t_sigma=4), 0 BN",
    "fcn_resnet50": "54 FBN(t_sigma=4), 0 BN",
    "lraspp_mobilenet_v3_large": "46 FBN(eps=0.001, momentum=0.01, t_sigma=4), 1 FBN(t_sigma=4), 0 BN",
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detection_and_segmentation_builders_honour_norm_layer_or_refuse_it(name, registered):
    build = functools.partial(torchvision.models.get_model, name, weights_backbone=None)
    with torch.device("meta"):
        if DETECTORS[name] is None:
            with pytest.raises(
                ValueError, match=f"{name} has no batch norm that norm_layer='FBN' could take the place"
            ):
                build(norm_layer="FBN")
        else:
            assert lines(build, "FBN(t_sigma=4)") == [DETECTORS[name]]
            filtered = functools.partial(FilteredBatchNorm2d, t_sigma=4.0)
            assert summarize(build(norm_layer=filtered)).counts["FBN"] == summarize(build()).counts["BN"]


def test_the_builders_that_honour_it_are_all_of_detection_and_segmentation(registered):
    rooms = torchvision.models.detection, torchvision.models.segmentation
    names = [name for room in rooms for name in torchvision.models.list_models(module=room)]
    signatures = [inspect.signature(torchvision.models.get_model_builder(name)) for name in names]
    assert len(names) > 15 and all("norm_layer" in signature.parameters for signature in signatures)
    for name in ("alexnet", "vgg11_bn", "densenet121", "shufflenet_v2_x0_5", "mnasnet0_5", "r3d_18", "squeezenet1_0"):
        with pytest.raises(TypeError, match="norm_layer"):  # torchvision's own refusal of a callable
            torchvision.models.get_model(name, norm_layer=norm_factory("FBN"))


@pytest.mark.parametrize(
    "name, line",
    [
        ("resnet18", "20 FBN(t_sigma=4), 0 BN"),
        ("vgg11_bn", "8 FBN(t_sigma=4), 0 BN"),
        ("mobilenet_v3_small", "34 FBN(eps=0.001, momentum=0.01, t_sigma=4), 0 BN"),
        ("r3d_18", "20 FBN(t_sigma=4), 0 BN"),
        ("quantized_resnet18", "20 FBN(t_sigma=4), 0 BN"),
    ],
)
def test_every_builder_takes_a_spec(name, line, registered):
    with torch.device("meta"):
        assert lines(functools.partial(torchvision.models.get_model, name), "FBN(t_sigma=4)") == [line]
        with pytest.raises(ValueError, match="alexnet has no batch norm"):
            torchvision.models.alexnet(norm_layer="FBN")
        with pytest.raises(ValueError, match="unknown norm 'FBM' .*did you mean 'FBN'"):
            torchvision.models.get_model(name, norm_layer="FBM")


def test_a_builder_is_reached_wherever_it_is_held(registered):
    builder = torchvision.models.get_model_builder("fasterrcnn_mobilenet_v3_large_320_fpn")
    pickled = pickle.loads(pickle.dumps(held_by_name))
    with torch.device("meta"):
        for build in (HELD, *(functools.partial(each, weights_backbone=None) for each in (builder, pickled))):
            for norm in ("FBN", norm_factory("FBN"), FilteredBatchNorm2d):
                assert lines(build, norm) == ["46 FBN(t_sigma=5), 0 BN"]
        assert lines(HELD, None, nn.BatchNorm2d, lambda c: nn.GroupNorm(8, c)) == [
            "46 BN", "46 BN", "46 GN(num_groups=8), 0 BN"
        ]  # fmt: skip
        with pytest.raises(ValueError, match="norm_layer of fasterrcnn_mobilenet_v3_large_320_fpn must be .* got 3"):
            HELD(norm_layer=3)


def test_unregister_gives_torchvision_its_builders_back():
    before = inspect.signature(held_by_name)
    for _ in range(2):
        fbn_plugin.register()
        assert inspect.signature(held_by_name).parameters["norm_layer"].default is None
        assert inspect.signature(torchvision.models.resnet18) != before
    for _ in range(2):
        fbn_plugin.unregister()
    assert inspect.signature(held_by_name) == before
    with torch.device("meta"):
        assert summarize(HELD(norm_layer=norm_factory("FBN"))).line == "46 BN", "torchvision drops it"
        with pytest.raises(TypeError, match="not callable"):
            torchvision.models.resnet18(norm_layer="FBN")
        detection.FasterRCNN(HELD().backbone, 2, norm_layer=None)


def test_constructors_of_detectors_refuse_a_norm(registered):
    backbone = HELD().backbone
    for cls in (detection.FasterRCNN, detection.MaskRCNN, detection.RetinaNet, detection.FCOS):
        with pytest.raises(ValueError, match=r"(FasterRCNN|RetinaNet|FCOS) takes no norm_layer, as its backbone is"):
            cls(backbone, 2, norm_layer=norm_factory("FBN"))


@pytest.fixture
def fake_weights(monkeypatch):
    """Weights of torchvision's that are not downloaded: random ones, with statistics as after training."""

    def get_state_dict(self, *args, **kwargs):
        fbn_plugin.unregister()
        torch.manual_seed(0)
        model = FASTER(weights_backbone=None) if self is COCO else torchvision.models.resnet50()
        fbn_plugin.register()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                nn.init.uniform_(module.weight, 0.5, 1.5)
        state = model.state_dict()
        return {key: value for key, value in state.items() if self is not COCO or "num_batches" not in key}

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)


@pytest.mark.parametrize(
    "weights, layers, line",
    [
        ({"weights_backbone": IMAGENET}, None, "42 FBN(t_sigma=4), 11 FrozenBN, 0 BN"),
        ({"weights_backbone": IMAGENET}, 5, "53 FBN(t_sigma=4), 0 BN"),
        ({"weights_backbone": IMAGENET}, 1, "43 FrozenBN, 10 FBN(t_sigma=4), 0 BN"),
        ({"weights": COCO}, 2, "29 FBN(t_sigma=4), 24 FrozenBN(eps=0.0), 0 BN"),
    ],
)
def test_frozen_stages_stay_frozen_and_weights_are_theirs(weights, layers, line, registered, fake_weights):
    options = {**weights, "trainable_backbone_layers": layers, "min_size": 64, "max_size": 64}
    theirs, ours = FASTER(**options), FASTER(norm_layer="FBN(t_sigma=4)", **options)
    assert summarize(ours).line == line
    for name, module in theirs.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            conv = ours.get_submodule(name.replace("downsample.1", "downsample.0").replace("bn", "conv"))
            new = ours.get_submodule(name)
            assert type(new) is (FilteredBatchNorm2d if conv.weight.requires_grad else FrozenBatchNorm2d)
            assert type(new) is FrozenBatchNorm2d or (new.eps == 1e-5 and new.weight.requires_grad)
    x = torch.randn(1, 3, 64, 64)
    theirs.eval(), ours.eval()
    for key, value in theirs.backbone(x).items():
        torch.testing.assert_close(ours.backbone(x)[key], value, rtol=1e-3, atol=1e-4)


def test_a_detector_with_a_norm_trains(registered):
    model = HELD(norm_layer="FBN(t_sigma=4)", num_classes=3).train()
    targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
    sum(model([torch.rand(3, 64, 64)] * 2, targets).values()).backward()
    norm = model.backbone.body["0"][1]
    assert type(norm) is FilteredBatchNorm2d and norm.num_batches_tracked == 1 and norm.weight.grad.isfinite().all()


def test_a_small_gamma_is_for_models_without_weights(registered, fake_weights):
    model = held_by_name(weights_backbone=None, norm_layer="ScaledBN(gamma_init=0.25)")
    assert all((norm.weight == 0.25).all() for norm in model.modules() if isinstance(norm, _BatchNorm))
    model = torchvision.models.resnet50(weights=IMAGENET, norm_layer="ScaledBN(gamma_init=0.25)")
    assert not (model.bn1.weight == 0.25).any()


def test_a_detector_that_trains_no_stage_says_so(registered, fake_weights):
    with pytest.warns(UserWarning, match="nothing was converted.* 53 in frozen stages"):
        FASTER(weights_backbone=IMAGENET, trainable_backbone_layers=0, norm_layer="FBN")


def test_backbones_with_a_pyramid_take_a_spec(registered):
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer="FBN", trainable_layers=4
    )
    assert summarize(backbone).line == "19 FBN(t_sigma=5), 1 FrozenBN, 0 BN"


def test_none_means_what_it_means_to_torchvision(registered):
    """To the builders of backbones plain batch norms, in place of the frozen ones that are their default."""
    build = functools.partial(detection.backbone_utils.resnet_fpn_backbone, backbone_name="resnet18", weights=None)
    with torch.device("meta"):
        assert lines(build, None) == ["15 BN, 5 BN with frozen weights"]
        assert summarize(build()).line == "20 FrozenBN, 0 BN"
        detection.FasterRCNN(HELD().backbone, 2, norm_layer=None)
