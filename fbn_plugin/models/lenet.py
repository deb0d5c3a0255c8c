"""LeNet-5 (LeCun et al., 1998) with norms at chosen layers: figures 5-7 and S7-S9 of Filtered batch normalization."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from fbn_plugin.models.base import ImageClassifier, NormLayer, unit

LAYERS = ("conv1", "conv2", "fc1", "fc2")


class LeNet5(ImageClassifier):
    """Convolutions of 6 and 16 kernels 5x5, each halved by pooling, then dense layers of 120, 84 and 10 units.

    The paper prints neither activation, pooling nor initialization, and names PyTorch: they are ReLU, maximum pooling
    and PyTorch's here. A norm stands between its layer and the activation. The paper's "between the last two fully
    connected layers" is after ``fc2``, the default.

    Args:
        norm_layer: spec string, callable or None, see :func:`fbn_plugin.models.base.unit`.
        norm_after: the layers that a norm follows: one or several of conv1, conv2, fc1 and fc2, or ``"all"``.
        act_layer: class of the activation.
        num_classes, in_chans, drop_rate: see :class:`fbn_plugin.models.base.ImageClassifier`.

    Shape:
        images of 32x32 pixels, or of 28x28, which are put in the middle of 32x32.

    Raises:
        ValueError: ``norm_after`` names no layer; images of another size.
    """

    def __init__(
        self,
        norm_layer: NormLayer = "BN",
        norm_after: str | Sequence[str] = "fc2",
        act_layer: Callable[[], nn.Module] = nn.ReLU,
        num_classes: int = 10,
        in_chans: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        chosen = LAYERS if norm_after == "all" else (norm_after,) if isinstance(norm_after, str) else tuple(norm_after)
        if unknown := [name for name in chosen if name not in LAYERS]:
            raise ValueError(f"norm_after takes {', '.join(LAYERS)} or all, got {unknown[0]!r}")

        def layer(name: str, in_size: int, out_size: int, kernel_size: int | None = None) -> nn.Module:
            return unit(in_size, out_size, norm_layer if name in chosen else None, act_layer, kernel_size)

        features = OrderedDict(
            conv1=layer("conv1", in_chans, 6, 5),
            pool1=nn.MaxPool2d(2),
            conv2=layer("conv2", 6, 16, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=layer("fc1", 400, 120),
            fc2=layer("fc2", 120, 84),
        )
        super().__init__(nn.Sequential(features), nn.Identity(), 84, num_classes, in_chans, drop_rate, (28, 32))

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(F.pad(x, (2, 2, 2, 2)) if x.shape[-2:] == (28, 28) else x)
