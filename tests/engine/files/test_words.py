"""One of a thing and several of it."""

from fbn_plugin.engine.files.words import counted, shown


def test_nouns_follow_their_number():
    assert [counted(n, "process") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
    assert [counted(n, "training image") for n in (1, 1437)] == ["1 training image", "1,437 training images"]
    assert counted(3, "entry") == "3 entries"


def test_values_are_shown_on_one_short_line():
    assert shown("a\nb") == r"'a\nb'" and shown([1, None]) == "[1, None]"
    assert shown("x" * 1000, 20) == "'xxxxxxxxx...' (1,002 characters)"
    assert shown(list(range(100)), 20) == "[0, 1, 2, ...] (390 characters)"
    assert len(shown("\0" * 10_000)) < 150
