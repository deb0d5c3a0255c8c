"""Where a study stands: how many jobs of each variant are done, what they gave so far, which failed, and how long the
rest takes.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from tqdm import tqdm

from fbn_plugin.engine.files.words import counted
from fbn_plugin.engine.run.cli import format_table
from fbn_plugin.engine.studies.outcomes import STATES, Metric, Outcome, Study

__all__ = ["ended_line", "eta", "figures", "seconds_left", "status_text"]

_MOST_FAILURES = 20


def seconds_left(
    outcomes: Sequence[Outcome],
    at_once: int,
    elapsed: Mapping[tuple[str, int], float] | None = None,
    ended: Collection[tuple[str, int]] = (),
) -> float | None:
    """Expected seconds until all jobs that wait or run are done.

    A job is expected to take what the finished ones of its variant took on average, or those of all variants. Of those
    that ended just now more is believed than of earlier ones, which another machine may have run: where a variant has
    only these, their time is scaled by how the others' has changed.

    Args:
        outcomes: of all jobs.
        at_once: how many jobs run at a time.
        elapsed: (variant, seed) -> seconds that a running job has run; one that is not named is taken as half done.
        ended: (variant, seed) of the jobs that ended just now.

    Returns:
        None where no job is done.
    """
    now, before = _means(outcomes, lambda each: each in ended), _means(outcomes, lambda each: each not in ended)
    both = [name for name in now if name in before]
    earlier = sum(before[name] for name in both)
    pace = sum(now[name] for name in both) / earlier if earlier else 1.0
    means = {name: seconds * pace for name, seconds in before.items()} | now
    if not means:
        return None
    overall = sum(means.values()) / len(means)
    rest = 0.0
    for each in outcomes:
        expected = means.get(each.variant, overall)
        if each.state == "waiting":
            rest += expected
        elif each.state == "running":
            rest += max(0.0, expected - (elapsed or {}).get((each.variant, each.seed), expected / 2))
    return rest / at_once


def _means(outcomes: Sequence[Outcome], counts: Callable[[tuple[str, int]], bool]) -> dict[str, float]:
    """Mean seconds of each variant's finished jobs."""
    taken: dict[str, list[float]] = {}
    for each in outcomes:
        if each.state == "done" and each.seconds is not None and counts((each.variant, each.seed)):
            taken.setdefault(each.variant, []).append(each.seconds)
    return {name: sum(seconds) / len(seconds) for name, seconds in taken.items()}


def eta(seconds: float | None) -> str:
    """Seconds as a clock shows them, ``"?"`` for None."""
    return "?" if seconds is None else tqdm.format_interval(seconds)


def figures(metrics: Mapping[str, float], known: Mapping[str, Metric]) -> str:
    """``top1 61.20 %, loss 1.1020``."""
    parts = []
    for name, value in metrics.items():
        unit = known[name].unit
        parts.append(f"{name} {_figure(value, unit)}" + (f" {unit}" if unit else ""))
    return ", ".join(parts) or "no figures"


def _figure(value: float, unit: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f}" if unit == "%" else f"{value:.4g}"


def ended_line(outcome: Outcome, study: Study, seconds: float | None, left: float | None) -> str:
    """What a job gave that has just ended.

    Args:
        outcome: of the job.
        study: that it is of.
        seconds: that it took this time; None where unknown.
        left: seconds that the other jobs take.
    """
    what = {"done": figures(outcome.metrics, study.metrics), "failed": f"failed: {outcome.error}"}
    took = "" if seconds is None else f" ({seconds:.1f} s)"
    return f"{_title(outcome)}: {what.get(outcome.state, 'stopped')}{took}; ETA {eta(left)}"


def status_text(study: Study, outcomes: Sequence[Outcome], at_once: int = 1) -> str:
    """A table of the variants, what is missing, and why jobs failed.

    Args:
        study: the study.
        outcomes: of all of its jobs.
        at_once: how many jobs run at a time, for the time that is left.
    """
    rows = [["variant", *STATES, *(f"{name}, mean" for name in study.metrics), "seconds"]]
    for variant in study.variants:
        own = [each for each in outcomes if each.variant == variant]
        done = [each for each in own if each.state == "done"]
        rows.append(
            [
                variant,
                *(str(sum(each.state == state for each in own)) for state in STATES),
                *(_mean([each.metrics.get(name, math.nan) for each in done], metric.unit)
                  for name, metric in study.metrics.items()),
                _mean([each.seconds for each in done if each.seconds is not None], ""),
            ]
        )  # fmt: skip
    done = sum(each.state == "done" for each in outcomes)
    left = sum(each.state in ("running", "waiting") for each in outcomes)
    lines = [study.heading, "", format_table(rows), "", f"{done} of {counted(len(outcomes), 'job')} done"]
    if left:
        seconds = seconds_left(outcomes, at_once)
        lines[-1] += f"; {left} to go"
        if seconds is not None:
            lines[-1] += f", about {eta(seconds)} with {counted(at_once, 'job')} at a time"
    for name in study.metrics:
        without = [each for each in outcomes if each.state == "done" and name not in each.metrics]
        if without:
            lines.append(f"{counted(len(without), 'finished job')} gave no {name}, such as {_title(without[0])}")
    failed = [each for each in outcomes if each.state == "failed"]
    if failed:
        lines += ["", f"{counted(len(failed), 'job')} failed; run --retry tries them again:"]
        lines += [f"  {_title(each)}: {each.error}" for each in failed[:_MOST_FAILURES]]
        if len(failed) > _MOST_FAILURES:
            lines.append(f"  and {len(failed) - _MOST_FAILURES} more")
    return "\n".join(lines)


def _mean(values: Sequence[float], unit: str) -> str:
    known = [value for value in values if not math.isnan(value)]
    return _figure(sum(known) / len(known), unit) if known else "-"


def _title(outcome: Outcome) -> str:
    return f"{outcome.variant}, seed {outcome.seed}"
