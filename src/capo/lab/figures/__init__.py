"""The paper's figures and tables, and our own: each a committed grid and a function that draws it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from capo.core.errors import InputError
from capo.lab.figures.catalogue import FIGURES
from capo.lab.figures.figure import FigureOf

__all__ = ["FigureOf", "all_figures", "figure_named"]


def all_figures() -> Iterator[FigureOf]:
    """In the order in which they are best made: those that share runs after those that make them."""
    yield from FIGURES


def figure_named(name: str) -> FigureOf:
    """One of them.

    Raises:
        InputError: there is none of that name.
    """
    names = [each.name for each in FIGURES]
    if name in names:
        return FIGURES[names.index(name)]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(names)}, all."
    raise InputError("FIGURE", f"{name!r} is not known, {hint}")
