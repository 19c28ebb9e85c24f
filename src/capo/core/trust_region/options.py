"""What a trust region is told to do, and the budget that it sets itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from capo.core.errors import InputError
from capo.core.trust_region.probe import Depth

Predictor = Literal["measured", "deep", "head"]
StepLengthRule = Literal["radius", "quadratic"]

ENTROPY_PER_COMPLETION = 6.4e-3
"""Share of the policy's entropy that one completion is worth (measured: docs/LOG.md)."""
WORST_LOSS = 0.25
"""What one step may cost at worst, as a share of the reward's range."""


@dataclass(frozen=True)
class TrustRegion:
    """Keeps the policy shift of every optimizer step within a budget.

    Args:
        policy_shift: δ, the most that a step may move the policy (mean KL in nats a token);
            ``"auto"``: :func:`auto_policy_shift`; None: nothing is scaled, only measured.
        predictor: how the shift is foreseen. ``"measured"``: the model is run with a part of the step
            added, on some completions. ``"deep"``: to second order, from the forward-mode derivative of
            the logits along the step. ``"head"``: from the last layer's part of the step alone, times a
            ratio learned from what was measured after earlier steps.
        sequences: completions of a step's batch on which it is predicted and measured, spread evenly
            over the prompts; ``"auto"``: :func:`auto_sequences`; None for all.
        depth: layers that ``"deep"`` and ``"quadratic"`` see: ``"all"``, or the last n and the head.
        step_length: ``"radius"``: as long as the budget allows. ``"quadratic"``: no longer than where the
            objective shift of the step is largest, each half of the batch judging the other's step.
        cruise: share of the budget that a typical step uses.

    Raises:
        InputError: a value is not allowed.
    """

    policy_shift: float | Literal["auto"] | None = "auto"
    predictor: Predictor = "measured"
    sequences: int | Literal["auto"] | None = "auto"
    depth: Depth = "all"
    step_length: StepLengthRule = "radius"
    cruise: float = 0.25

    def __post_init__(self) -> None:
        """Check every value."""
        shift = self.policy_shift
        if shift not in ("auto", None) and not _positive(shift):
            raise _error("policy_shift", f"must be 'auto', None or a number > 0, got {shift!r}.")
        if self.predictor not in get_args(Predictor):
            raise _error("predictor", f"must be {_list(Predictor)}, got {self.predictor!r}.")
        if self.sequences not in ("auto", None) and not _integer(self.sequences, 1):
            message = f"must be 'auto', an integer ≥ 1 or None, got {self.sequences!r}."
            raise _error("sequences", message)
        if self.depth != "all" and not _integer(self.depth, 0):
            raise _error("depth", f"must be 'all' or an integer ≥ 0, got {self.depth!r}.")
        if self.step_length not in get_args(StepLengthRule):
            raise _error(
                "step_length", f"must be {_list(StepLengthRule)}, got {self.step_length!r}."
            )
        if not (_positive(self.cruise) and self.cruise <= 1):
            raise _error("cruise", f"must be in (0, 1], got {self.cruise!r}.")

    @property
    def scales(self) -> bool:
        """Whether steps are scaled at all."""
        return self.policy_shift is not None


def auto_sequences(prompts: int) -> int:
    """On how many completions a step of so many prompts is tried: two of each, 8 at least, 32 at most.

    The policy shift is heavy-tailed over tokens, and prompts share the tokens at which it happens: where
    some prompts are left out, the shift of the others says little (docs/LOG.md).
    """
    return min(max(8, 2 * prompts), 32)


def auto_policy_shift(
    entropy: float, completions: float, iterations: int = 1, length: float = 1.0
) -> float:
    """The default budget δ of a step, in nats a token: the smaller of what is earned and what is safe.

    *Earned*: a step follows noise as well as signal, and more completions average more of it out, so
    that the shift that they justify grows in proportion to them; it is counted in shares of the
    policy's entropy, of which it takes from; and steps on the same completions point the same way, so
    that each gets less: ``6.4e-3 · H · B · K^-1.5``.

    *Safe*: by Pinsker's inequality a step of δ nats a token over ``T`` tokens changes the mean reward by
    at most ``√(T δ / 2)`` of its range: at most 1/4 for ``δ = 2 (1/4)² / T``.

    Args:
        entropy: mean entropy ``H`` of the policy over the batch's tokens, nats.
        completions: completions ``B`` whose gradient the step follows; those of advantage 0 have none
            (:class:`Followed` counts them over an optimizer's momentum).
        iterations: optimizer steps ``K`` that are taken on the same completions.
        length: mean tokens ``T`` of a completion.

    Source: docs/trust-region.md; the constants are measured.
    """
    earned = ENTROPY_PER_COMPLETION * entropy * completions * math.pow(iterations, -1.5)
    safe = 2.0 * WORST_LOSS**2 / max(length, 1.0)
    return min(earned, safe)


def make_trust_region(
    spec: TrustRegion | dict[str, Any] | str | float | None,
) -> TrustRegion | None:
    """The trust region that a configuration's value stands for; None for no trust region.

    Args:
        spec: None or ``"none"``; ``"auto"``; δ in nats a token; or a dict of :class:`TrustRegion`'s
            arguments.

    Raises:
        InputError: what ``spec`` says is not possible.
    """
    if spec is None or spec == "none":
        return None
    if isinstance(spec, TrustRegion):
        return spec
    if spec == "auto":
        return TrustRegion()
    if isinstance(spec, dict):
        known = [field.name for field in fields(TrustRegion)]
        for key in spec:
            if key not in known:
                raise _error(str(key), f"is not known; allowed are {', '.join(known)}.")
        return TrustRegion(**spec)
    if _positive(spec):
        return TrustRegion(policy_shift=float(spec))
    raise InputError(
        "trust_region",
        "must be None, 'auto', a policy shift > 0 in nats a token, or a dict of options, "
        f"got {spec!r}.",
    )


def _error(key: str, message: str) -> InputError:
    return InputError(f"trust_region.{key}", message)


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type,operator]


def _integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _list(choices: Any) -> str:
    return " or ".join(repr(choice) for choice in get_args(choices))
