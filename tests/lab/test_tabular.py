"""The exact quantities of the tabular MDP against enumeration, iteration and differentiation."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from capo import InputError
from capo.lab.tabular_bounds import compare, kl_divergence, kl_growth, remainder_growth
from capo.lab.tabular_mdp import TabularMDP, evaluate, policy_gradient, random_mdp

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMS: list[dict[str, Any]] = [{"discount": 0.9}, {"discount": 0.3}, {"horizon": 1}, {"horizon": 4}]


def draw(batch: int = 6, states: int = 3, actions: int = 3, seed: int = 0, **form: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    mdp, logits = random_mdp(batch, states, actions, generator=generator, **form)
    delta = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    return mdp, logits, delta


def trajectories(
    mdp: TabularMDP, b: int, policy: torch.Tensor
) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """Every (probability, [(s_0, a_0), …]) of MDP ``b``, in plain Python numbers."""
    assert mdp.horizon is not None
    S, A = policy.shape
    P, start = mdp.transition[b].tolist(), mdp.start[b].tolist()
    pi = policy.tolist()
    for path in itertools.product(itertools.product(range(S), range(A)), repeat=mdp.horizon):
        probability = start[path[0][0]]
        for t, (s, a) in enumerate(path):
            probability *= pi[s][a]
            if t + 1 < mdp.horizon:
                probability *= P[s][a][path[t + 1][0]]
        yield probability, list(path)


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_episodic_quantities_equal_brute_force_enumeration(horizon: int) -> None:
    mdp, logits, delta = draw(batch=3, states=2, actions=2, horizon=horizon)
    base, result = evaluate(mdp, logits), compare(mdp, logits, delta)
    for b in range(3):
        reward = mdp.reward[b].expand(horizon, -1, -1).tolist()
        policy, other = logits[b].softmax(-1), (logits + delta)[b].softmax(-1)
        old = list(trajectories(mdp, b, policy))
        new = list(trajectories(mdp, b, other))

        def total(path: list[tuple[int, int]], reward: Any = reward) -> float:
            return sum(reward[t][s][a] for t, (s, a) in enumerate(path))

        J = sum(p * total(path) for p, path in old)
        J_new = sum(p * total(path) for p, path in new)
        assert base.objective[b].item() == pytest.approx(J, abs=1e-12)
        assert result.improvement[b].item() == pytest.approx(J_new - J, abs=1e-12)

        # The chain rule: T·δ is the KL divergence between the two laws of whole trajectories.
        kl = sum(p * math.log(p / q) for (p, _), (q, _) in zip(old, new, strict=True) if p > 0)
        assert horizon * result.mean_kl[b].item() == pytest.approx(kl, abs=1e-12)

        # Q_t(s, a) and w_t(s) by conditioning the enumeration; ω from nothing else.
        surrogate = 0.0
        for t, s in itertools.product(range(horizon), range(2)):
            weight = sum(p for p, path in old if path[t][0] == s)
            assert base.occupancy[b, t, s].item() == pytest.approx(weight, abs=1e-12)
            values = []
            for a in range(2):
                through = [(p, path) for p, path in old if path[t] == (s, a)]
                mass = sum(p for p, _ in through)
                if mass < 1e-12:
                    break
                togo = sum(
                    p * sum(reward[k][x][y] for k, (x, y) in enumerate(path) if k >= t)
                    for p, path in through
                )
                values.append(togo / mass)
            if len(values) == 2:
                assert base.action_value[b, t, s].tolist() == pytest.approx(values, abs=1e-9)
                surrogate += weight * sum(
                    (other[s, a] - policy[s, a]).item() * values[a] for a in range(2)
                )
        assert result.surrogate[b].item() == pytest.approx(surrogate, abs=1e-9)


def test_discounted_quantities_equal_the_sum_over_time() -> None:
    mdp, logits, _ = draw(discount=0.9)
    base, policy = evaluate(mdp, logits), logits.softmax(-1)
    value, occupancy = torch.zeros_like(mdp.start), torch.zeros_like(mdp.start)
    law, scale = mdp.start, 1.0
    for _ in range(400):  # 0.9^400 < 1e-18
        occupancy = occupancy + scale * law
        law, scale = torch.einsum("bs,bsa,bsat->bt", law, policy, mdp.transition), scale * 0.9
        q = mdp.reward[:, 0] + 0.9 * torch.einsum("bsat,bt->bsa", mdp.transition, value)
        value = (policy * q).sum(-1)
    torch.testing.assert_close(base.value[:, 0], value, rtol=0, atol=1e-10)
    torch.testing.assert_close(base.occupancy[:, 0], occupancy, rtol=0, atol=1e-10)
    torch.testing.assert_close(base.objective, (mdp.start * value).sum(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(base.occupancy.sum((1, 2)), mdp.mass)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_equals_finite_differences_of_the_objective(form: dict[str, Any]) -> None:
    mdp, logits, _ = draw(**form)
    gradient, h = policy_gradient(evaluate(mdp, logits)), 1e-5
    for s, a in itertools.product(range(3), range(3)):
        bump = torch.zeros_like(logits)
        bump[:, s, a] = h
        difference = (
            evaluate(mdp, logits + bump).objective - evaluate(mdp, logits - bump).objective
        ) / (2 * h)
        torch.testing.assert_close(gradient[:, s, a], difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_performance_difference_lemma(form: dict[str, Any]) -> None:
    mdp, logits, delta = draw(batch=50, **form)
    base, after = evaluate(mdp, logits), evaluate(mdp, logits + delta)
    expected = torch.einsum(
        "bxs,bsa,bxsa->b", after.occupancy, after.log_policy.exp(), base.advantage
    )
    improvement = compare(mdp, logits, delta, base).improvement
    torch.testing.assert_close(improvement, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_quadratic_forms_are_the_second_order_taylor_polynomials(form: dict[str, Any]) -> None:
    mdp, logits, delta = draw(**form)
    base = evaluate(mdp, logits)

    eta = torch.zeros(6, 1, 1, dtype=torch.float64, requires_grad=True)
    policy = (logits + eta * delta).softmax(-1)
    surrogate = torch.einsum("bxs,bsa,bxsa->", base.occupancy, policy, base.advantage)
    (first,) = torch.autograd.grad(surrogate, eta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), eta)
    expected = (first.detach() + second / 2).flatten()
    result = compare(mdp, logits, delta, base)
    torch.testing.assert_close(result.quadratic_surrogate, expected, rtol=1e-9, atol=1e-11)
    small = compare(mdp, logits, 1e-4 * delta, base)
    torch.testing.assert_close(small.mean_kl, small.quadratic_kl, rtol=1e-3, atol=0)
    torch.testing.assert_close(small.surrogate, small.quadratic_surrogate, rtol=1e-3, atol=1e-11)


def test_kl_is_exact_for_tiny_and_for_huge_shifts() -> None:
    _, logits, shift = draw(batch=20, discount=0.5)
    log_policy = logits.log_softmax(-1)
    for size in (0.3, 3.0, 30.0):
        other = (logits + size * shift).log_softmax(-1)
        expected = (log_policy.exp() * (log_policy - other)).sum(-1)
        torch.testing.assert_close(kl_divergence(log_policy, size * shift), expected)
    tiny = 1e-7 * shift
    centred = tiny - (log_policy.exp() * tiny).sum(-1, keepdim=True)
    half_variance = (log_policy.exp() * centred**2).sum(-1) / 2
    torch.testing.assert_close(kl_divergence(log_policy, tiny), half_variance, rtol=1e-6, atol=0)
    assert bool(torch.isfinite(kl_divergence(log_policy, 1e4 * shift)).all())


@pytest.mark.parametrize("R", [0.0, 1e-6, 9e-4, 1.1e-3, 9e-3, 1.1e-2, 0.5, 3.0, 20.0])
def test_growth_factors_equal_their_power_series(R: float) -> None:
    value = torch.tensor(R, dtype=torch.float64)
    kappa = sum(2 * R**k / math.factorial(k + 2) for k in range(100))
    psi = sum(R**k / math.factorial(k + 3) for k in range(100))
    assert kl_growth(value).item() == pytest.approx(kappa, rel=1e-9)
    assert remainder_growth(value).item() == pytest.approx(psi, rel=1e-8)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("discount", {"discount": None}),
    ("discount", {"horizon": 3}),
    ("discount", {"discount": torch.ones(2, dtype=torch.float64)}),
    ("discount", {"discount": torch.full((3,), 0.5, dtype=torch.float64)}),
    ("horizon", {"discount": None, "horizon": 0}),
    ("transition", {"transition": torch.full((2, 3, 2, 3), 0.5, dtype=torch.float64)}),
    ("transition", {"transition": torch.full((2, 3, 2, 3), 1 / 3)}),
    ("transition", {"transition": torch.ones(2, 3, 2, dtype=torch.float64)}),
    ("start", {"start": torch.tensor([[2.0, -1.0, 0.0]] * 2, dtype=torch.float64)}),
    ("start", {"start": torch.full((2, 2), 0.5, dtype=torch.float64)}),
    ("reward", {"reward": torch.zeros(2, 2, 3, 2, dtype=torch.float64)}),
    ("reward", {"reward": torch.full((2, 1, 3, 2), torch.nan, dtype=torch.float64)}),
]


@pytest.mark.parametrize(("field", "change"), BAD)
def test_what_is_not_an_mdp_is_refused_by_name(field: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "transition": torch.full((2, 3, 2, 3), 1 / 3, dtype=torch.float64),
        "reward": torch.zeros(2, 1, 3, 2, dtype=torch.float64),
        "start": torch.full((2, 3), 1 / 3, dtype=torch.float64),
        "discount": torch.full((2,), 0.5, dtype=torch.float64),
    }
    TabularMDP(**good)
    with pytest.raises(InputError) as caught:
        TabularMDP(**(good | change))
    assert caught.value.field == field


@pytest.mark.parametrize("logits", [torch.zeros(6, 3, 2), torch.full((6, 3, 3), torch.inf)])
def test_logits_that_do_not_fit_are_refused(logits: torch.Tensor) -> None:
    mdp, _, _ = draw(discount=0.5)
    with pytest.raises(InputError, match="logits"):
        evaluate(mdp, logits.to(torch.float64))
