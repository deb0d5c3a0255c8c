"""The model that a detection config describes, with detectron2's optimizer and learning rate schedules.

What torchvision's model does otherwise than detectron2's (RoIAlign without the shift by half a pixel, for one) stays
torchvision's.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fbn_plugin import param_groups, prepend_input_norm
from fbn_plugin.engine.data.coco_data import scaled_size
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.rules import get_value
from fbn_plugin.engine.run.run_folder import NORM_KEYS
from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn
from fbn_plugin.training.parameter_groups import named_without_decay, norm_parameters

__all__ = ["DetectionTransform", "build_model", "build_optimizer", "build_scheduler"]

logger = logging.getLogger(__name__)


class DetectionTransform(GeneralizedRCNNTransform):
    """torchvision's step before the backbone, for images that are float RGB in 0..1 of any size.

    Training images come resized by the data loader; for evaluation they are resized here, antialiased as there, so that
    detections come out in the pixels of the image as given.
    """

    def __init__(self, min_size: int, max_size: int, mean: Sequence[float], std: Sequence[float], bgr: bool):
        super().__init__(min_size, max_size, [value / 255 for value in mean], [value / 255 for value in std])
        self.bgr = bgr

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.flip(0) if self.bgr else image)

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        short = self.min_size[0]
        if self.training or short == 0:
            return image, target
        size = scaled_size(*image.shape[-2:], short, self.max_size)
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0], target


class DetectionRPN(RegionProposalNetwork):
    """torchvision's proposal network with detectron2's losses: weights, and where smooth L1 goes over into L2."""

    beta, weight, box_weight = 0.0, 1.0, 1.0

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(sampled) > 0 for sampled in self.fg_bg_sampler(labels))
        chosen = positive | negative
        logits, classes = objectness.flatten()[chosen], torch.cat(labels)[chosen]
        deltas, targets = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        score = F.binary_cross_entropy_with_logits(logits, classes, reduction="sum")
        box = F.smooth_l1_loss(deltas, targets, beta=self.beta, reduction="sum")
        weight = self.weight / (self.fg_bg_sampler.batch_size_per_image * len(labels))
        return weight * score, weight * self.box_weight * box


class DetectionRoIHeads(RoIHeads):
    """torchvision's heads for boxes and masks with detectron2's loss of the boxes; see `DetectionRPN`."""

    beta, box_weight = 0.0, 1.0

    def forward(self, features, proposals, image_shapes, targets=None):
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        proposals, matched, labels, regression_targets = self.select_training_samples(proposals, targets)
        regions = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = self.box_predictor(self.box_head(regions))
        classes = torch.cat(labels)
        positive = classes.nonzero().squeeze(1)
        deltas = deltas.unflatten(1, (logits.shape[1], 4))[positive, classes[positive]]
        box = F.smooth_l1_loss(deltas, torch.cat(regression_targets)[positive], beta=self.beta, reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(logits, classes),
            "loss_box_reg": self.box_weight * box / classes.numel(),
        }
        if self.has_mask():
            boxes, matched = ([x[label > 0] for x, label in zip(each, labels)] for each in (proposals, matched))
            logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))
            masks, labels = ([target[name] for target in targets] for name in ("masks", "labels"))
            losses["loss_mask"] = maskrcnn_loss(logits, boxes, masks, labels, matched)
        return [], losses


def _detectron2_start(model: nn.Module) -> None:
    """Give the heads' last layers and the box head's linear ones detectron2's first values; the rest has them."""
    for layer in model.roi_heads.box_head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
    last = {model.roi_heads.box_predictor.cls_score: 0.01, model.roi_heads.box_predictor.bbox_pred: 0.001}
    if model.roi_heads.has_mask():
        nn.init.zeros_(model.roi_heads.mask_predictor.conv5_mask.bias)
        last[model.roi_heads.mask_predictor.mask_fcn_logits] = 0.001
    for layer, deviation in last.items():
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)


def _detectron2_losses(model: nn.Module, m: CfgNode) -> None:
    """Give proposal network and heads detectron2's losses, with the MODEL section's weights."""
    model.rpn.__class__, model.roi_heads.__class__ = DetectionRPN, DetectionRoIHeads
    model.rpn.beta, model.rpn.weight = m.RPN.SMOOTH_L1_BETA, m.RPN.LOSS_WEIGHT
    model.rpn.box_weight = m.RPN.BBOX_REG_LOSS_WEIGHT
    model.roi_heads.beta, model.roi_heads.box_weight = (
        m.ROI_BOX_HEAD.SMOOTH_L1_BETA,
        m.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT,
    )


