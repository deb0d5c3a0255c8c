"""One of a thing and several of it."""

from fbn_plugin.engine.run.words import counted


def test_nouns_follow_their_number():
    assert [counted(n, "process") for n in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]
    assert [counted(n, "training image") for n in (1, 1437)] == ["1 training image", "1,437 training images"]
    assert counted(3, "entry") == "3 entries"
