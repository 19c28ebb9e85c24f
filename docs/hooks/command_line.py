"""The reference of the command line, from the commands themselves."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from typing import TYPE_CHECKING
from unittest import mock

import typer
from typer.cli import get_docs_for_click

from capo.cli.main import app
from capo.cli.make import BENCHES

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the commands in."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """Every command with its arguments and options, as Markdown."""
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="capo")
    text = get_docs_for_click(obj=command, ctx=context, name="capo")
    body = text.split("\n", 1)[1]  # the page has a title
    benches = [f"### `capo bench {name}`\n\n```text\n{bench_help(name)}```\n" for name in BENCHES]
    return "\n".join([body.rstrip(), "", *benches])


def bench_help(name: str) -> str:
    """What ``capo bench NAME --help`` prints; benches parse their own options."""
    module = importlib.import_module(BENCHES[name])
    printed = io.StringIO()
    width = mock.patch.dict("os.environ", {"COLUMNS": "88"})
    called = mock.patch.object(sys, "argv", [f"capo bench {name}"])
    with width, called, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return printed.getvalue()
