"""METRICS of a study file: which figures of a run a study looks at, and how each is taken from what the run wrote."""

import dataclasses
from typing import TYPE_CHECKING, Any

from fbn_plugin.engine.files.words import counted, hint, shown
from fbn_plugin.engine.studies.outcomes import Metric, Together
from fbn_plugin.engine.studies.run_figures import AT, FIRST, PICKS
from fbn_plugin.engine.studies.study_keys import check_kinds, group

if TYPE_CHECKING:
    from fbn_plugin.engine.studies.engines import Engine

__all__ = ["metric_names", "read_metrics_key", "read_together"]

_OPTIONS = {
    "higher_is_better": bool,
    "ranked": bool,
    "unit": str,
    "label": str,
    "row": str,
    "row_label": str,
    "of": str,
    AT: int,
    **dict.fromkeys(FIRST, float),
}
_OWN = ("higher_is_better", "unit", "label", "row_label")


def metric_names(given: Any, engine: "Engine") -> list[str]:
    """The names in METRICS, of which nothing else is checked; ``given`` is None where the file has none."""
    given = given if isinstance(given, list | dict) else []
    return [name for name in given if isinstance(name, str)] or [next(iter(engine.metrics))]


def read_metrics_key(given: Any, engine: "Engine") -> dict[str, Metric]:
    """METRICS: a list of names, or a mapping of names to options.

    Args:
        given: as the file has it; None takes the first metric that is known.
        engine: knows metrics.

    Raises:
        ValueError: one sentence.
    """
    given = metric_names(None, engine) if given is None else given
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        if twice := [name for name in given if given.count(name) > 1]:
            raise ValueError(f"METRICS has {twice[0]!r} twice")
        given = {name: {} for name in given}
    if not isinstance(given, dict) or not given:
        raise ValueError(f"METRICS must be a list of names or a mapping, such as top1: {{}}, got {shown(given)}")
    return {name: _metric(name, options, engine) for name, options in given.items()}


def read_together(given: dict[str, Any]) -> dict[str, Together]:
    """TOGETHER: title of a picture -> its label, and the rows in it.

    Raises:
        ValueError: one sentence.
    """
    found = {}
    for title, options in given.items():
        where = f"TOGETHER {title!r}"
        options = group(where, options, "{label: top1 (%), rows: {validation: val/top1}}")
        check_kinds(where, options, {"label": str, "rows": dict})
        rows = options.get("rows") or {}
        if not rows or not all(isinstance(each, str) and each.strip() for pair in rows.items() for each in pair):
            raise ValueError(f"rows of {where} must be a mapping of names to rows of metrics.json, got {shown(rows)}")
        if len(set(rows.values())) < len(rows):
            raise ValueError(f"rows of {where} must be different ones, got {shown(rows)}")
        if not options.get("label", "").strip():
            raise ValueError(f"{where} must have a label for the axis, such as 'top-1 accuracy (%)'")
        found[str(title)] = Together(options["label"], rows)
    return found


def _metric(name: str, options: Any, engine: "Engine") -> Metric:
    options = {} if options is None else group(f"metric {name!r}", options)
    check_kinds(f"metric {name!r}", options, _OPTIONS, "option")
    if options.get("of", "last") not in PICKS:
        known = ", ".join(PICKS)
        raise ValueError(f"of of metric {name!r} must be one of {known}, got {shown(options['of'])}")
    row = options.get("row", name)
    default = _default(name, row, options, engine)
    own = {key: options[key] for key in _OWN if key in options}
    return dataclasses.replace(default, row=options.get("row", ""), is_ranked=options.get("ranked", True), **own)


def _default(name: str, row: str, options: dict[str, Any], engine: "Engine") -> Metric:
    """What a metric is, but for what its options say of it."""
    known = engine.metric(row)
    firsts = [key for key in FIRST if key in options]
    if len(firsts) + ("of" in options) + (AT in options) > 1:
        raise ValueError(f"metric {name!r} must have one of of, {AT}, {' and '.join(FIRST)}, got {shown(options)}")
    if firsts:
        threshold = float(options[firsts[0]])
        sign = "≥" if firsts[0] == "first_at_least" else "≤"
        unit = f" {known.unit}" if known and known.unit else ""
        label = f"iterations to {known.label if known else row} {sign} {threshold:g}{unit}"
        return Metric(False, "", label, of=firsts[0], threshold=threshold, row_label=_row_label(known))
    of = options.get("of", "last")
    if known is None:
        if "higher_is_better" not in options and options.get("ranked", True):
            names = tuple(engine.metrics)
            raise ValueError(
                f"METRICS has {name!r}, of which higher_is_better must be said, or ranked: false, as it is none of "
                f"{', '.join(names)}{hint(row, names)}"
            )
        known = Metric(higher_is_better=True, label=row)
    if AT in options:
        label = f"{known.label} after {counted(options[AT], 'iteration')}"
        return dataclasses.replace(known, label=label, of=AT, threshold=options[AT], row_label=_row_label(known))
    if of == "last":
        return known
    if of == "sd":  # to vary less is to be steadier, whichever way the row itself improves
        label = f"standard deviation along the run of {known.label}"
        return dataclasses.replace(known, higher_is_better=False, label=label, of=of, row_label=_row_label(known))
    return dataclasses.replace(known, label=f"{of} {known.label}", of=of, row_label=_row_label(known))


def _row_label(known: Metric | None) -> str:
    """What an axis calls a row, with its unit."""
    return f"{known.label} ({known.unit})" if known and known.unit else known.label if known else ""
