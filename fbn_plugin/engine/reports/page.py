"""The parts of a report: one HTML file that needs no other, its tables, and its pictures, which stand beside it too."""

import base64
import html
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from fbn_plugin.engine.files.disk import atomic_write
from fbn_plugin.engine.run.run_info import hardware

__all__ = [
    "heading",
    "listing",
    "machine",
    "note",
    "paragraph",
    "picture",
    "table",
    "write_page",
]

_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
th, td {{ padding: .35em .9em; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} pre {{ background: #f5f5f5; padding: 1em; overflow-x: auto; font-size: 13px; }}
.note {{ color: #555; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def heading(text: str) -> str:
    """A heading."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def note(text: str) -> str:
    """A paragraph in grey."""
    return f'<p class="note">{html.escape(text)}</p>'


def listing(text: str) -> str:
    """Lines as they are, such as commands."""
    return f"<pre>{html.escape(text)}</pre>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, header first."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    header, *body = rows
    return "\n".join(["<table>", line(header, "th"), *(line(row, "td") for row in body), "</table>"])


def picture(page: Path, name: str, png: bytes, text: str) -> str:
    """A picture in the page, written beside it too.

    Args:
        page: the HTML file.
        name: of the picture's file.
        png: the picture.
        text: what it shows, for who cannot see it.
    """
    atomic_write(Path(page).with_name(name), png)
    return f'<p><img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def machine() -> str:
    """What a page was made on."""
    return f"{hardware()}; torch {torch.__version__}, Python {platform.python_version()}"


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """Write a page of these parts in one step."""
    atomic_write(path, _PAGE.format(title=html.escape(title), body="\n".join(body)).encode())
