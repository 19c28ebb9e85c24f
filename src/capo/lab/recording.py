"""Which steps' tokens a run records, and what it is judged by where it selects nothing.

This is no part of a run's configuration: looking at tokens changes no weight.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from capo.core.errors import InputError
from capo.lab.config import Config
from capo.lab.rundir import RunDirectory

ABOUT = "tokens/about.json"


@dataclass(frozen=True)
class Recording:
    """What is recorded of a run's tokens.

    Attributes:
        every: the first step, the last and every ``every``-th between them; 0 for none.
        steps: optimizer steps of the run.
        watches: the run judges no token itself, so that those of recorded steps are judged for the
            record alone.
        step_model: whose step the tokens are judged by.
        moments: where Adam's moments come from.
        fisher: ``"sampled"`` or ``"exact"``.
    """

    every: int
    steps: int
    watches: bool
    step_model: Literal["adam", "sgd"]
    moments: Literal["simulated", "optimizer"]
    fisher: Literal["sampled", "exact"]

    def wants(self, step: int) -> bool:
        """Whether optimizer step ``step`` (from 1) is recorded."""
        return self.every > 0 and (step % self.every == 0 or step in (1, self.steps))

    def watch(self, steps_taken: int) -> bool:
        """The same for the trainer, which counts the steps taken before."""
        return self.wants(steps_taken + 1)

    def about(self) -> dict[str, Any]:
        """What ``tokens/about.json`` says."""
        return asdict(self)


def make_recording(
    config: Config, every: int | None, resumed: RunDirectory | None = None
) -> Recording:
    """What a run records.

    Args:
        config: resolved. A run that judges its tokens records every step unless it is told otherwise.
        every: what the user asked for; None for nothing in particular.
        resumed: the run that is continued; it goes on as it began.

    Raises:
        InputError: ``every`` is no number of steps, or the configuration keeps no records.
    """
    if every is not None and every < 1:
        raise InputError("--tokens", f"must be a number of steps of at least 1, got {every}.")
    if every is not None and not config.records.tokens:
        raise InputError("--tokens", "records tokens, but the run has records.tokens = false.")
    if every is None:
        began = resumed.read(ABOUT).get("every") if resumed is not None else None
        every = began if isinstance(began, int) else int(config.capo.judges)
    watches, capo = not config.capo.judges, config.capo
    adam = config.training.optimizer == "adamw"
    return Recording(
        every=every if config.records.tokens else 0,
        steps=config.steps,
        watches=watches,
        # A run that judges nothing says nothing of how to: then it is the real optimizer's own step.
        step_model=("adam" if adam else "sgd") if watches else capo.step_model,
        moments="optimizer" if watches else capo.moments,
        fisher=capo.fisher,
    )
