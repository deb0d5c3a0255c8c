"""What a file of weights gave a model, and what keeps the values that it was built with, in a few lines for the log."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

__all__ = ["loading_report"]


def loading_report(model: nn.Module, source: str, loaded: Collection[str], unused: Sequence[str] = ()) -> list[str]:
    """Lines of text on how the entries of a file went into a model.

    Args:
        model: after loading.
        source: the file's name.
        loaded: names in ``model.state_dict()`` that have their value from the file.
        unused: names of the file's other entries.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    lines = [f"{source}: {sum(name in loaded for name in own)} of the model's {len(own)} tensors loaded"]
    # What has one scale a channel is a norm: the weights of all else have two dimensions or more.
    norms = [name.removesuffix("weight") for name, value in own.items() if name.endswith("weight") and value.dim() == 1]
    scaled = sum(f"{norm}weight" in loaded and f"{norm}bias" in loaded for norm in norms)
    moving = [norm for norm in norms if f"{norm}running_mean" in own]
    known = sum(f"{norm}running_mean" in loaded and f"{norm}running_var" in loaded for norm in moving)
    lines.append(
        f"norms: scale and shift of {scaled} of {len(norms)} loaded, running statistics of {known} of the "
        f"{len(moving)} that have them"
    )
    if start := _parts(own, loaded):
        lines.append(f"as built, not from the file: {_some(start)}")
    if statistics := [name for name in unused if "running" in name]:
        lines.append(f"running statistics in the file and left out: {len(statistics)}; the norms have none")
    if others := [name for name in unused if "running" not in name]:
        lines.append(f"in the file and not used: {_some(others)}")
    return lines


def _parts(own: Mapping[str, Tensor], loaded: Collection[str], prefix: str = "") -> list[str]:
    """Names of the largest parts of a model that have nothing from the file."""
    inside = [name for name in own if name.startswith(prefix)]
    if not any(name in loaded for name in inside):
        return [prefix.removesuffix(".")] if prefix else ["the model"]
    heads = dict.fromkeys(name[len(prefix) :].partition(".")[0] for name in inside)
    found = []
    for head in heads:
        if prefix + head in own:
            found += [] if prefix + head in loaded else [prefix + head]
        else:
            found += _parts(own, loaded, f"{prefix}{head}.")
    return found


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
