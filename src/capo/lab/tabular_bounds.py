"""Theorem 5.1's two sides, its constants, and the remainder that its quadratic form leaves out.

Notation of ``tabular_mdp``: occupancy ``w`` with mass M (``1/(1−γ)`` or T). For a step that adds
``u = Δ[s]`` to the logits of state s, with ``Ā(s) = Σ_a π'(a|s) A(s,a)``:

    ω = Σ w Ā,   δ = (1/M) Σ w KL(π ‖ π'),   ε = max |A|,   claim: J(π') − J(π) ≥ ω − C √δ.   (1)

Why (1) is true. The performance-difference lemma (Kakade and Langford 2002) says
``J(π') − J(π) = Σ w' Ā``, so the gap is ``ω − ΔJ = Σ (w − w') Ā ≤ ε ‖w' − w‖₁``, and

- step by step (Achiam et al. 2017, lemma 3) ``‖w' − w‖₁ ≤ 2γ/(1−γ) Σ w TV ≤ √2 γ/(1−γ)² √δ``,
  which proves (1) with *half* the paper's C; episodic: ``C = √2 ε T(T−1)``;                   (2)
- along the trajectory, Pinsker on the law of the first t actions and the chain rule of KL give
  ``TV(P'_t, P_t) ≤ √(½ Σ_{k<t} KL_k)``, hence by Jensen
  ``C = √2 ε √(γ/(1−γ)³)``; episodic: ``C = √2 ε (T−1) √T``,                                  (3)
  smaller than (2) for γ > 1/2 (T > 1) by the factor √((1−γ)/γ) (1/√T).
- ``|Ā(s)| ≤ 2ε TV(s)`` as well, so ``gap ≤ 2γε/(1−γ)² max_s KL`` (Schulman et al. 2015, theorem
  1); episodic: ``ε T(T−1) max_s KL``.                                                         (4)

What the quadratic forms miss. Per state, along ``η ↦ π_η = softmax(θ + ηu)``, with V the variance
of u under π, ``R = max u − min u`` and ``S = max_a A − min_a A``:

- KL is the cumulant generating function of u − ū, so (Bennett) ``KL ≤ log(1 + m_F κ(R))`` with
  ``m_F = V/2``, ``κ(R) = 2(e^R − 1 − R)/R²``; and ``|K'''| ≤ R K''``, so ``Var_η ≤ V e^{Rη}``;  (5)
- ``f(η) = Σ π_η A`` has ``f''' = E_η[(u−ū)³(A−Ā)] − 3 Var_η Cov_η(u, A)``, so
  ``|f'''| ≤ (1 + ¾) R S Var_η`` and what the second-order Taylor polynomial leaves out is at most
  ``(7/2) R S m_F ψ(R)``, ``ψ(R) = (e^R − 1 − R − R²/2)/R³`` (and at most S + |polynomial|).   (6)

(5) and (6) in (1) give a statement that holds for every step:

    J(π') − J(π) ≥ ω_quad − Σ w (7/2) R S m_F ψ(R) − C √( (1/M) Σ w log(1 + m_F κ(R)) )         (7)

(with the trivial bound where it is smaller). And a statement about damage alone, which needs no
advantage: Pinsker on the law of the whole trajectory, with G the span of the return,

    |J(π') − J(π)| ≤ G √(M δ / 2).                                                              (8)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from capo.lab.tabular_mdp import Evaluation, TabularMDP, evaluate

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Constants:
    """The factors C of √δ (and of max KL), in units of reward. Shape [B] each."""

    paper: Float[Tensor, "B"]
    """Theorem 5.1's: ``2√2 γε/(1−γ)²``. Episodic, where the paper states none: (2)."""
    stepwise: Float[Tensor, "B"]
    """(2)."""
    trajectory: Float[Tensor, "B"]
    """(3)."""
    maximum: Float[Tensor, "B"]
    """(4), the factor of ``max_s KL``."""
    damage: Float[Tensor, "B"]
    """(8), the factor of √δ in a bound on ``|ΔJ|`` itself."""

    @property
    def proven(self) -> Float[Tensor, "B"]:
        """The smaller of (2) and (3)."""
        return torch.minimum(self.stepwise, self.trajectory)


