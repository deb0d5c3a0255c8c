"""Whether the part of a network that a norm belongs to is trained: a detector freezes the first stages of its backbone,
convolutions and norms, and a norm that is thawed there alone would train beside layers that do not."""

from torch import nn

from fbn_plugin.layers.description import describe


def layer_beside(model: nn.Module, name: str) -> nn.Module | None:
    """The layer that the norm of this name belongs to: the module that holds it, if that has parameters of its own (a
    convolution with its norm), else what stands before it among the children of the same module, or else behind it; if
    none there has parameters, the same one level up. None for a model that is the norm."""
    while name:
        path, _, own = name.rpartition(".")
        parent = model.get_submodule(path)
        if any(True for _ in parent.parameters(recurse=False)):
            return parent
        children = list(parent._modules)
        at = children.index(own)
        for child in (*reversed(children[:at]), *children[at + 1 :]):
            layer = parent._modules[child]
            if layer is not None and describe(layer) is None and any(True for _ in layer.parameters()):
                return layer
        name = path
    return None


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, and none is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters()) and any(
        True for _ in module.parameters()
    )


def frozen_layer(model: nn.Module, names: list[str]) -> nn.Module | None:
    """The frozen layer that a norm with these names belongs to; None if under one of them it belongs to a layer that
    trains, or to none."""
    layers = [layer_beside(model, name) for name in names]
    return layers[0] if all(layer is not None and is_frozen(layer) for layer in layers) else None
