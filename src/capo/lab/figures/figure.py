"""What a figure is: a grid that ships with the package, and what is drawn and recorded of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from capo.lab.sweep.grid import Grid, parse_grid

if TYPE_CHECKING:
    from capo.lab.report.charts import Figure
    from capo.lab.sweep.reading import GridResult


@dataclass
class Drawn:
    """What came of a figure.

    Attributes:
        figures: charts, with the data they are drawn from.
        tables: rows under a heading, as text.
        numbers: what verdicts are read from; JSON.
        notes: sentences for the reader.
    """

    figures: list[Figure] = field(default_factory=list)
    tables: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FigureOf:
    """A figure or table.

    Attributes:
        name: on the command line, of its grid, and of its folder under the results.
        title: what it shows.
        draw: from what is there of its grid.
    """

    name: str
    title: str
    draw: Callable[[GridResult], Drawn]

    def text(self) -> str:
        """Its grid, as it is committed."""
        folder = resources.files("capo.lab.figures")
        return folder.joinpath(f"{self.name}.toml").read_text(encoding="utf-8")

    def grid(self, seeds: int | None, settings: Sequence[str]) -> Grid:
        """Its grid, with so many seeds and with settings laid over it."""
        return parse_grid(self.text()).with_seeds(seeds).with_settings(settings)
