"""Data that studies want: looked for before anything runs, and made where it needs no download."""

import json

import pytest
from PIL import Image
from small_studies import ROOT, tool, write_study

from fbn_plugin.engine.data.image_data import load_image_data
from fbn_plugin.engine.studies.made_data import MADE, make_digits, make_photographs
from fbn_plugin.engine.studies.running import Resources, run_study
from fbn_plugin.engine.studies.study_file import read_study
from fbn_plugin.engine.studies.wanted_data import Wanted, is_there, make_wanted, missing

TEXT = "VARIANTS: {a: {SOLVER.MAX_ITER: 1}, b: {SOLVER.MAX_ITER: 1, MODEL.NORM: FBN}}\nSEEDS: 1\n"


def test_what_is_missing_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/images.tar").touch()
    text = f"{TEXT}DATA: {{here: H, mnist: 'MNIST,  from its page', w.pth: weights}}\n"
    file = read_study(write_study(tmp_path, text), ROOT)
    assert file.wanted == [Wanted("here", "H"), Wanted("mnist", "MNIST, from its page"), Wanted("w.pth", "weights")]
    with pytest.raises(FileNotFoundError) as error:
        run_study(file, tmp_path / "out", tool(tmp_path), Resources(1), forks=False)
    sets = tmp_path / "sets"
    where = f"neither here nor below $DETECTRON2_DATASETS ({sets})"
    assert str(error.value) == (
        f"study {file.path}: data are missing, {where}: mnist (MNIST, from its page); w.pth (weights)"
    )
    assert not (tmp_path / "out").exists()
    (sets / "mnist").mkdir(parents=True)
    (tmp_path / "w.pth").touch()
    assert missing(file.wanted).endswith("mnist (MNIST, from its page)")  # the folder is empty
    (sets / "mnist/images").touch()
    assert missing(file.wanted) is None
    outcomes = run_study(file, tmp_path / "out", tool(tmp_path), Resources(2), forks=False, say=lambda line: None)
    assert {each.state for each in outcomes} == {"done"}
    (tmp_path / "w.pth").unlink()  # what is done asks for nothing
    run_study(file, tmp_path / "out", tool(tmp_path), Resources(1), forks=False)


def test_small_sets_are_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(
        MADE, "photographs", type(MADE["photographs"])("photos", lambda path: made.append(path.mkdir()))
    )
    wanted = [Wanted(str(tmp_path / "set"), "photos", "photographs")]
    assert is_there(wanted[0]) and missing(wanted) is None
    make_wanted(wanted)
    make_wanted(wanted)
    assert len(made) == 1
    with pytest.raises(FileNotFoundError, match=r"data are missing, .*nothing \(N\)"):
        make_wanted([Wanted(str(tmp_path / "other"), "photos", "photographs"), Wanted("nothing", "N")])
    assert len(made) == 1


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("[a]", "DATA must be a mapping, got ['a']"),
        ("{a: 3}", "DATA of 'a' must be text that says what it is, or {made: NAME}, got 3"),
        ("{a: {made: pictures}}", "DATA of 'a' must be made by one of photographs, digits_on_photos, got 'pictures'"),
        ("{a: {make: photographs}}", "unknown key of DATA of 'a' 'make'; did you mean 'made'?"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(tmp_path, data, sentence):
    with pytest.raises(ValueError) as error:
        read_study(write_study(tmp_path, f"{TEXT}DATA: {data}"), ROOT)
    assert sentence in str(error.value)


def test_photographs_are_ten_classes_in_imagenets_layout(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    make_photographs(tmp_path / "a" / "photos")
    data = load_image_data("image_folder", str(tmp_path / "a/photos"))
    assert (len(data.classes), len(data.train), len(data.val)) == (10, 80, 40)
    assert {data.train[i][0].size for i in (0, 79)} == {(64, 64)}
    again = tmp_path / "again"
    make_photographs(again)
    for file in again.rglob("*.jpg"):
        assert Image.open(file).tobytes() == Image.open(tmp_path / "a/photos" / file.relative_to(again)).tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "again"]


def test_digits_on_photographs_are_a_set_of_cocos_kind(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    make_digits(tmp_path / "digits")
    counts = [
        len(json.loads((tmp_path / f"digits/annotations/instances_{split}.json").read_text())["images"])
        for split in ("train", "val")
    ]
    assert counts == [16, 4] and [path.name for path in tmp_path.iterdir()] == ["digits"]
