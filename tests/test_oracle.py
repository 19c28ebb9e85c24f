"""The oracle against itself: two derivations, and the optimizers it claims to imitate."""

from __future__ import annotations

import pytest
import torch

import oracle
from core.cases import CASES, CONFIDENT, FULL, MODES, Case, Mode, verdicts


@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
@pytest.mark.parametrize("case", CASES[::3], ids=lambda c: c.name)
def test_autograd_and_finite_differences_agree(case: Case, mode: Mode) -> None:
    plain, fine = verdicts(case, mode), verdicts(case, mode, arbiter=True)
    for name in oracle.FIELDS:
        torch.testing.assert_close(plain[name], fine[name], rtol=1e-11, atol=1e-20)


def test_float64_autograd_is_no_arbiter_of_confident_tokens() -> None:
    """Why ``oracle_mp`` exists; the two still agree where the policy is not yet sure."""
    case = CONFIDENT[0]
    plain, fine = verdicts(case, FULL), verdicts(case, FULL, arbiter=True)
    error = (plain["sampled_shift"] / fine["sampled_shift"] - 1).abs()
    assert error[0] < 1e-11
    assert error[-1] > 1e-9


@pytest.mark.parametrize("case", CONFIDENT, ids=lambda c: c.name)
def test_confident_cases_are_as_confident_as_they_say(case: Case) -> None:
    batch = case.batch
    favourites = batch.token_ids
    if case.favourite == "other":
        favourites = (favourites + 1) % case.vocab
    for hidden, favourite, doubt in zip(batch.hidden, favourites, case.doubt or (), strict=True):
        pi = batch.head.log_policy(batch.head.weight, hidden).exp()
        pi[favourite] = 0
        assert pi.sum().item() == pytest.approx(doubt, rel=1e-6)


@pytest.mark.parametrize(
    ("cls", "weight_decay"),
    [(torch.optim.Adam, 0.0), (torch.optim.AdamW, 0.0), (torch.optim.AdamW, 0.1)],
)
def test_take_step_is_the_optimizer_on_the_weight_itself(
    cls: type[torch.optim.Optimizer], weight_decay: float
) -> None:
    torch.manual_seed(0)
    weight, gradient, m = (torch.randn(5, 3, dtype=torch.float64) for _ in range(3))
    step = oracle.Adam(0.02, (0.8, 0.95), 1e-6, m, m.square(), 4, weight_decay, grad_scale=0.3)
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = cls(
        [parameter], lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay, foreach=False
    )
    optimizer.state[parameter] = oracle.adam_state(step, weight)
    parameter.grad = -0.3 * gradient
    optimizer.step()
    change = parameter.detach() - weight
    torch.testing.assert_close(
        oracle.take_step(step, gradient, weight), change, rtol=1e-12, atol=1e-15
    )


def test_policy_shift_is_the_kl_of_a_small_step() -> None:
    """½ ΔᵀFΔ → KL(π_W ‖ π_{W+Δ}), and the surrogate moves by m_H, to third order in the step."""
    batch = CASES[0].batch
    h, token, A = batch.hidden[0], int(batch.token_ids[0]), float(batch.advantages[0])
    for lr in (1e-2, 1e-3):
        delta = lr * oracle.score(batch.head, h, token)
        judged = oracle.judge_step(batch.head, h, token, A, delta)
        old = batch.head.log_policy(batch.head.weight, h)
        new = batch.head.log_policy(batch.head.weight + delta, h)
        kl = (old.exp() * (old - new)).sum()
        gain = A * ((new - old)[token].exp() - 1)
        assert abs(kl / judged.exact_shift - 1) < 5 * lr
        assert abs(gain - judged.objective_shift) < 5 * lr**3
