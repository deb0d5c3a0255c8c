"""MODEL.WEIGHTS of a run: a checkpoint of this engine, torchvision's ResNet, or a backbone of detectron2's."""

import logging
import warnings

from torch import nn

from fbn_plugin.engine.run.checkpoint import load_file
from fbn_plugin.engine.run.config import CfgNode
from fbn_plugin.engine.run.weights import loading_report, refuse_foreign, refuse_misfit, refuse_not_a_number
from fbn_plugin.engine.torchvision import detectron2_weights
from fbn_plugin.models.mask_rcnn import load_backbone

__all__ = ["StartingWeights"]

logger = logging.getLogger(__name__)


class StartingWeights:
    """The file that MODEL.WEIGHTS names, read before anything is built.

    Args:
        source: a path or an address.

    Attributes:
        is_backbone: whether it is a classification model's, not a detector's.
        iteration: the last one, from 0, that a checkpoint of this engine has behind it; None where unknown.

    Raises:
        OSError, ValueError: it is not there, cannot be downloaded, or is not what it should be; one sentence.
    """

    def __init__(self, source: str):
        self.source = source
        path = detectron2_weights.local_path(source)
        self.unused: list[str] = []
        self.iteration: int | None = None
        if detectron2_weights.is_detectron2_file(source):
            self.is_backbone = True
            self._weights, self.unused = detectron2_weights.read_backbone(path)
        else:
            content = load_file(path)
            self._weights = {name.removeprefix("module."): value for name, value in content["model"].items()}
            if isinstance(content.get("iteration"), int):  # another tool's may be anything
                self.iteration = content["iteration"]
            self.is_backbone = "conv1.weight" in self._weights

    def load(self, model: nn.Module, strict: bool) -> list[str]:
        """Load into a detector.

        Args:
            strict: nothing may be missing or left over.

        Returns:
            the lines that say what was loaded, see ``loading_report``.

        Raises:
            ValueError: the weights are of another model.
        """
        file = f"MODEL.WEIGHTS {self.source}"
        loaded, left = self._load_backbone(model, file) if self.is_backbone else self._load_all(model, file, strict)
        refuse_not_a_number(file, model)
        return loading_report(file, model, loaded, [*left, *self.unused])

    def _load_backbone(self, model: nn.Module, file: str) -> tuple[set[str], list[str]]:
        with warnings.catch_warnings():  # the report tells it
            warnings.simplefilter("ignore")
            loaded = load_backbone(model.backbone.body, self._weights, file)
        left = [name for name in self._weights if name not in loaded and not name.endswith("num_batches_tracked")]
        return {f"backbone.body.{name}" for name in loaded}, left

    def _load_all(self, model: nn.Module, file: str, strict: bool) -> tuple[set[str], list[str]]:
        own = {name: value.shape for name, value in model.state_dict().items()}
        given = {n: v for n, v in self._weights.items() if n in own and own[n] == getattr(v, "shape", None)}
        left = [name for name in self._weights if name not in given]
        missing = [name for name in own if name not in given]
        refuse_foreign(file, given, left)
        shapes = [(n, self._weights[n].shape, own[n]) for n in missing if hasattr(self._weights.get(n), "shape")]
        if strict:
            refuse_misfit(file, missing, shapes, left)
        # Another number of classes, or another norm, is no other network; another convolution of the backbone is.
        convolutions = [n for n in missing if n.startswith("backbone.body.") and len(own[n]) == 4]
        refuse_misfit(file, convolutions, [each for each in shapes if each[0] in convolutions])
        model.load_state_dict(given, strict=False)
        return set(given), left

    def advise(self, cfg: CfgNode) -> None:
        """Say what torchvision's ImageNet weights want, where the config has it otherwise."""
        if self.is_backbone and (not self.source.endswith(".pkl") or "torchvision" in self.source):
            wanted = {
                "INPUT.FORMAT": (cfg.INPUT.FORMAT, "RGB"),
                "MODEL.PIXEL_MEAN": (cfg.MODEL.PIXEL_MEAN, [123.675, 116.28, 103.53]),
                "MODEL.PIXEL_STD": (cfg.MODEL.PIXEL_STD, [58.395, 57.12, 57.375]),
            }
            if cfg.MODEL.RESNETS.DEPTH >= 50:
                wanted["MODEL.RESNETS.STRIDE_IN_1X1"] = (cfg.MODEL.RESNETS.STRIDE_IN_1X1, False)
            if wrong := [f"{key} {value}" for key, (own, value) in wanted.items() if own != value]:
                logger.warning("torchvision's ImageNet weights want %s", ", ".join(wrong))
