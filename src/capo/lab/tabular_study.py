"""Theorem 5.1 measured: thousands of random MDPs, four directions, steps over four decades.

``sweep`` keeps every number of one setting as a tensor ``[D, K, N]`` (direction, step, MDP);
``summarise`` and ``rows_by_step`` only count and maximise over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError
from capo.lab.tabular_bounds import (
    Comparison,
    Constants,
    compare,
    constants,
    episodic_constants,
    safe_logit_range,
)
from capo.lab.tabular_mdp import Evaluation, TabularMDP, evaluate, policy_gradient, random_mdp

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float
    from torch import Tensor

DIRECTIONS = ("gradient", "adam_sign", "natural", "random")
SHAPES = ((2, 2), (3, 2), (5, 3), (8, 5))  # (states, actions), a quarter of the MDPs each
STEPS = torch.logspace(-2, 2, 25, dtype=torch.float64)  # logit range of the step, six per decade


@dataclass(frozen=True)
class Setting:
    """Which form of the theorem: a discount, or a horizon at γ = 1."""

    discount: float | None = None
    horizon: int | None = None

    @property
    def name(self) -> str:
        """As tables and figures show it."""
        return f"γ={self.discount:g}" if self.discount is not None else f"T={self.horizon}"


SETTINGS = (
    *(Setting(discount=discount) for discount in (0.3, 0.5, 0.9, 0.99)),
    *(Setting(horizon=horizon) for horizon in (1, 2, 8, 32)),
)


def normalised_direction(
    name: str, mdp: TabularMDP, base: Evaluation, generator: torch.Generator
) -> Float[Tensor, "B S A"]:
    """A direction whose largest logit range over the states is 1 (or 0 where the gradient is 0).

    ``gradient`` is ∇J; ``adam_sign`` its sign, Adam's first step; ``natural`` its product with the
    inverse Fisher matrix, which for a softmax table is the occupancy-weighted advantage.

    Raises:
        InputError: an unknown name.
    """
    gradient = policy_gradient(base)
    if name == "gradient":
        direction = gradient
    elif name == "adam_sign":
        direction = gradient.sign()
    elif name == "natural":
        visits = base.occupancy.sum(1)[..., None]  # [B,S,1]
        advantage = torch.einsum("bxs,bxsa->bsa", base.occupancy, base.advantage)
        direction = advantage / visits.clamp_min(1e-300)
    elif name == "random":
        direction = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype)
    else:
        raise InputError("direction", f"must be one of {', '.join(DIRECTIONS)}, got {name!r}.")
    width = (direction.amax(-1) - direction.amin(-1)).amax(-1)[:, None, None]
    return direction / width.clamp_min(1e-300)


@dataclass(frozen=True)
class Sweep:
    """All comparisons of one setting. ``comparison`` fields are ``[D, K, N]``, the rest ``[N]``."""

    setting: Setting
    steps: Float[Tensor, "K"]
    comparison: Comparison
    constants: Constants
    epsilon: Float[Tensor, "N"]
    onset: Float[Tensor, "D N"]
    """Logit range at which the quadratic form is first violated; inf where it never is."""
    onset_kl: Float[Tensor, "D N"]
    """Quadratic δ there."""

    def violated(
        self, surrogate: Float[Tensor, "D K N"], C: Float[Tensor, "N"], kl: Float[Tensor, "D K N"]
    ) -> Bool[Tensor, "D K N"]:
        """``J(π') − J(π) < surrogate − C √kl`` by more than rounding."""
        return surrogate - C * kl.sqrt() - self.comparison.improvement > self.rounding

    @property
    def rounding(self) -> Float[Tensor, "N"]:
        """What float64 may lose: 1e-10 of the largest possible improvement."""
        mass = self.setting.horizon or 1 / (1 - (self.setting.discount or 0))
        return 1e-10 * (1 + self.epsilon) * mass


def violates_quadratic(c: Comparison, C: Constants, rounding: Tensor | float) -> Tensor:
    """Is the theorem's claim false when ω and δ are the quadratic forms?"""
    return c.quadratic_surrogate - C.paper * c.quadratic_kl.sqrt() - c.improvement > rounding


def sweep(setting: Setting, mdps: int, seed: int, steps: Tensor = STEPS) -> Sweep:
    """Compare every direction and step on ``mdps`` random MDPs.

    Raises:
        InputError: fewer MDPs than shapes.
    """
    if mdps < len(SHAPES):
        raise InputError("mdps", f"must be at least {len(SHAPES)}, got {mdps}.")
    generator = torch.Generator().manual_seed(seed)
    parts: list[Sweep] = []
    for index, (states, actions) in enumerate(SHAPES):
        batch = mdps // len(SHAPES) + (index < mdps % len(SHAPES))
        mdp, logits = random_mdp(
            batch,
            states,
            actions,
            generator=generator,
            discount=setting.discount,
            horizon=setting.horizon,
        )
        parts.append(_sweep_batch(setting, mdp, logits, steps, generator))
    return _concatenate(parts)


def _sweep_batch(
    setting: Setting, mdp: TabularMDP, logits: Tensor, steps: Tensor, generator: torch.Generator
) -> Sweep:
    """``sweep`` for MDPs of one shape."""
    base = evaluate(mdp, logits)
    C = constants(mdp, base.epsilon)
    rounding = 1e-10 * (1 + base.epsilon) * mdp.mass
    table: list[list[Comparison]] = []
    onsets, onset_kls = [], []
    for name in DIRECTIONS:
        direction = normalised_direction(name, mdp, base, generator)
        column = [compare(mdp, logits, float(step) * direction, base) for step in steps]
        violated = torch.stack([violates_quadratic(c, C, rounding) for c in column])  # [K,N]

        def judge(
            size: Tensor, direction: Tensor = direction
        ) -> tuple[Tensor, Tensor]:  # bound now: the loop moves on
            c = compare(mdp, logits, size[:, None, None] * direction, base)
            return violates_quadratic(c, C, rounding), c.quadratic_kl

        onset, at_onset = _bisect_onset(judge, steps, violated)
        table.append(column)
        onsets.append(onset)
        onset_kls.append(at_onset)
    stacked = Comparison(
        **{
            field: torch.stack(
                [torch.stack([getattr(c, field) for c in column]) for column in table]
            )
            for field in Comparison.__dataclass_fields__
        }
    )
    return Sweep(
        setting, steps, stacked, C, base.epsilon, torch.stack(onsets), torch.stack(onset_kls)
    )


def _bisect_onset(
    judge: Callable[[Tensor], tuple[Tensor, Tensor]], steps: Tensor, violated: Bool[Tensor, "K N"]
) -> tuple[Tensor, Tensor]:
    """The first violating grid step, refined by 20 bisections of the interval before it (log).

    ``judge`` maps step sizes [N] to (violated, quadratic δ). Returns the sizes and the δ.
    """
    first = violated.to(torch.int8).argmax(0)  # [N]; 0 also where nothing is violated
    any_violated = violated.any(0)
    high = steps[first].log()
    # Before the first grid step lies one more interval of the same length.
    low = high - (steps[1] / steps[0]).log()
    for _ in range(20):
        middle = (low + high) / 2
        bad, _ = judge(middle.exp())
        low, high = torch.where(bad, low, middle), torch.where(bad, middle, high)
    never = torch.full_like(high, math.inf)
    return (
        torch.where(any_violated, high.exp(), never),
        torch.where(any_violated, judge(high.exp())[1], never),
    )


def _concatenate(parts: list[Sweep]) -> Sweep:
    """Join batches of MDPs along N."""

    def join(values: list[Any], kind: type[Comparison] | type[Constants]) -> Any:
        names = kind.__dataclass_fields__
        return kind(**{n: torch.cat([getattr(v, n) for v in values], dim=-1) for n in names})

    return Sweep(
        setting=parts[0].setting,
        steps=parts[0].steps,
        comparison=join([p.comparison for p in parts], Comparison),
        constants=join([p.constants for p in parts], Constants),
        epsilon=torch.cat([p.epsilon for p in parts]),
        onset=torch.cat([p.onset for p in parts], dim=-1),
        onset_kl=torch.cat([p.onset_kl for p in parts], dim=-1),
    )


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, 0 where both vanish (no step was taken)."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-300), 0.0)


def rows_by_step(s: Sweep) -> list[dict[str, Any]]:
    """One row per direction and step: violations, tightness, certificates (CSV)."""
    c, C = s.comparison, s.constants
    root = c.mean_kl.sqrt()
    gap = c.surrogate - c.improvement
    corrected = c.quadratic_surrogate - c.surrogate_remainder
    flags = {
        "violations_exact": s.violated(c.surrogate, C.paper, c.mean_kl),
        "violations_exact_proven_constant": s.violated(c.surrogate, C.proven, c.mean_kl),
        "violations_quadratic": s.violated(c.quadratic_surrogate, C.paper, c.quadratic_kl),
        "violations_corrected": s.violated(corrected, C.proven, c.kl_bound),
        "violations_damage": -c.improvement - C.damage * root > s.rounding,
        "certified_exact": c.surrogate - C.paper * root > s.rounding,
        "certified_proven_constant": c.surrogate - C.proven * root > s.rounding,
        "certified_max_kl": c.surrogate - C.maximum * c.max_kl > s.rounding,
        "improved": c.improvement > s.rounding,
    }
    numbers = {
        "tightness": ratio(gap, C.paper * root),
        "tightness_proven_constant": ratio(gap, C.proven * root),
        "tightness_damage": ratio(-c.improvement, C.damage * root),
    }
    rows = []
    for d, direction in enumerate(DIRECTIONS):
        for k, step in enumerate(s.steps.tolist()):
            row: dict[str, Any] = {
                "setting": s.setting.name,
                "direction": direction,
                "logit_range": round(step, 6),
                "instances": gap.shape[-1],
                "median_mean_kl": float(c.mean_kl[d, k].median()),
                "minimal_slack_over_epsilon": float(
                    ((c.improvement - c.surrogate + C.paper * root) / s.epsilon)[d, k].min()
                ),
            }
            row |= {name: int(flag[d, k].sum()) for name, flag in flags.items()}
            row |= {name: float(number[d, k].max()) for name, number in numbers.items()}
            rows.append(row)
    return rows


def rows_by_kl(s: Sweep) -> list[dict[str, Any]]:
    """Violations of the quadratic form per decade of its own δ, all directions together (CSV)."""
    c = s.comparison
    violated = s.violated(c.quadratic_surrogate, s.constants.paper, c.quadratic_kl).flatten()
    decade = c.quadratic_kl.flatten().clamp_min(1e-12).log10().floor().to(torch.int64)
    return [
        {
            "setting": s.setting.name,
            "quadratic_kl_from": 10.0**value,
            "instances": int((decade == value).sum()),
            "violations_quadratic": int(violated[decade == value].sum()),
        }
        for value in sorted(set(decade.tolist()))
    ]


def summarise(s: Sweep) -> dict[str, Any]:
    """One setting in a few numbers (JSON, and the printed table)."""
    c, C = s.comparison, s.constants
    rows = rows_by_step(s)
    counted = {
        name: sum(row[name] for row in rows)
        for name in rows[0]
        if name.startswith(("violations", "certified", "improved"))
    }
    relative = ratio(c.surrogate - c.improvement, C.paper * c.mean_kl.sqrt())
    # Less what float64 loses in a difference of two sums of size ε·mass.
    lost = 4e-16 * s.epsilon * _mass(s.setting)
    error = ((c.quadratic_surrogate - c.surrogate).abs() - lost).clamp_min(0)
    small = s.steps <= 1  # where a cubic remainder is the whole error
    cubic = ratio(error, s.epsilon * _mass(s.setting) * c.quadratic_kl**1.5)[:, small].flatten()
    log_error = error.clamp_min(1e-300).log10()
    low, high = int((s.steps - 0.1).abs().argmin()), int((s.steps - 1).abs().argmin())
    begins = s.onset[s.onset.isfinite()]
    begins_kl = s.onset_kl[s.onset_kl.isfinite()]
    return {
        "setting": s.setting.name,
        "mdps": s.epsilon.numel(),
        "instances": relative.numel(),
        **counted,
        "minimal_slack_over_epsilon": min(row["minimal_slack_over_epsilon"] for row in rows),
        "tightness": float(relative.max()),
        "tightness_proven_constant": max(row["tightness_proven_constant"] for row in rows),
        "tightness_damage": max(row["tightness_damage"] for row in rows),
        "quadratic_safe_logit_range": safe_logit_range(s.setting.discount, s.setting.horizon),
        "quadratic_onset_share": begins.numel() / s.onset.numel(),
        "quadratic_onset_logit_range": _quantiles(begins),
        "quadratic_onset_kl": _quantiles(begins_kl),
        "remainder_order": float((log_error[:, high] - log_error[:, low]).median()),
        "remainder_over_bound": float(ratio(error, c.surrogate_remainder)[:, small].max()),
        "remainder_over_mean_kl_to_1.5": _quantiles(cubic),
        "mean_kl_over_bound": float(ratio(c.mean_kl, c.kl_bound).max()),
        "mean_kl_over_quadratic": float(ratio(c.mean_kl, c.quadratic_kl).max()),
    }


def _mass(setting: Setting) -> float:
    return float(setting.horizon or 1 / (1 - (setting.discount or 0.0)))


def _quantiles(values: Tensor) -> dict[str, float] | None:
    """Smallest, 1 %, 10 %, median and largest; ``None`` if there is nothing to rank."""
    if not values.numel():
        return None
    ranked = values.sort().values
    places = {"min": 0.0, "p01": 0.01, "p10": 0.1, "p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: float(ranked[round(q * (len(ranked) - 1))]) for name, q in places.items()}


def vacuous_horizons(
    mean_kls: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2),
) -> list[dict[str, Any]]:
    """Shortest T at which the penalty of a step of δ nats per token exceeds a whole reward of 1.

    For ε = 1 and a terminal reward in [0, 1] (a verifier's), so that no improvement is above 1.
    ``pinsker`` is the plain bound ``|ΔJ| ≤ √(Tδ/2)``, total variation between two laws of whole
    completions: it promises no improvement, but bounds the damage.
    """

    def shortest(column: int, kl: float) -> int:
        T = 1
        while episodic_constants(T)[column] * math.sqrt(kl) < 1:
            T += 1
        return T

    return [
        {
            "mean_kl": kl,
            "theorem": shortest(0, kl),
            "trajectory": shortest(1, kl),
            "pinsker": math.ceil(2 / kl - 1e-9),
            "theorem_penalty_at_T_1024": episodic_constants(1024)[0] * math.sqrt(kl),
            "pinsker_penalty_at_T_1024": min(1.0, math.sqrt(1024 * kl / 2)),
        }
        for kl in mean_kls
    ]
