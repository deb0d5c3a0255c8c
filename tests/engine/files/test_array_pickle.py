"""Weights in pickle form: the same bits as by Python's own unpickler, and nothing else."""

import pickle

import numpy as np
import pickles
import pytest
import torch
from limited_process import outcomes

from fbn_plugin.engine.files.array_pickle import read_pickled_weights


@pytest.fixture(autouse=True)
def in_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(data: bytes):
    with open("x.pkl", "wb") as file:
        file.write(data)
    return read_pickled_weights("x.pkl")


def assert_same(weights, content):
    assert weights.keys() == content.keys()
    for name, value in content.items():
        expected = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        assert weights[name].dtype == expected.dtype and weights[name].shape == expected.shape, name
        assert torch.equal(weights[name], expected), name
        assert weights[name].is_contiguous()


SOUND = pickles.sound()


@pytest.mark.parametrize("form", SOUND)
def test_every_protocol_and_form_has_the_same_bits(form):
    content = pickles.sound_content()
    result = read(SOUND[form])
    if form.startswith("zoo"):
        assert (result["__author__"], result["matching_heuristics"]) == ("torchvision", True)
    else:
        assert (result["__author__"], result["matching_heuristics"]) == ("Caffe2", True)
        del content["conv1_w_momentum"]
    assert_same(result["model"], content)
    result["model"]["conv1_w"].add_(1)  # the memory is the tensor's own


def test_strings_of_python_2():
    """As Python 2.7 writes them: its strings are bytes, its OrderedDict is made of pairs, its booleans are numbers."""
    value = np.array([1.5, -2.0, 3e38], "<f4")
    data = value.tobytes()
    function, ndarray = pickles.name("numpy.core.multiarray._reconstruct"), pickles.name("numpy.ndarray")
    array = function + ndarray + b"K\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
    array += b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U" + bytes([len(data)]) + data + b"tb"
    result = read(b"\x80\x02ccollections\nOrderedDict\n](](U\x07conv1_w" + array + b"ee\x85R.")
    assert_same(result["model"], {"conv1_w": value})

    quoted = repr(data)[1:].encode()  # Python 2's repr of the same bytes
    text = b"(dS'conv1_w'\n" + function + b"(" + ndarray + b"(I0\ntS'b'\ntR(I1\n(I3\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR"
    text += b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS" + quoted + b"\ntbs."
    assert_same(read(text)["model"], {"conv1_w": value})
    text = b"(dS'conv1_w'\ncnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
    text += b"(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    for code in range(256):
        quoted = repr(bytes([code]))[1:].encode()
        assert read(text + b"S" + quoted + b"\ntRs.")["model"]["conv1_w"] == code


def test_bytes_that_are_no_bools_are_true():
    data = b"\x80\x04}" + pickles.text("x") + pickles.array((3,), pickles.dtype("b1", "|"), b"\x00\x02\xff") + b"s."
    assert read(data)["model"]["x"].view(torch.uint8).tolist() == [0, 1, 1]


HARMFUL = pickles.harmful()


def read_and_look(data: bytes) -> None:
    try:
        read(data)
    finally:
        with pytest.raises(FileNotFoundError):
            open(pickles.CANARY).close()


def test_what_is_no_dictionary_of_arrays_is_refused_in_one_sentence():
    names = list(HARMFUL)
    ended = outcomes(read_and_look, [HARMFUL[name] for name in names], refusals=(ValueError,), seconds=10)
    faults = {name: each for name, each in zip(names, ended) if each.kind != "refused"}
    assert not faults
    for name, each in zip(names, ended):
        assert each.text.startswith("weights x.pkl cannot be read as a pickle of arrays: ") and len(each.text) < 300, (
            name
        )


def test_the_pickles_that_run_code_do_so_elsewhere(tmp_path):
    """Otherwise the test above would show nothing."""
    ran = 0
    for name, data in HARMFUL.items():
        if pickles.CANARY.encode() in data:
            pickle.loads(data)
            assert (tmp_path / pickles.CANARY).exists(), name
            (tmp_path / pickles.CANARY).unlink()
            ran += 1
    assert ran >= 6


@pytest.mark.parametrize(
    "content, sentence",
    [
        ({"conv1_w": 3}, "entry 'conv1_w' is a value of type int, not an array of numbers"),
        ([1], "it holds a value of type list, not a dictionary"),
        ({"x": np.zeros(2, complex)}, "it holds more than arrays of numbers (dtype is called"),
        ({1: np.zeros(2)}, "a dictionary has a value of type int for a name"),
        ({"x": print}, "it holds more than arrays ('builtins.print')"),
    ],
)
def test_the_sentence_says_what_is_wrong(content, sentence):
    with pytest.raises(ValueError) as error:
        read(pickle.dumps(content))
    assert sentence in str(error.value)


def test_a_file_that_is_cut_short_or_not_there():
    data = pickle.dumps(pickles.sound_content())
    with pytest.raises(ValueError, match=f"it is cut short, at byte {len(data) - 100}$"):
        read(data[:-100])
    with pytest.raises(FileNotFoundError, match=r"weights nowhere\.pkl are not there"):
        read_pickled_weights("nowhere.pkl")
