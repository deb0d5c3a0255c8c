"""The jobs of a study, packed for a file that is kept: what all runs of a variant share stands there once, and a run is
a short line. Nothing of a job is lost.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fbn_plugin.engine.files.words import shown

__all__ = ["pack", "packed_text", "unpack"]

_SEED, _PLACE = "{SEED}", "{seed}"  # in a command: of the config, and as the study counts


def pack(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of ``outcomes`` in a study.json by variant.

    Args:
        rows: plain values; their levels are the variants', and left out.

    Returns:
        variant -> ``"command"`` with seeds left open, ``"metrics"`` that runs have figures of, ``"at"`` (metric ->
        iterations of its curves) and ``"runs"``: seed, SEED, number of the machine, seconds, figures and curves, and
        behind these what a run has otherwise.
    """
    packed: dict[str, dict[str, Any]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        shared = {
            "command": _most_common([_template(row) for row in own]),
            "metrics": _most_common([list(row["metrics"]) for row in own if row["state"] == "done"]) or [],
            "at": _most_common([_places(row) for row in own if row["state"] == "done"]) or {},
        }
        packed[variant] = {**shared, "runs": [_packed(row, shared) for row in own]}
    return packed


def unpack(packed: Any, levels: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    """The rows that :func:`pack` was given.

    Args:
        packed: from a file.
        levels: of each variant.

    Raises:
        ValueError: it is no such thing; one sentence.
    """
    if not isinstance(packed, dict):
        raise ValueError(f"runs must be a mapping, got {shown(packed, 80)}")
    rows = []
    for variant, group in packed.items():
        try:
            rows += [_unpacked(variant, run, group, levels.get(variant, {})) for run in group["runs"]]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"runs of {shown(variant, 80)} are not as they are packed") from None
    return rows


def packed_text(packed: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON of what :func:`pack` gave, a run a line."""
    parts = []
    for variant, group in packed.items():
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(group[key])}" for key in ("command", "metrics", "at"))
        runs = ",\n".join(json.dumps(run, allow_nan=False, separators=(",", ":")) for run in group["runs"])
        parts.append(f'{json.dumps(variant)}: {{{head}, "runs": [\n{runs}\n]}}')
    return "{\n" + ",\n".join(parts) + "\n}"


def _most_common(values: Sequence[Any]) -> Any:
    counts = Counter(json.dumps(each) for each in values)
    return json.loads(counts.most_common(1)[0][0]) if counts else None


def _template(row: Mapping[str, Any]) -> str:
    """The command with its seeds left open."""
    command = row["command"].replace(f" SEED {row['config_seed']} ", f" SEED {_SEED} ")
    return command.replace(f"/seed-{row['seed']}", f"/seed-{_PLACE}")


def _command(template: str, seed: int, config_seed: int) -> str:
    return template.replace(_SEED, str(config_seed)).replace(_PLACE, str(seed))


def _places(row: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: [at for at, _ in curve] for name, curve in row["curves"].items()}


def _packed(row: Mapping[str, Any], shared: Mapping[str, Any]) -> list[Any]:
    own: dict[str, Any] = {}
    if row["state"] != "done":
        own["state"] = row["state"]
    if row["error"] is not None:
        own["error"] = row["error"]
    own |= {what: row[what] for what in ("layers", "kernels") if row[what]}
    if _command(shared["command"], row["seed"], row["config_seed"]) != row["command"]:
        own["command"] = row["command"]
    figures, curves = list(row["metrics"].values()), [[y for _, y in curve] for curve in row["curves"].values()]
    if list(row["metrics"]) != shared["metrics"]:
        own["metrics"], figures = row["metrics"], []
    if _places(row) != shared["at"] or list(row["curves"]) != list(shared["at"]):
        own["curves"], curves = row["curves"], []
    run = [row["seed"], row["config_seed"], row["machine"], row["seconds"], figures, curves]
    return [*run, own] if own else run


def _unpacked(variant: str, run: Any, shared: Mapping[str, Any], levels: Mapping[str, str]) -> dict[str, Any]:
    seed, config_seed, machine, seconds, figures, curves, *more = run
    own = more[0] if more else {}
    at = shared["at"]
    found = {
        "state": "done",
        "error": None,
        "layers": [],
        "kernels": [],
        "command": _command(shared["command"], seed, config_seed),
        "metrics": dict(zip(shared["metrics"], figures, strict=True)) if "metrics" not in own else {},
        "curves": {},
    }
    if "curves" not in own:
        pairs = zip(at.items(), curves, strict=True)
        found["curves"] = {name: [list(pair) for pair in zip(xs, ys, strict=True)] for (name, xs), ys in pairs}
    known = {"variant": variant, "levels": dict(levels), "seed": seed, "config_seed": config_seed, "seconds": seconds}
    return {**known, "machine": machine, **found, **own}
