"""Where data sets are looked for."""

from pathlib import Path

from fbn_plugin.engine.data.locations import data_root, places


def test_a_set_lies_where_it_is_named_or_in_the_folder_of_data_sets(monkeypatch, tmp_path):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert data_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places("mnist") == [Path("mnist"), tmp_path / "sets/mnist"]
    assert places("~/mnist") == [tmp_path / "mnist"] * 2
