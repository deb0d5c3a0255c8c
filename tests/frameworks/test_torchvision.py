"""torchvision: its classification models take a norm or are converted, and feature extraction follows."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import feature_extraction, resnet

import fbn_plugin
from fbn_plugin import NORMS, FilteredBatchNorm2d, convert_norm, norm_factory
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


@pytest.mark.parametrize("name", ARE_CONVERTED)
def test_other_classification_models_are_converted(name):
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    build = getattr(torchvision.models, name)
    check_same_network(convert_norm(build(**options), "FBN"), build(**options))


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
