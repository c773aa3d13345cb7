"""The Markdown that reports are written in, as HTML: headings, paragraphs, lists, tables, code, bold, images.

Everything else is text: no HTML, no link and no reference passes, so a trial id or a message cannot become markup.
Tables scroll by themselves; a block of code folds away.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape

# (file name, caption) of an image to HTML.
Image = Callable[[str, str], str]

FENCE = re.compile(r"^```\w*\n(.*?)\n?^```$", re.M | re.S)
HEADING = re.compile(r"(#{1,4}) (.*)")
IMAGE = re.compile(r"!\[(.*)\]\(([\w.-]+)\)")
BULLET = re.compile(r"[*-] ")
# Code before bold: what is code stays as it is.
INLINE = re.compile(r"`([^`]+)`|\*\*(.+?)\*\*")
# Ends a cell; an escaped one is text.
BAR = re.compile(r"(?<!\\)\|")
FIGURE = re.compile(r"([<>] |beyond )?[+−-]?\d[\d,.]*(( ?[±%x†]| of ).*)?|\[.*\]|–")
# A cell with more letters than this is a sentence, whose column must not become a pillar of words.
LONG_CELL = 24


def to_html(markdown: str, image: Image) -> str:
    """HTML of a report's Markdown; `image` gives that of an image by its file name and caption."""
    parts = FENCE.split(markdown)
    pieces = []
    for number, part in enumerate(parts):
        if number % 2:
            pieces.append(f"<details><summary>show</summary><pre><code>{escape(part)}\n</code></pre></details>")
        else:
            pieces += [_block(block, image) for block in re.split(r"\n\s*\n", part) if block.strip()]
    return "\n".join(pieces)


def inline(text: str) -> str:
    """Text with its code and bold; everything else escaped."""
    pieces, end = [], 0
    for match in INLINE.finditer(text):
        code, bold = match.groups()
        pieces.append(escape(text[end : match.start()]))
        pieces.append(f"<code>{escape(code)}</code>" if code else f"<strong>{inline(bold)}</strong>")
        end = match.end()
    return "".join(pieces) + escape(text[end:])


def _block(block: str, image: Image) -> str:
    """One block between blank lines; a list may follow its paragraph without one."""
    lines = block.strip("\n").splitlines()
    if heading := HEADING.fullmatch(lines[0]):
        level = len(heading[1])
        rest = "\n".join(lines[1:])
        return f"<h{level}>{inline(heading[2])}</h{level}>" + (_block(rest, image) if rest else "")
    if picture := IMAGE.fullmatch(block.strip()):
        return image(picture[2], picture[1])
    if len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"[|:\s-]+", lines[1]):
        return _table(lines)
    first = next((number for number, line in enumerate(lines) if BULLET.match(line)), len(lines))
    text = " ".join(line.strip() for line in lines[:first])
    return (f"<p>{inline(text)}</p>" if text else "") + (_list(lines[first:]) if first < len(lines) else "")


def _list(lines: list[str]) -> str:
    """Items; a line without a bullet goes on with the item before it."""
    items: list[str] = []
    for line in lines:
        if BULLET.match(line):
            items.append(line[2:].strip())
        else:
            items[-1] += " " + line.strip()
    return "<ul>" + "".join(f"<li>{inline(item)}</li>" for item in items) + "</ul>"


def _table(lines: list[str]) -> str:
    """A table in a box that scrolls by itself, also with the keyboard; a column of figures stands right.

    The first column names the rows. Without a head it is a list of facts, and nothing stands right.
    """
    head, body = _cells(lines[0]), [_cells(line) for line in lines[2:]]
    kinds = [_kind(column) if any(head) else "" for column in zip(*body, strict=False)]
    kinds += [""] * max(len(row) - len(kinds) for row in (head, *body))
    top = "".join(f'<th scope="col"{kind}>{inline(cell)}</th>' for kind, cell in zip(kinds, head, strict=False))
    rows = "".join(
        f'<tr><th scope="row">{inline(first)}</th>'
        + "".join(f"<td{kind}>{inline(cell)}</td>" for kind, cell in zip(kinds[1:], rest, strict=False))
        + "</tr>"
        for first, *rest in body
    )
    words = ", ".join(cell for cell in head if cell) or "facts"
    thead = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {escape(words)}">'
        f"<table>{thead}<tbody>{rows}</tbody></table></div>"
    )


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace(r"\|", "|") for cell in BAR.split(inner)]


def _kind(column: tuple[str, ...]) -> str:
    """The class of a column, as an attribute: mostly figures, or some sentence."""
    if 2 * sum(FIGURE.fullmatch(cell) is not None for cell in column) > len(column):
        return ' class="figure"'
    return ' class="words"' if max(len(cell) for cell in column) > LONG_CELL else ""
