"""Class probabilities that a model gives images, averaged over the views of an image, by population statistics or by
moments of batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fbn_plugin.engine.classification.crops import Views, normalized
from fbn_plugin.engine.classification.evaluation import Evaluator, moments_of
from fbn_plugin.engine.data.image_data import Images
from fbn_plugin.engine.data.loaders import data_loader
from fbn_plugin.engine.run import stopping
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.training.evaluation_modes import evaluation_mode

__all__ = ["class_probabilities"]


def class_probabilities(
    cfg: CfgNode,
    model: nn.Module,
    images: Images,
    num_classes: int,
    device: torch.device,
    crops: int = 1,
    spread: bool = False,
    name: str = "evaluating",
) -> tuple[Tensor, Evaluator]:
    """What a model says of images, by this process alone: class probabilities (N, C) in float64, averaged over views,
    and how it was done.

    Args:
        cfg: INPUT and TEST say how.
        model: on ``device``; left as it was.
        images: a set, in whose order the answers are.
        num_classes: of the model.
        device: of the model.
        crops: views of an image.
        spread: each view of an image has other company; without, the same images are together in all views.
        name: for the progress bar.

    Raises:
        ValueError: TEST.MOMENTS does not go with the images or the model.
        EvaluationLeft: the process is asked to stop.
    """
    total = None
    for number in range(crops if spread else 1):
        plan = Evaluator(cfg, images, num_classes, device, epoch=number, processes=1)
        plan.check(model)
        views = Views(plan.cfg, crops, number if spread else None)
        found = _probabilities(model, plan, views, device, name)
        total = found if total is None else total + found
    return total / (crops if spread else 1), plan


@torch.no_grad()
def _probabilities(model: nn.Module, plan: Evaluator, views: Views, device: torch.device, name: str) -> Tensor:
    """(N, C) in float64, in the order of the set or of its part."""
    images, crops = plan.images, views.count
    images.transform = views
    options = {"num_workers": plan.cfg.DATALOADER.NUM_WORKERS, "pin_memory": device.type == "cuda"}
    # As many images of all views as the model gets at a time, but for moments of a batch, which are of whole batches.
    batch_size = plan.cfg.TEST.IMS_PER_BATCH
    together = max(1, batch_size // crops) if plan.moments == "population" else batch_size
    loader: DataLoader = data_loader(images, batch_size=together, **options)
    found = []
    with evaluation_mode(model), moments_of(model, plan.moments):
        for pixels, _ in stopping.until_asked(tqdm(loader, name, leave=False, disable=None)):
            if plan.moments == "population":
                logits = model(normalized(pixels.to(device).flatten(0, 1), plan.cfg)).unflatten(0, pixels.shape[:2])
            else:
                each = (model(normalized(view.to(device), plan.cfg)) for view in pixels.unbind(1))
                logits = torch.stack(list(each), dim=1)
            found.append(logits.double().softmax(dim=2).mean(dim=1).cpu())
    if stopping.asked() and len(found) < len(loader):
        raise stopping.EvaluationLeft
    return plan.in_order(torch.cat(found))
