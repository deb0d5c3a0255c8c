"""Give the norms of a built model the small scale back that they were to start at.

Models set the scales of their norms to 1, or those of a block's last norm to 0, after the norms are built. Source:
Davis and Frank, "Revisiting Batch Norm Initialization" (2022), section 3.2: one constant in all norms of the network.
"""

import torch
from torch import nn


@torch.no_grad()
def apply_gamma_init(model: nn.Module) -> nn.Module:
    """Set the scale of every norm that has a ``gamma_init`` below 1 to it, also where the model set it to 0.

    A ``gamma_init`` of 1, which is that of norms whose spec gives none, leaves the scales as the model set them. For a
    model that is built and not trained yet; trained scales are lost.

    Args:
        model: changed in place.

    Returns:
        ``model``.

    Examples::

        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.ScaledBatchNorm2d(8))
        >>> _ = nn.init.zeros_(model[1].weight)  # as many models do with a block's last norm
        >>> round(fbn_plugin.apply_gamma_init(model)[1].weight[0].item(), 3)
        0.1
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and getattr(module, "gamma_init", 1.0) != 1:
            weight.fill_(module.gamma_init)
    return model
