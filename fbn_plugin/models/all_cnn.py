"""ALL-CNN-C (Springenberg et al., 2015) as section 4 of the ConvNorm paper has it, with its table of kernel stacks."""

from collections.abc import Callable

from torch import nn

from fbn_plugin.models.base import ImageClassifier, NormLayer, global_average, unit
from fbn_plugin.training.revised_initialization import revised_init

# Out channels, kernel and stride of each convolution, and the kernel sizes of its DWCK stack.
LAYERS = (
    (96, 3, 1, (4, 2, 2, 2)),
    (96, 3, 1, (4, 2, 2, 2)),
    (96, 3, 2, (4, 2, 2)),
    (192, 3, 1, (4, 2, 2)),
    (192, 3, 1, (4, 2, 2)),
    (192, 3, 2, (2, 2)),
    (192, 3, 1, (2, 2)),
    (192, 1, 1, (2,)),
)


class AllCNN(ImageClassifier):
    """Eight convolutions, a norm after each, then ten 1x1 kernels and average pooling.

    The paper names neither padding nor initialization. All 3x3 convolutions are padded by 1, so that maps are 32x32,
    16x16 and 8x8, the sizes that the stacks are made for; weights start as in
    :func:`fbn_plugin.revised_init`. The last convolution has no activation and is followed by a mean, so it is the
    classifier, a linear layer on the averaged maps: the same function and the same number of parameters.

    Args:
        norm_layer: spec string, callable or None, see :func:`fbn_plugin.models.base.unit`.
        kernel_stacks: give the norm of each layer the ``kernel_sizes`` of the paper, for ``norm_layer="ConvNorm"``.
        act_layer: class of the activation.
        num_classes, in_chans, drop_rate: see :class:`fbn_plugin.models.base.ImageClassifier`.
        small_first_norm: give the norm of the first layer the smaller networks of the paper's section 5.1, for
            ``norm_layer="LearnedNorm"``.
        width_divisor: all layers but the last have so many times fewer channels, for small machines.

    Shape:
        images of any size; the paper's are 32x32.
    """

    def __init__(
        self,
        norm_layer: NormLayer = "BN",
        kernel_stacks: bool = False,
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        small_first_norm: bool = False,
        width_divisor: int = 1,
    ) -> None:
        features, channels = nn.Sequential(), in_chans
        for number, (full_width, kernel_size, stride, stack) in enumerate(LAYERS, 1):
            width = full_width // width_divisor
            norm_options = {"kernel_sizes": stack} if kernel_stacks else {}
            norm_options |= {"first_layer": number == 1} if small_first_norm else {}
            shape = {"kernel_size": kernel_size, "stride": stride, "padding": kernel_size // 2}
            convolution = unit(channels, width, norm_layer, act_layer, norm_options=norm_options, **shape)
            features.add_module(f"conv{number}", convolution)
            channels = width
        super().__init__(features, global_average(), channels, num_classes, in_chans, drop_rate)
        revised_init(self)
