"""A page for every directory of results/: its README, its figures, its numbers as tables."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

PUBLISHED = {".png", ".svg", ".csv", ".json", ".toml"}  # beside the pages
MOST_ROWS = 40
MOST_COLUMNS = 14


def directory_page(directory: Path) -> str:
    """The README of a directory of results, then what else is there.

    Numbers come from the JSON files: every list of flat records is a table.
    """
    readme = directory / "README.md"
    parts = [readme.read_text() if readme.is_file() else f"# {_words(directory.name)}\n"]
    if not readme.is_file():
        parts += [f"![{path.stem}]({path.name})\n" for path in sorted(directory.glob("*.png"))]
    for path in sorted(directory.glob("*.json")):
        tables = [
            f"### {_words(name)}\n\n{table}\n"
            for name, rows in record_lists(json.loads(path.read_text()), path.stem)
            if (table := _table(rows))
        ]
        if tables:
            parts += [f"## Recorded in `{path.name}`\n", *tables]
    listed = sorted(
        path
        for path in directory.rglob("*")
        if path.suffix in PUBLISHED or (path.name == "README.md" and path != readme)
    )
    names = [path.relative_to(directory).as_posix() for path in listed]
    if names:
        parts.append("## Files\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n")
    return "\n".join(parts)


def directories(results: Path) -> list[Path]:
    """Those that have a page: every one at the top, and below it those with a README."""
    top = {path for path in results.iterdir() if path.is_dir()}
    return sorted(top | {path.parent for path in results.glob("*/**/README.md")})


def overview(results: Path) -> str:
    """One entry for every directory, with its first figure."""
    entries = []
    for directory in sorted(p for p in results.iterdir() if p.is_dir()):
        link = f"../results/{directory.name}"
        entry = f"## [{title(directory)}]({link})\n"
        figures = sorted(directory.glob("*.png"))
        if figures:
            entry += f"\n![{title(directory)}]({link}/{figures[0].name})\n"
        entries.append(entry)
    return "\n".join(entries)


def title(directory: Path) -> str:
    """The first heading of a directory's README, else its name."""
    readme = directory / "README.md"
    heading = re.search(r"^# (.+)$", readme.read_text(), re.MULTILINE) if readme.is_file() else None
    return heading[1] if heading else _words(directory.name)


def record_lists(document: Any, name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Every list of records in a JSON document, named by its key; what is nested in a record is left out."""
    if isinstance(document, list):
        rows = [
            {key: value for key, value in row.items() if not isinstance(value, list | dict)}
            for row in document
            if isinstance(row, dict)
        ]
        return [(name, rows)] if rows and len(rows) == len(document) and rows[0] else []
    if isinstance(document, dict):
        return [found for key, value in document.items() for found in record_lists(value, key)]
    return []


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if len(rows) > MOST_ROWS:
        return ""
    if len(columns) > MOST_COLUMNS:  # upright: a column a record
        head, *body = [[_words(key), *(_figure(row.get(key)) for row in rows)] for key in columns]
    else:
        head = [_words(key) for key in columns]
        body = [[_figure(row.get(key)) for key in columns] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figure(value: str | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def _words(name: str) -> str:
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]
