"""The seeds of a study, and SEED that follows from each. Small whole numbers differ in a few bits; Davis and Frank
(2022) run their seeds 1, 2, ... "made complex" by MD5, which is the default here.
"""

import hashlib
import re
from collections import Counter
from typing import Any

from fbn_plugin.engine.files.words import counted, shown

__all__ = ["SEED_RULES", "config_seed", "parse_seeds"]

SEED_RULES = ("md5", "plain")

_MOST_SEEDS = 10_000
_END = 2**63  # what SEED is below


def config_seed(seed: int, rule: str = "md5") -> int:
    """SEED of a job.

    Args:
        seed: as the study counts them.
        rule: ``"md5"``: the last 32 bits of the MD5 digest of the decimal number; ``"plain"``: the number itself.

    Examples::

        >>> config_seed(1), config_seed(2), config_seed(2, "plain")
        (1869972635, 3423897132, 2)
    """
    if rule == "plain":
        return seed
    return int(hashlib.md5(str(seed).encode(), usedforsecurity=False).hexdigest()[-8:], 16)


def parse_seeds(given: Any) -> list[int]:
    """Seeds as a study file writes them: ``1-15``, ``"1-3, 7"``, one number, or a list.

    Raises:
        ValueError: one sentence.

    Examples::

        >>> parse_seeds("1-3, 7")
        [1, 2, 3, 7]
    """
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, list) else [given]
    seeds: list[int] = []
    for part in parts:
        found = re.fullmatch(r"\s*(\d{1,30})\s*(?:-\s*(\d{1,30})\s*)?", str(part)) if _is_text(part) else None
        if found is None:
            raise ValueError(f"SEEDS must be whole numbers from 0 on, as 1-15 or [1, 2, 3], got {shown(part)}")
        first, last = int(found[1]), int(found[2] or found[1])
        if max(first, last) >= _END:
            raise ValueError(f"SEEDS must be below 2**63, as SEED is, got {shown(part)}")
        if last < first:
            raise ValueError(f"SEEDS must run from a smaller number to a larger one, got {shown(part)}")
        if last - first + 1 + len(seeds) > _MOST_SEEDS:
            raise ValueError(f"SEEDS must be at most {counted(_MOST_SEEDS, 'seed')}, got {shown(part)}")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"SEEDS has {Counter(seeds).most_common(1)[0][0]} twice")
    if not seeds:
        raise ValueError("SEEDS must be one seed or more, got []")
    return seeds


def _is_text(part: Any) -> bool:
    return isinstance(part, str | int) and not isinstance(part, bool)
