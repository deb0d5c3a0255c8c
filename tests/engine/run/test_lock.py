"""One run folder belongs to one run, however that one ends."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from fbn_plugin.engine.run import lock
from fbn_plugin.engine.run.cli import UserError
from fbn_plugin.engine.run.lock import hold, let_go, open_output_dir

fork = multiprocessing.get_context("fork")


def in_process(function, *arguments):
    """What ``function`` returns in a fork of this process, or the error that it raises."""

    def work(pipe):
        try:
            pipe.send(function(*arguments))
        except Exception as error:
            pipe.send(error)
        pipe.recv()  # until the parent lets it end

    ours, theirs = fork.Pipe()
    process = fork.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    assert ours.poll(30)
    return ours.recv(), process, ours


def end(process, pipe):
    pipe.send(None)
    process.join(30)


@pytest.fixture(autouse=True)
def nothing_held(tmp_path):
    yield
    let_go(tmp_path)


def test_a_second_run_is_refused_until_the_first_one_ends(tmp_path):
    result, process, pipe = in_process(hold, tmp_path)
    assert result is None
    for attempt in (hold, open_output_dir):
        with pytest.raises(UserError, match=f"OUTPUT_DIR {tmp_path} is in use by process {process.pid} on .*; choose"):
            attempt(tmp_path)
    end(process, pipe)
    hold(tmp_path)
    hold(tmp_path)  # as often as one likes
    assert isinstance(in_process(hold, tmp_path)[0], UserError)
    let_go(tmp_path), let_go(tmp_path)
    assert os.listdir(tmp_path) == []
    assert in_process(hold, tmp_path)[0] is None


def test_a_killed_run_holds_nothing_and_neither_do_its_workers(tmp_path):
    def run(path):
        hold(path)
        if (worker := os.fork()) == 0:  # as a DataLoader's, which notices after seconds that its run is gone
            time.sleep(60)
            os._exit(0)
        return worker

    worker, process, _ = in_process(run, tmp_path)
    try:
        with pytest.raises(UserError, match="is in use"):
            hold(tmp_path)
        process.kill()
        process.join()
        os.kill(worker, 0)  # is there still
        hold(tmp_path)
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("there", [True, False])
def test_of_runs_that_start_together_one_wins(tmp_path, there):
    """Those that look at a folder that is not there yet, too: then none of them holds it before it is made."""
    if there:
        (tmp_path / "run").mkdir()
    for _ in range(3):
        started = fork.Barrier(4)

        def start():
            started.wait(30)  # noqa: B023  called before the next barrier is made
            hold(tmp_path / "run")
            open_output_dir(tmp_path / "run")

        pipes = [fork.Pipe() for _ in range(4)]

        def work(pipe):
            try:
                pipe.send(start())
            except UserError as error:
                pipe.send(error)
            pipe.recv()

        processes = [fork.Process(target=work, args=(pipe[1],), daemon=True) for pipe in pipes]
        for process in processes:
            process.start()
        results = [pipe[0].recv() for pipe in pipes]
        assert results.count(None) == 1 and sum(isinstance(each, UserError) for each in results) == 3
        for process, pipe in zip(processes, pipes):
            end(process, pipe[0])


def test_a_run_that_began_and_ended_in_the_meantime(tmp_path):
    folder = tmp_path / "run"
    hold(folder)  # not there
    folder.mkdir()
    (folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(UserError, match="holds a run that began in the meantime"):
        open_output_dir(folder)
    assert os.listdir(folder) == ["last_checkpoint"]
    hold(folder)  # a resumed run has it before it looks
    open_output_dir(folder)
    let_go(folder)


def test_a_folder_that_is_removed_and_made_again(tmp_path):
    folder = tmp_path / "run"
    open_output_dir(folder)
    (folder / ".lock").unlink()
    folder.rmdir()
    open_output_dir(folder)
    assert isinstance(in_process(hold, folder)[0], UserError)
    let_go(folder)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_is_said_and_the_run_goes_on(tmp_path, monkeypatch, caplog, error):
    def lockf(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    open_output_dir(tmp_path)
    (record,) = caplog.records
    assert f"OUTPUT_DIR {tmp_path} cannot be locked ({os.strerror(error)})" in record.getMessage()


def test_what_else_the_lock_file_may_be(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff junk\n" * 1000)
    result, process, pipe = in_process(hold, tmp_path)
    assert result is None
    end(process, pipe)
    (tmp_path / ".lock").unlink(missing_ok=True)
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"\.lock cannot be written: Too many"):
        hold(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_the_folder_is_let_go_of_behind_the_last_method(tmp_path):
    class Trainer:
        cfg = type("cfg", (), {"OUTPUT_DIR": tmp_path})

        @lock.lets_go
        def train(self, fails):
            hold(tmp_path)
            assert not fails, "an error"
            return 3

    assert Trainer().train(False) == 3 and os.listdir(tmp_path) == []
    with pytest.raises(AssertionError, match="an error"):
        Trainer().train(True)
    assert os.listdir(tmp_path) == []
