"""JSON files that users give: what is none is refused in one sentence, with or without a byte-order mark it is read."""

import os
import time

import pytest

from fbn_plugin.engine.files.json_files import has_mark, read_json
from fbn_plugin.engine.files.words import shown


def test_with_and_without_a_mark(tmp_path):
    path = tmp_path / "file.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + '{"ä": [1, 2.5, null, NaN, 1e400]}'.encode())
        content = read_json(path)
        assert content["ä"][:3] == [1, 2.5, None] and content["ä"][3] != content["ä"][3]
        assert has_mark(path) == bool(mark)


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", "perhaps cut short: Expecting value"),
        (b'{"a": 1', "perhaps cut short"),
        (b"{} {}", "perhaps cut short: Extra data"),
        (b"\xff\xfe{\0}\0", "it is text in UTF-16"),
        (b"\xfe\xff\0{\0}", "it is text in UTF-16"),
        (b"\xff\xfe\0\0{\0\0\0", "it is text in UTF-32"),
        (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 10_000 + b"]", "Exceeds the limit (4300 digits)"),
        (b'{"a": 1, "a": 1}', "an object has the key 'a' twice"),
        (b'[{"id": 3, "x": {}, "x": {}}]', "an object of id 3 has the key 'x' twice"),
        (b"\x80\x04K\x01.", "byte 0 is not UTF-8"),
    ],
)
def test_what_is_no_json(tmp_path, text, words):
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(ValueError) as error:
        read_json(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} is not valid JSON") and words in sentence and "\n" not in sentence
    assert len(sentence) < len(str(path)) + 200


def test_a_key_twice_among_many_is_found_at_once(tmp_path):
    path = tmp_path / "file.json"
    names = [*map(str, range(200_000)), "199999"]
    path.write_text("{" + ", ".join(f'"{name}": 0' for name in names) + "}")
    start = time.monotonic()
    with pytest.raises(ValueError, match="has the key '199999' twice"):
        read_json(path)
    assert time.monotonic() - start < 20  # in steps that grow with the square, an hour


def test_a_bound_of_its_size(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("[]")
    assert read_json(path, 2) == []
    with pytest.raises(ValueError, match="is 2 bytes large, and must be at most 1"):
        read_json(path, 1)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match=f"{path} is not a file"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nowhere.json")


def test_values_in_sentences():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert shown("a\nb") == r"'a\nb'"
    assert shown(["x" * 300]).endswith("...] (304 characters)") and len(shown("x" * 10**6)) < 200
    assert shown(deep) == "a list that is nested too deeply"
    assert shown(10**5000) == "a number of too many digits"
    while deep:  # its end, too, would be one call within another
        deep = deep.pop()
