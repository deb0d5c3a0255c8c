"""What tables of runs have in common: means over seeds, differences seed by seed, the settings in which runs differ,
and the words for them."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fbn_plugin.engine.files.words import counted
from fbn_plugin.registry import NORMS

__all__ = [
    "FILTERED",
    "differing",
    "either",
    "either_of",
    "hardware_of",
    "paired_difference",
    "registry_order",
    "seeds_of",
    "summary",
    "with_deviation",
]

FILTERED = {"FBN": "BN", "SyncFBN": "SyncBN", "FGN": "GN", "FLN": "LN", "FIN": "IN", "FFRN": "FRN"}


class SeededRun(Protocol):
    """A run in a table."""

    folder: Path

    @property
    def seed(self) -> int | None:
        """SEED, or None for a run that drew its own."""


def registry_order(norm: str, label: str) -> tuple:
    """To sort by: the registry's order, a filtered norm behind its plain one; then what the registry does not know.

    Args:
        norm: its name without options.
        label: tells norms of the same name apart.
    """
    names = [name for name, _ in NORMS]
    plain = FILTERED.get(norm, norm)
    return names.index(plain) if plain in names else len(names), plain, norm != plain, label


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Number, mean, sample standard deviation and the values themselves, as plain data."""
    return {
        "n": len(values),
        "mean": statistics.mean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def with_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Such as ``91.20 ± 0.35``; of one value no deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def either(values: Iterable[Any]) -> str:
    """Such as ``1 or 2``, each value once."""
    return " or ".join(dict.fromkeys(map(str, values)))


def either_of(numbers: Iterable[int], what: str) -> str:
    """Such as ``1 image``, ``2 or 16 images``."""
    *others, last = dict.fromkeys(numbers)
    return " or ".join([*(f"{each:,}" for each in others), counted(last, what)])


def hardware_of(info: Mapping[str, Any]) -> str:
    """What a run was made on, by its ``run_info.json``."""
    if "hardware" not in info:
        return "not recorded"
    processes = info.get("processes", 1)
    return info["hardware"] if processes == 1 else f"{processes} processes, each on {info['hardware']}"


def seeds_of(runs: Sequence[SeededRun]) -> str:
    """How many runs, of which seeds, and where."""
    known = [run.seed for run in runs if run.seed is not None]
    parts = [f"seed{'s' * (len(set(known)) > 1)} {', '.join(map(str, dict.fromkeys(known)))}"] if known else []
    if drawn := len(runs) - len(known):
        parts.append(f"{drawn} of a seed that was drawn")
    text = f"{counted(len(runs), 'run')}, {' and '.join(parts)}"
    if twice := [str(seed) for seed in dict.fromkeys(known) if known.count(seed) > 1]:
        text += f"; seed {', '.join(twice)} more than once, which are no independent runs"
    return f"{text}; in {', '.join(str(run.folder) for run in runs)}"


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys that are not the same in all configs -> their values as text, in the order of the configs."""
    keys = dict.fromkeys(key for config in configs for key in config)
    found = {key: [repr(config[key]) if key in config else "not set" for config in configs] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def paired_difference(pairs: Sequence[tuple[float, float]], digits: int = 2) -> str:
    """Mean ± standard deviation of second minus first and, of three pairs or more and with scipy, the p of a two-sided
    paired t-test."""
    differences = [second - first for first, second in pairs]
    text = f"{statistics.mean(differences):+.{digits}f}"
    if len(pairs) == 1:
        return text
    deviation = statistics.stdev(differences)
    text += f" ± {deviation:.{digits}f}"
    if len(pairs) < 3 or not deviation:
        return text
    try:
        from scipy.stats import ttest_1samp
    except ModuleNotFoundError:
        return text
    return f"{text}, p = {ttest_1samp(differences, 0).pvalue:.2g} (two-sided paired t-test)"
