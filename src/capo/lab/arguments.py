"""A run's configuration in TRL's terms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from capo.lab.config import Config
from capo.lab.rundir import RunDirectory
from capo.lab.selections import RuleTable, ThresholdsTable, TokenRuleTable

if TYPE_CHECKING:
    from capo.integrations.trl import CAPOConfig
    from capo.tasks import Task


def trainer_arguments(config: Config, directory: RunDirectory, task: Task) -> CAPOConfig:
    """The whole configuration in TRL's terms."""
    from capo.integrations.trl import CAPOConfig

    training, algorithm, capo = config.training, config.algorithm, config.capo
    assert training.micro_batch is not None
    selection: Any = capo.selection
    if selection is None and capo.watch:
        selection = ThresholdsTable()  # no threshold: every token is judged and kept
    if isinstance(selection, ThresholdsTable):
        selection = selection.model_dump(mode="json")
    elif isinstance(selection, RuleTable):
        selection = selection.model_dump(mode="json", exclude_none=True)
    elif isinstance(selection, TokenRuleTable):
        selection = selection.spec()
    return CAPOConfig(
        output_dir=str(directory.checkpoints),
        seed=config.run.seed,
        # batches
        per_device_train_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.completions_per_step // training.micro_batch,
        generation_batch_size=training.completions_per_step,
        num_generations=training.num_generations,
        max_completion_length=training.max_completion_tokens or task.max_completion_tokens,
        max_steps=config.steps,
        shuffle_dataset=False,
        temperature=training.temperature,
        top_k=training.top_k or 0,
        # optimizer
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_ratio,
        max_grad_norm=training.max_grad_norm,
        optim={"adamw": "adamw_torch"}.get(training.optimizer, "sgd"),
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        adam_epsilon=training.adam_eps,
        weight_decay=training.weight_decay,
        bf16=training.bf16,
        use_cpu=config.run.device == "cpu",
        gradient_checkpointing=training.gradient_checkpointing,
        # loss
        loss_type=algorithm.loss_type,
        scale_rewards=algorithm.scale_rewards,
        epsilon=algorithm.epsilon,
        epsilon_high=algorithm.epsilon_high,
        delta=algorithm.delta,
        beta=algorithm.beta,
        num_iterations=algorithm.num_iterations,
        importance_sampling_level=algorithm.importance_sampling_level,
        top_entropy_quantile=algorithm.top_entropy_quantile,
        # selection
        selection=selection,
        step_model=capo.step_model,
        moments=capo.moments,
        fisher=capo.fisher,
        curvature_top_k=capo.top_k,
        renormalize=capo.renormalize,
        grad_scale=capo.grad_scale,
        depth=capo.depth,
        advantage_baseline="none" if algorithm.name == "reinforce" else "group",
        trust_region=None if capo.ledger is None else capo.ledger.spec(),
        # housekeeping
        save_strategy="steps",
        save_steps=training.save_every,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is news
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
