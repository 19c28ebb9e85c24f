"""Gating the gradient of the log-probabilities removes exactly the rejected tokens' terms."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import GRPOTrainer

from capo import InputError
from capo.integrations._trl_judge import PolicyPass
from capo.integrations._trl_loss import LOSS_TYPES, gradient_weights, token_loss_scale

from . import trl_kit as kit

LEVELS = ("token", "sequence")


class HandMadeVerdict:
    """In the place of the judge: fixed weights, and a note of what it was shown."""

    rule = None

    def __init__(self, weights: torch.Tensor) -> None:
        self.weights = weights
        self.seen: PolicyPass | None = None

    def judge(self, policy_pass: PolicyPass, *_: Any) -> Any:
        self.seen = policy_pass
        zeros = torch.zeros(policy_pass.token_ids.shape)
        curvature = SimpleNamespace(policy_shift=zeros, objective_shift=zeros)
        return SimpleNamespace(
            weights=self.weights,
            curvature=curvature,
            everywhere=curvature,
            everywhere_mask=policy_pass.mask,
            selection=SimpleNamespace(
                weights=self.weights, rejection_rate=zeros.sum(), rejection_rate_by_reason={}
            ),
            batch_policy_shift=zeros.sum(),
            batch_objective_shift=zeros.sum(),
            offset=None,
        )


class DetachedTokens(GRPOTrainer):
    """The definition: rejected tokens' log-probabilities are constants of the loss."""

    keep: torch.Tensor

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        log_probs, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return (torch.where(self.keep, log_probs, log_probs.detach()), *others)


def keep_some(inputs: dict[str, Any]) -> torch.Tensor:
    keep = torch.rand(inputs["completion_ids"].shape) < 0.5
    keep &= inputs["completion_mask"].bool()
    keep[1] = False  # one sequence loses everything
    assert keep.any()
    assert (inputs["completion_mask"].bool() & ~keep).any()
    return keep


