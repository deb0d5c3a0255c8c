"""VGG-16 (Simonyan and Zisserman, 2015) with a norm after its dense layers too: figures 10 and 11 of Filtered batch
normalization. The ``vgg16_bn`` of timm and torchvision has norms after the convolutions alone."""

from collections.abc import Callable

from torch import nn

from fbn_plugin.models.base import ImageClassifier, NormLayer, unit
from fbn_plugin.training.revised_initialization import revised_init

# Convolutions and their channels in each stage; maximum pooling halves the map behind it.
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


class VGG16(ImageClassifier):
    """Thirteen 3x3 convolutions in five stages and two dense layers, a norm after each, then the logits.

    Norms stand between a layer and its ReLU, "after every convolution and fully connected layer (except the logit
    layer)" (section IV-C). The paper is silent about dropout and initialization. Dropout is behind each of the two
    dense layers, as in VGG; weights start as in :func:`fbn_plugin.revised_init`, from which the network learns without
    norms too (He et al., 2015).

    The last maps are averaged over ``map_size`` x ``map_size`` windows, as torchvision does; at 7, images of 224 pixels
    stay as they are. The CIFAR form has one window and dense layers of 512 units.

    Args:
        norm_layer: spec string, callable or None, see :func:`fbn_plugin.models.base.unit`.
        act_layer: class of the activation.
        num_classes, in_chans: see :class:`fbn_plugin.models.base.ImageClassifier`.
        drop_rate: dropout behind each of the two dense layers; 0.5 in 2015.
        map_size: height and width of what the first dense layer sees.
        dense_size: units of each of the two dense layers.

    Shape:
        images of 224x224 pixels in the paper, of 32x32 in the CIFAR form; any from 32x32.
    """

    def __init__(
        self,
        norm_layer: NormLayer = "BN",
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        map_size: int = 7,
        dense_size: int = 4096,
    ) -> None:
        features, channels = nn.Sequential(), in_chans
        for stage, (depth, width) in enumerate(STAGES, 1):
            for number in range(1, depth + 1):
                convolution = unit(channels, width, norm_layer, act_layer, 3, padding=1)
                features.add_module(f"conv{stage}_{number}", convolution)
                channels = width
            features.add_module(f"pool{stage}", nn.MaxPool2d(2))
        features.add_module("average", nn.AdaptiveAvgPool2d(map_size))
        features.add_module("flatten", nn.Flatten())
        features.add_module("fc6", unit(map_size**2 * channels, dense_size, norm_layer, act_layer))
        features.add_module("drop6", nn.Dropout(drop_rate))
        features.add_module("fc7", unit(dense_size, dense_size, norm_layer, act_layer))
        super().__init__(features, nn.Identity(), dense_size, num_classes, in_chans, drop_rate)
        revised_init(self)
