"""Checkpoints of a detectron2 run: detectron2's file formats and names, written in one step, checked for fit, and
reported on in a few lines."""

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from fbn_plugin.engine.files.array_pickle import read_pickled_weights
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.checkpoint import AtomicSaving, load_file
from fbn_plugin.engine.run.states import check_like
from fbn_plugin.engine.run.weights import loading_report, refuse_foreign, refuse_misfit

__all__ = ["AtomicCheckpointer", "LossNormalizer"]

logger = logging.getLogger(__name__)


class LossNormalizer:
    """The moving average that dense detectors (RetinaNet, FCOS) divide their losses by, as a checkpointable.

    detectron2 keeps it in an attribute of the model, in each process its own, and out of ``state_dict``.
    ``state_dict`` here is a collective call; loading with another number of processes takes the mean.
    """

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, list[float | None]]:
        return {"ranks": distributed.all_gather(getattr(self.model, "loss_normalizer", None))}

    def check_state_dict(self, state: Any) -> None:
        """ValueError for a state that is none of such averages."""
        values = state.get("ranks") if isinstance(state, Mapping) else None
        if not isinstance(values, list) or not values:
            raise ValueError("it must be a mapping with a list 'ranks'")
        for value in values:
            if value is not None:
                check_like(0.0, value, "an average")

    def load_state_dict(self, state: dict[str, list[float | None]]) -> None:
        values = state["ranks"]
        if None not in values:
            same = len(values) == distributed.world_size()
            self.model.loss_normalizer = values[distributed.rank()] if same else sum(values) / len(values)


class AtomicCheckpointer(AtomicSaving, DetectionCheckpointer):
    """detectron2's checkpointer, whose files are whole or not there when a run is interrupted.

    Weights to start from may be of another model in part, but must have something of this one. Nothing in a file is
    run, where detectron2 would unpickle it: files of detectron2's model zoo and of Caffe2 (``.pkl``) are read by
    ``read_pickled_weights``, pycls's (``.pyth``) as other checkpoints, with ``weights_only``.
    """

    def load(self, path: str, checkpointables: list[str] | None = None, strict: bool | None = None) -> dict[str, Any]:
        """See :meth:`AtomicSaving.load`."""
        try:
            return super().load(path, checkpointables, strict)
        except (FileNotFoundError, ValueError):
            raise
        except Exception as error:  # unpickling what is no checkpoint may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from None
        finally:
            self._parsed_url_during_load = None  # detectron2 forgets to after an error

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return read_pickled_weights(filename)
        if filename.endswith(".pyth"):
            weights = load_file(filename)["model"].get("model_state")
            if not isinstance(weights, dict):
                raise ValueError(f"checkpoint {filename} has no 'model_state', as pycls's have")
            kept = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
            return {"model": kept, "__author__": "pycls", "matching_heuristics": True}
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> dict[str, Any]:
        return self.check_content(load_file(f))

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        super()._convert_ndarray_to_tensor(state_dict)
        self._entries = state_dict  # the last call sees the entries under the names that the model will be asked for

    def _log_incompatible_keys(self, incompatible) -> None:
        ours = set(self.model.state_dict())
        buffers = ("pixel_mean", "pixel_std")  # from the config
        unused = [name for name in incompatible.unexpected_keys if name not in buffers]
        loaded = ours.intersection(self._entries)
        if self._strict:
            refuse_misfit(self._path, incompatible.missing_keys, incompatible.incorrect_shapes, unused)
            logger.info("%s: all %d entries of the model loaded", self._path, len(ours))
            return
        refuse_foreign(self._path, loaded, unused)
        if incompatible.incorrect_shapes:
            name, theirs, own = incompatible.incorrect_shapes[0]
            logger.warning(
                "%d entries are not loaded, as their shapes differ, such as %s (%s in the file, %s in the model)",
                *(len(incompatible.incorrect_shapes), name, tuple(theirs), tuple(own)),
            )
        for line in loading_report(self._path, self.model, loaded, unused):
            logger.info(line)
