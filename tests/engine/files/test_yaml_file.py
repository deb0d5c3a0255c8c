"""YAML of configs: what is read, and hostile files, each refused in one sentence, in bounded time and memory."""

import math
import os
import re
import time
from pathlib import Path

import pytest
import yaml
from limited_process import outcomes

from fbn_plugin.engine.files import yaml_file
from fbn_plugin.engine.files.yaml_file import read_yaml
from fbn_plugin.engine.torchvision.config import load_detection_config

ROOT = Path(__file__).parents[3]


def read_text(folder, text):
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


@pytest.mark.parametrize("parser", ["of libyaml", "of Python"])
def test_values(tmp_path, parser, monkeypatch):
    if parser == "of Python":  # where PyYAML was built without libyaml
        monkeypatch.setattr(yaml_file, "_PARSER", yaml.SafeLoader)
    text = """
    A: {int: 3, negative: -1_000, hex: 0x1F, float: 1.5, yaml: 1.0e-4, text: 1e-4, inf: -.inf}
    B: [yes, Off, ~, null, '', "5", NO way, 2020-01-01, !!timestamp 2020, =, <<]
    C:
      - [1, [2, !!str 3, !!int '4']]
      - !!python/tuple [a, b]
    huge: 99999999999999999999
    """
    assert read_text(tmp_path, text) == {
        "A": {"int": 3, "negative": -1000, "hex": 31, "float": 1.5, "yaml": 1e-4, "text": "1e-4", "inf": -math.inf},
        "B": [True, False, None, None, "", "5", "NO way", "2020-01-01", "2020", "=", "<<"],
        "C": [[1, [2, "3", 4]], ["a", "b"]],
        "huge": "99999999999999999999",
    }


def test_marks_at_the_beginning_and_tabs(tmp_path):
    assert read_text(tmp_path, b"\xef\xbb\xbfA:\t{B: \xc3\xa9}\t# \xf0\x9f\x99\x82\r\n") == {"A": {"B": "é"}}


def test_aliases_and_merged_keys(tmp_path):
    text = "A: &a {x: 1, y: 2}\nB: &b {x: 3, z: 3}\nC: {<<: [*a, *b], y: 4}\nD: {<<: *b}\nE: [*a, *a]\n"
    read = read_text(tmp_path, text)
    assert read["C"] == {"x": 1, "y": 4, "z": 3} and read["D"] == {"x": 3, "z": 3}
    assert read["E"] == [{"x": 1, "y": 2}] * 2


