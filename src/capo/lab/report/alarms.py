"""The alarms that runs raised, read for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from capo.lab.report.reading import Run
from capo.lab.report.tokens import visible


@dataclass(frozen=True)
class Moved:
    """One of the tokens that a step moved most; ``share`` of the step's divergence."""

    token: str
    prompt: str
    before: str
    after: str
    divergence: float
    share: float


@dataclass(frozen=True)
class AlarmRow:
    """One alarm: where it was raised, the step that it blames, and that step's tokens."""

    step: int
    kind: str
    began: int
    sentence: str
    moved: tuple[Moved, ...]


def read_alarms(run: Run) -> list[AlarmRow]:
    """The alarms of a run, in order; a line that cannot be read is left out."""
    path = run.path / "alarms.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(_alarm(json.loads(line)))
        except (ValueError, TypeError, KeyError):
            continue  # torn by a kill
    return rows


def _alarm(row: Any) -> AlarmRow:
    moved = tuple(
        Moved(
            token=visible(str(one["token"])),
            prompt=visible(str(one["prompt"])),
            before=visible(str(one["before"])),
            after=visible(str(one["after"])),
            divergence=float(one["divergence"]),
            share=float(one["share"]),
        )
        for one in row["moved"]
    )
    return AlarmRow(
        int(row["step"]), str(row["kind"]), int(row["began"]), str(row["sentence"]), moved
    )
