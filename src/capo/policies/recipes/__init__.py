"""Recipes of pre-trained policies: what ``capo pretrain --config NAME`` knows by name.

The first line of each, a comment, says what it makes.
"""

from __future__ import annotations

import difflib
import tomllib
from importlib import resources
from typing import Any

from capo.core.errors import InputError


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    names = (entry.name for entry in resources.files(__name__).iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML of a recipe, comments included.

    Raises:
        InputError: there is no such recipe.
    """
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"recipes are {', '.join(recipe_names())}."
        raise InputError("recipe", f"{name!r} does not ship with the package; {hint}")
    return resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")


def recipe_settings(name: str) -> dict[str, Any]:
    """What a recipe sets, for `capo.policies.pretrain_config.PretrainConfig.from_dict`.

    Raises:
        InputError: there is no such recipe.
    """
    return tomllib.loads(recipe_text(name))


def recipe_title(name: str) -> str:
    """What a recipe makes, in a sentence.

    Raises:
        InputError: there is no such recipe.
    """
    return recipe_text(name).splitlines()[0].removeprefix("# ")
