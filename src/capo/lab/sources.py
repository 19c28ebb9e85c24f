"""Where configurations come from: TOML files, presets by name, dotted overrides."""

from __future__ import annotations

import difflib
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.core.tables import laid_over
from capo.lab.config import Config, parse_config

Document = dict[str, Any]


def preset_names() -> list[str]:
    """Names of the presets that ship with the package, sorted."""
    entries = resources.files("capo.presets").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in entries if _is_toml(entry.name))


def preset_text(name: str) -> str:
    """The TOML of a preset, comments included.

    Raises:
        InputError: there is no such preset.
    """
    if name not in preset_names():
        raise InputError("preset", f"{name!r} is not one of {', '.join(preset_names())}.")
    return resources.files("capo.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8")


def load_config(source: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, merge, check and resolve a configuration.

    Args:
        source: a TOML file (or the resolved JSON of a run), or the name of a preset.
        overrides: ``section.key=value`` with the value in TOML; a bare word is a string.

    Raises:
        InputError: anything that cannot be used, named by its dotted key.
    """
    document = _read(str(source), trail=())
    for override in overrides or []:
        document = laid_over(document, parse_override(override))
    return parse_config(document)


def parse_override(override: str) -> Document:
    """``a.b=value`` as a nested document.

    Raises:
        InputError: it is not of that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) < 2:
        raise InputError(
            override, "an override must read section.key=value, as in training.steps=10."
        )
    value: Any = _toml_value(text.strip())
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _read(source: str, trail: tuple[str, ...]) -> Document:
    if source in trail:
        raise InputError("extends", f"goes in a circle: {' -> '.join((*trail, source))}.")
    path = Path(source)
    text = _text(source, path)
    try:
        document = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise InputError(source, f"is not valid {kind}: {error}.") from None
    if not isinstance(document, dict):
        raise InputError(source, "must hold sections with keys.")
    parent = document.pop("extends", None)
    if parent is None:
        return document
    if not isinstance(parent, str):
        raise InputError("extends", f"must be a preset's name or a file's path, got {parent!r}.")
    if parent not in preset_names():  # a path is relative to the file that names it
        parent = str(path.parent / parent)
    return laid_over(_read(parent, (*trail, source)), document)


def _text(source: str, path: Path) -> str:
    if source in preset_names():
        return preset_text(source)
    if path.is_file():
        return path.read_text(encoding="utf-8")
    near = difflib.get_close_matches(source, preset_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"presets are {', '.join(preset_names())}."
    raise InputError("config", f"{source!r} is neither a file nor a preset, {hint}")


def _is_toml(name: str) -> bool:
    return name.endswith(".toml")
