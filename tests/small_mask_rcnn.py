"""A Mask R-CNN that is quick to run, and two images for it."""

import torch

from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn


def small(**options):
    """``mask_rcnn_fpn`` with few channels and few regions, unless ``options`` say otherwise."""
    small = {
        "fpn_channels": 16,
        "box_fcs": (16, 16),
        "mask_convs": (16,),
        "num_classes": 3,
        "min_size": 64,
        "max_size": 96,
    }
    few = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 10, "box_batch_size_per_image": 16}
    return mask_rcnn_fpn(**{**small, **few, **options})


def batch():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 80, 64, generator=generator)]
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 80, dtype=torch.uint8),
        },
        {  # nothing in this one: the mask head's norm may see an empty batch
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 80, 64, dtype=torch.uint8),
        },
    ]
    return images, targets
