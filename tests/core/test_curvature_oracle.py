"""``token_curvature`` against the oracle: 1e-9 relative in float64, 1e-4 in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import oracle
from core.cases import CASES, CONFIDENT, FULL, MODES, Case, Mode, cast, verdicts
from core.subject import IMPLEMENTATIONS, as_capo, curvature

FISHERS = ("sampled", "exact")

each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
each_fisher = pytest.mark.parametrize("fisher", FISHERS)
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def assert_judged(
    actual: Any,
    expected: dict[str, torch.Tensor],
    fisher: str,
    rtol: float,
    nats: float = 1e-36,
) -> None:
    """Every field equals the oracle's, elementwise and relatively.

    The one absolute allowance is ``nats``, for the entropy, which no shift is made of.
    """
    pairs = {
        "objective_shift": actual.objective_shift,
        f"{fisher}_shift": actual.policy_shift,
        "s": actual.s,
        "variance": actual.variance,
        "log_prob": actual.log_prob,
        "entropy": actual.entropy,
    }
    for name, value in pairs.items():
        torch.testing.assert_close(
            value.double(),
            expected[name],
            rtol=rtol,
            atol=nats if name == "entropy" else 1e-36,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@each_impl
@each_fisher
@each_mode
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_equals_explicit_hessian_and_fisher(case: Case, mode: Mode, fisher: str, impl: str) -> None:
    actual = curvature(case.batch, mode, fisher=fisher, impl=impl)
    assert actual.objective_shift.dtype == torch.float64
    assert_judged(actual, verdicts(case, mode), fisher, rtol=1e-9)


@each_impl
@each_mode
@pytest.mark.parametrize("case", CONFIDENT, ids=lambda c: c.name)
def test_confident_tokens_float64(case: Case, mode: Mode, impl: str) -> None:
    expected = verdicts(case, mode, arbiter=True)
    for fisher in FISHERS:
        actual = curvature(case.batch, mode, fisher=fisher, impl=impl)
        assert_judged(actual, expected, fisher, rtol=1e-9)


@each_impl
@each_mode
@pytest.mark.parametrize("case", CONFIDENT, ids=lambda c: c.name)
def test_confident_tokens_float32(case: Case, mode: Mode, impl: str) -> None:
    """1 − π from 1e-2 to 1e-8, below float32's resolution of π itself."""
    batch = cast(case.batch, torch.float32)
    expected = verdicts(case, mode, arbiter=True, dtype=torch.float32)
    for fisher in FISHERS:
        actual = curvature(batch, mode, torch.float32, fisher=fisher, impl=impl)
        nats = 1e-36 if case.favourite == "sampled" else 1e-6
        assert_judged(actual, expected, fisher, rtol=1e-4, nats=nats)


@each_impl
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_top_k_of_the_whole_vocabulary_is_the_whole_vocabulary(case: Case, impl: str) -> None:
    for renormalize in (True, False):
        everything = Mode("all", top_k=case.vocab, renormalize=renormalize)
        actual = curvature(case.batch, everything, impl=impl)
        assert_judged(actual, verdicts(case, FULL), "sampled", rtol=1e-9)


@each_impl
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("sgd", "adam")], ids=lambda c: c.name
)
def test_top_1_is_the_sampled_token_alone(case: Case, renormalize: bool, impl: str) -> None:
    """Renormalised, a policy over one token cannot move; otherwise only that row does."""
    mode = Mode("top1", top_k=1, renormalize=renormalize)
    actual = curvature(case.batch, mode, fisher="exact", impl=impl)
    torch.testing.assert_close(actual.log_prob, verdicts(case, FULL)["log_prob"])
    if renormalize:
        zeros = torch.zeros_like(actual.s)
        for value in (actual.objective_shift, actual.policy_shift, actual.s, actual.variance):
            torch.testing.assert_close(value, zeros, rtol=0, atol=1e-15)
    else:
        assert_judged(actual, verdicts(case, mode), "exact", rtol=1e-9)


@each_impl
@each_fisher
@pytest.mark.parametrize(
    "name",
    ["sgd", "momentum", "adam", "adamw", "adam-frozen", "sgd-softcap-all", "adam-softcap-all"],
)
@pytest.mark.parametrize("mode", MODES[:2], ids=lambda m: m.name)
@pytest.mark.parametrize("granularity", ["sequence", "batch"])
def test_groups_share_the_step_of_their_mean_gradient(
    granularity: str, mode: Mode, name: str, fisher: str, impl: str
) -> None:
    case = _with_tokens(name, (1.0, -0.7, 2.3, 0.4, -1.1))
    batch, mask = case.batch, torch.tensor([True, True, False, True, True])
    sequence_ids = torch.tensor([7, 3, 3, 7, 3])
    hidden = batch.hidden.clone()
    hidden[2] = torch.nan  # masked: neither in the mean gradient nor in the average
    groups = [[0, 3], [1, 4]] if granularity == "sequence" else [[0, 1, 3, 4]]
    actual = curvature(
        batch,
        mode,
        hidden=hidden,
        fisher=fisher,
        impl=impl,
        granularity=granularity,
        sequence_ids=sequence_ids if granularity == "sequence" else None,
        mask=mask,
    )
    for group in groups:
        judged = oracle.judge_group(
            batch.head,
            batch.hidden[group],
            batch.token_ids[group].tolist(),
            batch.effective[group].tolist(),
            batch.step,
            mode.top_k,
        )
        for name_, field in (("objective_shift",) * 2, (f"{fisher}_shift", "policy_shift")):
            mean = torch.stack([getattr(j, name_) for j in judged]).mean()
            torch.testing.assert_close(
                getattr(actual, field)[group], mean.expand(len(group)), rtol=1e-9, atol=0
            )
        for field in ("log_prob", "entropy", "s", "variance"):  # these stay each token's own
            own = torch.stack([getattr(j, field) for j in judged])
            torch.testing.assert_close(getattr(actual, field)[group], own, rtol=1e-9, atol=0)
    for value in (actual.objective_shift, actual.policy_shift, actual.log_prob):
        assert value[2] == 0


@each_impl
def test_a_given_momentum_step_at_batch_level(impl: str) -> None:
    """The step that torch's own momentum SGD is about to take, handed over as it is."""
    case = _with_tokens("sgd", (1.0, -0.7, 2.3, 0.4))
    batch = case.batch
    momentum = oracle.Momentum(0.1, 0.9, torch.randn_like(batch.head.weight))
    tokens, advantages = batch.token_ids.tolist(), batch.advantages.tolist()
    judged = oracle.judge_group(batch.head, batch.hidden, tokens, advantages, momentum)
    gradient = torch.stack(
        [
            A * oracle.score(batch.head, h, a)
            for h, a, A in zip(batch.hidden, tokens, advantages, strict=True)
        ]
    ).mean(0)
    delta = oracle.take_step(momentum, gradient, batch.head.weight)
    actual = curvature(batch, step=as_capo(oracle.Given(delta)), granularity="batch", impl=impl)
    for name, field in (("objective_shift",) * 2, ("sampled_shift", "policy_shift")):
        mean = torch.stack([getattr(j, name) for j in judged]).mean()
        torch.testing.assert_close(getattr(actual, field), mean.expand(4), rtol=1e-9, atol=0)


def _with_tokens(name: str, advantages: tuple[float, ...]) -> Case:
    (case,) = (c for c in CASES if c.name == name)
    return replace(case, advantages=advantages, coefficients=None)
