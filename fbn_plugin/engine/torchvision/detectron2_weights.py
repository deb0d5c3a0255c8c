"""detectron2's ImageNet backbones (``detectron2://ImageNetPretrained/MSRA/R-50.pkl`` and the like) for torchvision's
ResNets.

The files are pickles of NumPy arrays, in one of two ways of naming: Caffe2's (``res2_0_branch2a_bn_s``), which
``detectron2/checkpoint/c2_model_loading.py`` describes, or detectron2's (``res2.0.conv1.norm.weight``). They are read
by ``engine/files/array_pickle.py``, which runs nothing in them, and without detectron2.
"""

import os
import re

from iopath.common.file_io import HTTPURLHandler, PathManager
from torch import Tensor

from fbn_plugin.engine.files.array_pickle import read_pickled_weights

__all__ = ["is_detectron2_file", "local_path", "read_backbone"]

_PREFIX, _ADDRESS = "detectron2://", "https://dl.fbaipublicfiles.com/detectron2/"

_NORM = {
    **{"s": "weight", "gamma": "weight", "b": "bias", "beta": "bias"},
    **{"rm": "running_mean", "running_mean": "running_mean", "riv": "running_var", "running_var": "running_var"},
}


def is_detectron2_file(path: str) -> bool:
    """Whether a name in MODEL.WEIGHTS is of a file that detectron2 alone has."""
    return path.startswith(_PREFIX) or path.endswith(".pkl")


def local_path(path: str) -> str:
    """The file on this machine for a path or an address, downloaded into iopath's cache if it is not there yet.

    Raises:
        OSError: it cannot be downloaded; one sentence.
    """
    if "://" not in path:
        return path
    address = _ADDRESS + path.removeprefix(_PREFIX) if path.startswith(_PREFIX) else path
    path_manager = PathManager()
    path_manager.register_handler(HTTPURLHandler())
    try:
        return path_manager.get_local_path(address)
    except Exception as error:  # whatever a network, a proxy or a full disk may raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{path} cannot be downloaded from {address} ({reason}); download it elsewhere and set MODEL.WEIGHTS to "
            "the file, or to '' to start from random weights"
        ) from None


def read_backbone(path: str | os.PathLike) -> tuple[dict[str, Tensor], list[str]]:
    """Read a backbone.

    Returns:
        the weights under the names of torchvision's ResNet, and the names of the entries that it has no place for.

    Raises:
        FileNotFoundError, ValueError: no such file; a damaged one, one with more than arrays in it, or no ResNet.
    """
    content = read_pickled_weights(path)
    entries = content["model"]
    rename = _from_caffe2 if content["__author__"] == "Caffe2" else _from_detectron2
    names = {name: rename(name) for name in entries}
    weights = {new: entries[name] for name, new in names.items() if new is not None}
    if "conv1.weight" not in weights or len(weights) < sum(new is not None for new in names.values()):
        raise ValueError(f"weights {path} are not of a ResNet: its names are such as {next(iter(names), '')!r}")
    return weights, [name for name, new in names.items() if new is None]


def _from_caffe2(name: str) -> str | None:
    if name == "conv1_w":
        return "conv1.weight"
    if (match := re.fullmatch(r"(?:res_)?conv1_[bg]n_(\w+)", name)) and match[1] in _NORM:
        return f"bn1.{_NORM[match[1]]}"
    match = re.fullmatch(r"res([2-5])_(\d+)_branch(1|2a|2b|2c)_(?:(w)|[bg]n_(\w+))", name)
    if not match or not (match[4] or match[5] in _NORM):
        return None
    stage, block, branch, is_conv, entry = match.groups()
    return _block_name(int(stage), block, "1abc".index(branch[-1]), "weight" if is_conv else _NORM[entry], not is_conv)


def _from_detectron2(name: str) -> str | None:
    name = re.sub(r"^backbone\.(bottom_up\.)?", "", name)
    entry = r"(norm\.)?(weight|bias|running_mean|running_var|num_batches_tracked)"
    if match := re.fullmatch(rf"stem\.conv1\.{entry}", name):
        is_norm, last = match.groups()
        return f"bn1.{last}" if is_norm else "conv1.weight" if last == "weight" else None
    match = re.fullmatch(rf"res([2-5])\.(\d+)\.(?:conv([123])|shortcut)\.{entry}", name)
    if not match or not (match[4] or match[5] == "weight"):
        return None
    stage, block, conv, is_norm, last = match.groups()
    return _block_name(int(stage), block, int(conv or 0), last, bool(is_norm))


def _block_name(stage: int, block: str, conv: int, entry: str, is_norm: bool) -> str:
    """torchvision's name for the ``conv``-th convolution of a block, 0 being the shortcut's, or for its norm."""
    where = f"downsample.{int(is_norm)}" if conv == 0 else f"{'bn' if is_norm else 'conv'}{conv}"
    return f"layer{stage - 1}.{block}.{where}.{entry}"
