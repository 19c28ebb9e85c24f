"""Selection beyond the paper's hard thresholds: soft weights and thresholds that set themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError
from capo.core.selection import (
    PAPER_THRESHOLDS,
    THRESHOLD_REASONS,
    Denominator,
    Reason,
    Rule,
    Selection,
    Thresholds,
    check_denominator,
    check_policy_threshold,
    make_selection,
)
from capo.core.token_rules import TOKEN_RULES, TokenRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Float
    from torch import Tensor

    from capo.core.curvature import TokenCurvature


@dataclass(frozen=True)
class SoftThresholds:
    """Shrink a token instead of rejecting it.

    The weight is that with which the token's own SGD step would just meet its bounds: its policy shift
    is quadratic in the weight and its objective shift, to first order, linear:

        weight = min(1, (δ_F / m_F)^½, δ_H / m_H where m_H lies beyond δ_H)^sharpness

    ``sharpness = 1`` is that rule; larger values approach the hard one. A bound of the wrong sign (a
    token with ``m_H < 0`` under ``low ≥ 0``) cannot be met by shrinking: weight 0.

    Args:
        policy_shift: δ_F ≥ 0 in nats, or None.
        objective_shift: (low, high); either may be None.
        sharpness: exponent > 0.
        denominator: ``"all"`` (default: a shrunk token is no reason to enlarge others) or ``"kept"``.
    """

    policy_shift: float | None = None
    objective_shift: tuple[float | None, float | None] = (None, None)
    sharpness: float = 1.0
    denominator: Denominator = "all"

    def __post_init__(self) -> None:
        """Check the thresholds as the hard rule does."""
        Thresholds(self.policy_shift, self.objective_shift, self.denominator)
        if not self.sharpness > 0:
            raise InputError("sharpness", f"must be a number > 0, got {self.sharpness!r}.")

    def __call__(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Selection:
        """Weights in [0, 1]; the reason is the tightest bound."""
        m_f, m_h = curvature.policy_shift, curvature.objective_shift
        weights = torch.ones_like(m_f)
        reason = torch.zeros_like(m_f, dtype=torch.int8)
        low, high = self.objective_shift
        candidates = []
        if self.policy_shift is not None:
            inside = m_f <= self.policy_shift
            share = (self.policy_shift / m_f.clamp_min(torch.finfo(m_f.dtype).tiny)).sqrt()
            candidates.append((torch.where(inside, 1.0, share), Reason.POLICY_SHIFT))
        if low is not None:
            candidates.append((_linear_share(low, m_h, m_h >= low), Reason.OBJECTIVE_LOW))
        if high is not None:
            candidates.append((_linear_share(high, m_h, m_h <= high), Reason.OBJECTIVE_HIGH))
        for share, why in candidates:
            tighter = ~(share >= weights)  # NaN is tighter than anything
            reason = torch.where(tighter, int(why), reason)
            weights = torch.where(tighter, share.nan_to_num(nan=0.0), weights)
        return make_selection(
            weights.clamp(0.0, 1.0) ** self.sharpness,
            reason,
            mask,
            self.denominator,
            THRESHOLD_REASONS,
        )


def _linear_share(
    bound: float, value: Float[Tensor, "..."], inside: Bool[Tensor, "..."]
) -> Float[Tensor, "..."]:
    share = torch.where(value != 0, bound / torch.where(value != 0, value, 1.0), 0.0)
    return torch.where(inside, 1.0, share.clamp_min(0.0))


@dataclass(frozen=True)
class QuantileThresholds:
    """Thresholds read off the batch: a fixed share of its tokens is rejected.

    Args:
        policy_shift: keep the tokens up to this quantile of m_F (0.98 rejects 2 %), or None.
        objective_shift: quantiles (low, high) of m_H, or None each.
        denominator: ``"kept"`` or ``"all"``.
    """

    policy_shift: float | None = 0.98
    objective_shift: tuple[float | None, float | None] = (None, None)
    denominator: Denominator = "kept"

    def __post_init__(self) -> None:
        """Check the quantiles."""
        for name, value in (
            ("policy_shift", self.policy_shift),
            ("objective_shift", self.objective_shift[0]),
            ("objective_shift", self.objective_shift[1]),
        ):
            if value is not None and not 0.0 <= value <= 1.0:
                raise InputError(name, f"must be a quantile in [0, 1] or None, got {value!r}.")
        low, high = self.objective_shift
        if low is not None and high is not None and low > high:
            raise InputError("objective_shift", f"low must be ≤ high, got ({low}, {high}).")
        check_denominator(self.denominator)

    def thresholds(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Thresholds:
        """The thresholds that these quantiles give on this batch."""
        low, high = self.objective_shift
        m_h = curvature.objective_shift
        return Thresholds(
            _quantile(curvature.policy_shift, mask, self.policy_shift),
            (_quantile(m_h, mask, low), _quantile(m_h, mask, high)),
            self.denominator,
        )

    def __call__(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Selection:
        """Weights 0 or 1."""
        return self.thresholds(curvature, mask)(curvature, mask)


def _quantile(
    values: Float[Tensor, "..."], mask: Bool[Tensor, "..."], q: float | None
) -> float | None:
    """The smallest value that at least a share ``q`` of the tokens does not exceed; None without tokens."""
    if q is None or not bool(mask.any()):
        return None
    chosen = values[mask].sort().values
    # No interpolation: the threshold is a token's own value, so exactly ⌈q n⌉ tokens pass (ties aside).
    index = min(max(int(-(-q * len(chosen) // 1)) - 1, 0), len(chosen) - 1)
    return float(chosen[index])


@dataclass(frozen=True)
class NatsThreshold:
    """The largest δ_F at which the kept tokens' policy shifts add up to a budget.

    ``Σ_kept m_F / N ≤ budget``, N the number of unmasked tokens: the tokens with the smallest shifts are
    kept, as many as the budget pays for. One number in nats per token, whatever the model or the task.

    Args:
        budget: mean policy shift per token, nats, ≥ 0.
        denominator: ``"kept"`` or ``"all"``.
    """

    budget: float
    denominator: Denominator = "kept"

    def __post_init__(self) -> None:
        """Check the budget."""
        if self.budget is None:
            raise InputError("budget", "must be a number ≥ 0 (nats), got None.")
        check_policy_threshold(self.budget, "budget")
        check_denominator(self.denominator)

    def __call__(self, curvature: TokenCurvature, mask: Bool[Tensor, "..."]) -> Selection:
        """Weights 0 or 1; tokens of equal shift share one fate."""
        values = curvature.policy_shift[mask].double()
        order = values.sort().values
        paid = order.cumsum(0) <= self.budget * max(values.numel(), 1)
        count = int(paid.sum())
        # Beyond a tie the threshold would split tokens by their position: step back to the value below.
        while 0 < count < order.numel() and order[count] == order[count - 1]:
            count -= 1
        threshold = float(order[count - 1]) if count else -1.0
        keep = curvature.policy_shift.double() <= threshold
        reason = torch.where(keep, int(Reason.KEPT), int(Reason.POLICY_SHIFT))
        weights = keep.to(curvature.policy_shift.dtype)
        reasons = (Reason.POLICY_SHIFT,)
        return make_selection(weights, reason, mask, self.denominator, reasons, met=True)


RULES: dict[str, type[Any]] = {
    "thresholds": Thresholds,
    "soft": SoftThresholds,
    "quantile": QuantileThresholds,
    "nats": NatsThreshold,
    **TOKEN_RULES,
}
"""Rules that a configuration can name (a :class:`capo.Budget` needs the batch's own interaction)."""


def make_rule(selection: str | Mapping[str, Any] | None) -> Rule | TokenRule | None:
    """The rule that a configuration stands for.

    Args:
        selection: a preset of the paper (``"capo"``, ``"dr_capo"``, ``"reincapo"``), or a mapping with
            ``rule`` (``"thresholds"``, the default, ``"soft"``, ``"quantile"``, ``"nats"``, or a token
            rule of others, see `capo.core.token_rules`) and that rule's arguments; or None, no
            selection.

    Raises:
        InputError: names ``selection`` or the argument within it.
    """
    if selection is None:
        return None
    if isinstance(selection, str):
        if selection not in PAPER_THRESHOLDS:
            raise InputError(
                "selection",
                f"must be one of {_quoted(PAPER_THRESHOLDS)}, a dict of a rule's arguments or None, "
                f"got {selection!r}.",
            )
        return PAPER_THRESHOLDS[selection]
    if not hasattr(selection, "keys"):
        raise InputError("selection", f"must be a preset's name or a dict, got {selection!r}.")
    name = selection.get("rule", "thresholds")
    if name not in RULES:
        raise InputError("selection.rule", f"must be one of {_quoted(RULES)}, got {name!r}.")
    arguments = {key: value for key, value in selection.items() if key != "rule"}
    allowed = [f.name for f in fields(RULES[name])]
    if not arguments.keys() <= set(allowed):
        raise InputError(
            "selection", f"of rule {name!r} takes {', '.join(allowed)}, got {dict(selection)!r}."
        )
    if "objective_shift" in arguments:
        bounds = arguments["objective_shift"] or (None, None)
        if not isinstance(bounds, list | tuple):
            raise InputError(
                "selection.objective_shift", f"must be a pair [low, high], got {bounds!r}."
            )
        arguments["objective_shift"] = tuple(bounds)
    if name == "nats" and "budget" not in arguments:
        raise InputError("selection.budget", "must be given: mean policy shift per token in nats.")
    try:
        rule: Rule | TokenRule = RULES[name](**arguments)
        return rule
    except InputError as error:
        raise InputError(f"selection.{error.field}", error.message) from None


def _quoted(names: Mapping[str, Any]) -> str:
    return ", ".join(repr(name) for name in names)
