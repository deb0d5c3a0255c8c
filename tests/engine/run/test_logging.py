"""Training logs: means of each period, one line an iteration however often a run was stopped, readable JSON."""

import json
import logging
import math
import os
import time

import pytest
from full_disk import largest_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fbn_plugin.engine.files.disk import WriteError
from fbn_plugin.engine.run.logging import TrainingLog, forget_metrics, read_metrics, setup_logging


def run(folder, start, stop, total=6, period=2):
    with TrainingLog(folder, total, start, period) as log:
        for it in range(start, stop):
            log.step(it, total_loss=float(it), lr=0.1 * it, time=2.0, data_time=0.5)


def test_lines_hold_the_means_of_their_period(tmp_path):
    run(tmp_path, 0, 5, total=5)
    rows = read_metrics(tmp_path / "metrics.json")
    assert [row["iteration"] for row in rows] == [1, 3, 4]
    assert [row["total_loss"] for row in rows] == [0.5, 2.5, 4.0]
    assert [row["lr"] for row in rows] == [0.1 * 1, 0.1 * 3, 0.1 * 4]
    assert [row["eta_seconds"] for row in rows] == [6.0, 2.0, 0.0]
    assert rows[0].keys() == {"iteration", "total_loss", "lr", "time", "data_time", "eta_seconds", "step_time"}


def test_images_per_second(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "fbn_plugin"), TrainingLog(tmp_path, 2, period=2, images=6) as log:
        for iteration, seconds in enumerate((2.0, 4.0)):
            log.step(iteration, total_loss=1.0, lr=0.1, time=seconds, data_time=0.5)
    assert read_metrics(tmp_path / "metrics.json")[0]["images_per_second"] == 6 / 3
    assert "data_time 0.500  images/s 2" in caplog.text


def test_the_time_of_a_step_is_the_median_without_waiting(tmp_path):
    """The first iteration of a run, and one that waits for images, are no measure of the network."""
    with TrainingLog(tmp_path, 6, period=3) as log:
        for iteration, (seconds, wait) in enumerate(
            [(9.0, 0.5), (2.0, 0.5), (1.75, 0.25), (2.0, 0), (1.0, 0), (3.0, 0)]
        ):
            log.step(iteration, time=seconds, data_time=wait)
    assert [row["step_time"] for row in read_metrics(tmp_path / "metrics.json")] == [1.5, 2.0]


def test_a_resumed_run_leaves_the_same_lines(tmp_path):
    (tmp_path / "whole").mkdir(), (tmp_path / "stopped").mkdir()
    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "stopped", 0, 5)  # stopped at 5; its checkpoint is that of iteration 2
    run(tmp_path / "stopped", 2, 6)
    texts = [(tmp_path / name / "metrics.json").read_text() for name in ("whole", "stopped")]
    assert texts[0] == texts[1]


def test_the_window_has_what_no_line_has_yet(tmp_path):
    with TrainingLog(tmp_path, 6, 1, 3, {"total_loss": [0.5], "time": [1.0]}) as log:
        log.step(1, total_loss=1.5, time=3.0)
        assert log.window == log.window == {"total_loss": [0.5, 1.5], "time": [1.0, 3.0]}
        log.step(2, total_loss=2.5, time=3.0)
        assert log.window == {}
    assert read_metrics(tmp_path / "metrics.json")[0]["total_loss"] == 1.5


