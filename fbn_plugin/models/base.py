"""What the networks share: one layer with its norm and activation, and the face of a timm classifier."""

import math
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from fbn_plugin.layers.random_start import separate_stream
from fbn_plugin.registry import NormFactory, NormSpec, norm_factory, parse_spec

NormLayer = str | Callable[..., nn.Module] | None


def unit(
    in_size: int,
    out_size: int,
    norm_layer: NormLayer,
    act_layer: Callable[[], nn.Module] | None = nn.ReLU,
    kernel_size: int | None = None,
    norm_options: dict | None = None,
    **conv_options,
) -> nn.Sequential:
    """A convolution, or a dense layer if ``kernel_size`` is None, then its norm, then its activation.

    The layer has a bias only where no norm follows, which would take it away (Batch normalization, section 3.2). Its
    weight is drawn alike with and without a norm.

    Args:
        in_size, out_size: number of channels, or of units.
        norm_layer: spec string, ``norm_factory(...)``, another callable ``(out_size, **norm_options) -> nn.Module``, or
            None or ``""`` for no norm. Specs and factories give a 1-D norm after a dense layer.
        act_layer: called without arguments; None for no activation.
        norm_options: further options of the norm, over those in the spec.
        **conv_options: stride, padding and groups of the convolution.

    Returns:
        A sequence of ``conv`` or ``fc``, ``norm`` and ``act``, as far as there are.

    Raises:
        ValueError: a spec, or an option, that the registry does not know.
    """
    dense, options = kernel_size is None, norm_options or {}
    if isinstance(norm_layer, NormFactory):
        norm_layer = norm_layer.spec
    if norm_layer and not callable(norm_layer):
        spec = parse_spec(norm_layer)
        spec = parse_spec(str(NormSpec(spec.name, {**spec.options, **options})))  # which checks the options
        norm = norm_factory(spec, dims=1 if dense else 2)(out_size)
    else:
        with separate_stream():
            norm = norm_layer(out_size, **options) if norm_layer else None
    if dense:
        layer = nn.Linear(in_size, out_size, bias=False)
    else:
        layer = nn.Conv2d(in_size, out_size, kernel_size, bias=False, **conv_options)
    if norm is None:
        with separate_stream():  # as PyTorch draws it
            bound = layer.weight[0].numel() ** -0.5
            layer.bias = nn.Parameter(nn.init.uniform_(layer.weight.new_empty(out_size), -bound, bound))
    parts = {"fc" if dense else "conv": layer, "norm": norm, "act": act_layer and act_layer()}
    return nn.Sequential(OrderedDict((name, module) for name, module in parts.items() if module is not None))


class ImageClassifier(nn.Module):
    """Features, a pooling that gives vectors, dropout and a linear classifier, with the methods of a timm model.

    Args:
        features: images (N, in_chans, H, W) to feature maps or vectors.
        pool: those to vectors (N, num_features).
        num_features: size of the vectors.
        num_classes: 0 for no classifier: the vectors are the output.
        in_chans: channels of the images.
        drop_rate: dropout before the classifier.
        image_sizes: the heights and widths that are accepted; empty if any.

    Shape:
        images ``(N, in_chans, H, W)`` to logits ``(N, num_classes)``.

    Raises:
        ValueError: on images of another size than ``image_sizes``.
    """

    def __init__(
        self,
        features: nn.Module,
        pool: nn.Module,
        num_features: int,
        num_classes: int,
        in_chans: int,
        drop_rate: float = 0.0,
        image_sizes: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.features, self.pool = features, pool
        self.drop = nn.Dropout(drop_rate)
        self.num_features = self.head_hidden_size = num_features
        self.in_chans = in_chans
        self.image_sizes = image_sizes
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer: logits from vectors."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new last layer in place, for ``num_classes`` classes; 0 for none."""
        self.num_classes = num_classes
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the norms exempt from weight decay; timm asks the model alone."""
        modules = (
            (name, module) for name, module in self.named_modules() if name and hasattr(module, "no_weight_decay")
        )
        return {f"{prefix}.{name}" for prefix, module in modules for name in module.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """What tells timm, for the layer decay of its optimizers, the layer of a parameter's name: a number that grows
        from the input on."""
        order = {name: number for number, (name, _) in enumerate(self.features.named_children())}

        def layer(name: str) -> float:
            first, _, rest = name.partition(".")
            return order[rest.partition(".")[0]] if first == "features" else math.inf

        return layer

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (N, in_chans, H, W) to what the pooling takes."""
        if self.image_sizes and (x.shape[-2] != x.shape[-1] or x.shape[-1] not in self.image_sizes):
            accepted = " or ".join(f"{size}x{size}" for size in self.image_sizes)
            raise ValueError(
                f"{type(self).__name__} takes images of {accepted} pixels, got {x.shape[-2]}x{x.shape[-1]}"
            )
        return self.features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (N, num_classes), or with ``pre_logits`` to vectors (N, num_features)."""
        x = self.drop(self.pool(x))
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def global_average() -> nn.Sequential:
    """Feature maps (N, C, H, W) to the mean of each, (N, C)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
