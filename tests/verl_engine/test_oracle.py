"""One step of the engine against a plain loop that shares no code with verl or the integration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import capo
from verl_engine.conftest import Run

TEMPERATURE, CLIP, CLIP_NEGATIVE = 0.9, 0.2, 3.0


def test_a_step_is_that_of_a_plain_loop(results: Run, folder: Path) -> None:
    """Masks and weights, from the model's own hidden states, PPO's clip and torch's AdamW."""
    batch = torch.load(folder / "batch.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32)
    first = batch["prompts"].size(1)
    tokens = batch["responses"]
    mask = batch["response_mask"].bool()
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        output_hidden_states=True,
    )
    logits = output.logits[:, first - 1 : -1] / TEMPERATURE
    log_probs = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    ratio = (log_probs.detach() - batch["old_log_probs"]).exp()
    advantages = batch["advantages"]
    # Where PPO's clip is active the token has no gradient; below, its dual for negative advantages.
    clipped = torch.where(advantages > 0, ratio > 1 + CLIP, ratio < 1 - CLIP)
    clipped |= (advantages < 0) & (ratio > CLIP_NEGATIVE)
    effective = torch.where(clipped, 0.0, advantages * ratio)
    curvature = capo.token_curvature(
        output.hidden_states[-1][:, first - 1 : -1].detach(),
        model.lm_head.weight.detach(),
        tokens,
        effective,
        step=capo.AdamStep(1e-4, (0.9, 0.999), 1e-4, None, None, 0, weight_decay=0.01),
        temperature=TEMPERATURE,
        top_k=20,
        mask=mask,
    )
    kept = (curvature.policy_shift <= 3e-4) & (curvature.objective_shift.abs() <= 0.02) & mask
    ours = results("first", 2)
    weight = torch.cat([r["records"][0]["weight"] for r in ours])
    assert torch.equal(weight > 0, kept)
    assert 0 < int(kept.sum()) < int(mask.sum())
    assert bool(clipped[mask].any())

    # Each sequence is renormalised over what is kept of it; the loss is the mean over all tokens.
    kept_tokens = kept.sum(-1, keepdim=True)
    share = torch.where(kept_tokens > 0, mask.sum(-1, keepdim=True) / kept_tokens, 0.0) * kept
    loss = -(share * effective * log_probs).sum() / mask.sum()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.01
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert torch.isclose(norm, torch.tensor(ours[0]["metrics"][0]["grad_norm"][0]), rtol=1e-4)
    for name, value in model.state_dict().items():
        assert torch.allclose(ours[0]["weights"][name], value, rtol=0, atol=3e-7), name


@pytest.mark.parametrize(
    ("name", "policy"), [("step", "policy"), ("step-gathered", "policy"), ("step-tied", "tied")]
)
@torch.no_grad()
def test_the_measured_shift_is_the_divergence_of_the_weights_before_and_after(
    results: Run, folder: Path, name: str, policy: str
) -> None:
    """The engine measured it on a trial, of sharded weights that it had not changed yet."""
    batch = torch.load(folder / "batch.pt")
    model = AutoModelForCausalLM.from_pretrained(folder / policy, dtype=torch.float32).double()
    first = batch["prompts"].size(1)
    mask = batch["response_mask"].bool()

    def log_probs() -> torch.Tensor:
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            position_ids=batch["position_ids"],
        ).logits
        return (logits[:, first - 1 : -1] / TEMPERATURE).log_softmax(-1)[mask]

    for world in (1, 2):
        run = results(name, world)[0]
        assert len(run["metrics"]) == 1
        metrics = run["metrics"][0]
        assert (
            metrics["capo/trust/trials"][0] >= 2
        )  # the later ones must see all that the first saw
        model.load_state_dict(
            AutoModelForCausalLM.from_pretrained(folder / policy, dtype=torch.float32).state_dict()
        )
        before = log_probs()
        model.load_state_dict(run["weights"])
        divergence = (before.exp() * (before - log_probs())).sum(-1).mean()
        measured = torch.tensor(metrics["capo/trust/measured_policy_shift"][0]).double()
        assert 0 < divergence <= metrics["capo/trust/budget"][0]
        assert torch.isclose(measured, divergence, rtol=2e-2), (measured, divergence)
