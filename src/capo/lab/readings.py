"""The readings of a run that a terminal shows, from the rows that the run logs."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BLOCKS = "▁▂▃▄▅▆▇█"
KEPT = 4096  # values of a reading that a curve is drawn from
TAIL = 1 << 16  # bytes at the end of a log that are read for its last line


@dataclass(frozen=True)
class Reading:
    """Something worth watching.

    Attributes:
        name: of the line.
        keys: where it is logged; the first that a row has counts.
        form: of the number.
        unit: behind it.
        log: whether its curve is drawn by magnitude.
    """

    name: str
    keys: tuple[str, ...]
    form: str
    unit: str = ""
    log: bool = False

    def of(self, row: Row) -> float | None:
        """What a row says of it."""
        for key in self.keys:
            value = row.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                return float(value)
        return None

    def text(self, value: float) -> str:
        """The number and its unit."""
        return format(value, self.form) + (f" {self.unit}" if self.unit else "")


POLICY_SHIFT = Reading(
    "policy shift",
    (
        "capo/trust/measured_policy_shift",
        "capo/trust/last_measured_policy_shift",
        "capo/monitor/measured_policy_shift",
    ),
    ".1e",
    "nats a token",
    log=True,
)
REWARD = Reading("reward", ("reward",), ".2f")
REJECTED = Reading("rejected", ("capo/rejection_rate", "capo/monitor/rejection_rate"), ".1%")
SCALE = Reading("trust-region scale", ("capo/trust/scale",), ".2f")
READINGS = (
    REWARD,
    POLICY_SHIFT,
    Reading(
        "objective shift",
        (
            "capo/trust/observed_objective_shift",
            "capo/monitor/observed_objective_shift",
            "capo/batch/objective_shift",
        ),
        ".1e",
    ),
    REJECTED,
    SCALE,
    Reading("entropy", ("entropy",), ".2f", "nats a token"),
    Reading("warning score", ("capo/monitor/warning_score",), ".2f", "(1 warns)"),
)


class Series:
    """The values of the readings so far, oldest first."""

    def __init__(self) -> None:
        """Nothing was read."""
        self.values: dict[Reading, deque[float]] = {}

    def add(self, row: Row) -> None:
        """Take what a row says."""
        for reading in READINGS:
            value = reading.of(row)
            if value is not None:
                self.values.setdefault(reading, deque(maxlen=KEPT)).append(value)


def curve(values: Sequence[float], width: int, *, log: bool = False) -> str:
    """A curve of at most ``width`` blocks, by means over even stretches; empty for fewer than two values.

    Args:
        values: oldest first.
        width: columns.
        log: draw magnitudes; what is not positive is drawn at the bottom.
    """
    if len(values) < 2 or width < 2:
        return ""
    width = min(width, len(values))
    ends = [round(i * len(values) / width) for i in range(width + 1)]
    listed = list(values)
    means = [math.fsum(listed[a:b]) / (b - a) for a, b in itertools.pairwise(ends)]
    if log:
        least = min((value for value in means if value > 0), default=1.0)
        means = [math.log(max(value, least)) for value in means]
    low, high = min(means), max(means)
    top = len(BLOCKS) - 1
    if high <= low:
        return BLOCKS[0] * width
    return "".join(BLOCKS[round((value - low) / (high - low) * top)] for value in means)


def describe(row: Row) -> str:
    """The facts of a step that fit on a line."""
    named = {REJECTED: "rejected ", SCALE: "scale ", REWARD: "reward ", POLICY_SHIFT: "shift "}
    facts = []
    for reading in (REWARD, POLICY_SHIFT, REJECTED, SCALE):
        value = reading.of(row)
        if value is not None:
            facts.append(named[reading] + format(value, reading.form))
    return ", ".join(facts)


def last_row(path: Path) -> Row | None:
    """The last whole line of a log that may be being written; None where there is none."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - TAIL))
            lines = handle.read().split(b"\n")[:-1]  # the last is torn, or empty
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row: Row = json.loads(line)
        except ValueError:
            continue
        return row
    return None
