"""A `CurvatureMonitor` beside a run of the lab: no part of its configuration, since it changes no weight."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING

from capo.lab.rundir import RunDirectory

if TYPE_CHECKING:
    from capo.integrations.monitor import CurvatureMonitor
    from capo.integrations.trl import CAPOTrainer


def attach_monitor(trainer: CAPOTrainer, every: int) -> CurvatureMonitor:
    """Monitor every so many steps of a trainer; the run's recorder tells what is found.

    Raises:
        InputError: the trainer cannot be monitored.
    """
    from capo.integrations.monitor import CurvatureMonitor

    # Without any handler Python would print what the recorder tells already.
    logging.getLogger("capo.monitor").addHandler(logging.NullHandler())
    return CurvatureMonitor(trainer, every=every)


def monitored_every(directory: RunDirectory) -> int | None:
    """Every how many steps a run was monitored, by what it has logged; None where it was not."""
    seen = [
        row["step"]
        for row in directory.rows("metrics.jsonl")
        if any(key.startswith("capo/monitor/") for key in row)
    ]
    return min((b - a for a, b in itertools.pairwise(seen)), default=1) if seen else None
