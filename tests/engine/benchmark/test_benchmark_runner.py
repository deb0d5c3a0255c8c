"""Rows that fail, end their process or never end; the time that rows share; what a plan holds. All rows are fakes."""

import json
import math
import os
import time

import pytest
import torch

from fbn_plugin.engine.benchmark import Settings, rows, runner
from fbn_plugin.engine.benchmark.rows import Row
from fbn_plugin.engine.benchmark.runner import Measured


def works(until, notes):
    return {"check": "of a fake", "passed": True}


def fails(until, notes):
    notes.append("said before")
    raise ValueError("no such thing\nand a long story")


def ends(until, notes):
    os._exit(7)


def never_ends(until, notes):
    time.sleep(1000)


def spoils(until, notes):
    torch.cuda.synchronize = fails_at_once
    raise RuntimeError("an illegal memory access")


def fails_at_once():
    raise RuntimeError("an illegal memory access, again")


def eventful(settings):
    if settings is not None:  # in the process that measures, which has no GPU here
        torch.cuda.synchronize = lambda: None
    names = {"first": works, "fails": fails, "ends": ends, "second": works, "never ends": never_ends, "third": works}
    names |= {"spoils": spoils, "fourth": works}
    return [Row("checks", name, measure, 0.1) for name, measure in names.items()]


def one_row(settings):
    return [Row("checks", "first", works)]


def on_a_gpu(**options):
    """Settings for a GPU, whether there is one or not."""
    settings = Settings(**options)
    object.__setattr__(settings, "device", "cuda")
    return settings


def run(planner, **options):
    return runner.run(Settings(**options), planner=planner, isolated=False)


def test_an_error_in_a_row_is_a_note_and_the_run_goes_on():
    results = run(lambda settings: [Row("checks", "one", fails), Row("checks", "two", works), Row("host", "x", fails)])
    assert results["checks"] == [{"check": "of a fake", "passed": True}] and results["host"] == []
    assert results["notes"] == ["said before", "one: not measured: no such thing", "x: not measured: no such thing"]
    assert [each["row"] for each in results["durations"]] == ["one", "two", "x"]


def test_results_are_handed_out_after_every_row():
    seen = []

    def on_row(results, name, measured):
        seen.append((name, len(json.loads(json.dumps(results))["checks"]), len(measured.rows)))

    planner = lambda settings: [Row("checks", name, works) for name in "ab"] + [Row("checks", "c", fails)]  # noqa: E731
    runner.run(Settings(), on_row, planner, isolated=False)
    assert seen == [("a", 1, 1), ("b", 2, 1), ("c", 2, 0)]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a row says so."""

    class Clock:
        now = 1000.0

        def row(self, name, seconds, takes, given):
            def measure(until, notes):
                given[name] = until - self.now
                self.now += takes
                return []

            return Row("checks", name, measure, seconds)

    clock = Clock()
    monkeypatch.setattr(runner.time, "time", lambda: clock.now)
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock.now)
    return clock


def test_rows_share_the_time_in_proportion(clock):
    given = {}
    run(
        lambda _: [clock.row("a", 10, 10, given), clock.row("b", 30, 20, given), clock.row("c", 20, 5, given)],
        minutes=2,
    )
    # 120 s for rows that want 60: a gets 20; b gets 3/5 of the 110 that are left, c the 90 that then are.
    assert given == pytest.approx({"a": 20, "b": 66, "c": 90})


def test_what_the_time_does_not_suffice_for_is_skipped_with_a_note(clock):
    given = {}
    plan = [clock.row("slow", 10, 55, given), clock.row("large", 20, 20, given), clock.row("small", 4, 4, given)]
    results = run(lambda _: plan, minutes=1)
    assert given.keys() == {"slow", "small"}, "5 s are left: not half of what the large row needs"
    assert results["notes"] == ["large: skipped, the time was over"]


def test_without_minutes_nothing_is_skipped(clock):
    given = {}
    run(lambda _: [clock.row("a", 1, 1e6, given), clock.row("b", 1, 1, given)])
    assert given == {"a": math.inf, "b": math.inf}


def test_a_process_that_ends_or_hangs_costs_one_row():
    plan = eventful(None)
    found = []
    for message in runner._isolated(on_a_gpu(), eventful, plan, time.time() + 600, 8.0):
        if isinstance(message, Measured):
            found.append(message)
    assert [len(each.rows) for each in found] == [1, 0, 0, 1, 0, 1, 0, 1]
    notes = [each.notes[-1:] for each in found]
    assert notes[1] == ["fails: not measured: no such thing"]
    assert notes[2] == ["ends: not measured: its process ended with code 7"]
    assert notes[6:] == [["spoils: not measured: an illegal memory access"], []]
    assert notes[4] == ["never ends: not measured: its process gave no answer and was ended"]


def ends_at_once(*_):
    os._exit(3)


def test_a_process_that_does_not_start_ends_the_run(monkeypatch):
    monkeypatch.setattr(runner, "_work", ends_at_once)
    with pytest.raises(RuntimeError, match="does not start: its process ended with code 3"):
        runner.run(Settings(), planner=one_row, isolated=True)


def test_patience_ends_with_the_time():
    row = Row("checks", "x", works, seconds=80)
    now = time.time()
    assert runner._patience(row, math.inf, 60) is None
    assert runner._patience(row, now + 1000, 60) == 240
    assert runner._patience(row, now + 100, 60) == pytest.approx(115, abs=1)
    assert runner._patience(row, now - 100, 60) == 20


def test_the_plan_of_the_targets_has_every_row_that_they_count():
    """As many rows as the targets say that there are, for a GPU."""
    from fbn_plugin.engine.benchmark.targets import TARGETS

    planned = rows.plan(on_a_gpu(targets=True))
    assert [row.kind for row in planned[:2]] == ["preparation", "checks"], "first whether it is right"
    counts = {kind: sum(row.kind == kind for row in planned) for kind in runner.KINDS}
    assert counts == {
        "layers": 27, "models": 16, "host": 3, "compiled": 2, "first_steps": 1, "checks": 1, "preparation": 1,
    }  # fmt: skip
    assert sum(row.seconds for row in planned) <= 7.5 * 60
    assert {t.rows for t in TARGETS if t.device == "cuda" and t.kind == "layers"} == {27, 2 * 27, 4 * 27}
    batches = [row.measure.args[3][0] for row in planned if row.kind == "models" and row.measure.args[2] == "resnet50"]
    assert batches == [64] * 4 + [8] * 4


def test_a_plan_holds_what_the_settings_ask_for():
    settings = Settings(models=("resnet50",), shapes=((2, 4, 3, 3),), dtypes=("float32", "bfloat16"), batch_size=3)
    planned = rows.plan(settings)
    assert len(planned) == 16 + 2 and planned[-1].name == "resnet50 3x224x224 contiguous bfloat16"
