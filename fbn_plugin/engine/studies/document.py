"""A report as a list of blocks, written as Markdown or as one HTML page that needs no other file, light or dark as the
reader's screen is. The same blocks give the same bytes, whatever is installed."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template

from fbn_plugin.engine.files.words import on_one_line

__all__ = [
    "Block",
    "Code",
    "Heading",
    "Legend",
    "Link",
    "Mono",
    "Paragraph",
    "Picture",
    "Strong",
    "Table",
    "anchor",
    "html_page",
    "markdown",
]


@dataclass(frozen=True)
class Strong:
    """Text that stands out."""

    text: str


@dataclass(frozen=True)
class Mono:
    """A name, a key or a value as it is typed."""

    text: str


@dataclass(frozen=True)
class Link:
    """Text that leads to another page.

    Attributes:
        text: of the link.
        target: a file beside the page, or an address.
    """

    text: str
    target: str


Inline = str | Strong | Mono | Link


@dataclass(frozen=True)
class Heading:
    """A heading of rank 1 to 6."""

    rank: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Running text.

    Attributes:
        parts: in order, without spaces between them.
        kind: ``""``, ``"note"`` (in a lesser colour) or ``"warning"`` (in a frame).
    """

    parts: tuple[Inline, ...]
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """Cells, header first; the first column is of names, the others of figures unless they are named.

    Attributes:
        rows: as many cells in each; the header's are plain text.
        text_columns: numbers of columns of text, to be set left.
    """

    rows: list[list[Inline]]
    text_columns: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Code:
    """Lines as they are typed.

    Attributes:
        lines: shown as they are.
        summary: what they are; on the page the lines are folded away under it. "" for what needs none.
    """

    lines: list[str]
    summary: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture, as a file for Markdown and drawn into the page.

    Attributes:
        file: its name beside the Markdown.
        text: what it shows, for those who cannot see it.
        svg: for the page: elements ``<svg>``, set beside each other where there is room.
        least: pixels below which an element is not shrunk, but scrolled.
        widths: of each element, in pixels; it is not made much larger.
    """

    file: str
    text: str
    svg: tuple[str, ...]
    least: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Legend:
    """Names of lines with a piece of each, of the picture that follows; Markdown's pictures have their own.

    Attributes:
        entries: elements ``<svg>``.
    """

    entries: tuple[str, ...]


Block = Heading | Paragraph | Table | Code | Picture | Legend

# What Markdown would read as more than text; underscores within a word, and "<" before a space or a digit, it does not.
_SPECIAL = re.compile(r"([\\`*\[\]|#~$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<!\w)_|_(?!\w))")


def anchor(heading: str) -> str:
    """What a page of Markdown calls a heading, as GitHub and MyST make it.

    Examples::

        >>> anchor("P0.fig4: Moments, small ones (cpu scale, reduced)")
        'p0fig4-moments-small-ones-cpu-scale-reduced'
    """
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _markdown_text(part: Inline) -> str:
    text = on_one_line(part if isinstance(part, str) else part.text)
    if isinstance(part, Mono):
        fence = "``" if "`" in text else "`"
        pad = " " if "`" in text else ""
        return f"{fence}{pad}{text}{pad}{fence}".replace("|", r"\|")
    text = _SPECIAL.sub(r"\\\1", text)
    if isinstance(part, Link):
        return f"[{text}]({part.target})"
    return f"**{text}**" if isinstance(part, Strong) and text.strip() else text


def _markdown_table(table: Table) -> str:
    rows = [[_markdown_text(cell) for cell in row] for row in table.rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    left = [i in table.text_columns for i in range(len(widths))]
    lines = [
        "| " + " | ".join(cell.ljust(width) if at_left else cell.rjust(width) for cell, width, at_left in cells) + " |"
        for cells in (zip(row, widths, left) for row in rows)
    ]
    rule = ("-" * (width + 2) if at_left else "-" * (width + 1) + ":" for width, at_left in zip(widths, left))
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as a page of Markdown."""
    parts = []
    for block in blocks:
        if isinstance(block, Heading):
            parts.append("#" * block.rank + " " + _markdown_text(block.text))
        elif isinstance(block, Paragraph):
            parts.append("".join(map(_markdown_text, block.parts)))
        elif isinstance(block, Table):
            parts.append(_markdown_table(block))
        elif isinstance(block, Code):
            parts += [_markdown_text(block.summary) + ":"] if block.summary else []
            parts.append("\n".join(["```", *map(on_one_line, block.lines), "```"]))
        elif isinstance(block, Picture):
            parts.append(f"![{_markdown_text(block.text)}]({block.file})")
    return "\n\n".join(parts) + "\n"


