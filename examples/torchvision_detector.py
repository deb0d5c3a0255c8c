"""Train a Mask R-CNN of torchvision with filtered batch normalization in backbone, pyramid and mask head.

The images are bright squares on noise, made on the spot; put your data set in place of ``Squares``. The network is the
smallest, so that a CPU does: for a real one leave the widths and sizes out, take ``"resnet50"`` and
``weights_backbone=FILE``. Run: python examples/torchvision_detector.py
"""

import torch
from torch.utils.data import DataLoader, Dataset

from fbn_plugin import param_groups
from fbn_plugin.models.mask_rcnn import mask_rcnn_fpn


class Squares(Dataset):
    """Images (3, 64, 64) in 0..1 with one square each, and torchvision's targets for them."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        random = torch.Generator().manual_seed(index)
        left, top, side = torch.randint(8, 30, (3,), generator=random).tolist()
        image, mask = torch.rand(3, 64, 64, generator=random) / 2, torch.zeros(1, 64, 64, dtype=torch.uint8)
        image[:, top : top + side, left : left + side] += 0.5
        mask[:, top : top + side, left : left + side] = 1
        boxes = torch.tensor([[left, top, left + side, top + side]], dtype=torch.float32)
        return image, {"boxes": boxes, "labels": torch.tensor([1]), "masks": mask}


def main(iterations: int = 20) -> list[float]:
    torch.manual_seed(0)
    small = {"backbone_options": {"stem_channels": 16, "res2_channels": 16}, "fpn_channels": 32, "mask_convs": (32, 32)}
    norms = {"norm": "FBN(t_sigma=5)", "norm_fpn": "FBN", "norm_mask_head": "FBN"}
    model = mask_rcnn_fpn("resnet18", **norms, num_classes=2, box_fcs=(64,), min_size=64, max_size=64, **small).train()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.02, weight_decay=1e-4, scale_lr_divisor=1), momentum=0.9)
    loader = DataLoader(Squares(), batch_size=2, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch)))
    losses = []
    while len(losses) < iterations:
        for images, targets in loader:
            loss = sum(model(list(images), list(targets)).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
            losses.append(loss.item())
    print(f"loss: {losses[0]:.2f} -> {losses[-1]:.2f}")
    with torch.inference_mode():
        detections = model.eval()([Squares()[0][0]])[0]
    print(f"{len(detections['boxes'])} detections with {', '.join(detections)}")
    return losses


if __name__ == "__main__":
    main()
