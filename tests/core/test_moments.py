"""Simulated moments are those of a real AdamW on an explicit head parameter."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

import capo
import oracle
from core.cases import Case

BETAS, EPS, LR, DECAY = (0.8, 0.95), 1e-6, 0.05, 0.1
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.4, "bias": True},
    {"temperature": 0.7, "logit_scale": 1.3, "logit_softcap": 2.0, "bias": True},
]


class Training:
    """A head that AdamW really trains, and the library's simulation of its moments."""

    def __init__(self, top_k: int | None = None, **settings: Any) -> None:
        self.case = Case("moments", vocab=7, dim=3, **settings)
        self.head, self.top_k = self.case.batch.head, top_k
        self.weight = torch.nn.Parameter(self.head.weight.clone())
        self.optimizer = torch.optim.AdamW(
            [self.weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, foreach=False
        )
        self.moments = self.new_moments()
        self.generator = torch.Generator().manual_seed(3)

    def new_moments(self) -> capo.LastLayerMoments:
        return capo.LastLayerMoments((7, 3), BETAS, EPS, DECAY, dtype=torch.float64)

    def micro_batch(self, n: int = 5) -> dict[str, Tensor]:
        normal = torch.randn(4, n, generator=self.generator, dtype=torch.float64)
        return {
            "hidden": torch.randn(n, 3, generator=self.generator, dtype=torch.float64),
            "token_ids": torch.randint(7, (n,), generator=self.generator),
            "advantages": normal[0],
            "weights": (normal[1] > 0).double() * normal[2].abs().clamp(max=1),
            "coefficients": normal[3].exp(),
        }

    def loss(self, batch: dict[str, Tensor], scale: float) -> Tensor:
        """−scale · Σ weight · A · ratio · log π(a | W), the ratio a constant."""
        terms = []
        for i, token in enumerate(batch["token_ids"].tolist()):
            hidden = batch["hidden"][i]
            current = oracle.Head(
                self.weight.detach(),
                self.head.bias,
                self.head.temperature,
                self.head.logit_scale,
                self.head.logit_softcap,
            )
            index = oracle.kept_rows(current, hidden, token, self.top_k)
            log_prob = current.rows(index).log_policy(self.weight[index], hidden)[0]
            factor = batch["weights"][i] * batch["advantages"][i] * batch["coefficients"][i]
            terms.append(factor * log_prob)
        return -scale * torch.stack(terms).sum()

    def accumulate(self, batch: dict[str, Tensor], scale: float, **changes: Any) -> None:
        given = batch | changes
        self.moments.accumulate(
            given.pop("hidden"),
            self.weight.detach(),
            given.pop("token_ids"),
            given.pop("advantages"),
            temperature=self.head.temperature,
            logit_scale=self.head.logit_scale,
            logit_softcap=self.head.logit_softcap,
            head_bias=self.head.bias,
            top_k=self.top_k,
            scale=scale,
            **given,
        )

    def step(self, max_norm: float | None = None) -> None:
        """Two micro-batches, then one optimizer step of both."""
        for scale in (0.25, 0.5):
            batch = self.micro_batch()
            self.accumulate(batch, scale)
            self.loss(batch, scale).backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.weight], max_norm, foreach=False)
        self.moments.advance(max_norm=max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def assert_equal(self, rtol: float = 1e-10) -> None:
        state, judged = self.optimizer.state[self.weight], self.moments.adam_step(LR)
        torch.testing.assert_close(judged.exp_avg, state["exp_avg"], rtol=rtol, atol=1e-16)
        torch.testing.assert_close(judged.exp_avg_sq, state["exp_avg_sq"], rtol=rtol, atol=1e-18)
        assert judged.step == int(state["step"])


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "hot", "softcap"])
def test_moments_follow_a_real_optimizer(settings: dict[str, Any], top_k: int | None) -> None:
    training = Training(top_k, **settings)
    for _ in range(4):
        training.step()
        training.assert_equal()


@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_clipping_is_that_of_the_trainer(max_norm: float) -> None:
    training = Training()
    for _ in range(3):
        training.step(max_norm)
        training.assert_equal()


def test_the_step_before_any_advance_has_an_empty_state() -> None:
    step = Training().moments.adam_step(LR, grad_scale=0.5)
    assert (step.lr, step.step, step.grad_scale) == (LR, 0, 0.5)
    assert (step.betas, step.eps, step.weight_decay) == (BETAS, EPS, DECAY)
    for moment in (step.exp_avg, step.exp_avg_sq):
        assert moment is None or (moment == 0).all()


def test_accumulating_does_not_move_the_moments() -> None:
    training = Training()
    training.step()
    before = training.moments.adam_step(LR)
    first, second = before.exp_avg.clone(), before.exp_avg_sq.clone()
    training.accumulate(training.micro_batch(), scale=1.0)
    after = training.moments.adam_step(LR)
    assert after.step == before.step
    assert after.exp_avg.equal(first)
    assert after.exp_avg_sq.equal(second)


def test_masked_tokens_are_never_read() -> None:
    training, masked = Training(), Training()
    batch = training.micro_batch(4)
    nan = torch.full((2,), torch.nan, dtype=torch.float64)
    padded = {
        name: torch.cat([value, nan if value.is_floating_point() else torch.tensor([-100, 99])])
        for name, value in batch.items()
        if name != "hidden"
    } | {"hidden": torch.cat([batch["hidden"], nan[:, None].expand(-1, 3)])}
    training.accumulate(batch, 1.0)
    masked.accumulate(padded, 1.0, mask=torch.arange(6) < 4)
    training.moments.advance()
    masked.moments.advance()
    expected, actual = training.moments.adam_step(LR), masked.moments.adam_step(LR)
    torch.testing.assert_close(actual.exp_avg, expected.exp_avg, rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(actual.exp_avg_sq, expected.exp_avg_sq, rtol=1e-12, atol=1e-18)


def test_weights_and_coefficients_default_to_one() -> None:
    plain, ones = Training(), Training()
    batch = plain.micro_batch()
    one = torch.ones(5, dtype=torch.float64)
    ones.accumulate(batch, 1.0, weights=one, coefficients=one)
    plain.accumulate(batch, 1.0, weights=None, coefficients=None)
    plain.moments.advance()
    ones.moments.advance()
    assert plain.moments.adam_step(LR).exp_avg.equal(ones.moments.adam_step(LR).exp_avg)


def test_state_dict_round_trip() -> None:
    training = Training()
    training.step()
    training.step()
    file = io.BytesIO()
    torch.save(training.moments.state_dict(), file)
    file.seek(0)
    resumed = training.new_moments()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    saved, training.moments = training.moments, resumed
    training.assert_equal()
    training.step()
    training.assert_equal()
    # a copy, not a view: the moments that were saved have stood still
    assert saved.adam_step(LR).step == 2
    assert not saved.adam_step(LR).exp_avg.equal(training.moments.adam_step(LR).exp_avg)


def test_bad_input_names_the_field() -> None:
    training = Training()
    other = capo.LastLayerMoments((8, 3), BETAS, EPS, dtype=torch.float64)
    with pytest.raises(capo.InputError):
        training.moments.load_state_dict(other.state_dict())
    batch = training.micro_batch()
    with pytest.raises(capo.InputError) as caught:
        training.accumulate(batch, 1.0, weights=torch.ones(9).double())
    assert caught.value.field == "weights"
    with pytest.raises(capo.InputError) as caught:
        training.moments.advance(max_norm=-1.0)
    assert caught.value.field == "max_norm"
