"""The papers' networks that timm and torchvision do not have, in plain PyTorch, and the names under which
``fbn_plugin.register()`` gives them to timm. The CIFAR forms of timm's own networks are in ``cifar.py``, which needs
timm.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from fbn_plugin.models.alexnet import AlexNet
from fbn_plugin.models.all_cnn import AllCNN
from fbn_plugin.models.inception import Inception
from fbn_plugin.models.lenet import LAYERS, LeNet5
from fbn_plugin.models.mlp import SigmoidMLP
from fbn_plugin.models.pooled_resnet import PooledResNet
from fbn_plugin.models.vgg import VGG16

__all__ = ["NETWORKS", "VGG16", "AlexNet", "AllCNN", "Inception", "LeNet5", "Network", "PooledResNet", "SigmoidMLP"]


@dataclass(frozen=True)
class Network:
    """A named network: what builds it, with which arguments, and the images that it is for.

    Attributes:
        build: called with ``arguments``, ``num_classes`` and ``in_chans``, and those that the user gives.
        size: height and width of the images in pixels.
        mean, std: of each channel of the images, in 0..1.
        num_classes: unless the user gives another.
    """

    build: Callable[..., nn.Module]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int = 10
    arguments: dict = field(default_factory=dict)


MNIST = {"size": 28, "mean": (0.1307,), "std": (0.3081,)}
BINARY = {"size": 28, "mean": (0.0,), "std": (1.0,)}
CIFAR = {"size": 32, "mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}
IMAGENET = {"size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# "_plain" is without norms, which timm's create_model cannot be told by norm_layer=None ("" does).
_PLAIN = {"norm_layer": None}
_GOOGLENET = {"lrn": True, "drop_rate": 0.4}
_SMALL_VGG = {"map_size": 1, "dense_size": 512}

NETWORKS = {
    "lenet5": Network(LeNet5, **MNIST),
    "lenet5_plain": Network(LeNet5, **MNIST, arguments=_PLAIN),
    **{f"lenet5_{where}": Network(LeNet5, **MNIST, arguments={"norm_after": where}) for where in (*LAYERS, "all")},
    "lenet5_convs": Network(LeNet5, **MNIST, arguments={"norm_after": LAYERS[:2]}),
    "alexnet_cifar": Network(AlexNet, **{**CIFAR, "size": 227}),
    "alexnet_cifar_plain": Network(AlexNet, **{**CIFAR, "size": 227}, arguments=_PLAIN),
    "all_cnn_c": Network(AllCNN, **CIFAR),
    "all_cnn_c_plain": Network(AllCNN, **CIFAR, arguments=_PLAIN),
    "all_cnn_c_dwck": Network(AllCNN, **CIFAR, arguments={"norm_layer": "ConvNorm", "kernel_stacks": True}),
    "all_cnn_c_learned": Network(AllCNN, **CIFAR, arguments={"norm_layer": "LearnedNorm", "small_first_norm": True}),
    "mlp_3x100": Network(SigmoidMLP, **BINARY),
    "mlp_3x100_plain": Network(SigmoidMLP, **BINARY, arguments=_PLAIN),
    "bn_inception": Network(Inception, **IMAGENET, num_classes=1000),
    "bn_inception_sigmoid": Network(Inception, **IMAGENET, num_classes=1000, arguments={"act_layer": nn.Sigmoid}),
    "bn_inception_baseline": Network(Inception, **IMAGENET, num_classes=1000, arguments=_GOOGLENET),
    "bn_inception_plain": Network(Inception, **IMAGENET, num_classes=1000, arguments={**_PLAIN, **_GOOGLENET}),
    "bn_inception_sigmoid_plain": Network(
        Inception, **IMAGENET, num_classes=1000, arguments={**_PLAIN, **_GOOGLENET, "act_layer": nn.Sigmoid}
    ),
    "pooled_resnet20": Network(PooledResNet, **{**CIFAR, "size": 36}),
    "pooled_resnet44": Network(PooledResNet, **{**CIFAR, "size": 36}, arguments={"depths": (7, 7, 7)}),
    "pooled_resnet34": Network(
        PooledResNet,
        **IMAGENET,
        arguments={"depths": (3, 4, 6, 3), "widths": (96, 192, 384, 768), "stem": (5, 2)},
    ),
    "vgg16_all": Network(VGG16, **IMAGENET, num_classes=1000),
    "vgg16_all_plain": Network(VGG16, **IMAGENET, num_classes=1000, arguments=_PLAIN),
    "vgg16_all_cifar": Network(VGG16, **CIFAR, arguments=_SMALL_VGG),
    "vgg16_all_cifar_plain": Network(VGG16, **CIFAR, arguments={**_PLAIN, **_SMALL_VGG}),
}
