"""What a file of weights did to a model, in a few plain lines, and the sentence that refuses a file which does not fit.

Both detectors load ImageNet backbones into models whose norms may have another state than the file's: batch norms with
statistics, group norms without. Whoever loads knows which entries of the model came from the file; here they are
counted.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from fbn_plugin.adapters import load_adapters
from fbn_plugin.engine.files.words import counted
from fbn_plugin.layers.description import family

__all__ = ["loading_report", "refuse_foreign", "refuse_misfit", "refuse_not_a_number"]

_STATISTICS = ("running_mean", "running_var")


def loading_report(
    file: str, model: nn.Module, loaded: Collection[str], unused: Collection[str] = (), backbone: str = "backbone"
) -> list[str]:
    """Say what was loaded and what starts from random weights.

    Args:
        file: the file's name.
        model: after loading.
        loaded: entries of the model's ``state_dict`` that the file gave.
        unused: entries of the file that the model did not take, as the file or the model would call them.
        backbone: prefix of the backbone in the model.

    Returns:
        three to six lines: the file, and the backbone's tensors; norms' scale and shift; running statistics; parts of
        the model that the file says nothing about; unused entries.
    """
    load_adapters()  # a framework's frozen norms are norms, too
    loaded = set(loaded)
    entries = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    inside = [name for name in entries if name.startswith(f"{backbone}.") and _part(name, backbone) != "fpn"]
    lines = [f"{file}: {sum(name in loaded for name in inside)} of {len(inside)} tensors of the backbone loaded"]

    norms = {name: module for name, module in model.named_modules() if family(module) is not None}
    scaled = Counter(type(module).__name__ for name, module in norms.items() if f"{name}.weight" in loaded)
    lines.append(f"scale and shift of {_kinds(scaled)} loaded")
    lines.append(_statistics(norms, loaded, unused))

    learned = [name for name in entries if not name.endswith(_STATISTICS)]
    parts = Counter(_part(name, backbone) for name in learned)
    absent = Counter(_part(name, backbone) for name in learned if name not in loaded)
    if absent:
        listed = ", ".join(
            part if count == parts[part] else f"{count} of {parts[part]} tensors of {part}"
            for part, count in absent.items()
        )
        lines.append(f"not in the file, so at its initial values: {listed}")
    leftover = [name for name in unused if not name.endswith((*_STATISTICS, "num_batches_tracked"))]
    if leftover:
        lines.append(f"{counted(len(leftover), 'entry')} of the file not used: {_first(leftover)}")
    return lines


def refuse_misfit(
    file: str, missing: Iterable[str], mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]], unused=()
) -> None:
    """Refuse weights that are not of this very model.

    Args:
        file: as the sentence should call it.
        missing: entries of the model that the file lacks.
        mismatched: entries with their shapes in the file and in the model.
        unused: entries of the file that the model lacks.

    Raises:
        ValueError: there is one, counters of batches aside.
    """
    mismatched = list(mismatched)
    shapes = {name for name, _, _ in mismatched}
    wrong = [f"{name} (shape {tuple(old)}, the model's is {tuple(new)})" for name, old, new in mismatched]
    wrong += [f"{name} (missing)" for name in missing if name not in shapes]
    wrong += [f"{name} (not in the model)" for name in unused if name not in shapes]
    wrong = [each for each in wrong if "num_batches_tracked" not in each]
    if wrong:
        number = counted(len(wrong), "entry") + (" does" if len(wrong) == 1 else " do")
        raise ValueError(f"{file} is of another model: {number} not fit, such as {wrong[0]}")


def refuse_foreign(file: str, loaded: Collection[str], unused: Collection[str]) -> None:
    """Refuse weights to start from that have nothing in common with the model.

    Raises:
        ValueError: no entry was loaded.
    """
    if not any(name.endswith("weight") for name in loaded):
        raise ValueError(f"{file} has no weight of this model; its entries are {_first(unused) or 'none'}")


def refuse_not_a_number(file: str, model: nn.Module) -> None:
    """Refuse weights that a run left which had diverged: nothing follows from them but NaN.

    Args:
        file: where they are from, for the sentence.
        model: that has just loaded them.

    Raises:
        ValueError: a parameter, or a running statistic, holds NaN.
    """
    statistics = (
        (name, each) for name, each in model.named_buffers() if name.endswith(("running_mean", "running_var"))
    )
    found = [name for name, each in (*model.named_parameters(), *statistics) if each.isnan().any()]
    if found:
        raise ValueError(
            f"{file} holds NaN in {counted(len(found), 'tensor')}, such as {found[0]}: its run had diverged"
        )


def _statistics(norms: dict[str, nn.Module], loaded: set[str], unused: Collection[str]) -> str:
    given = Counter(type(module).__name__ for name, module in norms.items() if f"{name}.running_mean" in loaded)
    kept = Counter(
        type(module).__name__
        for name, module in norms.items()
        if f"{name}.weight" in loaded
        and getattr(module, "running_mean", None) is not None
        and f"{name}.running_mean" not in loaded
    )
    parts = [f"running statistics of {_kinds(given)} loaded"] if given else []
    if kept:
        parts.append(f"{_kinds(kept)} keep mean 0 and variance 1, as the file has no running statistics for them")
    if any(name.endswith("running_mean") for name in unused):
        without = [
            type(module).__name__
            for name, module in norms.items()
            if f"{name}.weight" in loaded and getattr(module, "running_mean", None) is None
        ]
        if without:
            parts.append(f"the file's running statistics left out: {without[0]} has none")
    return "; ".join(parts) or "no running statistics, neither in the file nor in the norms"


def _part(name: str, backbone: str) -> str:
    """The part of a detector that an entry belongs to: ``fpn``, ``backbone``, or the first word of its name."""
    first, _, rest = name.partition(".")
    if first != backbone:
        return first
    return "fpn" if re.match(r"(fpn|top_block)", rest) else first


def _kinds(count: Counter) -> str:
    return ", ".join(f"{counted(number, 'norm')} ({kind})" for kind, number in count.items()) or "no norms"


def _first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
