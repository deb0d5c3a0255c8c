"""The scales of a study file: one experiment as its paper prints it, at a size that a CPU carries, and in seconds. A
scale changes some keys of the file, and what it does not name stays.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fbn_plugin.engine.files.words import hint, shown
from fbn_plugin.engine.studies.study_keys import check_kinds, flat, group

__all__ = ["KEYS_OF_A_SCALE", "at_scale", "folder_name", "scales_of"]

# SET goes over the file's, DESCRIPTION behind it; the others take its place.
KEYS_OF_A_SCALE = {
    "TITLE": str,
    "BASE": str,
    "SET": dict,
    "FACTORS": dict,
    "VARIANTS": dict,
    "COMBINE": dict,
    "ONLY": object,
    "SEEDS": object,
    "METRICS": object,
    "TOGETHER": dict,
    "COMPARE": object,
    "DESCRIPTION": str,
    "TOOL": str,
    "DATA": dict,
    "NOT_RUN": str,
}
_PRODUCT = ("FACTORS", "VARIANTS")


def scales_of(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scales of a study file's content by name; empty where it has none.

    Raises:
        ValueError: SCALES is no mapping of such; one sentence.
    """
    if "SCALES" not in content:
        return {}
    scales = group("SCALES", content["SCALES"], "{paper: {}, cpu: {SEEDS: 1-5}}")
    if not scales:
        raise ValueError("SCALES has no scales")
    for name, given in scales.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"a scale must be named by small letters, digits and underscores, got {shown(name)}")
        if given is not None:
            check_kinds(f"scale {name}", group(f"scale {name}", given, "{SEEDS: 1-5}"), KEYS_OF_A_SCALE)
    return {name: given or {} for name, given in scales.items()}


def at_scale(content: Mapping[str, Any], scale: str | None) -> dict[str, Any]:
    """A study file's content as it is at one of its scales, without SCALES.

    Args:
        content: of the file.
        scale: its name; None for a file without.

    Raises:
        ValueError: there is no such scale, or none was named of a file that has some.

    Examples::

        >>> file = {"SET": {"SEED_": 1, "A": 1}, "SEEDS": "1-10", "SCALES": {"paper": {}, "cpu": {"SET": {"A": 2}}}}
        >>> at_scale(file, "cpu")
        {'SET': {'SEED_': 1, 'A': 2}, 'SEEDS': '1-10'}
    """
    scales = scales_of(content)
    if not scales:
        if scale is not None:
            raise ValueError(f"it has no SCALES, so there is no scale {shown(scale)}")
        return dict(content)
    if scale not in scales:
        said = "it has scales, and one must be named by --scale" if scale is None else f"it has no scale {shown(scale)}"
        raise ValueError(f"{said}: {', '.join(scales)}{hint(scale, tuple(scales)) if scale else ''}")
    changes = scales[scale]
    found = {key: value for key, value in content.items() if key != "SCALES"}
    if changes.keys() & set(_PRODUCT):
        found = {key: value for key, value in found.items() if key not in _PRODUCT}
    found |= changes
    if "SET" in changes and "SET" in content:
        found["SET"] = flat(group("SET", content["SET"])) | flat(changes["SET"])
    if "DESCRIPTION" in changes and "DESCRIPTION" in content:
        found["DESCRIPTION"] = f"{str(content['DESCRIPTION']).rstrip()} {changes['DESCRIPTION']}"
    return found


def folder_name(file: str | os.PathLike, scale: str | None) -> str:
    """What the folder of a study is called: as its file, with the scale behind it.

    Examples::

        >>> folder_name("configs/experiments/p0_fig5.yaml", "cpu"), folder_name("digits.yaml", None)
        ('p0_fig5-cpu', 'digits')
    """
    return Path(file).stem + (f"-{scale}" if scale else "")
