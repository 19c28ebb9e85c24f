"""The code blocks of README.md and docs/, found and executed.

``python`` runs, all blocks of a page in one namespace (with the invisible ones in HTML comments).
``sh``: every command is held against the real one: its options are parsed, its presets and overrides
loaded, its files looked for; what is cheap runs. ``toml`` is checked as a run's configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import tomllib
from collections.abc import Iterable
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from typer.testing import CliRunner

from capo.cli.main import app
from capo.cli.make import BENCHES
from capo.lab.config import Config
from capo.lab.figures import figure_named
from capo.lab.sources import load_config, preset_names
from capo.lab.suites import load_suite, suite_names
from capo.lab.sweep.grid import parse_grid

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Text is output: it stands beside a command. A diff is of a TRL script (test_trl_diff.py) or of a verl job,
# which tests/verl_engine has verl read.
LANGUAGES = {"python", "sh", "toml", "json", "text", "diff"}
OTHERS = {"accelerate", "torchrun", "tensorboard", "git", "cd", "export", "source", "."}
CHEAP = {"presets", "doctor"}
INSTALLS = {
    "--install-completion",
    "--show-completion",
}  # into the shell that asks; see test_completion
CHEAP_PROBLEMS = 64  # of `capo eval`

_FENCE = re.compile(r"^ *(?:```+|~~~+) *(\S*)", re.MULTILINE)


class _Parsed(Exception):  # noqa: N818 - nothing is wrong
    """An argparse parser was content."""


def languages(text: str) -> list[str]:
    """The language of every fenced block; ``""`` where none is named."""
    return _FENCE.findall(text)[::2]


def commands(block: str) -> Iterable[list[str]]:
    """The commands of a shell block, split into words, comments and prompts dropped."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Hold one command against what there is.

    Raises:
        AssertionError: there is no such command, option, preset, key, target, extra or file.
    """
    match words:
        case ["capo", *arguments]:
            check_capo(arguments)
        case ["make", *targets]:
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {t for t in targets if "=" not in t} <= set(rules), f"make {targets}"
        case ["python", "-m", module, *arguments]:
            check_typer_module(module, arguments)
        case ["python", script, *_]:
            assert (ROOT / script).is_file() or script == "train.py", f"{script} is not there"
        case ["pip", "install", *requirements]:
            for requirement in requirements:
                check_requirement(requirement)
        case [script, *_] if "/" in script:
            assert (ROOT / script).is_file(), f"{script} is not there"
        case [program, *_]:
            assert program in OTHERS, f"{' '.join(words)}: teach doc_blocks.py to check {program}"


def check_capo(arguments: list[str]) -> None:
    """Parse a ``capo`` command as the real one does; run it where that is cheap."""
    group = typer.main.get_command(app)
    if arguments and arguments[0].startswith("-"):
        known = {option for param in group.params for option in param.opts}
        assert set(arguments) <= known | {"--help"}, arguments
        if arguments[0] not in INSTALLS:
            run_capo(arguments)
        return
    name, *rest = arguments
    command = group.commands.get(name)  # type: ignore[attr-defined]
    assert command is not None, f"there is no `capo {name}`"
    while hasattr(command, "commands"):  # a group of commands
        inner, *rest = rest
        assert inner in command.commands, f"there is no `capo {name} {inner}`"
        name, command = f"{name} {inner}", command.commands[inner]
    with typer.Context(group, info_name="capo") as parent:
        try:
            context = command.make_context(name, list(rest), parent=parent)
        except Exception as error:
            raise AssertionError(f"capo {' '.join(arguments)}: {error}") from error
    check_values(name, context.params, list(context.args), arguments)


def check_values(name: str, params: dict[str, Any], extra: list[str], given: list[str]) -> None:
    """What a command's own parser does not look at: presets, keys, suites, benches."""
    if name == "train" and params["config"] is not None:
        source = params["config"]
        known = source in preset_names() or (ROOT / source).is_file()
        assert known or source.endswith(".toml"), f"{source!r} is no preset and no file"
        load_config(
            str(ROOT / source) if (ROOT / source).is_file() else source if known else "small-capo",
            params["overrides"] or [],
        )
    elif name == "lab reproduce":
        assert params["figure"] == "all" or figure_named(params["figure"])
    elif name == "bench":
        check_bench(params["what"], extra)
    elif name == "eval" and params["suite"] is not None:
        known = params["suite"] in suite_names()
        assert known or params["suite"].endswith(".toml"), params["suite"]
        if params["suite"] == "embedded":
            assert load_suite("embedded")
    cheap = name in CHEAP or (
        name == "eval"
        and params["model"].startswith("embedded:")
        and (params["problems"] or 512) * (params["k"] or 1) <= CHEAP_PROBLEMS
    )
    if cheap:
        run_capo(given)


def check_bench(name: str, arguments: list[str]) -> None:
    """Benches parse their options with argparse: stop them there."""
    assert name in BENCHES, f"there is no `capo bench {name}`"
    parse = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parse(self, *args, **kwargs)
        raise _Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parsed):
        try:
            import_module(BENCHES[name]).main(arguments)
        except _Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"capo bench {name} {arguments}") from error
    raise AssertionError(f"capo bench {name} did not parse its options")


def check_typer_module(module: str, arguments: list[str]) -> None:
    """``python -m MODULE``: its ``main`` is a typer command."""
    single = typer.Typer(add_completion=False)
    single.command()(import_module(module).main)
    try:
        typer.main.get_command(single).make_context(module, list(arguments))
    except Exception as error:
        raise AssertionError(f"python -m {module} {arguments}: {error}") from error


def check_requirement(requirement: str) -> None:
    """Extras that are named must exist."""
    if requirement.startswith("-"):
        return
    name, _, extras = requirement.partition("[")
    if name not in {"capo-rl", "."}:
        assert re.fullmatch(r"[\w.=<>-]+", requirement), requirement
        return
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in filter(None, extras.rstrip("]").split(",")):
        assert extra in declared["optional-dependencies"], f"there is no extra {extra!r}"
    assert metadata.version("capo-rl")


def run_capo(arguments: list[str]) -> None:
    """Run the command in this process; one that stands on several pages is run once."""
    _run(tuple(arguments))


@cache
def _run(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"capo {' '.join(arguments)}: {result.output}"


def _shell(example: Example) -> None:
    for words in commands(example.parsed):
        check_command(words)


def _toml(example: Example) -> None:
    document = tomllib.loads(example.parsed)
    if "preset" in document:
        assert parse_grid(example.parsed).points()
    elif set(document) <= {"extends", *Config.model_fields}:
        path = Path("block.toml")
        path.write_text(example.parsed)
        load_config(path)


def _json(example: Example) -> None:
    json.loads(example.parsed)


def parsed(page: Path) -> Document:
    """A page with its blocks."""
    parsers = [
        PythonCodeBlockParser(),
        CodeBlockParser(language="sh", evaluator=_shell),
        CodeBlockParser(language="toml", evaluator=_toml),
        CodeBlockParser(language="json", evaluator=_json),
        SkipParser(),
    ]
    return Document.parse(os.fspath(page), *parsers)
