"""The residual networks of Batch normalization and the impact of batch structure (tables 1 and 4), which halve their
maps by maximum pooling between the stages."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fbn_plugin.models.base import ImageClassifier, NormLayer, global_average, unit
from fbn_plugin.training.revised_initialization import revised_init


class PooledBlock(nn.Module):
    """Two 3x3 convolutions around which the input is carried; missing channels of it are zeros."""

    def __init__(self, in_chs: int, out_chs: int, norm_layer: NormLayer, act_layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = unit(in_chs, out_chs, norm_layer, act_layer, 3, padding=1)
        self.conv2 = unit(out_chs, out_chs, norm_layer, None, 3, padding=1)
        self.act = act_layer()
        self.extra = out_chs - in_chs

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv2(self.conv1(x)) + F.pad(x, (0, 0, 0, 0, 0, self.extra)))


class PooledResNet(ImageClassifier):
    """A convolution, stages of residual blocks with 3x3 maximum pooling of stride 2 between them, the global average.

    The blocks are those of the residual networks of 2015: norm after each convolution, activation after the sum. The
    paper does not say what a shortcut does where the number of channels grows: here it pads them with zeros, as those
    networks do on CIFAR-10, so that there are no further weights. The "9x9" pool of table 4 is over its 7x7 maps.
    Weights start as in :func:`fbn_plugin.revised_init`.

    Args:
        depths: blocks in each stage.
        widths: channels in each stage.
        stem: kernel size and stride of the first convolution. One of stride 2 is followed by pooling.
        norm_layer: spec string, callable or None, see :func:`fbn_plugin.models.base.unit`.
        act_layer: class of the activation.
        num_classes, in_chans, drop_rate: see :class:`fbn_plugin.models.base.ImageClassifier`.

    Shape:
        images of any size; the paper's are 36x36 (20 and 44 layers) and 224x224 (34 layers).
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (64, 128, 256),
        stem: tuple[int, int] = (3, 1),
        norm_layer: NormLayer = "BN",
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        kernel_size, stride = stem
        features, channels = nn.Sequential(), widths[0]
        first = unit(in_chans, channels, norm_layer, act_layer, kernel_size, stride=stride, padding=kernel_size // 2)
        features.add_module("stem", first)
        for number, (depth, width) in enumerate(zip(depths, widths), 1):
            if number > 1 or stride > 1:
                features.add_module(f"pool{number}", nn.MaxPool2d(3, 2, 1))
            ends = [channels] + [width] * depth
            blocks = (PooledBlock(*ends[i : i + 2], norm_layer, act_layer) for i in range(depth))
            features.add_module(f"stage{number}", nn.Sequential(*blocks))
            channels = width
        super().__init__(features, global_average(), channels, num_classes, in_chans, drop_rate)
        revised_init(self)
