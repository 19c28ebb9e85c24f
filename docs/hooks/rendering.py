"""What a page's HTML needs: formulas as MathML, roles of docstrings as plain names, links to names.

MathML needs no script and no font file: the browser sets the formulas by itself.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

from latex2mathml.converter import convert

import capo

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>',
    flags=re.DOTALL,
)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code>)")
_NAME = re.compile(r"(?<![>/\"])<code>~?(?P<name>[A-Za-z_][\w.]*)(?:\(\))?</code>(?!</a>)")
_HEADING = re.compile(r"(<h\d[^>]*>.*?</h\d>)", flags=re.DOTALL)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn what Markdown left over into HTML."""
    content = _FORMULA.sub(_mathml, content)
    content = _ROLE.sub("", content)
    parts = _HEADING.split(content)  # no links in headings
    return "".join(
        part if index % 2 else _NAME.sub(_linked, part) for index, part in enumerate(parts)
    )


def _mathml(match: re.Match[str]) -> str:
    inline = match["inline"] is not None
    latex = html.unescape(match["inline"] if inline else match["block"]).strip()
    return convert(latex, display="inline" if inline else "block")


def _linked(match: re.Match[str]) -> str:
    name = match["name"]
    if name in capo.__all__:
        name = f"capo.{name}"
    if not name.startswith("capo."):
        return match[0]
    # Optional: a name that has no entry in the reference stays as it is.
    return f'<autoref optional identifier="{name}">{match[0]}</autoref>'
