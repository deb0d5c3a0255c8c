"""Put a batch normalization that learns in the place of a model's fixed mean and deviation of the pixels. Source: Davis
and Frank, "Revisiting Batch Norm Initialization" (2022), section 3.4.

What differs between the frameworks, where the fixed values stand, is theirs, see ``frameworks/*``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.jit import is_scripting

from fbn_plugin.adapters import load_adapters
from fbn_plugin.layers import InputNorm2d

Builder = Callable[[int], InputNorm2d]

_PREPENDERS: list[tuple[Callable[[nn.Module], bool], Callable[[nn.Module, Builder], None]]] = []


def register_prepender(accepts: Callable[[nn.Module], bool], prepend: Callable[[nn.Module, Builder], None]) -> None:
    """Teach :func:`prepend_input_norm` a kind of model.

    Args:
        accepts: tells whether a model is of this kind.
        prepend: called with the model and what builds the norm for a number of channels; changes the model in place.
    """
    _PREPENDERS.append((accepts, prepend))


def prepend_input_norm(model: nn.Module, gamma_init: float = 0.1) -> nn.Module:
    """Normalize the pixels by an :class:`fbn_plugin.InputNorm2d` in place of a fixed mean and deviation.

    - A detector of detectron2 or torchvision normalizes by itself: its mean and deviation become 0 and 1. The moments
      are over all pixels of the batch's images, before these are resized by the model and padded. What is padded does
      not count, and is 0 after the normalization, as it is with fixed values.
    - timm's models and any other that is called with a batch (N, C, H, W) are given normalized images: now give them
      images that are not. ``timm.data.resolve_model_data_config(model)`` then says mean 0 and deviation 1. The norm
      is a hook of the call; what goes around the call (``model.forward_features``, FX tracing) wants
      ``model.input_norm(images)``.

    Args:
        model: changed in place: it gets an ``input_norm`` (torchvision's detectors: ``transform.input_norm``), which is
            part of its ``state_dict``. Load weights from before it is there with ``strict=False``.
        gamma_init: the scale that the model's other batch norms start at, in (0, 1]; this one starts at 0.58 times it.

    Returns:
        ``model``.

    Raises:
        ValueError: a ``gamma_init`` out of range, a model that has an input norm, or one without a convolution, whose
        number of input channels is not known.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.ScaledBatchNorm2d(8))
        >>> pixels = torch.rand(2, 3, 16, 16)  # not normalized
        >>> fbn_plugin.prepend_input_norm(model)(pixels).shape
        torch.Size([2, 8, 14, 14])
        >>> round(model.input_norm.gamma_init, 3)  # 0.58 * 0.1
        0.058
    """
    load_adapters()
    if any(isinstance(module, InputNorm2d) for module in model.modules()):
        raise ValueError(f"the {type(model).__name__} has an input norm already")
    device = next((parameter.device for parameter in model.parameters()), None)

    def build(num_channels: int) -> InputNorm2d:
        return InputNorm2d(num_channels, gamma_init=gamma_init, device=device).train(model.training)

    prepend = next((prepend for accepts, prepend in _PREPENDERS if accepts(model)), prepend_to_call)
    prepend(model, build)
    return model


def prepend_to_call(model: nn.Module, build: Builder) -> None:
    """Let ``model`` normalize the batch (N, C, H, W) that it is called with."""
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise ValueError(f"the {type(model).__name__} has no Conv2d that tells how many channels its images have")
    norm = build(conv.in_channels)
    if isinstance(model, nn.Sequential | nn.ModuleDict):  # these call their children one after the other
        children = dict(model._modules)
        model._modules.clear()
        model._modules.update({"input_norm": norm, **children})
    else:
        model.input_norm = norm
        model.register_forward_pre_hook(_normalize_batch)


def _normalize_batch(self, args: tuple[Tensor]) -> tuple[Tensor]:  # types for TorchScript: others may follow
    if is_scripting():
        return (self.input_norm(args[0]),)
    return (self.input_norm(args[0]),) + args[1:]  # noqa: RUF005, as TorchScript knows no star


def normalize_images(norm: InputNorm2d, images: Sequence[Tensor]) -> list[Tensor]:
    """Normalize images of different sizes by the moments of all their pixels.

    Args:
        norm: for C channels.
        images: (C, H, W) each, float or integer.

    Returns:
        Images of the same sizes, float.
    """
    pixels = torch.cat([image.flatten(1) for image in images], 1)
    if not pixels.is_floating_point():
        pixels = pixels.to(norm.weight.dtype)
    pixels = norm(pixels[None, :, :, None])[0, :, :, 0]
    parts = pixels.split([image[0].numel() for image in images], 1)
    return [part.reshape(image.shape) for part, image in zip(parts, images)]
