"""What was found of one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "absent", "broken", "untried"]


class Absent(Exception):  # noqa: N818 - nothing is in error
    """What a probe raises where a thing is not there and need not be."""


@dataclass(frozen=True)
class Finding:
    """One thing and its state.

    Attributes:
        section, name: where it stands in the report.
        state: ``ok``: it was tried and works; ``absent``: it is not there and nothing that is there needs
            it; ``broken``: it is there and does not work; ``untried``: what it needs is not ``ok``.
        found: a version, a measurement, or what went wrong; one line.
        fix: one line: what to do; empty where nothing is to be done.
    """

    section: str
    name: str
    state: State
    found: str
    fix: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
