"""What a shell is offered on Tab. Only names that cost no import of torch are offered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import capo

Offers = list[tuple[str, str]]  # a word and a short help

PACKAGE = Path(capo.__file__).parent
RULES = ("none", "capo", "dr_capo", "reincapo")


def _starting(words: Iterable[tuple[str, str]], typed: str) -> Offers:
    return [(word, help) for word, help in words if word.startswith(typed)]


def _named(folder: str, suffix: str = ".toml") -> Iterator[tuple[str, str]]:
    """The files of a folder of the package: their names, and their first comments."""
    for path in sorted((PACKAGE / folder).glob(f"*{suffix}"), key=lambda each: each.stem):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        yield path.stem, first.removeprefix("# ") if first.startswith("# ") else ""


def _files(typed: str, suffix: str) -> Iterator[tuple[str, str]]:
    """Files and folders that begin as typed, as a shell would offer them."""
    base = Path(typed) if typed.endswith("/") else Path(typed).parent
    if not base.is_dir():
        return
    for path in sorted(base.iterdir()):
        if path.is_dir():
            yield f"{path}/", ""
        elif path.suffix == suffix:
            yield str(path), ""


def _words(*words: str) -> Iterator[tuple[str, str]]:
    return ((word, "") for word in words)


def configs(incomplete: str) -> Offers:
    """Presets, and TOML files."""
    return [*presets(incomplete), *_starting(_files(incomplete, ".toml"), incomplete)]


def presets(incomplete: str) -> Offers:
    """Presets."""
    return _starting(_named("presets"), incomplete)


def policies(incomplete: str) -> Offers:
    """The embedded policy, and directories."""
    embedded = _words("embedded:sums")
    return _starting([*embedded, *_files(incomplete, "")], incomplete)


def figures(incomplete: str) -> Offers:
    """What `capo lab reproduce` regenerates."""
    return _starting([*_named("lab/figures"), ("all", "")], incomplete)


def recipes(incomplete: str) -> Offers:
    """Recipes of pre-training, and TOML files."""
    found = _starting(_named("policies/recipes"), incomplete)
    return [*found, *_starting(_files(incomplete, ".toml"), incomplete)]


def suites(incomplete: str) -> Offers:
    """Suites of evaluation, and TOML files."""
    from capo.lab.suites import suite_names

    words = [*_words(*suite_names()), *_files(incomplete, ".toml")]
    return _starting(words, incomplete)


def benches(incomplete: str) -> Offers:
    """What `capo bench` measures."""
    from capo.cli.make import BENCHES

    return _starting(_words(*BENCHES), incomplete)


def tasks(incomplete: str) -> Offers:
    """Tasks."""
    return _starting(_words("sums", "math", "reasoning_gym"), incomplete)


def actions(incomplete: str) -> Offers:
    """Of `capo presets`."""
    return _starting([("list", "name them"), ("show", "print one")], incomplete)


def shardings(incomplete: str) -> Offers:
    """Of `capo plan`."""
    return _starting(_words("ddp", "fsdp2", "zero2", "zero3"), incomplete)


def precisions(incomplete: str) -> Offers:
    """Of `capo plan`."""
    return _starting(_words("mixed", "bf16", "float32"), incomplete)


def devices(incomplete: str) -> Offers:
    """Of `capo plan`: devices, and JSON files of rates."""
    words = [*_words("a100", "h100", "h200", "b200"), *_files(incomplete, ".json")]
    return _starting(words, incomplete)


def overrides(incomplete: str) -> Offers:
    """Keys of a configuration, ``training.learning_rate=``; behind the ``=`` the words that it may be."""
    from capo.lab.config import Config

    words: list[tuple[str, str]] = []
    for name, field in Config.model_fields.items():
        section: Any = field.annotation
        for key, each in getattr(section, "model_fields", {}).items():
            stem = f"{name}.{key}="
            words.append((stem, ""))
            if incomplete.startswith(stem):
                values = RULES if stem == "capo.selection=" else _choices(each.annotation)
                words += [(stem + value, "") for value in values]
    return [offer for offer in _starting(words, incomplete) if offer[0] != incomplete]


def _choices(annotation: Any) -> list[str]:
    """The words that a type allows; none where it allows numbers or anything."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(each) for each in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _choices(part)]
