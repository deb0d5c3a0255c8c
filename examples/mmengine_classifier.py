"""Train a small network of mmcv's blocks with filtered batch normalization, by mmengine's runner.

In a config of MMDetection the same ``norm_cfg`` stands in backbone, neck and heads. The images are noise that is
brighter or darker, made on the spot. Run: python examples/mmengine_classifier.py
"""

import tempfile

import torch
from mmcv.cnn import ConvModule
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import fbn_plugin

fbn_plugin.register()


@MODELS.register_module(force=True)
class SmallClassifier(BaseModel):
    def __init__(self, norm_cfg: dict) -> None:
        super().__init__()
        self.stem = ConvModule(3, 16, 3, stride=2, norm_cfg=norm_cfg)
        self.conv = ConvModule(16, 32, 3, stride=2, norm_cfg=norm_cfg)
        self.head = nn.Linear(32, 2)

    def forward(self, images: torch.Tensor, labels: torch.Tensor, mode: str = "tensor"):
        scores = self.head(self.conv(self.stem(images)).mean((2, 3)))
        return {"loss": nn.functional.cross_entropy(scores, labels)} if mode == "loss" else scores


def main(folder: str, iterations: int = 30) -> BaseModel:
    torch.manual_seed(0)
    data = [(torch.rand(3, 32, 32) * (1 + index % 2), index % 2) for index in range(64)]
    runner = Runner(
        {"type": "SmallClassifier", "norm_cfg": {"type": "FBN", "t_sigma": 5}},
        folder,
        train_dataloader=DataLoader(data, 4, sampler=DefaultSampler(data)),
        train_cfg={"by_epoch": False, "max_iters": iterations},
        optim_wrapper={
            "optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
            "paramwise_cfg": {"norm_decay_mult": 0.0},
        },
    )
    model = runner.train().eval()
    images, labels = (torch.stack(list(map(torch.as_tensor, part))) for part in zip(*data))
    print(f"{model.stem}\naccuracy: {(model(images, labels).argmax(1) == labels).float().mean():.0%}")
    return model


if __name__ == "__main__":
    main(tempfile.mkdtemp())
