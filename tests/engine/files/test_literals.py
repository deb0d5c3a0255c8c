"""Values of a command line: as yacs reads them, and hostile text, which stays text or is never parsed."""

import math
import time
import warnings

import pytest
from fvcore.common.config import CfgNode
from limited_process import assert_sound, outcomes

from fbn_plugin.engine.files.literals import literal


@pytest.mark.parametrize(
    "text",
    [
        *("3", "-3", "+3", " 3", "1e-3", ".5", "1_000", "0x1F", "True", "None", "Nonesuch", "'3'", 'b"3"', "u'a'"),
        *("(3, 4)", "[1, [2, 3]]", "((8, 16), [32])", "{'a': 1}", "()", "(1)", "'a' 'b'", "[(1,), None]"),
        *("FBN(t_sigma=4.0)", "", "a/b:train", "/tmp/x", "./output", "~/x", "2007/x", "1,2", "1-2", "-x", "(a)"),
        *("0010", "1:30", "..", "é", "no", "nan", "1e999", "'a", "[", "1\0", "\\d", "'\\d'", "1if 2else 3", "- 3"),
    ],
)
def test_as_yacs_reads_it(text):
    with warnings.catch_warnings(record=True) as said:
        value = literal(text)
    assert not said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = CfgNode._decode_cfg_value(text) if text != 'b"3"' else text
    assert value == expected and type(value) in (type(expected), dict)


@pytest.mark.parametrize("text", ["1j", "1+1j", "b'a'", "[b'a']", "{1, 2}", "...", "18446744073709551616", "9" * 400])
def test_what_no_config_holds_stays_text(text):
    assert literal(text) == text
    assert literal(f"[{text}]") == f"[{text}]"


def test_limits():
    assert literal("18446744073709551615") == 2**64 - 1
    assert literal("1e400") == math.inf
    assert literal("(" + "1," * 15_000 + ")") == (1,) * 15_000
    assert isinstance(literal("(" + "1," * 20_000 + ")"), str)


HOSTILE = [
    *("-" * 4000 + "1", "-" * 30_000, "[" * 100, "[" * 32_000, "(" * 180 + "-" * 900 + "1", "{" * 199, "{1:" * 99),
    *("9" * 5000, "9" * 32_000, "0x" + "f" * 32_000, "2**9999", "1" + "+1" * 16_000, "1" + "-1j" * 9000, "[]" * 16_000),
    *("1," * 16_000, "'" + "\\N{BULLET}" * 3000 + "'", "1" + "\0" * 9, "'\ud800'", "-" * 10**6, "[1," * 10**6),
    *("(lambda: 0)()", "[exit()]", "__import__('os').abort()", "[x for x in (1,) * 10**9]", "'a' * 10**10"),
]


def parse_and_measure(text: str) -> str:
    start = time.process_time()
    value = literal(text)
    assert time.process_time() - start < 0.5
    return type(value).__name__


def test_hostile_text():
    ended = outcomes(parse_and_measure, HOSTILE, seconds=20, mebibytes=200)
    assert_sound(ended, HOSTILE)
    assert all(each.text in ("str", "tuple") for each in ended)
