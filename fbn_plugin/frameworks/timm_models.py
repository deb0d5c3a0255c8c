"""How the papers' networks get into timm: ``timm.create_model("all_cnn_c", norm_layer="FBN")``.

timm keeps its models in the dictionaries of timm/models/_registry.py, to which its public functions only add.
"""

from collections.abc import Callable

from timm.models import build_model_with_cfg, generate_default_cfgs, is_model, register_model
from torch import nn

from fbn_plugin import internals
from fbn_plugin.frameworks.timm import find_spec
from fbn_plugin.models import NETWORKS, cifar

_ALL = {**NETWORKS, **cifar.NETWORKS}
# timm's dictionaries (or sets) of models by name, and the one of models by module.
_BY_NAME = [
    internals.optional(f"timm.models._registry.{name}", {})
    for name in (
        "_model_entrypoints",
        "_model_to_module",
        "_model_with_tags",
        "_model_pretrained_cfgs",
        "_model_default_cfgs",
    )
]
_BY_MODULE = internals.optional("timm.models._registry._module_to_models", {})

default_cfgs = generate_default_cfgs(  # register_model looks for this name
    {
        name: {
            "num_classes": network.num_classes,
            "input_size": (len(network.mean), network.size, network.size),
            "mean": network.mean,
            "std": network.std,
            "crop_pct": 1.0 if network.size < 224 else 0.875,
            "interpolation": "bilinear",
        }
        for name, network in _ALL.items()
    }
)


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    network = _ALL[name]

    def create(pretrained: bool = False, **kwargs) -> nn.Module:
        arguments = {**network.arguments, **kwargs}
        if name in NETWORKS and isinstance(norm := arguments.get("norm_layer"), str) and norm:
            arguments["norm_layer"] = find_spec(norm, ())
        return build_model_with_cfg(network.build, name, pretrained, feature_cfg={"feature_cls": "getter"}, **arguments)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name} for images of {network.size}x{network.size} pixels."
    return create


def register() -> None:
    """Enter the papers' networks in timm's registry, unless they are there."""
    for name in _ALL:
        if not is_model(name):
            register_model(_entrypoint(name))


def unregister() -> None:
    """Take the papers' networks out of timm's registry; models that are built stay as they are."""
    module = __name__.rpartition(".")[2]
    for name in _ALL:
        for entries in _BY_NAME:
            entries.pop(name, None)
    _BY_MODULE.pop(module, None)