def constants(mdp: TabularMDP, epsilon: Float[Tensor, "B"]) -> Constants:
    """Every C of this module for ``ε = epsilon``."""
    damage = mdp.return_span * (mdp.mass / 2).sqrt()
    if mdp.discount is not None:
        gamma, rest = mdp.discount, 1 - mdp.discount
        half = math.sqrt(2) * gamma * epsilon / rest**2
        return Constants(
            paper=2 * half,
            stepwise=half,
            trajectory=math.sqrt(2) * epsilon * (gamma / rest**3).sqrt(),
            maximum=2 * gamma * epsilon / rest**2,
            damage=damage,
        )
    assert mdp.horizon is not None
    stepwise, trajectory = episodic_constants(mdp.horizon)
    pairs = mdp.horizon * (mdp.horizon - 1)
    return Constants(
        paper=stepwise * epsilon,
        stepwise=stepwise * epsilon,
        trajectory=trajectory * epsilon,
        maximum=pairs * epsilon,
        damage=damage,
    )


def episodic_constants(horizon: int) -> tuple[float, float]:
    """(2) and (3) for ε = 1, γ = 1 and ``horizon`` decisions."""
    stepwise = math.sqrt(2) * horizon * (horizon - 1)
    trajectory = math.sqrt(2) * (horizon - 1) * math.sqrt(horizon)
    return stepwise, trajectory


