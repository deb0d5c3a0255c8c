"""Files of ``torch.save``'s that ``torch.load`` would believe; mutated ones are in tests/sweeps."""

import argparse
import io
import zipfile

import pytest
import torch

from fbn_plugin.engine.files.tensor_file import check_pickles, check_tensors


def content():
    return {
        "model": {"half": torch.ones(2).half(), "view": torch.arange(9)[2:5], "none": torch.zeros(0, 3)},
        "more": [torch.ones(2, dtype=each) for each in (torch.bool, torch.bfloat16, torch.cfloat, torch.int16)],
        "arguments": argparse.Namespace(a=(1, (2, 3))),
        "sizes": (torch.Size([1, 2]), torch.float32, torch.device("cpu"), {1, 2}, 2**70, b"x", -1.5, None),
    }


@pytest.mark.parametrize("old", [False, True])
def test_what_pytorch_writes_is_sound(tmp_path, old):
    data = content()
    if not old:  # PyTorch writes, but cannot read, these in its old form
        data["new"] = [torch.ones(3).to(torch.uint16), torch.ones(3).to(torch.float8_e4m3fn)]
    torch.save(data, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    check_pickles(tmp_path / "x.pth")
    check_tensors(torch.load(tmp_path / "x.pth", weights_only=False))


def changed(path, old: bytes, new: bytes) -> None:
    """A file of `torch.save`'s, its pickle changed and its checksums right."""
    file = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, file)
    with zipfile.ZipFile(file) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            assert not name.endswith("data.pkl") or old in data
            target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


@pytest.mark.parametrize(
    "old, new, sentence",
    [
        (b"K\x04tq", b"M\xff\xfftq", "tensor data '0' has 16 bytes, not 262140"),
        (b"FloatStorage", b"DoubleStorage", "tensor data '0' has 16 bytes, not 32"),
        (b"FloatStorage", b"QInt8Storage", "a tensor of a type that weights do not have"),
        (b"X\x01\0\0\x000", b"X\x01\0\0\x007", "tensor data '7' has None bytes, not 16"),
        (b"}q\x00X", b"}q\x00" + b")" + b"\x85" * 30 + b"Ns" + b"X", "it has tuples in tuples"),
        (b"}q\x00X", b"}q\x00" + b"\x82\x01" + b"Ns" + b"X", "instruction EXT1 is number 4"),
        (b"}q\x00X", b"}q\x00" + b"tX", "takes values where there are none"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, old, new, sentence):
    changed(tmp_path / "x.pth", old, new)
    with pytest.raises(ValueError) as error:
        check_pickles(tmp_path / "x.pth")
    assert sentence in str(error.value)


def test_old_form_longer_than_the_file(tmp_path):
    file = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    assert b"K\x04N" in data
    (tmp_path / "x.pth").write_bytes(data.replace(b"K\x04N", b"J\xff\xff\xff\x7fN"))
    with pytest.raises(ValueError, match="its tensors are longer than the file"):
        check_pickles(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, 2).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)]
)
def test_tensors_that_are_not_dense(tensor):
    with pytest.raises(ValueError, match="a tensor that is not dense"):
        check_tensors({"model": [{"w": (tensor,)}]})


def test_a_sparse_tensor_is_refused_before_pytorch_warns_of_it(tmp_path):
    torch.save({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="a tensor that is not dense"):
        check_pickles(tmp_path / "x.pth")
