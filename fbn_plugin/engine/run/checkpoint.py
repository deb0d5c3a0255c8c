"""Checkpoints that survive an interruption: fvcore's and detectron2's checkpointers (file names, ``last_checkpoint``,
loading) with atomic writes, contents that are checked before they are used, one sentence for a damaged file, and the
random states of every process.
"""

import argparse
import errno
import logging
import os
import random
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.files.tensor_file import check_pickles, check_tensors
from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.cli import UserError, error_sentence
from fbn_plugin.engine.run.output_dir import last_checkpoint
from fbn_plugin.engine.run.states import check_like, check_states
from fbn_plugin.engine.run.weights import refuse_foreign, refuse_misfit, refuse_not_a_number

logger = logging.getLogger(__name__)

__all__ = ["AtomicCheckpointer", "AtomicSaving", "RandomState", "check_contents", "load_file"]


def check_contents(path: str | os.PathLike) -> None:
    """Hold a checkpoint against the checksums in it, so that no damaged byte of it is used: ``torch.load`` does not.

    Files of ``torch.save``'s are archives with a CRC-32 of each part. Those without, as of PyTorch before 1.6, of
    ``torch.serialization.set_crc32_options(False)`` and ``.safetensors``, are taken as they are. 200 MB take 0.05 s.

    Raises:
        ValueError: a part is damaged or missing.
    """
    damaged = f"checkpoint {path} cannot be read: it is cut short or damaged"
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                compressed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)  # it may be without end
                if compressed or sum(part.file_size for part in parts) > file.seek(0, os.SEEK_END):
                    raise ValueError("its records are not as long as they say")
                if all(part.CRC == 0 for part in parts) and any(part.file_size for part in parts):
                    return
                found = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(damaged) from error
    except OSError as error:  # a place before the beginning of the file is an invalid argument
        reason = damaged if error.errno == errno.EINVAL else f"checkpoint {path} cannot be read: {error.strerror}"
        raise ValueError(reason) from None
    if found is not None:
        raise ValueError(f"{damaged} (its part {found!r} does not match its checksum)")


def _no_file(path: str | os.PathLike) -> str:
    if os.path.isdir(path):
        return f"checkpoint {path} is a folder; name a file in it, such as model_final.pth of a run"
    return f"checkpoint {path} is not there"


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
        FileNotFoundError, ValueError: no such file; not a PyTorch file, or one cut short or damaged, see
            :func:`check_contents`.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(_no_file(path))
    check_contents(path)
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
    for weights in [data[key] for key in there] or [data]:
        if not all(isinstance(name, str) for name in weights):
            raise ValueError(f"checkpoint {path} holds no weights: their names must be text")
        if any(isinstance(value, Tensor) and value.is_complex() for value in weights.values()):
            raise ValueError(f"checkpoint {path} holds complex numbers, and weights are real")
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

    def check_state_dict(self, state: Any) -> None:
        """ValueError for a state that is not one of such generators; of this process's part."""
        if not isinstance(state, Mapping) or not isinstance(state.get("ranks"), list) or not state["ranks"]:
            raise ValueError("it must be a mapping with a list 'ranks'")
        if len(state["ranks"]) == distributed.world_size():
            try:
                _check_generators(state["ranks"][distributed.rank()])
            except (TypeError, LookupError, OverflowError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"process {distributed.rank()} has no states of generators in it: {reason}") from None

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


def _check_generators(own: Any) -> None:
    """Try the states out on other generators, as far as these look at them."""
    version, keys, gauss = own["python"]
    check_like(0.0 if gauss is not None else None, gauss, "gauss")
    random.Random().setstate((version, tuple(keys), gauss))
    kind, keys, position, has_gauss, cached = own["numpy"]
    if kind != "MT19937" or not 0 <= position <= 624 or has_gauss not in (0, 1):
        raise ValueError("numpy's is none of its Mersenne Twister's")
    np.random.RandomState().set_state((kind, keys, position, has_gauss, cached))
    check_like(torch.get_rng_state(), own["torch"], "torch's")
    torch.Generator().set_state(own["torch"])
    cuda = own["cuda"]
    if cuda is not None and not (isinstance(cuda, Tensor) and cuda.dtype == torch.uint8 and cuda.dim() == 1):
        raise ValueError("cuda's is no row of bytes")
    if cuda is not None and torch.cuda.is_available():
        torch.Generator("cuda").set_state(cuda)


class AtomicSaving:
    """What fvcore's Checkpointer and its descendants get before them in a class's bases: atomic writes, and a run that
    is resumed only into the very same model.

    ``save`` is called by every process, gathers what is theirs, and rank 0 writes.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        data = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()}, **kwargs)
        distributed.on_main(lambda: self._write(f"{name}.pth", data))

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        if self.save_dir and self.save_to_disk:
            path = os.path.join(self.save_dir, name)
            atomic_write(path, write=lambda file: torch.save(data, file))
            self.tag_last_checkpoint(name)
            logger.info("saved %s", path)

    def get_checkpoint_file(self) -> str:
        """The path that ``last_checkpoint`` names, "" where there is no such file; errors as
        :func:`~fbn_plugin.engine.run.output_dir.last_checkpoint`."""
        return last_checkpoint(self.save_dir) if self.has_checkpoint() else ""

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
            raise FileNotFoundError(_no_file(path))
        self._path = path
        self._strict = checkpointables is None if strict is None else strict
        self._wanted = [*self.checkpointables] if checkpointables is None else checkpointables
        content = super().load(path, checkpointables)
        if path:
            refuse_not_a_number(f"checkpoint {path}", self.model)
        return content

    def check_content(self, content: dict[str, Any]) -> dict[str, Any]:
        """What was read, if it has what is to be loaded from it; called before any of it is used.

        Raises:
            UserError: a state is missing, or fits no such object.
        """
        scaler = self.checkpointables.get("scaler")
        if content.get("scaler") == {} and scaler is not None and scaler.is_enabled():
            content["scaler"] = scaler.state_dict()  # of a run on the CPU, which scales nothing
        if not all(isinstance(value, Tensor) for value in content["model"].values()):
            raise UserError(f"checkpoint {self._path} is of another model: not all of its weights are tensors")
        check_states(self._path, content, {key: self.checkpointables[key] for key in self._wanted})
        return content


class AtomicCheckpointer(AtomicSaving, Checkpointer):
    """fvcore's Checkpointer with atomic writes; a run is resumed only into the very same model, and weights to start
    from must have something of it."""

    def load(self, path: str, checkpointables: list[str] | None = None, strict: bool | None = None) -> dict[str, Any]:
        """See :meth:`AtomicSaving.load`."""
        if "://" in path:
            path = self._fetch(path)
        elif path and not os.path.isfile(path):
            path = path.partition("?")[0]
        return super().load(path, checkpointables, strict)

    def _fetch(self, address: str) -> str:
        try:
            path = self.path_manager.get_local_path(address)
        except OSError as error:
            raise OSError(f"checkpoint {address} cannot be fetched: {error_sentence(error)}") from None
        if not os.path.isfile(path):  # of an address that is none
            raise FileNotFoundError(f"checkpoint {address} is not there")
        return path

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
        return self.check_content(load_file(f))
