"""timm's models with another norm in the place of their batch normalization."""

import difflib
import inspect
import logging
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fbn_plugin import apply_gamma_init, convert_norm, prepend_input_norm, revised_init
from fbn_plugin.engine.classification.batch import BatchSizes
from fbn_plugin.engine.data.locations import places
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import named, refusal
from fbn_plugin.frameworks import timm_models
from fbn_plugin.layers.description import describe, family

__all__ = ["build_model", "check_image_size", "check_model_options", "create_model", "model_title"]

logger = logging.getLogger(__name__)

# Arguments of a model that have a key of their own, or are not for this tool.
_OWN_KEYS = {
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
    "drop_rate": "MODEL.DROP_RATE",
    "in_chans": "INPUT.FORMAT",
    "norm_layer": "MODEL.NORM",
    "num_classes": "DATASETS.ROOT",
    "pretrained": "MODEL.PRETRAINED",
    "checkpoint_path": "MODEL.WEIGHTS",
}
_NOT_OPTIONS = (
    *("cache_dir", "cfg", "exportable", "feature_cfg", "features_only", "no_jit", "out_indices", "pretrained_cfg"),
    *("model_name", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_strict", "scriptable"),
)


def model_title(cfg: CfgNode) -> str:
    """A config's network, with its options, and its norm, for readers.

    Examples::

        >>> model = {"NAME": "resnet18_cifar", "OPTIONS": {"layers": [1, 1, 1, 1]}, "NORM": "FBN", "NORM_LAYERS": ()}
        >>> model_title(CfgNode({"MODEL": model}))
        'resnet18_cifar(layers=[1, 1, 1, 1]) with FBN'
    """
    options = ", ".join(f"{name}={value!r}" for name, value in cfg.MODEL.OPTIONS.items())
    norm = f" with {cfg.MODEL.NORM}" if cfg.MODEL.NORM else ""
    norm += f" in {', '.join(cfg.MODEL.NORM_LAYERS)}" if cfg.MODEL.NORM_LAYERS else ""
    return cfg.MODEL.NAME + (f"({options})" if options else "") + norm


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
        nearest = [each for each in difflib.get_close_matches(name, timm.list_models(), n=3) if each != name]
        hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(f"timm cannot build {name!r}: {str(error).rstrip('.')}{hint}") from error


def _with_norm(
    model: nn.Module, name: str, norm: str, pretrained: bool = False, layers: Sequence[str] = (), **kwargs
) -> nn.Module:
    old = {module for module in model.modules() if isinstance(module, _BatchNorm)}
    if not old:
        raise ValueError(f"{name} has no batch normalization that {norm} could replace")
    model = convert_norm(model, norm, include=layers or None)
    if not layers and (left := [type(module).__name__ for module in model.modules() if module in old]):
        number = counted(len(left), "norm")
        raise ValueError(f"{number} of {name} cannot be replaced by {norm}, the first is a {left[0]}")
    return model if pretrained else apply_gamma_init(model)


def build_model(cfg: CfgNode, num_classes: int) -> nn.Module:
    """The model that a config describes, on the CPU; errors as :func:`create_model`."""
    name, pretrained = cfg.MODEL.NAME, cfg.MODEL.PRETRAINED
    options = {"in_chans": len(cfg.INPUT.FORMAT), "pretrained": pretrained, "drop_rate": cfg.MODEL.DROP_RATE}
    further = dict(cfg.MODEL.OPTIONS)
    if cfg.MODEL.DROP_PATH_RATE:
        further["drop_path_rate"] = cfg.MODEL.DROP_PATH_RATE
    if pretrained and cfg.MODEL.PRETRAINED_PATH:
        options["pretrained_cfg_overlay"] = _weights_of(cfg, num_classes)
    try:
        model = _timm_model(name, num_classes=num_classes, **options, **further)
    except Exception as error:  # of an option a model may say anything
        _refuse_options(cfg, further, error)
        with named("MODEL.PRETRAINED" if pretrained and name in timm.list_models() else "MODEL.NAME"):
            raise
    if cfg.MODEL.NORM:
        with named("MODEL.NORM" + " with NORM_LAYERS" * bool(cfg.MODEL.NORM_LAYERS)):
            model = _with_norm(model, name, cfg.MODEL.NORM, pretrained, cfg.MODEL.NORM_LAYERS)
    if cfg.MODEL.REVISED_INIT:
        revised_init(model)
    if cfg.INPUT.NORM_GAMMA_INIT:
        prepend_input_norm(model, cfg.INPUT.NORM_GAMMA_INIT)
    return model


def _weights_of(cfg: CfgNode, num_classes: int) -> dict[str, Any]:
    """MODEL.PRETRAINED_PATH as timm takes it: what a file has, and of how many classes it is.

    Where these are not the model's, timm leaves the classifier out and would take whatever else fits, so that a model
    of the file's own classes is tried first, whose weights must all be there.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is of another model; one sentence.
    """
    name, path = cfg.MODEL.NAME, cfg.MODEL.PRETRAINED_PATH
    if _plain(cfg, **cfg.MODEL.OPTIONS) is None:  # as timm will say
        return {}
    arguments = {"in_chans": len(cfg.INPUT.FORMAT), **cfg.MODEL.OPTIONS}
    with named("MODEL.PRETRAINED_PATH"):
        weights = load_file(next((place for place in places(path) if place.is_file()), path))["model"]
    usual = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    last = next((len(each) for each in reversed(weights.values()) if torch.is_tensor(each) and each.dim() > 1), 0)
    reason = "it has no weights"
    tried = (num_classes, last, usual and usual.num_classes) if weights else ()  # without, timm would download some
    for classes in dict.fromkeys(each for each in tried if each):
        try:
            overlay = {"state_dict": dict(weights), "num_classes": classes}  # a copy, as timm changes it
            timm.create_model(name, True, pretrained_cfg_overlay=overlay, num_classes=classes, **arguments)
        except Exception as error:  # PyTorch names all that are missing, and a model's conversion fails in any way
            reason = textwrap.shorten(str(error), 200, placeholder=" ...")
            continue
        left = "" if classes == num_classes else f"; the classifier begins anew, as the data have {num_classes}"
        logger.info("%s: all weights of %s, with %s%s", path, name, counted(classes, "class"), left)
        return {"state_dict": weights, "num_classes": classes}
    raise ValueError(f"MODEL.PRETRAINED_PATH {path} is not of {name}: {reason}")


def check_model_options(cfg: CfgNode) -> None:
    """Refuse arguments in MODEL.OPTIONS that other keys are for.

    Raises:
        ValueError: the first of them, with the key.
    """
    for argument in cfg.MODEL.OPTIONS:
        if argument in _OWN_KEYS:
            raise ValueError(f"MODEL.OPTIONS must be without {argument}, for which there is {_OWN_KEYS[argument]}")
        if argument in _NOT_OPTIONS:
            raise ValueError(f"MODEL.OPTIONS must be arguments that describe the network, got {argument!r}")


def _plain(cfg: CfgNode, **options: Any) -> nn.Module | None:
    """The model without weights and storage; None where timm cannot build it."""
    timm_models.register()
    try:
        with torch.device("meta"):
            return timm.create_model(cfg.MODEL.NAME, in_chans=len(cfg.INPUT.FORMAT), **options)
    except Exception:  # a model may say anything
        return None


def _refuse_options(cfg: CfgNode, options: dict[str, Any], error: Exception) -> None:
    """Say which of the options a model does not take; nothing where it cannot be built without them either."""
    name = cfg.MODEL.NAME
    if not options or (model := _plain(cfg)) is None:
        return
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unexpected is None or unexpected[1] not in options:
        reason = " ".join(str(error).split()) or type(error).__name__
        key = "MODEL.OPTIONS" if cfg.MODEL.OPTIONS else "MODEL.DROP_PATH_RATE"
        raise refusal(key, f"what {name} takes ({reason})", options) from None
    if unexpected[1] == "drop_path_rate":
        raise refusal("MODEL.DROP_PATH_RATE", f"0 with {name}, which has no such argument", options[unexpected[1]])
    parameters = inspect.signature(type(model)).parameters.values()
    accepted = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    accepted = [each for each in accepted if each not in (*_OWN_KEYS, *_NOT_OPTIONS)]
    raise ValueError(
        f"MODEL.OPTIONS must be arguments of {name}, got {unexpected[1]!r}: accepted are {', '.join(accepted)}"
    ) from None


def _values_of_a_moment(norm: nn.Module, images: torch.Tensor) -> int:
    """How many values of an input a batch norm's moments are of."""
    return len(images) if describe(norm).evaluation == "activation" else images.numel() // images.shape[1]


@torch.no_grad()
def check_image_size(cfg: CfgNode, model: nn.Module, device: torch.device, sizes: BatchSizes | None = None) -> None:
    """Refuse an INPUT.SIZE that a model cannot take, which it would say in its first iteration, by two empty images;
    and a batch of which a norm would have one value a channel: it has no variance, and PyTorch refuses it.

    Args:
        cfg: config.
        model: on ``device``; it is left in the mode that it is in.
        device: where it is.
        sizes: of the batches that it will be trained on; None: it will not be.

    Raises:
        ValueError: with what the model says, or the norm's name.
    """
    training = model.training
    values: dict[str, int] = {}  # of each norm by the batch, values a channel of the two images
    hooks = [
        norm.register_forward_pre_hook(
            lambda module, args, name=name: values.update({name: _values_of_a_moment(module, args[0])})
        )
        for name, norm in model.named_modules()
        if family(norm) == "BN"
    ]
    try:
        model.eval()(torch.zeros(2, len(cfg.INPUT.FORMAT), cfg.INPUT.SIZE, cfg.INPUT.SIZE, device=device))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise refusal("INPUT.SIZE", f"one that {cfg.MODEL.NAME} takes ({reason})", cfg.INPUT.SIZE) from None
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for name, two in values.items() if sizes is not None else ():
        norm = model.get_submodule(name)
        images = sizes.step * (sizes.processes if describe(norm).synchronized else 1)
        if images * two == 2:
            what = f"more than 1 image for each process and step: of one {name}, a {type(norm).__name__}, has one "
            raise refusal("SOLVER.IMS_PER_BATCH", what + "value a channel, which has no variance", sizes.update)
