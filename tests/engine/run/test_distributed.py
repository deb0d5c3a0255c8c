"""One process: devices are chosen or named as wrong, collectives return their input. For two, see the tools' tests."""

import pytest
import torch
from torch import multiprocessing as mp

from fbn_plugin.engine.run import distributed


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_devices(monkeypatch):
    assert distributed.init("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE must be 'cuda'.* got 'gpu'"):
        distributed.init("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.init("cuda") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="wants cuda:2, and this machine has 2 GPUs"):
        distributed.init("cuda:2")


def test_torchruns_word_counts_before_the_group_is_joined(monkeypatch):
    assert distributed.rank() == 0 and distributed.is_main() and distributed.world_size() == 1
    monkeypatch.setenv("RANK", "3")
    assert distributed.rank() == 3 and not distributed.is_main()


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"RANK": "x"}, "RANK must be a number as torchrun sets it in the environment, got 'x'"),
        ({"RANK": "-1"}, "RANK must be a number .* got '-1'"),
        ({"RANK": "9" * 5000}, "RANK must be a number .* got '999"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE must be a number .* got 'abc'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be a number .* got '0'"),
        (
            {"WORLD_SIZE": "2", "RANK": "2"},
            "RANK must be less than WORLD_SIZE, 2, .* got '2'",
        ),  # it would wait for ever
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "two"}, "LOCAL_RANK must be a number .* got 'two'"),
    ],
)
def test_numbers_of_the_environment(environment, sentence, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        distributed.is_main(), distributed.init("cpu")


def test_collectives_of_one_process():
    values = {"loss": 1.5}
    assert distributed.all_gather(values) == [values]
    assert distributed.broadcast_object(values) is values
    assert distributed.reduce_mean(values, torch.device("cpu")) == values
    distributed.barrier(), distributed.broadcast_buffers(torch.nn.BatchNorm2d(2)), distributed.finish()


@pytest.fixture
def lost():
    text = "[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"
    return RuntimeError(text), torch.distributed.DistBackendError("NCCL error")


def test_a_lost_process_is_a_sentence_where_processes_share_a_run(monkeypatch, lost):
    assert [distributed.lost_process(error) for error in lost] == [None, None]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for error in lost:
        assert distributed.lost_process(error).startswith("another process of this run stopped")
    for error in (RuntimeError("a bug"), ValueError("gloo")):
        assert distributed.lost_process(error) is None


def test_a_lost_worker_is_a_sentence():
    for said, words in (
        (
            "DataLoader worker (pid 4242) is killed by signal: Killed. ",
            "was killed (Killed), perhaps for want of memory",
        ),
        ("DataLoader worker (pid(s) 1, 2) exited unexpectedly", "exited unexpectedly"),
    ):
        assert f"a process that loads images {words}" in distributed.lost_process(RuntimeError(said))


def _fail(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

    def action():
        raise LookupError("a bug")

    try:
        distributed.on_main(action)
    except (LookupError, RuntimeError) as error:
        (folder / f"{rank}").write_text(f"{type(error).__name__}: {error}")


def test_what_rank_0_raises_ends_the_others_too(tmp_path):
    mp.start_processes(_fail, (tmp_path,), nprocs=2, start_method="fork")
    assert (tmp_path / "0").read_text() == "LookupError: a bug"
    assert (tmp_path / "1").read_text() == "RuntimeError: rank 0 failed: LookupError: a bug"