def test_bases_go_under(tmp_path):
    (tmp_path / "one.yaml").write_text("A: &a {x: 1, y: 1}\nB: *a\nL: [1, 2]\n")
    (tmp_path / "two.yaml").write_text("A: {y: 2, z: 2}\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "run.yaml").write_text("_BASE_: [../one.yaml, ../two.yaml]\nA: {z: 3}\nL: [3]\n")
    both = {"A": {"x": 1, "y": 2, "z": 3}, "B": {"x": 1, "y": 1}, "L": [3]}  # B is not A, though it was an alias
    assert read_yaml(tmp_path / "sub" / "run.yaml") == both
    (tmp_path / "again.yaml").write_text("_BASE_: sub/run.yaml\n")
    assert read_yaml(str(tmp_path / "again.yaml")) == both


def test_it_reads_what_yaml_reads():
    """All files of this project."""
    for path in sorted(ROOT.glob("configs/**/*.yaml")):
        plain = yaml.safe_load(path.read_text())
        base = plain.pop("_BASE_", None)
        if base is None:
            assert read_yaml(path) == plain
        else:
            assert read_yaml(path).keys() == plain.keys() | read_yaml(path.parent / base).keys()


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "must hold a YAML mapping"),
        ("# nothing\n", "must hold a YAML mapping"),
        ("word", "must hold a YAML mapping"),
        ("- 1", "must hold a YAML mapping"),
        ("A: 1\n---\nB: 2\n", "line 2 begins a second document"),
        ("A: {x: 1}\nB: 1\nA: {y: 2}\n", "line 3 has 'A' for the second time in one group"),
        ("A:\n  x: 1\n  x: 1\n", "line 3 has 'x' for the second time"),
        ("A: 1\n5: 2\n", "line 2 has 5 as a key, which must be text"),
        ("A: {no: 2}\n", "line 1 has False as a key"),
        ("? [a]\n: 2\n", "line 1 has ['a'] as a key"),
        ("~: 2\n", "line 1 has None as a key"),
        ("k" * 1000 + ": 2\n", "line 1 has a key of 1,000 characters"),
        ("A: 010\n", "line 1 has '010', which is no plain int"),
        ("A: 1:30\n", "line 1 has '1:30', which is no plain int"),
        ("A: 1:30.5\n", "line 1 has '1:30.5', which is no plain float"),
        ("A: !!int word\n", "line 1 has 'word', which is no plain int"),
        ("A: *b\n", "line 1 names *b, and there is no such anchor before it"),
        ("a: &a\n  b: *a\n", "line 2 has *a within what it stands for"),
        ("a: &a [1, [*a]]\n", "line 1 has *a within what it stands for"),
        ("a: &a {<<: *a}\n", "line 1 has *a within what it stands for"),
        ("a: {<<: 5}\n", "line 1 merges what is no mapping into one"),
        ("a: !!set {b}\n", "line 1 has the tag !!set: nothing in a config is executed; write the value itself"),
        ("a: !mine b\n", "line 1 has the tag !mine"),
        ("a: !!binary b\n", "line 1 has the tag !!binary"),
        ("a: %s\n", "not valid YAML"),
        ("a: 1\nb: [c: [1, 2\nd: 3", "while parsing a flow sequence, begun in line 2"),
        ("a:\n\tb: 1\n", "is not valid YAML: line 2: "),
        ("a: b\0c\n", "not valid YAML"),
        ("a: [1,\n}\n", "is not valid YAML: line 2: "),
        ("a: b".encode("utf-16"), "must be text in UTF-8"),
        (b"a: \xe9", "must be text in UTF-8"),
        ("_BASE_: 5", "_BASE_ must be a path, or a list of paths, got 5"),
        ("_BASE_:", "_BASE_ must be a path, or a list of paths, got None"),
        ("_BASE_: [[run.yaml]]", "_BASE_ must be a path, or a list of paths, got ['run.yaml']"),
        ('_BASE_: "a\\0b"', "_BASE_ must be a path"),
        ("_BASE_: {a: b}", "_BASE_ must be a path"),
        ("_BASE_: run.yaml", "includes itself through _BASE_"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml, which"),
        ("_BASE_: .", "it is a folder, a pipe or a device"),
        ("_BASE_: /dev/zero", "it is a folder, a pipe or a device"),
        ("_BASE_: http://127.0.0.1:9/a.yaml", "config file http://127.0.0.1:9/a.yaml must be a file on this machine"),
        ("_BASE_: base.yaml\nA: 1\n", "A is one value, and in its _BASE_ a group"),
        ("_BASE_: base.yaml\nA: {x: {y: 1}}\n", "A.x is a group, and in its _BASE_ one value"),
    ],
)
def test_what_is_refused(tmp_path, text, words):
    (tmp_path / "base.yaml").write_text("A: {x: 1}\n")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_text(tmp_path, text)
    sentence = str(error.value)
    assert words in sentence and "config file" in sentence and "\n" not in sentence and len(sentence) < 1000


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")  # opening it would wait for ever
    for path, words in ((tmp_path / "pipe.yaml", "pipe"), (tmp_path, "folder"), ("/dev/zero", "device")):
        with pytest.raises(ValueError, match=f"config file {path} must be a file; .*{words}"):
            read_yaml(path)
    with pytest.raises(ValueError, match="cannot be read: File name too long"):
        read_yaml("a" * 5000)
    with pytest.raises(ValueError, match="must be a file on this machine: nothing is fetched"):
        read_yaml("https://127.0.0.1:9/a.yaml")


# --- hostile files: under one second and 200 MiB ---------------------------------------------------------------------

CANARY = "canary"


def bomb(first: str, level: str, times: int = 9, levels: int = 9) -> str:
    """Each level has the one before it nine times."""
    lines = [f"a0: &a0 {first}"]
    for i in range(levels):
        lines.append(f"a{i + 1}: &a{i + 1} " + level.format(*[f"*a{i}"] * times))
    return "\n".join(lines)


