"""How the networks of Davis and Frank, "Revisiting Batch Norm Initialization" (2022), section 4.1, start: their layers
without the scale of the norms, which is for :func:`fbn_plugin.apply_gamma_init`.
"""

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fbn_plugin.layers.description import describe


@torch.no_grad()
def revised_init(model: nn.Module) -> nn.Module:
    """Draw the weights of convolutions and linear layers anew, by fan-in, and set every ``bias`` to 0.

    Convolutions are drawn from Kaiming's normal distribution for ReLU. Linear layers are uniform; the paper leaves the
    bounds open, here they are Kaiming's for ReLU too, ``sqrt(6 / fan_in)``. Fan-in makes the variance that enters a
    batch normalization, and with it the factor of its gradient (Eq. 12 to 16), the same in all layers.

    Most models start otherwise, for a reason or not: the ResNets of timm, torchvision and detectron2 by fan-out, the
    predictors of detectors with small deviations, transformers with a truncated normal. So this is for classifiers with
    ReLU, built and not trained yet. The small networks in a norm by learned statistics stay as that norm starts them.

    Args:
        model: changed in place.

    Returns:
        ``model``.

    Examples::

        >>> model = fbn_plugin.revised_init(nn.Sequential(nn.Conv2d(3, 8, 3), fbn_plugin.ScaledBatchNorm2d(8)))
        >>> model[0].bias.abs().max().item()
        0.0
    """
    described = [(norm, describe(norm)) for norm in model.modules()]
    in_norms = {part for norm, what in described if what is not None and what.owns_children for part in norm.modules()}
    for module in model.modules():
        if isinstance(module, _ConvNd) and module not in in_norms:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)
    return model
