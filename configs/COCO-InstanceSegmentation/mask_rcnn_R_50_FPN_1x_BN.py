"""mask_rcnn_R_50_FPN_1x_BN.yaml for detectron2's tools/lazyconfig_train_net.py. That tool has neither the population
statistics nor the linear rule of this project's: it evaluates with moving averages, and takes 16 images on any number
of GPUs."""

from detectron2 import model_zoo

import fbn_plugin

fbn_plugin.register()

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.eval_period = train.checkpointer.period = 10000
