"""Train a DETR of Transformers with filtered batch normalization in its backbone, save it and load it again.

The images are bright squares on noise, made on the spot. The network is a tiny one with random weights, so that a CPU
does: for a real one take ``DetrForObjectDetection.from_pretrained("facebook/detr-resnet-50")`` and its image processor.
DETR's loss wants scipy. Run: python examples/huggingface_detector.py
"""

import tempfile

import torch
from transformers import AutoModelForObjectDetection, DetrConfig, DetrForObjectDetection, ResNetConfig

import fbn_plugin
from fbn_plugin.frameworks.huggingface import convert_pretrained


def tiny_detr() -> DetrForObjectDetection:
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, d_model=32, num_queries=4, num_labels=1, **layers, **heads)
    )


def squares(count: int) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """Images (count, 3, 64, 64) with a square each, and DETR's labels for them."""
    images, labels = torch.rand(count, 3, 64, 64) / 2, []
    for image in images:
        left, top, side = torch.randint(8, 30, (3,)).tolist()
        image[:, top : top + side, left : left + side] += 0.5
        box = torch.tensor([[left + side / 2, top + side / 2, side, side]]) / 64
        labels.append({"class_labels": torch.tensor([0]), "boxes": box})
    return images, labels


def main(folder: str, iterations: int = 60) -> tuple[torch.nn.Module, torch.nn.Module, list[float]]:
    torch.manual_seed(0)
    fbn_plugin.register()  # for from_pretrained
    report = fbn_plugin.NormReport()
    model = tiny_detr()
    model.model.unfreeze_backbone()  # which DETR freezes
    convert_pretrained(model, "FBN(t_sigma=5)", report=report).train()
    print(report)
    optimizer = torch.optim.AdamW(fbn_plugin.param_groups(model, lr=1e-3, weight_decay=1e-4, scale_lr_divisor=1))
    losses = []
    for _ in range(iterations):
        images, labels = squares(8)
        loss = model(images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.2f} -> {losses[-1]:.2f}")
    model.save_pretrained(folder)
    return model, AutoModelForObjectDetection.from_pretrained(folder), losses


if __name__ == "__main__":
    main(tempfile.mkdtemp())
