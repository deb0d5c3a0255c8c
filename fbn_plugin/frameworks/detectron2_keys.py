"""The keys that a detection config has besides detectron2's own. At their default they are left out of what is written,
so that detectron2 reads it without this package.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

__all__ = ["KEYS", "add_keys", "changed_keys", "without_defaults"]

KEYS: dict[str, Any] = {
    # Above 0: MODEL.PIXEL_MEAN and PIXEL_STD give way to a norm that learns, with a scale of 0.58 times this number.
    "INPUT.NORM_GAMMA_INIT": 0.0,
    # The scale of batch norms learns so many times slower (Davis and Frank 2022: 100), and neither norms nor biases
    # decay; 1 is all at one rate. 0: detectron2's groups.
    "SOLVER.SCALE_LR_DIVISOR": 0.0,
    # A metric of the evaluations, such as "segm/AP": each that beats the best so far writes model_best.pth.
    "SOLVER.BEST_CHECKPOINT_METRIC": "",
    # Numbers of iterations after which to evaluate, besides TEST.EVAL_PERIOD.
    "TEST.EVAL_ITERATIONS": (),
    # Iterations between two measurements of the share of values that each filtered norm leaves out; 0 is off.
    "NORM_STATS_PERIOD": 0,
    # Quantiles of what layers compute: iterations between two measurements (0 is off), layers by name, and which.
    "MEASURE.ACTIVATIONS.PERIOD": 0,
    "MEASURE.ACTIVATIONS.LAYERS": (),
    "MEASURE.ACTIVATIONS.QUANTILES": (0.0, 0.25, 0.5, 0.75, 1.0),
}
_OWN_GROUPS = ("MEASURE", "MEASURE.ACTIVATIONS")  # which detectron2 does not have

_Config = TypeVar("_Config", bound=Mapping)


def add_keys(cfg: Mapping[str, Any]) -> None:
    """Set those keys that a config does not have to their default."""
    for group in _OWN_GROUPS if "MODEL" in cfg else ():  # a group is no config
        node, name = _place(cfg, group)
        if node is not None and name not in node:
            node[name] = type(cfg)()
    for key, default in KEYS.items():
        node, name = _place(cfg, key)
        if node is not None and name not in node:
            node[name] = default


def changed_keys(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a config has with another value than the default, and that value."""
    return {key: value for key, value in _values(cfg) if not _is_default(key, value)}


def without_defaults(cfg: _Config) -> _Config:
    """A copy of a config (with ``clone()``) without those keys that are at their default."""
    cfg = cfg.clone()
    for key, value in list(_values(cfg)):
        if _is_default(key, value):
            node, name = _place(cfg, key)
            dict.pop(node, name)  # also of one that is frozen
    for group in reversed(_OWN_GROUPS):
        node, name = _place(cfg, group)
        if node is not None and node.get(name) == {}:
            dict.pop(node, name)
    return cfg


def _place(cfg: Mapping[str, Any], key: str) -> tuple[Any, str]:
    """The group that ``key`` belongs to, None if it is not there, and its name there."""
    *groups, name = key.split(".")
    for group in groups:
        cfg = cfg.get(group) if isinstance(cfg, Mapping) else None
    return cfg if isinstance(cfg, Mapping) else None, name


def _values(cfg: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key in KEYS:
        node, name = _place(cfg, key)
        if node is not None and name in node:
            yield key, node[name]


def _is_default(key: str, value: Any) -> bool:
    default = KEYS[key]
    return (tuple(value) if isinstance(value, list) else value) == default
