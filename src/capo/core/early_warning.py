"""An early warning of collapse, from what every optimizer step does to the policy.

A step's policy shift (mean KL in nats a token) is compared with what a batch of its size justifies: the
budget that a trust region would have set (:func:`capo.auto_policy_shift`). Under a learning rate that still
grows, the shift is taken to grow with its square. The logarithm of that multiple feeds a one-sided CUSUM:
steps that are too long one after the other warn, a single outlier does not.

Source: E. S. Page, *Continuous Inspection Schemes*, Biometrika 41 (1954), for the CUSUM; the constants are
frozen by ``capo bench warning --freeze`` (docs/monitor.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from capo.core.trust_region.options import auto_policy_shift


@dataclass(frozen=True)
class WarningConstants:
    """The constants of :class:`EarlyWarning`.

    Attributes:
        allowance: multiple of the budget at which a step counts neither for nor against a warning.
        threshold: sum of log multiples above the allowance at which to warn.
        most: the most that one step may add to that sum, so that it takes at least two.
        horizon: optimizer steps ahead to which the schedule of the learning rate is read.
    """

    allowance: float = 6.0
    threshold: float = 3.0
    most: float = 2.0
    horizon: int = 10


FROZEN = WarningConstants()
"""As frozen, see docs/monitor.md."""


@dataclass(frozen=True)
class StepReading:
    """What the early warning reads of one optimizer step.

    Attributes:
        policy_shift: measured, nats a token.
        entropy: of the policy over the step's tokens, nats.
        completions: behind the step.
        iterations: optimizer steps on the same completions.
        mean_length: of a completion, tokens.
        growth: largest learning rate of the coming ``horizon`` steps over this step's, 1 at least.
    """

    policy_shift: float
    entropy: float
    completions: int
    iterations: int
    mean_length: float
    growth: float = 1.0

    @property
    def nats(self) -> float:
        """Policy shift of a whole completion."""
        return self.policy_shift * self.mean_length

    @property
    def excess(self) -> float:
        """The shift of a step like this at the learning rate to come, as a multiple of the budget.

        NaN where there is none: a learning rate of 0, or numbers that are not finite.
        """
        if not (self.policy_shift > 0 and math.isfinite(self.policy_shift) and self.entropy > 0):
            return math.nan
        budget = auto_policy_shift(
            self.entropy, self.completions, self.iterations, self.mean_length
        )
        return self.policy_shift * max(self.growth, 1.0) ** 2 / budget


@dataclass(frozen=True)
class Warned:
    """One early warning.

    Attributes:
        step: the optimizer step after which it was raised.
        sentence: what was seen and what to do, for a reader.
    """

    step: int
    sentence: str


class EarlyWarning:
    """Watches the excesses of one run, in order; a run that is continued feeds those it has logged.

    Args:
        constants: see :class:`WarningConstants`.
    """

    def __init__(self, constants: WarningConstants = FROZEN) -> None:
        self.constants = constants
        self.warned: list[Warned] = []
        self.active = False
        self._sum = 0.0

    @property
    def score(self) -> float:
        """How near a warning is: 1 and more is one."""
        return self._sum / self.constants.threshold

    def state_dict(self) -> dict[str, float]:
        """What :meth:`load_state_dict` continues from."""
        return {"sum": self._sum, "active": float(self.active)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue the watch of a run that is resumed."""
        self._sum, self.active = float(state["sum"]), bool(state["active"])

    def feed(self, excess: float) -> bool:
        """Take a step's excess; True where a warning begins. It lasts until the sum is back at 0."""
        if not (excess > 0 and math.isfinite(excess)):
            return False
        added = math.log(excess / self.constants.allowance)
        self._sum = max(0.0, self._sum + min(added, self.constants.most))
        if self.active:
            self.active = self._sum > 0
            return False
        self.active = self._sum >= self.constants.threshold
        return self.active

    def observe(self, step: int, reading: StepReading) -> Warned | None:
        """Take a step's reading; the warning that begins with it, if any."""
        if not self.feed(reading.excess):
            return None
        growing = ""
        if reading.growth > 1:
            growing = f", and the learning rate is still to grow {reading.growth:.2g} ×"
        warned = Warned(
            step,
            f"early warning at step {step}: steps move the policy further than batches of "
            f"{reading.completions} completions justify ({reading.policy_shift:.2g} nats a token, "
            f"{reading.nats:.2g} a completion{growing}: {reading.excess:.2g} × the budget); expect a "
            "collapse, lower the learning rate or set a trust region.",
        )
        self.warned.append(warned)
        return warned
