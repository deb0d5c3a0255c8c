"""The network of figure 1 of Batch normalization: three dense layers of 100 sigmoid units, for MNIST."""

from collections.abc import Callable

from torch import nn

from fbn_plugin.models.base import ImageClassifier, NormLayer, unit


class SigmoidMLP(ImageClassifier):
    """Dense layers ``fc1``, ``fc2``, ``fc3`` of 100 units, ``y = g(norm(Wu))`` or, without a norm, ``g(Wu + b)``.

    The paper takes 28x28 binary images and "small random Gaussian" weights, of which it does not print the deviation.

    Args:
        norm_layer: spec string, callable that gives norms of (N, C), or None; see :func:`fbn_plugin.models.base.unit`.
        act_layer: class of the activation g.
        init_std: standard deviation of the initial weights, classifier included; biases are 0.
        image_size: height and width of the images in pixels.
        num_classes, in_chans, drop_rate: see :class:`fbn_plugin.models.base.ImageClassifier`.

    Shape:
        images of ``image_size`` squared pixels.
    """

    def __init__(
        self,
        norm_layer: NormLayer = "BN",
        act_layer: Callable[[], nn.Module] = nn.Sigmoid,
        init_std: float = 0.1,
        image_size: int = 28,
        num_classes: int = 10,
        in_chans: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        features, size = nn.Sequential(), in_chans * image_size**2
        features.add_module("flatten", nn.Flatten())
        for number in (1, 2, 3):
            features.add_module(f"fc{number}", unit(size, 100, norm_layer, act_layer))
            size = 100
        self.init_std = init_std
        super().__init__(features, nn.Identity(), size, num_classes, in_chans, drop_rate, (image_size,))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
