import os
import time

import pytest
from limited_process import assert_sound, outcomes


def play(case: str) -> str:
    match case:
        case "sound":
            return "weights"
        case "refuse":
            raise ValueError("the value must be 1, got 2")
        case "lines":
            raise ValueError("one line\nand another")
        case "bug":
            raise KeyError("x")
        case "crash":
            os.abort()
        case "hang":
            time.sleep(60)
        case "memory":
            return len(bytearray(10**9))


@pytest.mark.parametrize("last", ["sound", "hang"])
def test_every_way_to_end_is_told_from_the_others(last):
    cases = ["sound", "refuse", "lines", "bug", "crash", "sound", "memory", last]
    ended = outcomes(play, cases, seconds=5)
    kinds = [each.kind for each in ended]
    assert kinds[:7] == ["done", "refused", "traceback", "traceback", "signal", "done", "traceback"]
    assert kinds[7] == ("time" if last == "hang" else "done")
    assert ended[0].text == "weights" and ended[1].text == "the value must be 1, got 2"
    assert "KeyError" in ended[3].text and "SIGABRT" in ended[4].text and "MemoryError" in ended[6].text


def test_faults_are_named_with_their_cases():
    cases = ["sound", "bug", "refuse"]
    ended = outcomes(play, cases)
    with pytest.raises(AssertionError, match="1 of 3 cases:\n'bug'\n  traceback: (.|\n)*KeyError"):
        assert_sound(ended, cases)
    assert_sound(ended[::2], cases[::2])