HOSTILE = {
    "aliases of maps": bomb("{k: 1}", "{{" + ",".join(f"k{i}: {{}}" for i in range(9)) + "}}"),
    "aliases of lists": bomb("[x, y]", "[" + ",".join(["{}"] * 9) + "]"),
    "merged keys": bomb("{k: 1}", "{{<<: [" + ",".join(["{}"] * 9) + "]}}"),
    "a chain of aliases": bomb("{k: 1}", "{{k: {}}}", 1, 5000),
    "a long list of aliases": "a: &a [" + "x," * 9000 + "]\nb: [" + "*a," * 30000 + "]",
    "blocks by the thousand": "\n".join(" " * i + "a:" for i in range(1400)),
    "lists by the thousand": "a: " + "[" * 100_000,
    "maps by the thousand": "a: " + "{a: " * 100_000,
    "dashes by the thousand": "a:\n " + "- " * 100_000,
    "keys by the thousand": "? " * 100_000,
    "values without end": "a: [" + "1," * 400_000,
    "keys without end": "\n".join(f"k{i}: 1" for i in range(60_000)),
    "one long word": "a: " + "x" * 1_000_000,
    "one long number": "SOLVER: {BASE_LR: " + "9" * 900_000 + "}",
    "a number of 400 digits": "SOLVER: {BASE_LR: " + "9" * 400 + "}",
    "a whole number of 400 digits": "SEED: " + "9" * 400,
    "a long hexadecimal number": "SEED: 0x" + "f" * 900_000,
    "a number beyond all": "SOLVER: {BASE_LR: 1.0e+400}",
    "text for a number": "SEED: '" + "-" * 300_000 + "'",
    "nested text for a number": "SEED: '" + "[" * 300_000 + "'",
    "unary minus in text": "SEED: '" + "-" * 4000 + "1'",
    "comments": "# x\n" * 250_000,
    "too large": "#" * 2**21,
    "anchors": "\n".join(f"k{i}: &b{i} 1" for i in range(40_000)),
    "quotes": "a: " + '"' * 500_001,
    "white space": "a:" + " " * 1_000_000 + "[",
    "tag of Python": "a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [canary]]",
    "name of Python": "a: !!python/name:os.system",
    "module of Python": "a: !!python/module:antigravity",
    "new object of Python": "a: !!python/object/new:os.system ['touch canary']",
    "evaluated": "MODEL: {WEIGHTS: \"__import__('pathlib').Path('canary').touch()\"}\nSEED: ''",
}


def load_and_measure(path: str) -> str:
    """Load a config; more than one second of work is a fault."""
    os.chdir(Path(path).parent)
    start = time.process_time()
    try:
        load_detection_config(path)
    finally:
        took = time.process_time() - start
        assert took < 1, f"it took {took:.2f} s"
    return ""


def test_hostile_files(tmp_path):
    cases = []
    for i, text in enumerate(HOSTILE.values()):
        cases.append(str(tmp_path / f"{i}.yaml"))
        Path(cases[-1]).write_text(text)
    ended = outcomes(load_and_measure, cases, seconds=20, mebibytes=200)
    wrong = {name: each for name, each in zip(HOSTILE, ended) if each.kind != "refused" or len(each.text) > 1000}
    assert not wrong
    said = dict(zip(HOSTILE, (each.text for each in ended)))
    assert "line 5 goes beyond 20,000 values" in said["aliases of maps"] and "20,000" in said["merged keys"]
    for case in ("blocks", "lists", "maps", "dashes"):
        # newer versions of libyaml have a limit of their own
        assert re.search("nested more than 32 deep|maximum nesting depth", said[f"{case} by the thousand"])
    assert "SOLVER.BASE_LR must be of type finite float" in said["a number of 400 digits"]
    assert "SEED must be a whole number of at most 64 bits" in said["a whole number of 400 digits"]
    assert (
        "has the tag !!python/object/apply" in said["tag of Python"]
        and "write the value itself" in said["tag of Python"]
    )
    assert not (tmp_path / CANARY).exists()


def test_the_two_texts_of_detectron2s_zoo_are_known_as_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    tag = "!!python/object/apply:eval"
    path.write_text(
        f'A: {tag} ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"]\n'
        f'B: {tag} ["[int(x * 0.1 * 640) for x in range(5, 16)]"]\n'
    )
    read = read_yaml(path)
    assert read["A"] == [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    assert read["B"] == [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960]
    for text in ('["1"]', "[]", "[[1]]", '["1", "2"]', "[\"open('canary', 'w')\"]", "{a: 1}", "x"):
        path.write_text(f"A: {tag} {text}\n")
        with pytest.raises(
            ValueError, match=r"line 1 has the tag !!python/object/apply:eval: nothing in a config is exec"
        ):
            read_yaml(path)


def test_chains_of_bases_end(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: {i + 1}.yaml\n")
        (tmp_path / f"two{i}.yaml").write_text(f"_BASE_: [two{i + 1}.yaml, two{i + 1}.yaml]\n")
    (tmp_path / "200.yaml").write_text("A: {}")
    (tmp_path / "two30.yaml").write_text("A: {}")
    for name in ("0.yaml", "two0.yaml"):  # the second has a thousand million files
        with pytest.raises(ValueError, match="is one of more than 100 that are read by _BASE_"):
            read_yaml(tmp_path / name)
    assert read_yaml(tmp_path / "101.yaml") == {"A": {}}
