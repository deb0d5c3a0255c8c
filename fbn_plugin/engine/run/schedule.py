"""When a run evaluates: at its end, every so many iterations, and after chosen ones; and what of that is done when a
run goes on."""

import logging
import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from fbn_plugin.engine.run import distributed
from fbn_plugin.engine.run.logging import read_metrics
from fbn_plugin.engine.run.rules import increasing, refusal

__all__ = ["eval_iterations", "is_evaluated_after", "recorded_evaluation"]

logger = logging.getLogger(__name__)


def is_evaluated_after(finished: int, max_iter: int, period: int, chosen: Collection[int] = ()) -> bool:
    """Whether there is an evaluation when so many iterations are finished.

    Args:
        finished: iterations.
        max_iter: of the whole run; its end is always evaluated.
        period: iterations between two evaluations; 0 is none.
        chosen: further numbers of finished iterations.
    """
    if finished <= 0:
        return False
    return finished == max_iter or finished in chosen or (period > 0 and finished % period == 0)


def eval_iterations(
    given: Sequence[Any], max_iter: int, say: Callable[[str], None] = logger.warning
) -> tuple[int, ...]:
    """TEST.EVAL_ITERATIONS as integers, which the command line may give as strings.

    Args:
        given: the key's value.
        max_iter: iterations of the whole run.
        say: gets a sentence where some lie behind the end.

    Raises:
        ValueError: they are no increasing numbers from 1 on.
    """
    try:
        numbers = tuple(_whole(each) for each in given)
    except ValueError:
        numbers = None
    if numbers is None or not increasing("iterations").accepts(numbers):
        shown = tuple(given) if numbers is None else numbers
        raise refusal("TEST.EVAL_ITERATIONS", "increasing numbers of iterations, from 1 on", shown)
    if late := [number for number in numbers if number > max_iter]:
        say(f"TEST.EVAL_ITERATIONS: SOLVER.MAX_ITER is {max_iter}, so there is no evaluation after {late}")
    return numbers


def _whole(given: Any) -> int:
    if not isinstance(given, int | str):
        raise ValueError(given)
    return int(given)


def _is_metric(name: str) -> bool:
    """Whether an entry of ``metrics.json`` is a figure of an evaluation, as detectron2's evaluators name them."""
    group, _, figure = name.rpartition("/")
    return bool(group) and figure.startswith(("AP", "AR@", "mIoU", "PQ"))


def recorded_evaluation(
    output_dir: str | os.PathLike, finished: int, is_metric: Callable[[str], bool] = _is_metric
) -> dict[str, float]:
    """The evaluation that ``metrics.json`` has after so many iterations, on every process; empty where there is none,
    as when a run was stopped between a checkpoint and its evaluation.

    Args:
        output_dir: OUTPUT_DIR.
        finished: iterations.
        is_metric: whether an entry is a figure of an evaluation, by its name; by default, a detector's.
    """
    found = {
        name: math.nan if value is None else value
        for row in read_metrics(os.path.join(output_dir, "metrics.json"))
        if row["iteration"] == finished - 1
        for name, value in row.items()
        if is_metric(name)
    }
    return distributed.broadcast_object(found)