def build_model(cfg: CfgNode) -> nn.Module:
    """The Mask R-CNN (without MODEL.MASK_ON: Faster R-CNN) that the config describes, with random weights, on the CPU.

    It takes float RGB images in 0..1 of any size, whatever INPUT.FORMAT, and classes count from 1.
    """
    m = cfg.MODEL
    if m.ROI_BOX_HEAD.NORM and not m.ROI_BOX_HEAD.NUM_CONV:
        logger.warning("MODEL.ROI_BOX_HEAD.NORM has no effect: the box head has no convolution (NUM_CONV 0)")
    norms = {key: get_value(cfg, key) for key in NORM_KEYS}
    try:
        model = _mask_rcnn(cfg, norms)
    except ValueError as error:
        raise _norm_refusal(cfg, norms) or error from None
    model.transform = DetectionTransform(
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, m.PIXEL_MEAN, m.PIXEL_STD, cfg.INPUT.FORMAT == "BGR"
    )
    _detectron2_start(model)
    _detectron2_losses(model, m)
    model.rpn.box_coder.weights = m.RPN.BBOX_REG_WEIGHTS
    model.rpn.min_size = max(m.PROPOSAL_GENERATOR.MIN_SIZE, model.rpn.min_size)
    if cfg.INPUT.NORM_GAMMA_INIT:
        prepend_input_norm(model, cfg.INPUT.NORM_GAMMA_INIT)
    return model


def _mask_rcnn(cfg: CfgNode, norms: Mapping[str, str]) -> nn.Module:
    """torchvision's model with the norms of ``NORM_KEYS``."""
    m = cfg.MODEL
    return mask_rcnn_fpn(
        f"resnet{m.RESNETS.DEPTH}",
        *norms.values(),
        num_classes=m.ROI_HEADS.NUM_CLASSES + 1,
        masks=m.MASK_ON,
        **_backbone_options(m),
        **_proposal_options(m),
        **_head_options(m),
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
    )


def _norm_refusal(cfg: CfgNode, norms: Mapping[str, str]) -> ValueError | None:
    """What to say of the norm that does not fit the network, such as one of 7 groups for 64 channels, with its key."""
    for key, spec in norms.items():
        try:
            _mask_rcnn(cfg, dict.fromkeys(norms, "BN") | {key: spec})
        except ValueError as error:
            return ValueError(f"{key} {spec!r}: {error}")
    return None


def _backbone_options(m: CfgNode) -> dict[str, Any]:
    """Of ``mask_rcnn_fpn``, from the MODEL section: ResNet and feature pyramid."""
    r = m.RESNETS
    options = {}
    if (r.NUM_GROUPS, r.WIDTH_PER_GROUP) != (1, 64):
        options |= {"groups": r.NUM_GROUPS, "width_per_group": r.WIDTH_PER_GROUP}
    res2 = 64 if r.DEPTH < 50 else 256
    if r.STEM_OUT_CHANNELS != 64 or res2 != r.RES2_OUT_CHANNELS:
        options |= {"stem_channels": r.STEM_OUT_CHANNELS, "res2_channels": r.RES2_OUT_CHANNELS}
    return {
        "trainable_layers": 5 - m.BACKBONE.FREEZE_AT,
        "backbone_options": options,
        "bottleneck_stride": "1x1" if r.STRIDE_IN_1X1 else "3x3",
        "fpn_channels": m.FPN.OUT_CHANNELS,
    }


