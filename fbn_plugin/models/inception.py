"""The variant of Inception in figure 5 of Batch normalization, with and without norms (its figures 2 and 3)."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fbn_plugin.models.base import ImageClassifier, NormLayer, global_average, unit
from fbn_plugin.training.revised_initialization import revised_init

# Name: #1x1, #3x3 reduce, #3x3, double #3x3 reduce, double #3x3, pooling, projection. The modules without 1x1 kernels
# halve the size of the maps and pass their pooled input through.
MODULES = {
    "3a": (64, 64, 64, 64, 96, nn.AvgPool2d, 32),
    "3b": (64, 64, 96, 64, 96, nn.AvgPool2d, 64),
    "3c": (0, 128, 160, 64, 96, nn.MaxPool2d, 0),
    "4a": (224, 64, 96, 96, 128, nn.AvgPool2d, 128),
    "4b": (192, 96, 128, 96, 128, nn.AvgPool2d, 128),
    "4c": (160, 128, 160, 128, 160, nn.AvgPool2d, 96),
    "4d": (96, 128, 192, 160, 192, nn.AvgPool2d, 96),
    "4e": (0, 128, 192, 192, 256, nn.MaxPool2d, 0),
    "5a": (352, 192, 320, 160, 224, nn.AvgPool2d, 128),
    "5b": (352, 192, 320, 192, 224, nn.MaxPool2d, 128),
}


class InceptionModule(nn.Module):
    """Branches whose maps are joined: 1x1; 1x1 and 3x3; 1x1 and twice 3x3; pooling and 1x1.

    Args:
        in_chs: channels of the input.
        *row: of ``MODULES``.
        conv: builds a convolution with norm and activation.
    """

    def __init__(
        self,
        in_chs: int,
        one: int,
        reduce: int,
        three: int,
        double_reduce: int,
        double: int,
        pool: type[nn.Module],
        projection: int,
        conv: Callable[..., nn.Module],
    ) -> None:
        super().__init__()
        stride = 1 if one else 2
        last = {"kernel_size": 3, "stride": stride, "padding": 1}
        branches = {
            "3x3": [conv(in_chs, reduce, kernel_size=1), conv(reduce, three, **last)],
            "double3x3": [
                conv(in_chs, double_reduce, kernel_size=1),
                conv(double_reduce, double, kernel_size=3, padding=1),
                conv(double, double, **last),
            ],
            "pool": [pool(**last)] + ([conv(in_chs, projection, kernel_size=1)] if projection else []),
        }
        if one:
            branches = {"1x1": [conv(in_chs, one, kernel_size=1)], **branches}
        self.branches = nn.ModuleDict({name: nn.Sequential(*layers) for name, layers in branches.items()})
        self.out_chs = one + three + double + (projection or in_chs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches.values()], 1)


class Inception(ImageClassifier):
    """The network of figure 5: a separable 7x7 convolution, 1x1 and 3x3 convolutions, ten Inception modules.

    A norm stands before every nonlinearity. Where the paper is silent or contradicts itself:

    - The rows 4c and 4d print 128 projected maps and 576 in all, but add up to 608. The totals are kept, which the next
      rows and the 1024 of 4e need; the projections are 96.
    - The rows 3c and 4e print the size of their input: their output is 14x14 and 7x7.
    - The text counts 13.6 million parameters. The figure has 11.2 million with 1000 classes, or 11.3 with 128 projected
      maps in 4c and 4d; where the others are is not in the paper. The figure is followed.
    - The separable convolution (depth multiplier 8) has one norm and one nonlinearity, after its 1x1 part.
    - Initialization: :func:`fbn_plugin.revised_init`.

    Args:
        norm_layer: spec string, callable or None, see :func:`fbn_plugin.models.base.unit`.
        act_layer: class of the nonlinearity.
        lrn: local response normalization around the second convolution, as in GoogLeNet, over 5 channels. The paper's
            Inception and BN-Baseline have it, BN-x5 and later do not.
        weight_gain: factor of the convolutions' initial weights: the paper's ensemble has "increased" ones, and does
            not say by how much.
        per_activation: names of modules, "3a" to "5b", whose norms are ``PerActivationBN`` in the place of
            ``norm_layer``. The paper's ensemble has such in "the last hidden layers".
        num_classes, in_chans: see :class:`fbn_plugin.models.base.ImageClassifier`.
        drop_rate: dropout before the classifier: 0.4 in the paper's Inception and BN-Baseline, 0 from BN-x5 on,
            0.05 or 0.1 in some of the ensemble's networks.

    Shape:
        images of 224x224 pixels in the paper; any from 32x32, with ``per_activation`` all of one size.

    Raises:
        ValueError: a ``weight_gain`` that is not above 0, or a name in ``per_activation`` that no module has.
    """

    def __init__(
        self,
        norm_layer: NormLayer = "BN",
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        lrn: bool = False,
        weight_gain: float = 1.0,
        per_activation: Sequence[str] = (),
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        if not weight_gain > 0:
            raise ValueError(f"weight_gain must be above 0, got {weight_gain!r}")
        if unknown := [name for name in per_activation if name not in MODULES]:
            raise ValueError(f"per_activation must be names of modules, {', '.join(MODULES)}, got {unknown[0]!r}")
        conv = functools.partial(unit, norm_layer=norm_layer, act_layer=act_layer)
        features = nn.Sequential()
        features.add_module(
            "conv1",
            nn.Sequential(
                nn.Conv2d(in_chans, 8 * in_chans, 7, stride=2, padding=3, groups=in_chans, bias=False),
                conv(8 * in_chans, 64, kernel_size=1),
            ),
        )
        features.add_module("pool1", nn.MaxPool2d(3, 2, 1))
        if lrn:
            features.add_module("lrn1", nn.LocalResponseNorm(5))
        features.add_module(
            "conv2", nn.Sequential(conv(64, 64, kernel_size=1), conv(64, 192, kernel_size=3, padding=1))
        )
        if lrn:
            features.add_module("lrn2", nn.LocalResponseNorm(5))
        features.add_module("pool2", nn.MaxPool2d(3, 2, 1))
        channels = 192
        for name, row in MODULES.items():
            own = {"norm_layer": "PerActivationBN"} if name in per_activation else {}
            module = InceptionModule(channels, *row, conv=functools.partial(conv, **own))
            features.add_module(f"inception_{name}", module)
            channels = module.out_chs
        super().__init__(features, global_average(), channels, num_classes, in_chans, drop_rate)
        revised_init(self)
        for module in self.modules() if weight_gain != 1 else ():
            if isinstance(module, nn.Conv2d):
                module.weight.data.mul_(weight_gain)
