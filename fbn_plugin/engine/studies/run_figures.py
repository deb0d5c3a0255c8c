"""The figure of a run that a metric means, from what ``metrics.json`` has along it: the last one, the best one, one
over all of them (their mean, or how much they vary), that after a number of iterations, or the iterations until a
threshold is passed (as Ioffe and Szegedy, 2015, count steps to 72.2 %).
"""

import math
import statistics
from collections.abc import Callable, Sequence

from fbn_plugin.engine.studies.outcomes import Metric

__all__ = ["AT", "FIRST", "PICKS", "figure_of_run"]

AT = "at"

# Those that have a threshold.
FIRST = ("first_at_least", "first_at_most")
_OVER_ALL: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "max": max,
    "min": min,
    "sd": lambda values: statistics.stdev(values) if len(values) > 1 else math.nan,
}
PICKS = ("last", "best", *_OVER_ALL)


def figure_of_run(metric: Metric, curve: Sequence[tuple[int, float]]) -> float:
    """The figure of a finished run.

    Args:
        metric: says by ``of`` which.
        curve: (finished iterations, value) along the run, at least one, in order; NaN where a row has no number.

    Returns:
        NaN where there is none: at the end of a run that diverged, over rows of which one has no number, at iterations
        that no row is of, or of a threshold that was never passed. The best one is that of the rows that have a number.

    Examples::

        >>> curve = [(100, 55.0), (200, 72.5), (300, 71.0)]
        >>> figure_of_run(Metric(True, of="best"), curve)
        72.5
        >>> figure_of_run(Metric(False, of="first_at_least", threshold=70.0), curve)
        200.0
        >>> figure_of_run(Metric(True, of="at", threshold=300), curve)
        71.0
    """
    values = [value for _, value in curve]
    if metric.of in FIRST:
        passes = _passes(metric)
        return next((float(at) for at, value in curve if passes(value)), math.nan)
    if metric.of == AT:
        return next((value for at, value in curve if at == metric.threshold), math.nan)
    if metric.of == "best":
        known = [value for value in values if math.isfinite(value)]
        return (max if metric.higher_is_better else min)(known, default=math.nan)
    if metric.of in _OVER_ALL:
        return _OVER_ALL[metric.of](values) if all(map(math.isfinite, values)) else math.nan
    return values[-1]


def _passes(metric: Metric) -> Callable[[float], bool]:
    """Whether a value passes the threshold; NaN does not."""
    threshold = metric.threshold
    if metric.of == "first_at_least":
        return lambda value: value >= threshold
    return lambda value: value <= threshold
