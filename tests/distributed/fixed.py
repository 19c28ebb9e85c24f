"""Trainers that are fed one and the same global batch, however many processes share it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import GRPOTrainer

from capo.integrations.trl import CAPOTrainer
from integrations import trl_kit as kit

ROWS = 8
"""Of a global micro-batch."""
WIDTH, PROMPT = 6, 4


def global_batch(model: Any, index: int) -> dict[str, torch.Tensor]:
    """Micro-batch number `index`: two prompts of four completions each, both in every process.

    Lengths are ragged, advantages of both signs and some 0, and the old log-probabilities are off-policy.
    """
    generator = torch.Generator().manual_seed(100 + index)
    vocabulary = model.config.vocab_size
    prompts = torch.randint(3, vocabulary, (2, PROMPT), generator=generator)
    prompt_ids = prompts.repeat(ROWS // 2, 1)  # 0 1 0 1 …
    prompt_mask = torch.ones_like(prompt_ids)
    prompt_ids[::2, 0], prompt_mask[::2, 0] = 0, 0  # the first prompt is shorter
    lengths = torch.randint(2, WIDTH + 1, (ROWS,), generator=generator)
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    ids = torch.randint(3, vocabulary, (ROWS, WIDTH), generator=generator) * mask
    advantages = torch.randn(ROWS, generator=generator)
    advantages[3] = 0.0
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([prompt_ids, ids], 1),
            attention_mask=torch.cat([prompt_mask, mask], 1),
        ).logits[:, -WIDTH - 1 : -1]
    old = torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old + 0.1 * torch.randn(old.shape, generator=generator),
        "num_items_in_batch": mask.sum(),
        # Read only where `use_vllm` says so.
        "importance_sampling_ratio": torch.exp(0.5 * torch.randn(old.shape, generator=generator)),
    }


class FixedBatches:
    """Mixed into a trainer: micro-batches come from :func:`global_batch`, this process's rows of them."""

    batches: list[dict[str, torch.Tensor]]

    def _prepare_inputs(self: Any, generation_batch: Any) -> dict[str, Any]:
        del generation_batch
        accumulation = self.args.gradient_accumulation_steps
        if getattr(self, "_fed", (None,))[0] != self.state.global_step:
            self._fed = (self.state.global_step, 0)
        _, micro = self._fed
        self._fed = (self.state.global_step, micro + 1)
        generation = self.state.global_step // self.args.num_iterations
        return self.batches[generation * accumulation + micro]


class FixedGRPO(FixedBatches, GRPOTrainer):  # type: ignore[misc]
    """TRL's trainer on the fixed batches."""


class FixedCAPO(FixedBatches, CAPOTrainer):
    """Ours on the fixed batches."""


def make(
    output: Path,
    *,
    cls: Any,
    model: Any,
    world: int,
    rank: int,
    records: list[Any] | None = None,
    shifts: list[Any] | None = None,
    **overrides: Any,
) -> Any:
    """A trainer that is fed its rows of the global batches."""
    steps, accumulation = overrides["max_steps"], overrides.get("gradient_accumulation_steps", 1)
    plain = overrides.pop("plain", model)
    batches = [global_batch(plain, i) for i in range(steps * accumulation)]
    share = ROWS // world
    own = slice(rank * share, (rank + 1) * share)
    extra: dict[str, Any] = {}
    if issubclass(cls, CAPOTrainer):
        if records is not None:
            extra["token_callbacks"] = [records.append]
        if shifts is not None:
            extra["shift_callbacks"] = [shifts.append]
    config = kit.CAPOConfig if issubclass(cls, CAPOTrainer) else kit.GRPOConfig
    instance = cls(
        model=model,
        reward_funcs=kit.reward,
        args=kit.arguments(
            config,
            output,
            **{"per_device_train_batch_size": share, "adam_epsilon": 1e-4, **overrides},
        ),
        train_dataset=kit.dataset(),
        processing_class=kit.tokenizer(),
        **extra,
    )
    instance.batches = [
        {name: v if v.ndim == 0 else v[own] for name, v in batch.items()} for batch in batches
    ]
    return instance
