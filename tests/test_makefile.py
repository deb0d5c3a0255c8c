"""``make check`` is a selection of the tests that leaves no room out."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_check_touches_every_room():
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    checked = [ROOT / name for name in re.search(r"^CHECKED := (.+)", text, re.MULTILINE)[1].split()]
    assert all(path.exists() for path in checked)
    rooms = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert not {room for room in rooms if not any(path == room or path.parent == room for path in checked)}
