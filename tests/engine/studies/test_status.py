"""Where a study stands, in words."""

import math

from fbn_plugin.engine.studies.outcomes import Metric, Outcome, Study, Variant
from fbn_plugin.engine.studies.status import ended_line, seconds_left, status_text

STUDY = Study(
    title="Norms",
    description="",
    tool="classification",
    base="",
    settings={},
    factors={},
    variants={"BN": Variant(), "FBN": Variant()},
    seeds=[1, 2, 3],
    seed_rule="md5",
    metrics={"top1": Metric(higher_is_better=True, unit="%"), "loss": Metric(higher_is_better=False)},
    comparisons=[],
)


def outcome(variant: str, seed: int, state: str, **values) -> Outcome:
    return Outcome(variant, seed, seed, state, **values)


OUTCOMES = [
    outcome("BN", 1, "done", metrics={"top1": 60.0, "loss": 1.25}, seconds=10.0),
    outcome("FBN", 1, "failed", error="no disk", seconds=99.0),
    outcome("BN", 2, "done", metrics={"top1": 61.0, "loss": math.nan}, seconds=20.0),
    outcome("FBN", 2, "done", metrics={"top1": 70.0}, seconds=45.0),
    outcome("BN", 3, "running"),
    outcome("FBN", 3, "waiting"),
]


def test_what_is_left_follows_from_each_variants_own_jobs():
    assert seconds_left(OUTCOMES, 1) == 15 / 2 + 45
    assert seconds_left(OUTCOMES, 2, {("BN", 3): 10.0}) == (5 + 45) / 2
    assert seconds_left(OUTCOMES, 1, {("BN", 3): 100.0}) == 45  # longer than expected
    assert seconds_left(OUTCOMES[:1] + OUTCOMES[-1:], 1) == 10  # of the other variant, as there is nothing else
    assert seconds_left(OUTCOMES[-1:], 1) is None


def test_what_ended_just_now_tells_more_than_earlier_jobs():
    assert seconds_left(OUTCOMES, 1, ended={("BN", 2)}) == 20 / 2 + 2 * 45  # BN takes 20 where it took 10
    assert seconds_left(OUTCOMES, 1, ended={("BN", 1), ("BN", 2), ("FBN", 2)}) == 15 / 2 + 45
    assert seconds_left(OUTCOMES[:1] + OUTCOMES[-1:], 1, ended={("BN", 1)}) == 10


def test_the_table():
    lines = status_text(STUDY, OUTCOMES, 2).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert rows[0] == ["variant", "done", "failed", "running", "waiting", "top1, mean", "loss, mean", "seconds"]
    assert rows[2] == ["BN", "2", "0", "1", "0", "60.50", "1.25", "15"]
    assert rows[3] == ["FBN", "1", "1", "0", "1", "70.00", "-", "45"]
    text = "\n".join(lines)
    assert "3 of 6 jobs done; 2 to go, about 00:26 with 2 jobs at a time" in text
    assert "1 finished job gave no loss, such as FBN, seed 2" in text
    assert "1 job failed; run --retry tries them again:\n  FBN, seed 1: no disk" in text
    assert status_text(STUDY, OUTCOMES[:1]).endswith("1 of 1 job done")


def test_the_line_of_a_job():
    assert ended_line(OUTCOMES[0], STUDY, 10.04, 61) == "BN, seed 1: top1 60.00 %, loss 1.25 (10.0 s); ETA 01:01"
    assert ended_line(OUTCOMES[1], STUDY, None, None) == "FBN, seed 1: failed: no disk; ETA ?"
    assert ended_line(OUTCOMES[5], STUDY, 1.0, 3) == "FBN, seed 3: stopped (1.0 s); ETA 00:03"
