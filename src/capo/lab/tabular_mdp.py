"""A tabular softmax MDP in which everything that Theorem 5.1 speaks of is computed exactly.

Two forms share every formula through one object, the *occupancy measure* ``w``:

- **discounted**, one value function: ``w(s) = Σ_t γ^t P(s_t = s) = d(s)/(1−γ)``, mass ``1/(1−γ)``;
- **episodic**, γ = 1 and length T, one value function a position: ``w_t(s) = P(s_t = s)``, mass T.

Dimension letters: B MDPs of a batch, X positions (1 in the discounted form, T in the episodic
one), S states, A actions. All tensors are float64; policies are ``softmax(θ[s])``, the same at
every position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from capo.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class TabularMDP:
    """A batch of MDPs of one shape.

    Args:
        transition: ``P(s' | s, a)``; the last axis sums to one.
        reward: ``r_t(s, a)``; X is 1 (the same at every position) or the horizon.
        start: distribution of the first state.
        discount: γ in [0, 1) for the discounted form, ``None`` for the episodic form.
        horizon: number of decisions T ≥ 1 for the episodic form, ``None`` for the discounted form.

    Raises:
        InputError: a shape, a probability, the discount or the horizon is out of range.
    """

    transition: Float[Tensor, "B S A S"]
    reward: Float[Tensor, "B X S A"]
    start: Float[Tensor, "B S"]
    discount: Float[Tensor, "B"] | None = None
    horizon: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is not an MDP, naming the field."""
        if (self.discount is None) == (self.horizon is None):
            raise InputError("discount", "give exactly one of discount and horizon.")
        if self.transition.dim() != 4 or self.transition.shape[1] != self.transition.shape[3]:
            raise InputError("transition", "must have the shape [B, S, A, S].")
        B, S, A, _ = self.transition.shape
        positions = 1 if self.horizon is None else self.horizon
        if self.horizon is not None and self.horizon < 1:
            raise InputError("horizon", f"must be at least 1, got {self.horizon}.")
        if self.reward.shape not in {(B, 1, S, A), (B, positions, S, A)}:
            raise InputError("reward", f"must have the shape {(B, positions, S, A)}.")
        if self.start.shape != (B, S):
            raise InputError("start", f"must have the shape {(B, S)}.")
        for name, value in (("transition", self.transition), ("start", self.start)):
            _check_distribution(name, value)
        if not bool(torch.isfinite(self.reward).all()):
            raise InputError("reward", "must be finite.")
        if self.discount is not None:
            inside = (self.discount >= 0) & (self.discount < 1)
            if self.discount.shape != (B,) or not bool(inside.all()):
                raise InputError("discount", f"must be {B} numbers in [0, 1).")

    @property
    def mass(self) -> Float[Tensor, "B"]:
        """Total occupancy, the effective number of decisions: ``1/(1−γ)`` or T."""
        if self.discount is not None:
            return 1 / (1 - self.discount)
        return torch.full_like(self.start[:, 0], float(self.horizon or 0))

    @property
    def return_span(self) -> Float[Tensor, "B"]:
        """At most how far two returns can differ: the discounted sum of the rewards' spans."""
        reward = self.reward.flatten(2)  # [B,X,S·A]
        span = reward.amax(-1) - reward.amin(-1)  # [B,X]
        if span.shape[1] == 1:
            return span[:, 0] * self.mass
        return span.sum(1)


@dataclass(frozen=True)
class Evaluation:
    """What one policy is worth, exactly. Values are in units of reward."""

    log_policy: Float[Tensor, "B S A"]
    value: Float[Tensor, "B X S"]
    action_value: Float[Tensor, "B X S A"]
    advantage: Float[Tensor, "B X S A"]
    occupancy: Float[Tensor, "B X S"]
    objective: Float[Tensor, "B"]

    @property
    def epsilon(self) -> Float[Tensor, "B"]:
        """``ε = max |A|`` over every position, state and action (reachable or not)."""
        return self.advantage.abs().flatten(1).amax(1)


def _check_distribution(name: str, value: Tensor) -> None:
    """Entries in [0, 1], last axis summing to one."""
    if value.dtype != torch.float64:
        raise InputError(name, f"must be float64, got {value.dtype}.")
    total = value.sum(-1)
    if not bool((value >= 0).all()) or not bool(((total - 1).abs() < 1e-9).all()):
        raise InputError(name, "must be non-negative and sum to one over the last axis.")


def evaluate(mdp: TabularMDP, logits: Float[Tensor, "B S A"]) -> Evaluation:
    """V, Q, A, occupancy and J of ``softmax(logits)``.

    By linear solve (discounted) or by one pass backwards and one forwards (episodic).

    Raises:
        InputError: ``logits`` do not fit the MDP or are not finite.
    """
    if logits.shape != mdp.transition.shape[:3]:
        raise InputError("logits", f"must have the shape {tuple(mdp.transition.shape[:3])}.")
    if not bool(torch.isfinite(logits).all()):
        raise InputError("logits", "must be finite.")
    log_policy = torch.log_softmax(logits, dim=-1)
    policy = log_policy.exp()
    kernel = torch.einsum("bsa,bsat->bst", policy, mdp.transition)  # P_π(s' | s)
    if mdp.discount is not None:
        value, action_value, occupancy = _evaluate_discounted(mdp, policy, kernel)
    else:
        value, action_value, occupancy = _evaluate_episodic(mdp, policy, kernel)
    return Evaluation(
        log_policy=log_policy,
        value=value,
        action_value=action_value,
        advantage=action_value - value[..., None],
        occupancy=occupancy,
        objective=(mdp.start * value[:, 0]).sum(-1),
    )


def _evaluate_discounted(
    mdp: TabularMDP, policy: Tensor, kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``V = (I − γP_π)⁻¹ r_π`` and ``w = (I − γP_πᵀ)⁻¹ ρ``."""
    assert mdp.discount is not None
    gamma = mdp.discount[:, None, None]
    reward = mdp.reward[:, 0]  # [B,S,A]
    system = torch.eye(kernel.shape[-1], dtype=kernel.dtype) - gamma * kernel  # [B,S,S]
    value = torch.linalg.solve(system, (policy * reward).sum(-1))
    occupancy = torch.linalg.solve(system.transpose(1, 2), mdp.start)
    future = torch.einsum("bsat,bt->bsa", mdp.transition, value)
    return value[:, None], (reward + gamma * future)[:, None], occupancy[:, None]


def _evaluate_episodic(
    mdp: TabularMDP, policy: Tensor, kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward induction for V_t, Q_t; forward propagation for w_t."""
    assert mdp.horizon is not None
    T = mdp.horizon
    reward = mdp.reward.expand(-1, T, -1, -1)
    following = torch.zeros_like(mdp.start)
    values, action_values = [], []
    for t in reversed(range(T)):
        action_value = reward[:, t] + torch.einsum("bsat,bt->bsa", mdp.transition, following)
        following = (policy * action_value).sum(-1)
        values.append(following)
        action_values.append(action_value)
    occupancy = [mdp.start]
    for _ in range(T - 1):
        occupancy.append(torch.einsum("bs,bst->bt", occupancy[-1], kernel))
    return (
        torch.stack(values[::-1], dim=1),
        torch.stack(action_values[::-1], dim=1),
        torch.stack(occupancy, dim=1),
    )


def policy_gradient(evaluation: Evaluation) -> Float[Tensor, "B S A"]:
    """``∂J/∂θ[s, a] = Σ_t w_t(s) π(a|s) A_t(s, a)`` (the policy gradient theorem)."""
    weighted = torch.einsum("bxs,bxsa->bsa", evaluation.occupancy, evaluation.advantage)
    return evaluation.log_policy.exp() * weighted


def random_mdp(
    batch: int,
    states: int,
    actions: int,
    *,
    generator: torch.Generator,
    discount: float | None = None,
    horizon: int | None = None,
) -> tuple[TabularMDP, Float[Tensor, "B S A"]]:
    """Random MDPs and policies, drawn wide: from dense to deterministic, from flat to confident.

    One quarter of the MDPs has deterministic transitions (as text generation has); the softness of
    the others is drawn per MDP. One half has dense normal rewards, the other half sparse ones: in
    the episodic form a 0/1 reward at the last position (the verifier's reward), in the discounted
    form a reward of 1 for one action in one state. The scale of the policy's logits is drawn from
    [0.1, 5].

    Returns:
        The MDPs and the logits of their policies.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Softmax of scaled normals: scale 0 is uniform, scale 10 nearly deterministic.
    softness = 10 * uniform(batch, 1, 1, 1)
    transition = torch.softmax(softness * normal(batch, states, actions, states), -1)
    hard = torch.nn.functional.one_hot(transition.argmax(-1), states).to(torch.float64)
    transition = torch.where((uniform(batch) < 0.25)[:, None, None, None], hard, transition)

    positions = 1 if horizon is None else horizon
    dense = normal(batch, 1, states, actions).expand(-1, positions, -1, -1)
    sparse = torch.zeros(batch, positions, states, actions, dtype=torch.float64)
    if horizon is None:
        sparse[:, 0, 0, 0] = 1
    else:
        sparse[:, -1] = (uniform(batch, states, actions) < 0.5).to(torch.float64)
        sparse[:, -1, :, 0], sparse[:, -1, :, 1] = 1, 0  # never all alike, so that ε > 0
    reward = torch.where((uniform(batch) < 0.5)[:, None, None, None], dense, sparse)

    scale = 0.1 * 50 ** uniform(batch, 1, 1)  # log-uniform in [0.1, 5]
    mdp = TabularMDP(
        transition=transition,
        reward=reward,
        start=torch.softmax(3 * normal(batch, states), -1),
        discount=None if discount is None else torch.full((batch,), discount, dtype=torch.float64),
        horizon=horizon,
    )
    return mdp, scale * normal(batch, states, actions)