def test_a_line_cut_short_is_dropped(tmp_path):
    run(tmp_path, 0, 4)
    path = tmp_path / "metrics.json"
    path.write_text(path.read_text() + '{"iteration": 5, "total_')
    assert [row["iteration"] for row in read_metrics(path)] == [1, 3]
    run(tmp_path, 4, 6)
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 3, 5]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"iteration": 1, "lr": 0.1, 0.2}', '{"iteration": 2}'], "line 1 is damaged"),
        (['{"iteration": 1}', "junk", '{"iteration": 2}'], "line 2 is damaged"),
        (['{"iteration": 1}', "\0\0\0", '{"iteration": 2}'], "line 2 is damaged"),
        (["[" * 50_000, '{"iteration": 2}'], "line 1 is damaged"),
        (['{"iteration": 1}', "3"], "line 2 has no 'iteration'"),
        (['{"iteration": true}'], "line 1 has no 'iteration'"),
        (['{"iteration": -2}'], "line 1 has no 'iteration'"),
        (['{"iteration": NaN}'], "line 1 has no 'iteration'"),
        (['{"iteration": 1, "bbox/AP": [3]}'], r"line 1: bbox/AP must be a number or null, got \[3\]"),
        ([f'{{"iteration": {10**400}}}'], "line 1 has no 'iteration'"),
        ([f'{{"iteration": 1, "bbox/AP": {10**400}}}'], "line 1: bbox/AP must be a number or null, got 1000"),
        (['{"iteration": 1, "bbox/AP": true}'], "line 1: bbox/AP must be a number or null, got True"),
    ],
)
def test_other_damage_is_one_sentence_and_the_file_stays(tmp_path, lines, words):
    path = tmp_path / "metrics.json"
    path.write_text("\n".join(lines) + "\n")
    before = path.read_bytes()
    for use in (lambda: read_metrics(path), lambda: TrainingLog(tmp_path, 6, 3)):
        with pytest.raises(ValueError, match=f"^{path}: {words}"):
            use()
    assert path.read_bytes() == before


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.json")
    with pytest.raises(ValueError, match="metrics.json is not a file"):
        read_metrics(tmp_path / "metrics.json")


def test_what_is_kept_is_kept_as_it_stands(tmp_path):
    """Lines of detectron2's, with what other tools went on behind after a crash."""
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 1, "a": NaN, "b": 1e400}\n{"iteration": 2, "a\n{"iteration": 3,  "a": 2.50}\n\0\0')
    assert [row["iteration"] for row in read_metrics(path)] == [1, 3]
    forget_metrics(path, 9)
    assert path.read_text() == '{"iteration": 1, "a": NaN, "b": 1e400}\n{"iteration": 3,  "a": 2.50}\n'
    forget_metrics(path, 3)
    assert path.read_text() == '{"iteration": 1, "a": NaN, "b": 1e400}\n'


def test_a_full_disk_stops_the_run_where_it_is_first_noticed(tmp_path, capsys):
    setup_logging(tmp_path)
    logger = logging.getLogger("fbn_plugin")
    with largest_file(0):
        with pytest.raises(WriteError, match=r"log\.txt cannot be written: File too large"):
            logger.info("a line")
        with pytest.raises(KeyError):
            try:
                raise KeyError("an error")
            except KeyError:
                logger.info("a line about it")
                raise
    with TrainingLog(tmp_path, 6) as log:
        with largest_file(5), pytest.raises(WriteError, match=r"metrics\.json cannot be written"):
            log.write(0, {"a": 1.0})
        with largest_file(50), pytest.raises(WriteError, match=r"events\.out.* cannot be written"):
            log.write(0, {"a": 1.0})
        log.write(1, {"a": 2.0})
    assert [row["iteration"] for row in read_metrics(tmp_path / "metrics.json")] == [0, 1]
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("a")] == [1]


def test_tensorboard_forgets_what_comes_again(tmp_path):
    run(tmp_path, 0, 6)
    time.sleep(1.1)  # files are read by their second
    run(tmp_path, 2, 6)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("total_loss")
    assert [event.step for event in events] == [1, 3, 5]


def test_an_evaluation_without_value_is_null(tmp_path):
    with TrainingLog(tmp_path, 1) as log:
        log.write(0, {"bbox/AP": math.nan, "bbox/AP50": 30.0})
    text = (tmp_path / "metrics.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"iteration": 0, "bbox/AP": None, "bbox/AP50": 30.0}


def test_tensorboard_has_the_same_values(tmp_path):
    run(tmp_path, 0, 6)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("total_loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.5), (3, 2.5), (5, 4.5)]


def test_without_a_terminal_there_is_a_line_now_and_then(tmp_path, capsys):
    setup_logging(tmp_path)
    run(tmp_path, 0, 6)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in out] == ["2/6", "4/6", "6/6"]
    assert "total_loss 0.5" in out[0] and "eta 00:08" in out[0]
    assert (tmp_path / "log.txt").read_text().count("total_loss") == 3