def _html_text(part: Inline) -> str:
    text = html.escape(on_one_line(part if isinstance(part, str) else part.text))
    if isinstance(part, Strong):
        return f"<strong>{text}</strong>"
    if isinstance(part, Link):
        return f'<a href="{html.escape(part.target)}">{text}</a>'
    return f"<code>{text}</code>" if isinstance(part, Mono) else text


def _html_table(table: Table) -> str:
    def line(cells: Sequence[Inline], tag: str) -> str:
        kinds = [' class="text"' if i in table.text_columns else "" for i in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{_html_text(cell)}</{tag}>" for cell, kind in zip(cells, kinds)) + "</tr>"
        )

    header, *rows = table.rows
    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead>{line(header, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.rank}>{_html_text(block.text)}</h{block.rank}>"
    if isinstance(block, Paragraph):
        kind = f' class="{block.kind}"' if block.kind else ""
        return f"<p{kind}>{''.join(map(_html_text, block.parts))}</p>"
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, Code):
        text = f"<pre>{html.escape(chr(10).join(map(on_one_line, block.lines)))}</pre>"
        return f"<details><summary>{_html_text(block.summary)}</summary>{text}</details>" if block.summary else text
    if isinstance(block, Legend):
        return f'<div class="legend">{"".join(block.entries)}</div>'
    panels = "\n".join(
        f'<div class="panel" style="--most: {1.2 * width:.0f}px">{svg}</div>'
        for svg, width in zip(block.svg, block.widths)
    )
    label, least = html.escape(block.text), f"--least: {block.least}px"
    return f'<div class="panels" style="{least}" role="group" aria-label="{label}">\n{panels}\n</div>'


def html_page(title: str, blocks: Sequence[Block], style: str = "") -> str:
    """The blocks as a page that loads nothing.

    Args:
        title: of the window.
        blocks: the page.
        style: rules of CSS for what the pictures hold.
    """
    body = "\n".join(map(_html_block, blocks))
    return _PAGE.substitute(title=_html_text(title), style=style, body=body)


# The look of engine/reports/report.py, for two schemes of colour.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>$title</title><style>
:root { --ink: #222; --soft: #555; --line: #ddd; --paper: #fff; --shade: #f5f5f5; --warn: #8a5300;
        --warn-shade: #fff6e5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a8a8a8; --line: #3a3d42; --paper: #16181c; --shade: #22252a; --warn: #ffc766;
          --warn-shade: #2e2715; }
}
$style
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: var(--ink);
       background: var(--paper); overflow-wrap: break-word; }
h1, h2, h3, h4 { line-height: 1.25; }
h2 { margin-top: 2em; border-bottom: 1px solid var(--line); padding-bottom: .2em; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .35em .65em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; } th.text, td.text { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--paper); }
pre { background: var(--shade); padding: 1em; overflow-x: auto; font-size: 13px; } code { font-size: .9em; }
details { margin: 1em 0; } summary { cursor: pointer; }
.note { color: var(--soft); font-size: 14px; }
.warning { background: var(--warn-shade); border-left: 4px solid var(--warn); padding: .6em 1em; }
.panels { display: grid; gap: 1em; margin: 1em 0; }
.panels { grid-template-columns: repeat(auto-fill, minmax(min(var(--least), 100%), 1fr)); }
.panel { overflow-x: auto; max-width: var(--most); }
.panel > svg { display: block; width: 100%; min-width: var(--least); height: auto; }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin-top: 1em; }
@media print { .panel, table { break-inside: avoid; } }
</style></head><body>
$body
</body></html>
""")
