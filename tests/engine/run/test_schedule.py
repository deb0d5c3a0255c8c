"""When a run evaluates, and what of that is done already."""

import json
import math

import pytest

from fbn_plugin.engine.run.schedule import eval_iterations, is_evaluated_after, recorded_evaluation


@pytest.mark.parametrize(
    "period, chosen, expected",
    [(0, (), [10]), (4, (), [4, 8, 10]), (0, (1, 7), [1, 7, 10]), (5, (3, 12), [3, 5, 10])],
)
def test_evaluations(period, chosen, expected):
    assert [i for i in range(11) if is_evaluated_after(i, 10, period, chosen)] == expected


def test_chosen_iterations_are_numbers_that_increase():
    said = []
    assert eval_iterations(("1", "30"), 20, said.append) == (1, 30) and eval_iterations((), 5) == ()
    assert len(said) == 1 and "no evaluation after [30]" in said[0]
    for given in ((3, 2), (2, 2), (0, 4), ("half",), (1.5,)):
        with pytest.raises(ValueError, match="TEST.EVAL_ITERATIONS must be increasing .*, got "):
            eval_iterations(given, 20)


def test_the_evaluation_that_the_metrics_have(tmp_path):
    assert recorded_evaluation(tmp_path, 5) == {}
    rows = [
        {"iteration": 3, "bbox/AP": 1.0},
        {"iteration": 4, "total_loss": 2.0, "filtered/mean": 0.1},
        {"iteration": 4, "my_data:val/segm/AP50": 2.0, "bbox/AP-disc": None, "sem_seg/mIoU": 3.0, "AP": 9.0},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = recorded_evaluation(tmp_path, 5)
    assert math.isnan(found.pop("bbox/AP-disc"))
    assert found == {"my_data:val/segm/AP50": 2.0, "sem_seg/mIoU": 3.0} and recorded_evaluation(tmp_path, 3) == {}
