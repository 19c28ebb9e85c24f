"""A tiny policy, tokenizer, task and trainer, all local and seeded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from trl import GRPOConfig, GRPOTrainer

from capo.integrations.trl import CAPOConfig, CAPOTrainer

CHARACTERS = "0123456789+-=abcdefghijklmnop"
_SMALL = {
    "vocab_size": len(CHARACTERS) + 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What a head can have besides a matrix: a bias, a soft-cap, a multiplier, a divisor.
CONFIGS: dict[str, Any] = {
    "qwen2": lambda **kw: Qwen2Config(**_SMALL, **kw),
    "llama": lambda **kw: LlamaConfig(**_SMALL, **kw),
    "phi (bias)": lambda **kw: PhiConfig(**{**_SMALL, "num_key_value_heads": 2}, **kw),
    "gemma2 (soft-cap)": lambda **kw: Gemma2Config(
        **_SMALL, head_dim=8, final_logit_softcapping=0.05, **kw
    ),
    "cohere (multiplier)": lambda **kw: CohereConfig(**_SMALL, logit_scale=0.3, **kw),
    "granite (divisor)": lambda **kw: GraniteConfig(**_SMALL, logits_scaling=4.0, **kw),
}


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    vocabulary |= {c: i + 3 for i, c in enumerate(CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def policy(family: str = "qwen2", *, tied: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[family](tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # sharper than the default initialisation, so that tokens differ
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
            if name == "lm_head.bias":
                parameter.normal_()
    return model


def reward(completions: list[str], **_: Any) -> list[float]:
    """Length and content both count, so that advantages vary within every group."""
    return [len(set(c)) / 8 + 0.5 * c.count("1") - 0.1 * c.count("a") for c in completions]


def dataset(n: int = 64) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{i % 10}+{(3 * i) % 7}=" for i in range(n)]})


def arguments(cls: type[GRPOConfig], output: Path, **overrides: Any) -> Any:
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "beta": 0.0,
        "loss_type": "grpo",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "seed": 7,
        "dataloader_pin_memory": False,
    }
    if issubclass(cls, CAPOConfig):  # nothing but what a test asks for
        settings |= {"num_iterations": 1, "trust_region": None}
    return cls(output_dir=str(output), **{**settings, **overrides})


def trainer(
    output: Path,
    *,
    model: Any = None,
    cls: type[GRPOTrainer] = CAPOTrainer,
    rewards: Any = reward,
    config: type[GRPOConfig] | None = None,
    token_callbacks: Any = None,
    optimizers: Any = (None, None),
    **overrides: Any,
) -> Any:
    config = config or (CAPOConfig if issubclass(cls, CAPOTrainer) else GRPOConfig)
    extra = {"token_callbacks": token_callbacks} if token_callbacks else {}
    return cls(
        model=policy() if model is None else model,
        reward_funcs=rewards,
        args=arguments(config, output, **overrides),
        train_dataset=dataset(),
        processing_class=tokenizer(),
        optimizers=optimizers,
        **extra,
    )


def scale_loss(instance: Any, factor: float = 1024.0) -> None:
    """The gradient scaler of fp16 in a trainer that computes in float32, which a CPU can."""
    accelerator = instance.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor)

    def unscale() -> None:
        for optimizer in accelerator._optimizers:
            accelerator.scaler.unscale_(optimizer.optimizer)

    accelerator.unscale_gradients = unscale


def weights(instance: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in instance.model.named_parameters()}


def assert_same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"weights differ: {different}"


def micro_batch(
    instance: Any,
    *,
    off_policy: float = 0.0,
    lengths: tuple[int, ...] = (6, 3, 5, 1),
    seed: int = 3,
) -> dict[str, Any]:
    """Inputs of `_compute_loss` without generation: ragged, of both signs of the advantage.

    `off_policy` is the spread of log-ratios; 0 leaves the old log-probabilities out, as TRL does.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, _SMALL["vocab_size"], (batch, width), generator=generator) * mask
    prompts = torch.randint(3, _SMALL["vocab_size"], (batch, 4), generator=generator)
    prompt_mask = torch.ones_like(prompts)
    prompt_mask[0, :2], prompts[0, :2] = 0, 0  # left-padded
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.randn(batch, generator=generator),
        # `_generate_and_score_completions` counts the tokens of the whole generation batch.
        "num_items_in_batch": mask.sum() * instance.args.steps_per_generation,
    }
    if off_policy:
        with torch.no_grad():
            log_probs, _, _ = instance._get_per_token_logps_and_entropies(
                instance.model,
                torch.cat([prompts, ids], 1),
                torch.cat([prompt_mask, mask], 1),
                width,
            )
        noise = torch.randn(log_probs.shape, generator=generator)
        inputs["old_per_token_logps"] = log_probs - off_policy * noise
    return inputs


def causal_logits(model: Any, ids: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Every position's logits from backbone and head, without TRL's fused head."""
    hidden = model.base_model(input_ids=ids, attention_mask=attention, use_cache=False)
    return hidden.last_hidden_state @ model.lm_head.weight.T


def ready(instance: Any, accumulation_steps: int = 1) -> Any:
    """The state in which `training_step` would call `_compute_loss`."""
    instance.model.train()
    instance.current_gradient_accumulation_steps = accumulation_steps
    return instance


def gradients(instance: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    instance.model.zero_grad()
    instance._compute_loss(instance.model, inputs).backward()
    return {n: p.grad.clone() for n, p in instance.model.named_parameters() if p.grad is not None}
