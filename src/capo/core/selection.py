"""From curvature to weights: which tokens enter the update, and how much.

Every rule returns a :class:`Selection` and states its denominator: ``"kept"`` renormalises each
sequence's loss over the kept tokens, as the paper's authors do; ``"all"`` leaves the loss's own
denominator alone, so that rejecting a token only removes its term.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from capo.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.curvature import TokenCurvature

Denominator = Literal["kept", "all"]


class Reason(enum.IntEnum):
    """Why a token's weight is below 1."""

    MASKED = -1
    KEPT = 0
    POLICY_SHIFT = 1  # m_F > δ_F
    OBJECTIVE_LOW = 2  # m_H < δ_H
    OBJECTIVE_HIGH = 3  # m_H > δ_H^high
    BUDGET = 4  # removed so that the batch stays within its bound
    RULE = 5  # by a rule that is not about shifts

    @property
    def label(self) -> str:
        """The name in metrics and reports."""
        return self.name.lower()


@dataclass(frozen=True)
class Selection:
    """Weights of the tokens in the update.

    Args:
        weights: ``[...]`` in [0, 1], 0 where masked (a rule of others may also amplify).
        reason: ``[...]`` int8 of :class:`Reason`.
        rejection_rate: share of unmasked tokens that a rule touched (soft rules: mean of 1 − weight).
        rejection_rate_by_reason: the same by reason; tokens with several reasons count under the first.
        denominator: ``"kept"`` or ``"all"``, what the loss is to be normalised by.
        met: for rules with a budget, whether it was met.
        penalty: ``[...]`` what a rule adds to ∂loss/∂log π of a token, before the loss's own
            normalisation; None for all rules that only weigh.
    """

    weights: Float[Tensor, "..."]
    reason: Int[Tensor, "..."]
    rejection_rate: Float[Tensor, ""]
    rejection_rate_by_reason: dict[str, Float[Tensor, ""]]
    denominator: Denominator
    met: bool | None = None
    penalty: Float[Tensor, "..."] | None = None


class Rule(Protocol):
    """A selection rule: reads curvature, gives weights."""

    def __call__(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Selection:
        """Select among the tokens of ``mask``."""
        ...


def select(
    curvature: TokenCurvature, rule: Rule, mask: Bool[Tensor, "..."] | None = None
) -> Selection:
    """Apply a selection rule.

    Args:
        curvature: from :func:`capo.token_curvature`.
        rule: for instance :class:`Thresholds`.
        mask: ``[...]`` tokens to select among; those that were not judged are left out of it.

    Raises:
        InputError: the mask has another shape.
    """
    if mask is None:
        return rule(curvature, curvature.mask)
    if mask.shape != curvature.mask.shape:
        raise InputError(
            "mask",
            f"must be shaped like the curvature {tuple(curvature.mask.shape)}, "
            f"got {tuple(mask.shape)}.",
        )
    return rule(curvature, mask.bool() & curvature.mask)


def make_selection(
    weights: Float[Tensor, "..."],
    reason: Int[Tensor, "..."],
    mask: Bool[Tensor, "..."],
    denominator: Denominator,
    reasons: Sequence[Reason],
    *,
    met: bool | None = None,
) -> Selection:
    """A :class:`Selection` with its rates, one for each of the ``reasons`` the rule can give."""
    weights = torch.where(mask, weights, 0.0)
    reason = torch.where(mask, reason, int(Reason.MASKED)).to(torch.int8)
    count = mask.sum().clamp_min(1)
    lost = torch.where(mask, (1.0 - weights).clamp_min(0.0), 0.0)
    by_reason = {r.label: torch.where(reason == int(r), lost, 0.0).sum() / count for r in reasons}
    return Selection(weights, reason, lost.sum() / count, by_reason, denominator, met)


def check_policy_threshold(value: float | None, name: str = "policy_shift") -> None:
    """Raise :class:`InputError` unless a policy-shift bound is None or a number ≥ 0."""
    if value is not None and not (_is_number(value) and value >= 0):
        raise InputError(name, f"must be a number ≥ 0 (nats) or None, got {value!r}.")


def check_denominator(value: str) -> None:
    """Raise :class:`InputError` unless the denominator is known."""
    if value not in ("kept", "all"):
        raise InputError("denominator", f"must be 'kept' or 'all', got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


THRESHOLD_REASONS = (Reason.POLICY_SHIFT, Reason.OBJECTIVE_LOW, Reason.OBJECTIVE_HIGH)


@dataclass(frozen=True)
class Thresholds:
    """The paper's hard rule: keep a token iff ``low ≤ m_H ≤ high`` and ``m_F ≤ policy_shift``.

    Args:
        policy_shift: δ_F ≥ 0 in nats, or None for no bound.
        objective_shift: (δ_H, δ_H^high); either may be None, which makes the rule one-sided.
        denominator: ``"kept"`` (the authors' choice) or ``"all"``.

    Raises:
        InputError: a negative δ_F, a threshold that is not a number, or low > high.

    Source: arXiv 2510.00819, Algorithm 1.
    """

    policy_shift: float | None = None
    objective_shift: tuple[float | None, float | None] = (None, None)
    denominator: Denominator = "kept"

    def __post_init__(self) -> None:
        """Check the thresholds."""
        check_policy_threshold(self.policy_shift)
        if len(self.objective_shift) != 2:
            raise InputError("objective_shift", "must be a pair (low, high).")
        low, high = self.objective_shift
        for value in (low, high):
            if value is not None and not _is_number(value):
                raise InputError("objective_shift", f"must hold numbers or None, got {value!r}.")
        if low is not None and high is not None and low > high:
            raise InputError("objective_shift", f"low must be ≤ high, got ({low}, {high}).")
        check_denominator(self.denominator)

    def __call__(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Selection:
        """Weights 0 or 1."""
        low, high = self.objective_shift
        reason = torch.zeros_like(curvature.mask, dtype=torch.int8)
        # Last written wins, so the first-named reason is written last. NaN fails every `<=`.
        if high is not None:
            reason[~(curvature.objective_shift <= high)] = Reason.OBJECTIVE_HIGH
        if low is not None:
            reason[~(curvature.objective_shift >= low)] = Reason.OBJECTIVE_LOW
        if self.policy_shift is not None:
            reason[~(curvature.policy_shift <= self.policy_shift)] = Reason.POLICY_SHIFT
        weights = (reason == Reason.KEPT).to(curvature.policy_shift.dtype)
        return make_selection(weights, reason, mask, self.denominator, THRESHOLD_REASONS)


PAPER_THRESHOLDS: dict[str, Thresholds] = {
    "capo": Thresholds(policy_shift=1e-4, objective_shift=(-1e-2, 1e-2)),
    "dr_capo": Thresholds(policy_shift=1e-3, objective_shift=(-5e-4, 5e-4)),
    "reincapo": Thresholds(policy_shift=1e-5, objective_shift=(-1e-1, 1e-1)),
}
"""Published thresholds (Adam step, sampled Fisher, K = 50): CAPO, Dr.CAPO, ReinCAPO."""