def kl_growth(R: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``κ(R) = 2(e^R − 1 − R)/R²`` of (5); κ(0) = 1."""
    series = 1 + R / 3 + R**2 / 12  # next term R³/60: below 2e-11 where it is used
    safe = R.clamp_min(1e-3)
    return torch.where(R > 1e-3, 2 * (torch.expm1(safe) - safe) / safe**2, series)


def remainder_growth(R: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """``ψ(R) = (e^R − 1 − R − R²/2)/R³`` of (6); ψ(0) = 1/6."""
    series = 1 / 6 + R / 24 + R**2 / 120 + R**3 / 720
    safe = R.clamp_min(1e-2)
    exact = (torch.expm1(safe) - safe - safe**2 / 2) / safe**3
    return torch.where(R > 1e-2, exact, series)


@dataclass(frozen=True)
class Comparison:
    """One step ``θ → θ + Δ`` judged exactly and quadratically. Shape [B] each.

    ``improvement`` is ``J(π') − J(π)``; ``surrogate`` and ``mean_kl`` are ω and δ of (1);
    ``quadratic_surrogate`` and ``quadratic_kl`` the same from the token formulas of the last-layer
    model (``m_H``, ``m_F``) in expectation; ``logit_range`` is max R over the states.
    """

    improvement: Float[Tensor, "B"]
    surrogate: Float[Tensor, "B"]
    mean_kl: Float[Tensor, "B"]
    max_kl: Float[Tensor, "B"]
    quadratic_surrogate: Float[Tensor, "B"]
    quadratic_kl: Float[Tensor, "B"]
    logit_range: Float[Tensor, "B"]
    surrogate_remainder: Float[Tensor, "B"]
    """Bound (6) on ``|surrogate − quadratic_surrogate|``."""
    kl_bound: Float[Tensor, "B"]
    """Bound (5) on ``mean_kl``, from the quadratic forms and R alone."""


def kl_divergence(
    log_policy: Float[Tensor, "B S A"], shift: Float[Tensor, "B S A"]
) -> Float[Tensor, "B S"]:
    """``KL(π ‖ π')`` in nats where ``π' ∝ π e^shift``, accurate for small and for large shifts.

    ``log E_π e^ū`` with centred ū: the mean of ``expm1(ū) − ū`` keeps the digits that a difference
    of logarithms loses on confident policies, and the log-sum-exp takes over before it overflows.
    """
    policy = log_policy.exp()
    centred = shift - (policy * shift).sum(-1, keepdim=True)
    finite = centred.clamp_max(500)
    precise = torch.log1p((policy * (torch.expm1(finite) - finite)).sum(-1))
    return torch.where(
        centred.amax(-1) < 500, precise, torch.logsumexp(log_policy + centred, dim=-1)
    )


def compare(
    mdp: TabularMDP,
    logits: Float[Tensor, "B S A"],
    delta: Float[Tensor, "B S A"],
    base: Evaluation | None = None,
) -> Comparison:
    """Both sides of (1) and of (7) for the step ``delta``; ``base`` is ``evaluate(mdp, logits)``.

    Raises:
        InputError: from ``evaluate``.
    """
    base = evaluate(mdp, logits) if base is None else base
    after = evaluate(mdp, logits + delta)
    w, A = base.occupancy, base.advantage  # [B,X,S], [B,X,S,A]
    policy = base.log_policy.exp()  # [B,S,A]

    # The last-layer token formulas, with a ~ π in expectation: the head's h is one-hot here.
    s = delta - (policy * delta).sum(-1, keepdim=True)  # [B,S,A] wᵀu of the sampled action
    variance = (policy * s**2).sum(-1)  # [B,S]
    objective_shift = A * (s + (s**2 - variance[..., None]) / 2)[:, None]  # [B,X,S,A] m_H
    expected_shift = (policy[:, None] * objective_shift).sum(-1)  # [B,X,S] E[m_H]
    policy_shift = variance / 2  # [B,S] E[m_F]; sampled and exact Fisher agree in expectation

    R = delta.amax(-1) - delta.amin(-1)  # [B,S]
    span = A.amax(-1) - A.amin(-1)  # [B,X,S]
    remainder = 3.5 * R * policy_shift * remainder_growth(R)  # [B,S] (6) for a span of 1
    remainder = torch.minimum(span * remainder[:, None], span + expected_shift.abs())  # [B,X,S]
    kl = kl_divergence(base.log_policy, delta)

    def total(per_state: Tensor) -> Tensor:
        """Σ_x Σ_s w_x(s) f_x(s) for f of shape [B,S] or [B,X,S]."""
        per_state = per_state if per_state.dim() == 3 else per_state[:, None]
        return (w * per_state).flatten(1).sum(1)

    return Comparison(
        improvement=after.objective - base.objective,
        # Σ (π' − π) A rather than Σ π' A: the same number, but it vanishes exactly with the step.
        surrogate=total(((after.log_policy.exp() - policy)[:, None] * A).sum(-1)),
        mean_kl=total(kl) / mdp.mass,
        max_kl=kl.amax(-1),
        quadratic_surrogate=total(expected_shift),
        quadratic_kl=total(policy_shift) / mdp.mass,
        logit_range=R.amax(-1),
        surrogate_remainder=total(remainder),
        kl_bound=total(torch.log1p(policy_shift * kl_growth(R))) / mdp.mass,
    )


def safe_logit_range(discount: float | None = None, horizon: int | None = None) -> float:
    """Largest R below which the *quadratic* form of (1), with the paper's C, is a theorem.

    The paper's C is larger than the proven one, and that slack pays for the remainders (5), (6) as
    long as, with ``m_F ≤ R²/8`` (Popoviciu),
    ``M·7εRψ(R) δ + C_proven √(κ(R) δ) ≤ C_paper √δ``. Found by bisection; 0 if there is no slack.
    """
    if horizon is not None:
        paper, trajectory = episodic_constants(horizon)
        proven, mass = min(paper, trajectory), float(horizon)
    else:
        assert discount is not None
        mass = 1 / (1 - discount)
        paper = 2 * math.sqrt(2) * discount * mass**2
        proven = min(paper / 2, math.sqrt(2 * discount * mass**3))

    def holds(value: float) -> bool:
        R = torch.tensor(value, dtype=torch.float64)
        growth, psi = float(kl_growth(R)), float(remainder_growth(R))
        return mass * 7 * value * psi * value / math.sqrt(8) + proven * math.sqrt(growth) <= paper

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low if holds(low) and paper > proven else 0.0
