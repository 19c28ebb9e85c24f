"""The hidden states are those that predict the tokens, and the head's logits are the trainer's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from capo import InputError
from capo.integrations._trl_head import LMHead, capture_hidden, predicting_positions, read_head

from . import trl_kit as kit


def log_probs_by_definition(
    hidden: torch.Tensor, head: LMHead, token_ids: torch.Tensor
) -> torch.Tensor:
    logits = hidden.double() @ head.weight.double().mT
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    if head.logit_softcap is not None:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    log_pi = torch.log_softmax(logits / head.temperature, dim=-1)
    return log_pi.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("family", kit.CONFIGS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_captured_hidden_states_give_the_trainers_log_probs(
    tmp_path: Path, family: str, temperature: float
) -> None:
    instance = kit.trainer(tmp_path, model=kit.policy(family), temperature=temperature)
    inputs = kit.micro_batch(instance)
    with torch.no_grad(), capture_hidden(instance.model) as passes:
        trainers, _, _ = instance._get_per_token_logps_and_entropies(
            instance.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].size(1),
        )
    head = read_head(instance.model, instance.temperature)
    hidden = predicting_positions(torch.cat(passes), inputs["completion_ids"].size(1))
    ours = log_probs_by_definition(hidden, head, inputs["completion_ids"])
    mask = inputs["completion_mask"].bool()
    torch.testing.assert_close(ours[mask], trainers[mask].double(), rtol=1e-5, atol=1e-5)
    # The neighbour's hidden states would not do.
    shifted = log_probs_by_definition(
        torch.cat(passes)[:, -hidden.size(1) :], head, inputs["completion_ids"]
    )
    assert (shifted - trainers)[mask].abs().max() > 1e-3


def test_families_cover_every_logit_transform() -> None:
    heads = {family: read_head(kit.policy(family), 1.0) for family in kit.CONFIGS}
    assert heads["qwen2"].logit_scale == 1.0
    assert heads["cohere (multiplier)"].logit_scale == 0.3
    assert heads["granite (divisor)"].logit_scale == 0.25
    assert heads["gemma2 (soft-cap)"].logit_softcap == 0.05
    assert heads["phi (bias)"].bias is not None


def test_hook_is_gone_after_the_block() -> None:
    model = kit.policy()
    with capture_hidden(model) as passes:
        model(torch.tensor([[3, 4]]))
    model(torch.tensor([[3, 4]]))
    assert len(passes) == 1
    assert not passes[0].requires_grad


def test_head_inside_a_peft_like_wrapper_is_found() -> None:
    model = kit.policy()
    wrapped: Any = SimpleNamespace(get_base_model=lambda: model)
    assert read_head(wrapped, 1.0).parameter is model.lm_head.weight


def test_sharded_away_head_is_refused() -> None:
    model = kit.policy()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(InputError, match=r"^model: the LM head of Qwen2ForCausalLM"):
        read_head(model, 1.0)
