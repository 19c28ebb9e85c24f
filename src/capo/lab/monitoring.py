"""A `CurvatureMonitor` beside a run of the lab: no part of its configuration, since it changes no weight."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from capo.lab.rundir import RunDirectory

if TYPE_CHECKING:
    from capo.integrations.monitor import CurvatureMonitor
    from capo.integrations.trl import CAPOTrainer


def attach_monitor(trainer: CAPOTrainer) -> CurvatureMonitor:
    """Monitor a trainer; the run's recorder tells what is found.

    Raises:
        InputError: the trainer cannot be monitored.
    """
    from capo.integrations.monitor import CurvatureMonitor

    # Without any handler Python would print what the recorder tells already.
    logging.getLogger("capo.monitor").addHandler(logging.NullHandler())
    return CurvatureMonitor(trainer)


def was_monitored(directory: RunDirectory) -> bool:
    """Whether a run has logged a monitor's readings."""
    rows = directory.rows("metrics.jsonl")
    return any(key.startswith("capo/monitor/") for row in rows for key in row)
