"""What a plan will cost, before anything is run: every part is played through with guesses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from capo.lab.config import Config
from capo.lab.study.jobs import Arm, Job
from capo.lab.study.outcome import Evaluated, Outcome, Store
from capo.lab.study.plan import Plan
from capo.lab.study.pool import Driver
from capo.lab.study.stages import run_study

# Seconds of one core, measured on the embedded policy: generation and both passes, a further pass
# over the same completions, an evaluation, and the rest of a run.
STEP, COMPLETION = 0.05, 0.0042
PASS, PASS_COMPLETION = 0.02, 0.0023
PROBLEM = 0.0011
SETUP = 0.5

# The guesses: how a run goes, so that the parts go on. They enter nothing but the estimate.
BASE, TARGET_AT, BREAKS_AT, COLLAPSE_AT = 0.43, 1600, 3.5e-4, 1500


@dataclass
class Guesser:
    """A runner that makes up outcomes and adds up what they would cost."""

    capo_preset: str
    seconds: dict[str, float] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    _queue: list[Job] = field(default_factory=list)

    def submit(self, job: Job) -> None:
        """See `Runner.submit`."""
        self._queue.append(job)

    def finished(self) -> list[tuple[Job, Outcome]]:
        """See `Runner.finished`."""
        made = [(job, self._guess(job)) for job in self._queue]
        self._queue.clear()
        return made

    def _guess(self, job: Job) -> Outcome:
        config, arm = job.config(), job.arm
        outcome = guess(job, config, falls=arm.preset != self.capo_preset)
        self.runs[arm.stage] += 1
        seconds = cost(config, arm, outcome.completions)
        self.seconds[arm.stage] = self.seconds.get(arm.stage, 0.0) + seconds
        return outcome


def guess(job: Job, config: Config, *, falls: bool) -> Outcome:
    """A run that learns, or one that collapses where ``falls`` and the learning rate is large."""
    arm, batch = job.arm, config.training.completions_per_step
    learning_rate = config.training.learning_rate
    horizon = config.completions_after(config.steps)
    end = min(horizon, arm.budget or horizon)
    broken = falls and learning_rate > BREAKS_AT
    # Four times the completions with a batch far too large, as the conservative regime has.
    at = TARGET_AT * (4 if batch > 500 else 1)
    if broken and "collapse" in arm.stop_at:
        end = min(end, COLLAPSE_AT)
    elif not broken and "target" in arm.stop_at:
        end = min(end, at)
    accuracy = 0.0 if broken else 0.9
    completions = [0, *(end - back * batch for back in (2, 1, 0))]
    evaluations = [
        Evaluated(index, each, accuracy if index else BASE, 0.02)
        for index, each in enumerate(completions)
    ]
    return Outcome(
        stage=arm.stage,
        arm=arm.name,
        seed=job.seed,
        fingerprint="",
        preset=arm.preset,
        overrides=arm.overrides,
        completions_per_step=batch,
        learning_rate=learning_rate,
        target=arm.target,
        spacing=arm.spacing,
        evaluations=tuple(evaluations),
        completions=end,
        horizon=horizon,
        ended="steps",
    )


def cost(config: Config, arm: Arm, completions: int) -> float:
    """Seconds of one core for a run of the study that consumes so many completions."""
    return core_seconds(config, completions, spacing=arm.spacing, problems=arm.problems)


def core_seconds(config: Config, completions: int, *, spacing: int, problems: int) -> float:
    """Seconds of one core for a run of the embedded policy.

    Args:
        config: resolved.
        completions: that it consumes.
        spacing: completions between evaluations.
        problems: of an evaluation.
    """
    batch, passes = config.training.completions_per_step, config.algorithm.num_iterations
    batches = -(-completions // batch)
    step = STEP + COMPLETION * batch + (passes - 1) * (PASS + PASS_COMPLETION * batch)
    evaluations = min(batches, -(-completions // spacing)) + 1
    return SETUP + batches * step + evaluations * PROBLEM * problems


class _ReadOnly(Store):
    def save(self, outcome: Outcome) -> Any:
        """Keep nothing of a guess."""


def estimate(plan: Plan, store: Store, only: str = "*") -> Guesser:
    """Count the runs that are still to be made and their seconds, by stage."""
    guesser = Guesser(plan.preset)
    run_study(plan, Driver(_ReadOnly(store.root), guesser, only))
    return guesser
