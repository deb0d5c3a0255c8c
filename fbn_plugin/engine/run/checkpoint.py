"""Checkpoints that survive an interruption: fvcore's and detectron2's checkpointers (file names, ``last_checkpoint``,
loading) with atomic writes, one sentence for a damaged file, and the random states of every process.
"""

import argparse
import logging
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer

from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.tensor_file import check_pickles, check_tensors
from fbn_plugin.engine.run.weights import refuse_foreign, refuse_misfit
from fbn_plugin.engine.run.words import counted

logger = logging.getLogger(__name__)

__all__ = ["AtomicCheckpointer", "AtomicSaving", "PeriodicCheckpointer", "RandomState", "atomic_write", "load_file"]


def atomic_write(path: str | os.PathLike, data: bytes | None = None, write=None) -> None:
    """Replace ``path`` in one step: a reader, or a crash at any moment, finds the old file or the new one, whole.

    Args:
        path: file to write; its folder must exist.
        data: the content, or
        write: a function that writes it to a binary file object.
    """
    path = os.fspath(path)
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            if write is None:
                file.write(data)
            else:
                write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_file(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint or a plain state dict to the CPU, without running code from it (``weights_only``).

    Files of timm's, Lightning's and the like have their weights elsewhere: of ``state_dict_ema``, ``model_ema``,
    ``state_dict`` and ``model`` the first that is there is taken, as ``timm.models.load_state_dict`` does, and said.
    What ``DistributedDataParallel`` and ``torch.compile`` put in front of every name goes.

    Args:
        path: a file of ``torch.save``'s, or one that ends in ``.safetensors``.

    Returns:
        the file's dictionary, its weights under ``"model"``.

    Raises:
        FileNotFoundError, ValueError: no such file; not a PyTorch file, or one cut short.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint {path} is not there")
    try:
        if os.fspath(path).endswith(".safetensors"):
            from safetensors.torch import load_file as load_safetensors

            data = load_safetensors(path)
        else:
            check_pickles(path)
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its arguments as one
                data = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(data)
    except ModuleNotFoundError:
        raise
    except Exception:  # the unpickler fails in any way on any bytes; PyTorch's words would advise to let code run
        raise ValueError(
            f"checkpoint {path} cannot be read: it is cut short, no PyTorch file, or has more than tensors in it"
        ) from None
    if not isinstance(data, dict):
        raise ValueError(f"checkpoint {path} holds a {type(data).__name__}, not a dictionary of weights")
    known = ("state_dict_ema", "model_ema", "state_dict", "model")
    there = [key for key in known if isinstance(data.get(key), Mapping)]
    if not there:
        return {"model": _without_wrappers(data)}
    if there[0] != "model":
        left = f"; not those of {' and '.join(there[1:])}" if there[1:] else ""
        logger.info("%s: the weights are those of %s%s", path, there[0], left)
    rest = {key: value for key, value in data.items() if key not in there}
    return {**rest, "model": _without_wrappers(data[there[0]])}


def _without_wrappers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Without a prefix that all names have."""
    prefixes = ("module.", "_orig_mod.")
    while found := [prefix for prefix in prefixes if weights and all(name.startswith(prefix) for name in weights)]:
        weights = {name.removeprefix(found[0]): value for name, value in weights.items()}
    return dict(weights)


class RandomState:
    """The states of Python's, NumPy's and PyTorch's generators (CPU and own GPU) in every process, as one
    checkpointable.

    ``state_dict`` is a collective call. Loading with another number of processes leaves the generators as they are.
    """

    def state_dict(self) -> dict[str, list]:
        kind, keys, position, has_gauss, cached = np.random.get_state()
        own = {
            "python": random.getstate(),
            "numpy": (kind, keys.tolist(), position, has_gauss, cached),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        return {"ranks": distributed.all_gather(own)}

    def load_state_dict(self, state: dict[str, list]) -> None:
        if len(state["ranks"]) != distributed.world_size():
            return
        own = state["ranks"][distributed.rank()]
        version, keys, gauss = own["python"]
        random.setstate((version, tuple(keys), gauss))
        np.random.set_state(own["numpy"])
        torch.set_rng_state(own["torch"])
        if own["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])


class AtomicSaving:
    """What fvcore's Checkpointer and its descendants get before them in a class's bases: atomic writes, and a run that
    is resumed only into the very same model.

    ``save`` is called by every process, gathers what is theirs, and rank 0 writes.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        data = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()}, **kwargs)
        if self.save_dir and self.save_to_disk and distributed.is_main():
            path = os.path.join(self.save_dir, f"{name}.pth")
            atomic_write(path, write=lambda file: torch.save(data, file))
            self.tag_last_checkpoint(os.path.basename(path))
            logger.info("saved %s", path)
        distributed.barrier()

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        atomic_write(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename.encode())

    def load(self, path: str, checkpointables: list[str] | None = None, strict: bool | None = None) -> dict[str, Any]:
        """Load a file, or nothing for an empty path; see fvcore.

        Args:
            path: file or address; what follows a ``?`` is no part of the file's name.
            checkpointables: names of what to load besides the model; None is all, to resume.
            strict: refuse weights that are not of this very model; by default when resuming.

        Raises:
            FileNotFoundError, ValueError: one sentence.
        """
        if path and "://" not in path and not any(map(os.path.isfile, (path, path.partition("?")[0]))):
            raise FileNotFoundError(f"checkpoint {path} is not there")
        self._path = path
        self._strict = checkpointables is None if strict is None else strict
        return super().load(path, checkpointables)


class AtomicCheckpointer(AtomicSaving, Checkpointer):
    """fvcore's Checkpointer with atomic writes; a run is resumed only into the very same model, and weights to start
    from must have something of it."""

    def _log_incompatible_keys(self, incompatible) -> None:
        if self._strict:
            wrong = incompatible.missing_keys, incompatible.incorrect_shapes, incompatible.unexpected_keys
            refuse_misfit(f"checkpoint {self._path}", *wrong)
        own = self.model.state_dict()
        loaded = own.keys() - set(incompatible.missing_keys) - {name for name, _, _ in incompatible.incorrect_shapes}
        refuse_foreign(self._path, loaded, incompatible.unexpected_keys)
        logger.info("%s: %d of %s of the model loaded", self._path, len(loaded), counted(len(own), "entry"))
        super()._log_incompatible_keys(incompatible)

    def _load_file(self, f: str) -> dict[str, Any]:
        return load_file(f)
