"""Checkpoints: whole or not there, read without running code, resumed only into the same model."""

import math
import os
import random
import re
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from fbn_plugin.engine.run.checkpoint import AtomicCheckpointer, RandomState, check_contents, load_file


def test_a_failed_save_keeps_the_last_checkpoint_valid(tmp_path, monkeypatch):
    model = nn.Linear(2, 2)
    checkpointer = AtomicCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0", iteration=0)
    monkeypatch.setattr(torch, "save", lambda data, file: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        checkpointer.save("model_1", iteration=1)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0.pth"]
    assert AtomicCheckpointer(model, str(tmp_path)).resume_or_load("") == {"iteration": 0}


def test_a_plain_state_dict_is_read_as_a_model(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / "weights.pth")
    assert load_file(tmp_path / "weights.pth")["model"].keys() == state.keys()


def _harmful(path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "ran"),)

    torch.save({"model": Harmful()}, path)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.write_bytes(b"PK\x03\x04 cut"),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_text("text"),
        _harmful,
    ],
)
def test_a_damaged_or_harmful_file_is_one_sentence(tmp_path, write):
    path = tmp_path / "bad.pth"
    write(path)
    with pytest.raises(ValueError) as error:
        load_file(path)
    assert str(error.value).startswith(f"checkpoint {path} cannot be read: it is ") and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_cut_short_is_one_sentence(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.pth cannot be read"):
        load_file(path)


def test_resuming_wants_the_same_model_and_loading_weights_does_not(tmp_path):
    AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path)).save("model_0")
    path = str(tmp_path / "model_0.pth")
    for other in (nn.Linear(2, 3), nn.Linear(2, 2, bias=False), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="model_0.pth is of another model"):
            AtomicCheckpointer(other).load(path)
    AtomicCheckpointer(nn.Linear(2, 2, bias=False)).load(path, checkpointables=[])
    with pytest.raises(FileNotFoundError, match="is not there"):
        AtomicCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "model_9.pth"))
    with pytest.raises(FileNotFoundError, match="is a folder; name a file in it"):
        AtomicCheckpointer(nn.Linear(2, 2)).load(str(tmp_path))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_weights_of_a_run_that_had_diverged(tmp_path, name):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.state_dict()[name].view(-1)[0] = math.nan
    AtomicCheckpointer(model, str(tmp_path)).save("model_0")
    sentence = f"model_0.pth holds NaN in 1 tensor, such as {name}: its run had diverged"
    for wanted in ([], None):  # weights to start from or to evaluate, and a run that goes on
        with pytest.raises(ValueError, match=re.escape(sentence)):
            AtomicCheckpointer(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).load(
                str(tmp_path / "model_0.pth"), wanted
            )


def test_random_states_come_back(tmp_path):
    def draw():
        return random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()

    model = nn.Linear(1, 1)
    draw()
    checkpointer = AtomicCheckpointer(model, str(tmp_path), random=RandomState())
    checkpointer.save("model_0")
    expected = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    AtomicCheckpointer(model, str(tmp_path), random=RandomState()).resume_or_load("")
    assert draw() == expected


def test_optimizer_and_scheduler_go_on_where_they_were(tmp_path):
    def run(steps, resume):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda it: 0.5**it)
        checkpointer = AtomicCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler)
        if resume:
            checkpointer.resume_or_load("")
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            scheduler.step()
        checkpointer.save("model")
        return model.state_dict()

    whole = {name: value.clone() for name, value in run(4, resume=False).items()}
    run(2, resume=False)
    resumed = run(2, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("address", ["catalog://x", "file:///x.pth", "hf-hub://x", "://", "missing.pth?a=1"])
def test_an_address_that_is_none(tmp_path, address):
    with pytest.raises(FileNotFoundError, match=re.escape(address.partition("?")[0]) + " is not there"):
        AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path)).load(address, [])


def test_what_follows_the_question_mark_is_no_part_of_the_name(tmp_path):
    own, other = nn.Linear(2, 2), nn.Linear(2, 2)
    torch.save(other.state_dict(), tmp_path / "w.pth")
    AtomicCheckpointer(own, str(tmp_path)).load(f"{tmp_path / 'w.pth'}?matching_heuristics=True", [])
    assert torch.equal(own.weight, other.weight)


@pytest.mark.parametrize("value, words", [([1.0], "not all of its weights are tensors"), (1j, "complex numbers")])
def test_weights_that_are_none(tmp_path, value, words):
    torch.save({"weight": value if isinstance(value, list) else torch.full((2, 2), value)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth .*{words}"):
        AtomicCheckpointer(nn.Linear(2, 2), str(tmp_path)).load(str(tmp_path / "w.pth"), [])


def test_an_archive_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1_000_000))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda archive: pytest.fail("it is unpacked"))
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read: it is cut short or damaged"):
        check_contents(path)
