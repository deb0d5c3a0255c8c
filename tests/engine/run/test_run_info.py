"""What a run was made with: written whole, read back, absent in older folders; and what an evaluation found."""

import json
import math

import pytest
import torch

import fbn_plugin
from fbn_plugin.engine.run.run_info import hardware, read_run_info, write_evaluation, write_run_info


def test_written_and_read_back(tmp_path):
    assert read_run_info(tmp_path) == {}
    write_run_info(tmp_path, "torchvision", "cpu", 2, 4, {"a:train": 10}, {"a:val": 3})
    info = read_run_info(tmp_path)
    assert info["hardware"] == hardware("cpu") and f", {torch.get_num_threads()} thread" in info["hardware"]
    assert (info["engine"], info["processes"], info["images_per_batch"]) == ("torchvision", 2, 4)
    assert (info["train_images"], info["test_images"]) == ({"a:train": 10}, {"a:val": 3})
    assert info["versions"]["fbn_plugin"] == fbn_plugin.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["run_info.json"]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file(tmp_path, content):
    (tmp_path / "run_info.json").write_text(content)
    with pytest.raises(ValueError, match="run_info.json"):
        read_run_info(tmp_path)


@pytest.mark.parametrize(("threads", "words"), [(1, ", 1 thread"), (2, ", 2 threads")])
def test_threads_are_counted_in_words(threads, words, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert hardware("cpu").endswith(words)


def test_an_evaluation(tmp_path):
    path = tmp_path / "evaluation.json"
    write_evaluation(path, 3, tmp_path / "a.pth", ["a:val"], {"bbox/AP": 1.5, "bbox/APl": math.nan}, "a CPU")
    assert json.loads(path.read_text()) == {
        "iteration": 3,
        "weights": str(tmp_path / "a.pth"),
        "results": None,
        "hardware": "a CPU",
        "dataset": ["a:val"],
        "metrics": {"bbox/AP": 1.5, "bbox/APl": None},
    }
    write_evaluation(path, None, None, ["a:val"], {"bbox/AP": 1.5}, results="found.json")
    assert json.loads(path.read_text())["results"] == "found.json"
