"""A fixed batch, a policy, and verl's training worker on them: what torchrun and Ray both run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl import DataProto
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import TrainingWorkerConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import left_right_2_no_padding

from capo.policies import load_policy
from verl_engine.cases import ROWS, Case

PROMPT, RESPONSE = 7, 9
TIED = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
CAPO_CONFIG = "actor_rollout_ref.actor.fsdp_config._target_=capo.integrations.verl.CAPOEngineConfig"


def prepare(folder: Path) -> None:
    """Write the embedded policy, a random one with tied embeddings, and the batch, for all processes."""
    torch.manual_seed(5)
    policy = load_policy("embedded:sums")
    policy.model.save_pretrained(folder / "policy")
    policy.tokenizer.save_pretrained(folder / "policy")
    tied = Qwen2ForCausalLM(Qwen2Config(**TIED))
    tied.save_pretrained(folder / "tied")
    policy.tokenizer.save_pretrained(folder / "tied")
    torch.save(sample_batch(policy.model), folder / "batch.pt")


@torch.no_grad()
def sample_batch(model: Any) -> dict[str, torch.Tensor]:
    """Eight completions of four prompts, of uneven lengths, by a policy that has moved on a little."""
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(2, 64, (ROWS // 2, PROMPT), generator=generator)
    prompt_lengths = torch.tensor([7, 5, 6, 3]).repeat_interleave(2)
    prompt_mask = torch.arange(PROMPT) >= (PROMPT - prompt_lengths)[:, None]
    lengths = torch.tensor([9, 6, 8, 9, 4, 9, 7, 5])
    there = torch.arange(RESPONSE) < lengths[:, None]
    attention = torch.cat([prompt_mask, there], dim=1).long()
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    ids = prompts.repeat_interleave(2, dim=0) * prompt_mask
    old = []
    for length in range(PROMPT, PROMPT + RESPONSE):
        logits = model(
            input_ids=ids,
            attention_mask=attention[:, :length],
            position_ids=positions[:, :length],
            use_cache=False,
        ).logits[:, -1]
        token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        old.append((logits / 0.9).log_softmax(-1).gather(-1, token))
        ids = torch.cat([ids, token], dim=1)
    noise = torch.randn(ROWS, RESPONSE, generator=generator)
    response_mask = there.clone()
    response_mask[3, 2:4] = False  # a tool's answer, say
    rewards = torch.tensor([1.0, -1.0, 0.7, -0.7, 0.0, 0.4, -1.3, 1.3])
    ids[:, PROMPT:] *= there
    return {
        "input_ids": ids,
        "attention_mask": attention,
        "position_ids": positions,
        "prompts": ids[:, :PROMPT],
        "responses": ids[:, PROMPT:],
        "response_mask": response_mask.long(),
        "old_log_probs": (torch.cat(old, dim=1) + 0.15 * noise) * there,
        "advantages": rewards[:, None] * response_mask,
    }


def rows_of(case: Case, world: int, rank: int) -> list[int]:
    """Which rows a process is handed, in their order.

    verl splits a mini-batch into contiguous parts, one a process, and those into micro-batches. One
    process alone is handed the rows such that its micro-batches are those that two would share.
    """
    own = case.mini_batch // world
    chosen: list[int] = []
    for start in range(0, ROWS, case.mini_batch):
        if world == 2:
            chosen += range(start + rank * own, start + (rank + 1) * own)
            continue
        half, each = case.mini_batch // 2, case.micro_batch // 2
        for at in range(start, start + half, each):
            chosen += [*range(at, at + each), *range(at + half, at + half + each)]
    return chosen


def mini_batch(rows: dict[str, torch.Tensor], case: Case) -> Any:
    """As verl's trainer hands a batch to its actor."""
    data = DataProto.from_single_dict(dict(rows), meta_info={"temperature": case.temperature})
    packed = left_right_2_no_padding(data.to_tensordict())
    tu.assign_non_tensor(
        packed,
        calculate_entropy=False,
        distillation_use_topk=False,
        distillation_only=False,
        global_batch_size=case.mini_batch,
        mini_batch_size=case.mini_batch,
        epochs=case.epochs,
        seed=42,
        dataloader_kwargs={"shuffle": False},
        compute_loss=True,
    )
    return packed


def configs(case: Case, folder: Path, world: int) -> tuple[Any, Any]:
    """verl's own configuration, composed as `python -m verl.trainer.main_ppo` does."""
    overrides = [
        f"actor_rollout_ref.model.path={folder}/{case.policy}",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"actor_rollout_ref.model.use_remove_padding={case.remove_padding}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "actor_rollout_ref.actor.strategy=fsdp2",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        f"actor_rollout_ref.actor.optim.optimizer={case.optimizer}",
        "actor_rollout_ref.actor.optim.total_training_steps=100",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={case.mini_batch}",
        f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={case.micro_batch // world}",
        f"actor_rollout_ref.actor.ppo_epochs={case.epochs}",
        "actor_rollout_ref.actor.use_torch_compile=False",
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile=False",
        f"+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype={case.dtype}",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype=fp32",
        "actor_rollout_ref.rollout.n=2",
        *case.overrides,
    ]
    if "Adam" in case.optimizer:
        # Adam's first step is a sign: rounding of a vanishing gradient must not decide it.
        overrides.append("+actor_rollout_ref.actor.optim.override_optimizer_config.eps=1e-4")
    if case.capo is not None:
        overrides += [CAPO_CONFIG, f"+actor_rollout_ref.actor.fsdp_config.capo={case.capo}"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose("ppo_trainer", overrides=overrides).actor_rollout_ref
    actor = omega_conf_to_dataclass(composed.actor)
    model = omega_conf_to_dataclass(composed.model)
    engine = actor.engine
    engine.use_dynamic_bsz = case.dynamic
    engine.max_token_len_per_gpu = engine.infer_max_token_len_per_gpu = 24
    engine.micro_batch_size_per_gpu = case.micro_batch // world
    engine.infer_micro_batch_size_per_gpu = case.micro_batch // world
    worker = TrainingWorkerConfig(
        model_type="language_model",
        model_config=model,
        engine_config=engine,
        optimizer_config=actor.optim,
        checkpoint_config=actor.checkpoint,
    )
    return worker, partial(ppo_loss, config=actor)