def assert_same_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    largest = max(g.abs().max() for g in b.values())
    assert largest > 0
    for name, expected in b.items():
        torch.testing.assert_close(a[name], expected, rtol=1e-5, atol=float(1e-6 * largest))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gated_gradient_is_that_of_the_loss_without_the_rejected_tokens(
    tmp_path: Path, loss_type: str, level: str
) -> None:
    settings = {"loss_type": loss_type, "importance_sampling_level": level, "beta": 0.1}
    ours = kit.ready(kit.trainer(tmp_path, model=saved_policy(tmp_path), **settings))
    definition = kit.ready(
        kit.trainer(tmp_path, model=saved_policy(tmp_path), cls=DetachedTokens, **settings)
    )
    inputs = kit.micro_batch(ours, off_policy=0.3)
    inputs["ref_per_token_logps"] = inputs["old_per_token_logps"] + 0.05
    keep = definition.keep = keep_some(inputs)
    ours._judge = HandMadeVerdict(keep.float())
    assert_same_gradients(kit.gradients(ours, inputs), kit.gradients(definition, inputs))
    # and it is not the gradient of the whole loss
    definition.keep = torch.ones_like(keep)
    whole = kit.gradients(definition, inputs)
    gated = kit.gradients(ours, inputs)
    assert any(not torch.allclose(gated[n], whole[n], rtol=1e-2) for n in whole)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_at_token_level_it_is_an_advantage_of_zero(tmp_path: Path, loss_type: str) -> None:
    """TRL takes advantages per token; with token-level ratios that masks as well."""
    ours = kit.ready(kit.trainer(tmp_path, loss_type=loss_type))
    stock = kit.ready(kit.trainer(tmp_path, cls=GRPOTrainer, loss_type=loss_type))
    inputs = kit.micro_batch(ours, off_policy=0.3)
    keep = keep_some(inputs)
    ours._judge = HandMadeVerdict(keep.float())
    masked = {**inputs, "advantages": inputs["advantages"][:, None] * keep}
    assert_same_gradients(kit.gradients(ours, inputs), kit.gradients(stock, masked))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_of_one_are_the_stock_trainer(tmp_path: Path, loss_type: str, level: str) -> None:
    settings = {"loss_type": loss_type, "importance_sampling_level": level}
    ours = kit.ready(kit.trainer(tmp_path, **settings))
    stock = kit.ready(kit.trainer(tmp_path, cls=GRPOTrainer, **settings))
    inputs = kit.micro_batch(ours, off_policy=0.3)
    ours._judge = HandMadeVerdict(inputs["completion_mask"].float())
    mine, theirs = kit.gradients(ours, inputs), kit.gradients(stock, inputs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_loss_value_is_untouched(tmp_path: Path) -> None:
    ours = kit.ready(kit.trainer(tmp_path))
    stock = kit.ready(kit.trainer(tmp_path, cls=GRPOTrainer))
    inputs = kit.micro_batch(ours, off_policy=0.3)
    ours._judge = HandMadeVerdict(keep_some(inputs).float())
    mine = ours._compute_loss(ours.model, inputs)
    assert torch.equal(mine, stock._compute_loss(stock.model, inputs))


def test_a_rejected_tokens_infinite_gradient_stays_out(tmp_path: Path) -> None:
    ours = kit.ready(kit.trainer(tmp_path))
    inputs = kit.micro_batch(ours, off_policy=0.3)
    inputs["advantages"] = inputs["advantages"][:, None].repeat(1, 6)
    inputs["advantages"][0, 2] = float("nan")
    keep = inputs["completion_mask"].bool().clone()
    keep[0, 2] = False
    ours._judge = HandMadeVerdict(keep.float())
    assert all(g.isfinite().all() for g in kit.gradients(ours, inputs).values())


def test_evaluation_is_not_judged(tmp_path: Path) -> None:
    ours = kit.trainer(tmp_path)
    ours.model.eval()
    judge = ours._judge = HandMadeVerdict(torch.zeros(4, 6))
    with torch.no_grad():
        ours._compute_loss(ours.model, kit.micro_batch(ours))
    assert judge.seen is None


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_effective_advantage_on_policy_is_the_advantage(
    tmp_path: Path, loss_type: str, level: str, accumulation: int
) -> None:
    """The loss's own normalisation is divided out exactly: a token enters as a batch of one."""
    ours = kit.ready(
        kit.trainer(
            tmp_path,
            loss_type=loss_type,
            importance_sampling_level=level,
            gradient_accumulation_steps=accumulation,
            epsilon_high=2.0,  # in cispo this is the largest ratio itself, and must let 1 pass
        ),
        accumulation,
    )
    inputs = kit.micro_batch(ours)
    judge = ours._judge = HandMadeVerdict(inputs["completion_mask"].float())
    ours._compute_loss(ours.model, inputs)
    assert judge.seen is not None
    mask = judge.seen.mask
    expected = inputs["advantages"][:, None].expand(mask.shape)
    torch.testing.assert_close(judge.seen.effective_advantage[mask], expected[mask])


@pytest.mark.parametrize("level", LEVELS)
def test_effective_advantage_is_ratio_times_not_clipped(tmp_path: Path, level: str) -> None:
    ours = kit.ready(kit.trainer(tmp_path, importance_sampling_level=level, epsilon=0.1))
    inputs = kit.micro_batch(ours, off_policy=0.4)
    judge = ours._judge = HandMadeVerdict(inputs["completion_mask"].float())
    ours._compute_loss(ours.model, inputs)
    assert judge.seen is not None
    mask, advantages = judge.seen.mask, inputs["advantages"][:, None]
    with torch.no_grad():
        log_probs, _, _ = ours._get_per_token_logps_and_entropies(
            ours.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            6,
        )
    log_ratio = log_probs - inputs["old_per_token_logps"]
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1))[:, None].expand(mask.shape)
    ratio = log_ratio.exp()
    clipped = ((advantages > 0) & (ratio > 1.1)) | ((advantages < 0) & (ratio < 0.9))
    assert clipped[mask].any()
    assert (~clipped)[mask].any()
    expected = advantages * ratio * ~clipped
    torch.testing.assert_close(
        judge.seen.effective_advantage[mask], expected[mask], rtol=1e-5, atol=1e-6
    )


def test_denominators() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    kept = torch.tensor([[1.0, 0, 0.5, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    assert gradient_weights(kept, mask, "all") is kept
    renormalised = gradient_weights(kept, mask, "kept")
    expected = torch.tensor([[8 / 3, 0, 4 / 3, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    torch.testing.assert_close(renormalised, expected)


def test_kept_denominator_is_the_mean_over_kept_tokens(tmp_path: Path) -> None:
    """As if the rejected tokens were padding: TRL's own sequence mean over what is left."""
    ours = kit.ready(kit.trainer(tmp_path))
    stock = kit.ready(kit.trainer(tmp_path, cls=GRPOTrainer))
    inputs = kit.micro_batch(ours)
    keep = keep_some(inputs)
    weights = gradient_weights(keep.float(), inputs["completion_mask"], "kept")
    ours._judge = HandMadeVerdict(weights)
    # `tool_mask` takes tokens out of the loss and its denominators, not out of the context.
    left_out = {**inputs, "tool_mask": keep.long()}
    assert_same_gradients(kit.gradients(ours, inputs), kit.gradients(stock, left_out))


def test_unknown_loss_type_is_named() -> None:
    with pytest.raises(InputError, match=r"^loss_type: must be one of grpo.*got 'ppo'"):
        token_loss_scale("ppo", torch.ones(1, 2), max_completion_length=2, window_tokens=2)


def saved_policy(tmp_path: Path) -> Any:
    """A policy with a path, from which TRL loads the reference model that `beta` needs."""
    model = kit.policy()
    model.save_pretrained(tmp_path / "policy")
    return type(model).from_pretrained(tmp_path / "policy")