def _proposal_options(m: CfgNode) -> dict[str, Any]:
    """Anchors and the proposal network."""
    r = m.RPN
    return {
        "anchor_sizes": m.ANCHOR_GENERATOR.SIZES,
        "aspect_ratios": m.ANCHOR_GENERATOR.ASPECT_RATIOS,
        "rpn_convs": len(r.CONV_DIMS),
        "rpn_pre_nms_top_n_train": r.PRE_NMS_TOPK_TRAIN,
        "rpn_pre_nms_top_n_test": r.PRE_NMS_TOPK_TEST,
        "rpn_post_nms_top_n_train": r.POST_NMS_TOPK_TRAIN,
        "rpn_post_nms_top_n_test": r.POST_NMS_TOPK_TEST,
        "rpn_nms_thresh": r.NMS_THRESH,
        "rpn_bg_iou_thresh": r.IOU_THRESHOLDS[0],
        "rpn_fg_iou_thresh": r.IOU_THRESHOLDS[1],
        "rpn_batch_size_per_image": r.BATCH_SIZE_PER_IMAGE,
        "rpn_positive_fraction": r.POSITIVE_FRACTION,
    }


def _head_options(m: CfgNode) -> dict[str, Any]:
    """The heads of boxes and masks, their training samples and their detections."""
    box, mask, heads = m.ROI_BOX_HEAD, m.ROI_MASK_HEAD, m.ROI_HEADS
    return {
        "box_convs": [box.CONV_DIM] * box.NUM_CONV,
        "box_fcs": [box.FC_DIM] * box.NUM_FC,
        "box_resolution": box.POOLER_RESOLUTION,
        "box_sampling_ratio": box.POOLER_SAMPLING_RATIO,
        "mask_convs": [mask.CONV_DIM] * mask.NUM_CONV,
        "mask_resolution": mask.POOLER_RESOLUTION,
        "mask_sampling_ratio": mask.POOLER_SAMPLING_RATIO,
        "box_score_thresh": heads.SCORE_THRESH_TEST,
        "box_nms_thresh": heads.NMS_THRESH_TEST,
        "box_fg_iou_thresh": heads.IOU_THRESHOLDS[0],
        "box_bg_iou_thresh": heads.IOU_THRESHOLDS[0],
        "box_batch_size_per_image": heads.BATCH_SIZE_PER_IMAGE,
        "box_positive_fraction": heads.POSITIVE_FRACTION,
        "bbox_reg_weights": box.BBOX_REG_WEIGHTS,
    }


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD:
    """SGD with detectron2's parameter groups: norms decay by WEIGHT_DECAY_NORM, biases by WEIGHT_DECAY_BIAS if that is
    set, and biases learn BIAS_LR_FACTOR times as fast; or, with SCALE_LR_DIVISOR, with those of `param_groups`. What
    norms name in `no_weight_decay()` does not decay."""
    solver = cfg.SOLVER
    if solver.SCALE_LR_DIVISOR:
        parameters = param_groups(model, solver.BASE_LR, solver.WEIGHT_DECAY, solver.SCALE_LR_DIVISOR)
        return torch.optim.SGD(parameters, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    norms, named = norm_parameters(model), named_without_decay(model, norms_only=True)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr, decay = solver.BASE_LR, solver.WEIGHT_DECAY_NORM if parameter in norms else solver.WEIGHT_DECAY
        if name.rpartition(".")[2] == "bias":
            lr *= solver.BIAS_LR_FACTOR
            decay = decay if solver.WEIGHT_DECAY_BIAS is None else solver.WEIGHT_DECAY_BIAS
        groups.setdefault((lr, 0.0 if parameter in named else decay), []).append(parameter)
    parameters = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    return torch.optim.SGD(parameters, solver.BASE_LR, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)


def build_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """detectron2's WarmupMultiStepLR or WarmupCosineLR, one step an iteration."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        schedule: ParamScheduler = MultiStepParamScheduler(values, milestones=steps, num_updates=solver.MAX_ITER)
    else:
        schedule = CosineParamScheduler(1.0, solver.BASE_LR_END / solver.BASE_LR)
    warmup = min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0)
    if warmup > 0:
        start = solver.WARMUP_FACTOR * schedule(0.0)
        end = schedule(0.0 if solver.RESCALE_INTERVAL else warmup)
        rise = LinearParamScheduler(start, end) if solver.WARMUP_METHOD == "linear" else ConstantParamScheduler(start)
        if warmup == 1.0:
            schedule = rise
        else:
            scaling = ["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"]
            schedule = CompositeParamScheduler([rise, schedule], [warmup, 1 - warmup], scaling)
    # fvcore's schedules end before 1; the rate after the last iteration is asked for, and not used.
    last = solver.MAX_ITER - 1
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda it: schedule(min(it, last) / solver.MAX_ITER))
