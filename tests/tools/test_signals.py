"""Signals, as schedulers and terminals send them, to the training tools: where they are met, what is saved, what the
resumed run ends with."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from forked import Forked
from tiny_runs import ROOT, TOOLS, arguments, assert_same, import_all, results, tool

from fbn_plugin.engine.run import population, stopping

SENTENCE = "stopped by {}; --resume continues from the last checkpoint in {}\n"


@pytest.fixture(scope="module", params=TOOLS)
def name(request):
    tool(request.param)
    import_all(request.param)
    return request.param


@pytest.fixture(scope="module")
def undisturbed(name, shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Forked(tool(name), arguments(name, folder / "run", shapes), folder)
    assert run.wait() == 0, run.error
    return results(folder / "run")


def at_call(owner, method, number, act):
    """Let the ``number``-th call of a function (from 1) begin with ``act()``."""
    calls, function = [], getattr(owner, method)

    def called(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            act()
        return function(*args, **kwargs)

    setattr(owner, method, called)


def group(number):
    """Signals the whole group, from another process, as a scheduler does."""
    return lambda: subprocess.run(["kill", f"-{number}", "--", f"-{os.getpgid(0)}"])


def in_step(act):
    """In the second step, whose batch workers have loaded."""
    at_call(torch.optim.SGD, "step", 2, act)


def in_step_twice(act):
    at_call(torch.optim.SGD, "step", 2, lambda: [act(), time.sleep(0.05), act()])


def while_it_is_built(act):
    at_call(torch.optim.SGD, "__init__", 1, act)


def kill_workers(_):
    def kill():
        for worker in multiprocessing.active_children():
            worker.kill()
        time.sleep(0.5)

    at_call(torch.optim.SGD, "step", 2, kill)


def in_evaluation(act):
    function = stopping.until_asked

    def until_asked(batches):
        for number, batch in enumerate(function(batches)):
            with contextlib.suppress(TypeError):  # the statistics' have no end
                if number == 1 and len(batches):
                    act()
            yield batch

    stopping.until_asked = until_asked


def in_statistics(act):
    at_call(population, "update_population_stats", 1, act)


def in_saving(act):
    at_call(torch, "save", 1, act)


def in_scoring(act):
    from pycocotools.cocoeval import COCOeval

    at_call(COCOeval, "evaluate", 1, act)


def stopped(name, given, folder, place, number, code):
    """A run that a signal to its group stops at a place, which ends with a code, one sentence and no traceback; its
    sentence."""
    run = Forked(tool(name), given, folder, lambda: place(group(number)))
    assert run.wait(30) == code, (place, run.output, run.error)
    assert run.error.count("\n") == 1 and "Traceback" not in run.output, (place, run.output, run.error)
    assert not [path for path in folder.rglob("*.tmp*") if folder in path.parents], place
    return run.error


def test_sigterm_saves_and_the_resumed_run_ends_as_if_never_stopped(name, undisturbed, shapes, tmp_path):
    """As Slurm stops a run: the whole process group is signalled, workers too, and killed after 30 seconds."""
    out = tmp_path / "run"
    given = ["--resume", *arguments(name, out, shapes), "DATALOADER.NUM_WORKERS", "2"]
    of_detectors = [in_statistics, in_scoring] if name != "train_classification" else []
    for place in [in_saving, *of_detectors, in_step, in_evaluation]:
        assert stopped(name, given, tmp_path, place, signal.SIGTERM, 143) == SENTENCE.format("SIGTERM", out), place
    run = Forked(tool(name), given, tmp_path)
    assert run.wait() == 0, run.error
    assert_same(results(out), undisturbed)


def test_ctrl_c_and_a_second_sigterm_stop_at_once(name, shapes, tmp_path, monkeypatch):
    out = tmp_path / "run"
    given = [*arguments(name, out, shapes), "DATALOADER.NUM_WORKERS", "2"]
    for number, code, said in ((signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")):
        error = stopped(name, given, tmp_path, while_it_is_built, number, code)
        assert error.startswith(f"stopped by {said}") and not list(out.glob("*.json"))
    nothing = f"nothing is saved yet in {out}, so the run starts again\n"
    for place in (in_step, in_saving, in_evaluation):
        assert stopped(name, given, tmp_path, place, signal.SIGINT, 130) == f"stopped by Ctrl-C; {nothing}"
    monkeypatch.setattr(stopping, "_SAME", 0.0)
    assert stopped(name, given, tmp_path, in_step_twice, signal.SIGTERM, 143) == f"stopped by SIGTERM; {nothing}"
    assert not list(out.glob("*.pth"))


def test_other_signals_and_a_worker_that_is_killed(name, shapes, tmp_path):
    out = tmp_path / "run"
    given = ["--resume", *arguments(name, out, shapes), "DATALOADER.NUM_WORKERS", "1"]
    given += ["DATALOADER.IN_MEMORY", "never"] if name == "train_classification" else []  # which needs no workers
    error = stopped(name, given, tmp_path, kill_workers, signal.SIGKILL, 1)
    assert error.startswith("error: a process that loads images was killed (Killed)")
    for number in (signal.SIGHUP, signal.SIGUSR1):
        assert stopped(name, given, tmp_path, in_step, number, 143) == SENTENCE.format(number.name, out)


def pair(name, given, folder, place=None, number=0):
    """A run in two processes, as torchrun starts them; the second is signalled at a place; how both end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }

        def before(environment=environment, rank=rank):
            os.environ.update({key: str(value) for key, value in environment.items()})
            if place and rank == 1:
                place(lambda: os.kill(os.getpid(), number))

        (folder / str(rank)).mkdir(exist_ok=True)
        runs.append(Forked(tool(name), given, folder / str(rank), before))
    return [(run.wait(60), run.error) for run in runs]


