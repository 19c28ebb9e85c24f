"""Runs whose policy is no distribution any more: how they are known, and what they say of themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from capo.lab.rundir import RunDirectory

DIVERGED = "diverged"  # message of a finished run: nothing can be sampled from its policy


def is_divergence(message: str, directory: RunDirectory) -> bool:
    """Whether a run failed because its policy is no distribution any more.

    A GPU says no more than that an assertion failed; then the last step's gradient tells.
    """
    if "probability tensor" in message:  # what torch says of sampling from infinite logits
        return True
    if "device-side assert" not in message:
        return False
    steps = directory.rows("metrics.jsonl")
    figures = [float(steps[-1].get(key, 0.0)) for key in ("loss", "grad_norm")] if steps else []
    return not all(map(math.isfinite, figures))


def has_diverged(directory: RunDirectory, status: Mapping[str, Any] | None = None) -> bool:
    """Whether the run ended so: its status says it, or its failure does."""
    status = directory.read("status.json") if status is None else status
    message = str(status.get("message", ""))
    if status.get("state") == "failed":
        return is_divergence(message, directory)
    return status.get("state") == "finished" and message == DIVERGED
