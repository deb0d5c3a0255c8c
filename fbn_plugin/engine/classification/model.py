"""timm's models with another norm in the place of their batch normalization."""

import difflib

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import apply_gamma_init, convert_norm, prepend_input_norm, revised_init
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import named, refusal
from fbn_plugin.frameworks import timm_models

__all__ = ["build_model", "check_image_size", "create_model"]


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
    model = _timm_model(name, **kwargs)
    return _with_norm(model, name, norm, **kwargs) if norm else model


def _timm_model(name: str, **kwargs) -> nn.Module:
    timm_models.register()
    try:
        return timm.create_model(name, **kwargs)
    except RuntimeError as error:  # timm: unknown name, unknown tag, or no such pretrained weights
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest and nearest[0] != name else ""
        raise ValueError(f"timm cannot build {name!r}: {str(error).rstrip('.')}{hint}") from error


def _with_norm(model: nn.Module, name: str, norm: str, pretrained: bool = False, **kwargs) -> nn.Module:
    old = {module for module in model.modules() if isinstance(module, _BatchNorm)}
    if not old:
        raise ValueError(f"{name} has no batch normalization that {norm} could replace")
    model = convert_norm(model, norm)
    if left := [type(module).__name__ for module in model.modules() if module in old]:
        number = counted(len(left), "norm")
        raise ValueError(f"{number} of {name} cannot be replaced by {norm}, the first is a {left[0]}")
    return model if pretrained else apply_gamma_init(model)


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """The model that a config describes, on the CPU; errors as :func:`create_model`."""
    name, pretrained = cfg.MODEL.NAME, cfg.MODEL.PRETRAINED
    options = {"in_chans": len(cfg.INPUT.FORMAT), "pretrained": pretrained, "drop_rate": cfg.MODEL.DROP_RATE}
    with named("MODEL.PRETRAINED" if pretrained and name in timm.list_models() else "MODEL.NAME"):
        model = _timm_model(name, num_classes=num_classes, **options)
    if cfg.MODEL.NORM:
        with named("MODEL.NORM"):
            model = _with_norm(model, name, cfg.MODEL.NORM, pretrained)
    if cfg.MODEL.REVISED_INIT:
        revised_init(model)
    if cfg.INPUT.NORM_GAMMA_INIT:
        prepend_input_norm(model, cfg.INPUT.NORM_GAMMA_INIT)
    return model


@torch.no_grad()
def check_image_size(cfg: CfgNode, model: nn.Module, device: torch.device) -> None:
    """Refuse an INPUT.SIZE that a model cannot take, which it would say in its first iteration, by two empty
    images: of one alone, a norm by the batch has one value a channel on a map of one pixel.

    Args:
        cfg: config.
        model: on ``device``; it is left in the mode that it is in.
        device: where it is.

    Raises:
        ValueError: with what the model says.
    """
    training = model.training
    try:
        model.eval()(torch.zeros(2, len(cfg.INPUT.FORMAT), cfg.INPUT.SIZE, cfg.INPUT.SIZE, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise refusal("INPUT.SIZE", f"one that {cfg.MODEL.NAME} takes ({reason})", cfg.INPUT.SIZE) from None
    finally:
        model.train(training)
