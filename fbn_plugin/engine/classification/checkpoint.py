"""Checkpoints of classifiers: fvcore's, which a data set of other classes is held against."""

from typing import Any

from torch import nn

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer
from fbn_plugin.engine.run.cli import UserError

__all__ = ["ClassifierCheckpointer"]


class ClassifierCheckpointer(AtomicCheckpointer):
    """A checkpointer that says of how many classes a file is, where these are not the model's.

    Args:
        model: with timm's ``get_classifier``, if it has a classifier.
        save_dir: folder of the checkpoints.
        reset_classifier: leave the classifier out of weights to start from, so that the model keeps its own.
        **checkpointables: further objects with a state.
    """

    def __init__(self, model: nn.Module, save_dir: str, reset_classifier: bool = False, **checkpointables: Any):
        super().__init__(model, save_dir, **checkpointables)
        self._reset_classifier = reset_classifier

    def check_content(self, content: dict[str, Any]) -> dict[str, Any]:
        """See :meth:`AtomicSaving.check_content`.

        Raises:
            UserError: a classifier of other classes, besides.
        """
        super().check_content(content)
        weights, starts = content["model"], not self._strict
        for name, own in self._classifier().items():
            given = weights.get(name)
            if given is None:
                continue
            if starts and self._reset_classifier:
                del weights[name]
            elif given.dim() == own.dim() and given.shape[1:] == own.shape[1:] and len(given) != len(own):
                what = "MODEL.RESET_CLASSIFIER True trains a new classifier on its other weights"
                what = what if starts else f"evaluate it on a data set of {counted(len(given), 'class')}"
                classes = f"{counted(len(given), 'class')}, and the data set has {len(own)}"
                raise UserError(f"checkpoint {self._path} has {classes}: {what}")
        return content

    def _classifier(self) -> dict[str, nn.Parameter]:
        """Name and value of the parameters of the last layer, or layers."""
        layers = self.model.get_classifier() if hasattr(self.model, "get_classifier") else ()
        layers = layers if isinstance(layers, tuple | list) else (layers,)
        own = {p for layer in layers if isinstance(layer, nn.Module) for p in layer.parameters()}
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter in own}
