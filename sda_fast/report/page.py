"""A page as a list of parts, rendered to Markdown and to one self-contained HTML file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sda_fast.report.tables import Table


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Paragraph:
    text: str
    emphasized: bool = False


@dataclass
class Picture:
    path: Path
    caption: str


Part = Heading | Paragraph | Picture | Table

STYLE = """
body { font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; color: #1d2127; background: #fff;
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.9rem; line-height: 1.2; } h2 { font-size: 1.3rem; margin-top: 2.6rem; }
.notice { border-left: 4px solid #0072b2; background: #eef5fa; padding: .6rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: 1rem 0; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid #dfe3e8; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid #9aa3ad; } .number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555e68; font-size: .92rem; }
"""


def to_markdown(parts: Sequence[Part], folder: Path) -> str:
    """Markdown whose pictures are linked relative to `folder`."""
    blocks = []
    for part in parts:
        if isinstance(part, Heading):
            blocks.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Paragraph):
            blocks.append(f"> **{part.text}**" if part.emphasized else part.text)
        elif isinstance(part, Picture):
            blocks.append(f"![{part.caption}]({part.path.relative_to(folder).as_posix()})\n\n*{part.caption}*")
        else:
            blocks.append(part.markdown())
    return "\n\n".join(blocks) + "\n"


def to_html(parts: Sequence[Part], title: str) -> str:
    """One HTML file with its style and its pictures inside."""
    body = "\n".join(_html_of(part) for part in parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_of(part: Part) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
    if isinstance(part, Paragraph):
        opening = '<p class="notice"><strong>' if part.emphasized else "<p>"
        return opening + html.escape(part.text) + ("</strong></p>" if part.emphasized else "</p>")
    if isinstance(part, Picture):
        caption = html.escape(part.caption)
        data = base64.b64encode(part.path.read_bytes()).decode("ascii")
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    return _html_table(part)


def _html_table(table: Table) -> str:
    def cell(tag: str, text: str, column: int, bold: bool = False) -> str:
        content = f"<strong>{html.escape(text)}</strong>" if bold else html.escape(text)
        number = ' class="number"' if column >= table.names else ""
        return f"<{tag}{number}>{content}</{tag}>"

    header = "".join(cell("th", text, column) for column, text in enumerate(table.header))
    rows = "\n".join(
        "<tr>" + "".join(cell("td", text, c, (r, c) in table.bold) for c, text in enumerate(cells)) + "</tr>"
        for r, cells in enumerate(table.rows)
    )
    return f'<div class="wide"><table>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'
