"""Give the norms of a built model the small scale back that they were to start at.

Models set the scales of their norms to 1, or those of a block's last norm to 0, after the norms are built. Source:
Davis and Frank, "Revisiting Batch Norm Initialization" (2022), section 3.2: one constant in all norms of the network.
"""

import torch
from torch import nn


@torch.no_grad()
def apply_gamma_init(model: nn.Module) -> nn.Module:
    """Set the scale of every norm that has a ``gamma_init`` to it, also where the model set it to 0.

    For a model that is built and not trained yet; trained scales are lost. A filtered norm whose spec gives no
    ``gamma_init`` has 1.

    Args:
        model: changed in place.

    Returns:
        ``model``.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "gamma_init") and weight is not None:
            weight.fill_(module.gamma_init)
    return model
