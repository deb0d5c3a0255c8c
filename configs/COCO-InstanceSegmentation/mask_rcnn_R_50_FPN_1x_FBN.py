"""mask_rcnn_R_50_FPN_1x_BN.py with FBN."""

import fbn_plugin

from .mask_rcnn_R_50_FPN_1x_BN import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

fbn_plugin.register()

model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "FBN(t_sigma=5.0)"
