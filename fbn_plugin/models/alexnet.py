"""AlexNet (Krizhevsky et al., 2012) for CIFAR-10 images enlarged to 227x227: figures 4, 8 and 9 of Filtered batch
normalization."""

from collections.abc import Callable

from torch import nn

from fbn_plugin.models.base import ImageClassifier, NormLayer, unit

# Out channels, kernel, stride and padding of each convolution, and whether maximum pooling follows.
CONVOLUTIONS = (
    (96, 11, 4, 0, True),
    (256, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)


class AlexNet(ImageClassifier):
    """Five convolutions and two dense layers of 4096 units, a norm after each, then the logits.

    The paper says "vanilla implementation without any normalization", so there is no local response normalization,
    with or without a norm. It does not say whether the convolutions are split in two groups, as for the two GPUs of
    2012: they are not. A norm stands between its layer and the ReLU; the initialization is PyTorch's.

    Args:
        norm_layer: spec string, callable or None, see :func:`fbn_plugin.models.base.unit`.
        act_layer: class of the activation.
        num_classes, in_chans: see :class:`fbn_plugin.models.base.ImageClassifier`.
        drop_rate: dropout before each of the two dense layers; 0.5 in 2012, not mentioned in the paper.
        width_divisor: all layers but the last have so many times fewer channels and units, for small machines.

    Shape:
        images of 227x227 pixels.
    """

    def __init__(
        self,
        norm_layer: NormLayer = "BN",
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.5,
        width_divisor: int = 1,
    ) -> None:
        features, channels, dense_size = nn.Sequential(), in_chans, 4096 // width_divisor
        for number, (full_width, kernel_size, stride, padding, pool) in enumerate(CONVOLUTIONS, 1):
            width = full_width // width_divisor
            convolution = unit(channels, width, norm_layer, act_layer, kernel_size, stride=stride, padding=padding)
            features.add_module(f"conv{number}", convolution)
            if pool:
                features.add_module(f"pool{number}", nn.MaxPool2d(3, 2))
            channels = width
        features.add_module("flatten", nn.Flatten())
        for number, size in ((6, 6 * 6 * channels), (7, dense_size)):
            features.add_module(f"drop{number}", nn.Dropout(drop_rate))
            features.add_module(f"fc{number}", unit(size, dense_size, norm_layer, act_layer))
        super().__init__(features, nn.Identity(), dense_size, num_classes, in_chans, image_sizes=(227,))