def test_two_processes_stop_after_the_same_iteration(name, shapes, tmp_path):
    """Of which one alone is signalled, or killed; the run ends as one that was never stopped."""
    if name == "train_net":
        pytest.skip("it starts its processes itself")
    given = {part: ["--resume", *arguments(name, tmp_path / part, shapes)] for part in ("whole", "run")}
    assert pair(name, given["whole"], tmp_path) == [(0, "")] * 2
    out = tmp_path / "run"
    killed = pair(name, given["run"], tmp_path, in_step, signal.SIGKILL)
    assert [code for code, _ in killed] == [1, -signal.SIGKILL]
    assert killed[0][1].startswith("error: another process of this run stopped") and killed[0][1].count("\n") == 1
    for place in (in_step, in_evaluation):
        ended = pair(name, given["run"], tmp_path, place, signal.SIGTERM)
        assert [code for code, _ in ended] == [143, 143], (place, ended)
        assert ended[0][1].startswith("stopped by SIGTERM; --resume continues") and not ended[1][1], (place, ended)
    assert pair(name, given["run"], tmp_path) == [(0, "")] * 2
    assert_same(results(out), results(tmp_path / "whole"))


@pytest.mark.detectron2
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_processes_that_the_tool_starts_stop_with_it(shapes, tmp_path, monkeypatch, number, code):
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")  # other packages', in the processes that are started
    main, out = tool("train_net"), tmp_path / "run"
    given = [
        "--num-gpus",
        "2",
        *arguments("train_net", out, shapes),
        "SOLVER.MAX_ITER",
        "1000",
        "TEST.EVAL_PERIOD",
        "0",
    ]
    run = Forked(main, [*given, "TEST.PRECISE_BN.ENABLED", "False", "SOLVER.CHECKPOINT_PERIOD", "1000"], tmp_path)
    end = time.monotonic() + 60
    while not ((out / "metrics.json").exists() and (out / "metrics.json").read_text()):
        assert time.monotonic() < end, run.error
        time.sleep(0.05)
    os.kill(run.pid, number)
    assert run.wait(30) == code, run.error
    assert run.error.count("\n") == 1 and (out / "last_checkpoint").exists() == (code == 143), run.error


def test_while_packages_are_imported_and_when_nobody_reads():
    command = [sys.executable, str(ROOT / "tools/make_table.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    run = subprocess.Popen(command, **pipes)
    time.sleep(0.5)  # of the two seconds that PyTorch takes
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1].startswith("stopped be") and run.returncode == 130
    run = subprocess.Popen(command, **pipes)
    run.stdout.close()
    assert run.stderr.read() == "" and run.wait() == 141
