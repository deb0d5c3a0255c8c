"""timm's models with another norm in the place of their batch normalization."""

import difflib

import timm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import apply_gamma_init, convert_norm
from fbn_plugin.frameworks import timm_models

__all__ = ["create_model"]


def create_model(name: str, norm: str = "", **kwargs) -> nn.Module:
    """Build a timm model whose batch normalization is replaced by another norm; initial and loaded weights are kept.

    The model is built first and converted then, which works alike for models that take a `norm_layer`, for those
    that do not, and for norms with an activation.

    Args:
        name: a timm model name, or that of one of the papers' networks.
        norm: spec string such as "FBN(t_sigma=4)"; "" for the model's own norm.
        **kwargs: for `timm.create_model`: num_classes, in_chans, pretrained, drop_rate, ...

    Raises:
        ValueError: unknown model, bad spec, a model without batch normalization, or with one that cannot be replaced.
    """
    timm_models.register()
    try:
        model = timm.create_model(name, **kwargs)
    except RuntimeError as error:  # timm: unknown name, unknown tag, or no such pretrained weights
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] != name else ""
        raise ValueError(f"timm cannot build {name!r}: {str(error).rstrip('.')}{hint}") from error
    if not norm:
        return model
    old = {module for module in model.modules() if isinstance(module, _BatchNorm)}
    if not old:
        raise ValueError(f"{name} has no batch normalization that {norm} could replace")
    model = convert_norm(model, norm)
    if left := [type(module).__name__ for module in model.modules() if module in old]:
        raise ValueError(f"{len(left)} norms of {name} cannot be replaced by {norm}, the first is a {left[0]}")
    return model if kwargs.get("pretrained") else apply_gamma_init(model)
