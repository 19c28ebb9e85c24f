"""What a run is: typed sections, checked before anything is written.

Sparse TOML goes in (a file, or the name of a preset, plus dotted overrides), a resolved
configuration comes out. The resolved configuration, not a name, is a run's identity.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from capo.core.errors import InputError
from capo.lab.sections import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    Section,
    Seed,
    none_word,
    sequence,
    validate,
)
from capo.lab.selections import (
    RuleTable,
    ThresholdsTable,
    TokenRuleTable,
    as_selection,
)
from capo.lab.trust import TrustRegionTable, as_table, depth_or_none

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]
Scaling = Literal["group", "batch", "none"]

# What each algorithm means in TRL's terms; both can be set by hand in [algorithm].
# Dr.GRPO and REINFORCE divide by no standard deviation, so their advantages are not scaled.
ALGORITHMS: dict[str, tuple[LossType, Scaling]] = {
    "grpo": ("grpo", "group"),
    "dr_grpo": ("dr_grpo", "none"),
    "reinforce": ("grpo", "none"),
}


# Keys that recorded runs do not know: at their defaults they are no part of what a run is.
_LATER = (
    ("run", "device", "auto"),
    ("run", "max_seconds", None),
    ("training", "tf32", False),
)


class RunSection(Section):
    """``[run]``: everything random in a run follows from the seed.

    ``threads`` (CPU threads; by default as many as torch chooses) is part of what a run is: the
    order of a sum depends on it. So is the ``device``; ``auto`` is a GPU where there is one.
    ``max_seconds`` (wall clock, evaluations included) ends a run after the step under way, evaluated.
    """

    seed: Seed = 0
    threads: PositiveInt | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_seconds: PositiveFloat | None = None
    name: str | None = None


class PolicySection(Section):
    """``[policy]``: ``embedded:NAME`` or a Hugging Face model directory."""

    path: str = "embedded:sums"


class TaskSection(Section):
    """``[task]``: where problems come from and how answers are graded.

    ``train_problems`` bounds the pool of training problems; by default a run draws as many as it
    has use for.
    """

    name: str = "sums"
    params: dict[str, Any] = Field(default_factory=dict)
    train_problems: PositiveInt | None = None


class AlgorithmSection(Section):
    """``[algorithm]``: the loss, in TRL's terms."""

    name: Literal["grpo", "dr_grpo", "reinforce"] = "grpo"
    loss_type: LossType | None = None
    scale_rewards: Scaling | None = None
    epsilon: Annotated[float, Field(gt=0)] = 0.2
    epsilon_high: PositiveFloat | None = None
    delta: Annotated[float | None, Field(gt=1)] = None
    beta: NonNegativeFloat = 0.0
    num_iterations: PositiveInt = 1
    importance_sampling_level: Literal["token", "sequence"] = "token"
    top_entropy_quantile: Annotated[float, Field(ge=0, le=1)] = 1.0


class TrainingSection(Section):
    """``[training]``: batches, optimizer and schedule.

    ``completions_per_step`` is the batch of one optimizer step over all processes; ``micro_batch``
    the completions of one forward and backward pass on one device. ``steps`` counts optimizer
    steps; where it is absent, ``epochs`` over ``task.train_problems`` decides. The optimizer
    ``momentum`` is SGD with the first of ``adam_betas`` as its momentum. ``tf32`` multiplies float32
    matrices on a GPU's matrix units, with 10 bits of their mantissas.
    """

    learning_rate: PositiveFloat = 1e-4
    completions_per_step: PositiveInt = 96
    num_generations: Annotated[int, Field(ge=2)] = 8
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Probability = 0.1
    max_grad_norm: PositiveFloat = 1.0
    adam_betas: Annotated[tuple[Probability, Probability], BeforeValidator(sequence)] = (
        0.9,
        0.999,
    )
    adam_eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    optimizer: Literal["adamw", "sgd", "momentum"] = "adamw"
    temperature: PositiveFloat = 1.0
    top_k: Annotated[PositiveInt | None, BeforeValidator(none_word)] = None
    max_prompt_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    bf16: bool = False
    tf32: bool = False
    gradient_checkpointing: bool = False
    save_every: PositiveInt | None = None


class CapoSection(Section):
    """``[capo]``: which tokens are kept, the step they are judged by, and how far it may go.

    ``depth`` judges tokens by what the real step does to them, through so many layers, instead of by
    each token's own step of the head.
    ``watch`` judges (and records) the tokens of a run without selection, and measures the steps of a
    run without trust region; its weights stay the same.
    """

    selection: Annotated[
        str | ThresholdsTable | RuleTable | TokenRuleTable | None, BeforeValidator(as_selection)
    ] = None
    watch: bool = False
    step_model: Literal["adam", "sgd"] = "adam"
    moments: Literal["simulated", "optimizer"] = "simulated"
    fisher: Literal["sampled", "exact"] = "sampled"
    top_k: Annotated[PositiveInt | None, BeforeValidator(none_word)] = 50
    renormalize: bool = True
    grad_scale: PositiveFloat = 1.0
    depth: Annotated[int | Literal["all"] | None, BeforeValidator(depth_or_none)] = None
    trust_region: Annotated[TrustRegionTable | None, BeforeValidator(as_table)] = None

    @property
    def ledger(self) -> TrustRegionTable | None:
        """The trust region by which steps are measured, whether or not it scales them."""
        if self.trust_region is None and self.watch:
            return as_table({"policy_shift": None})
        return self.trust_region

    @property
    def judges(self) -> bool:
        """Whether tokens are judged at all."""
        return self.watch or self.selection is not None


class EvalSection(Section):
    """``[eval]``: sampled accuracy at temperature 1 on fixed held-out problems.

    Measured whenever the run has consumed another ``every_completions`` completions, and at the
    first and the last step.
    """

    every_completions: PositiveInt | None = None
    problems: PositiveInt = 512
    seed: Seed = 20251000


class RivalSection(Section):
    """``[rival]``: a step rule of others, to be compared with; see `capo.lab.rivals`.

    ``skip_on_spike``: no step where the gradient's norm, before clipping, exceeds ``spike_factor`` ×
    the median of the last ``spike_window`` norms. ``kl_adaptive``: the learning rate follows the
    measured policy shift of the last step, whose target is ``target_shift`` nats a token.
    """

    rule: Literal["none", "skip_on_spike", "kl_adaptive"] = "none"
    spike_factor: Annotated[float, Field(gt=1)] = 2.0
    spike_window: PositiveInt = 20
    target_shift: PositiveFloat = 3e-3
    min_learning_rate: PositiveFloat = 1e-6
    max_learning_rate: PositiveFloat = 1e-2

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_learning_rate > self.max_learning_rate:
            raise InputError("rival.min_learning_rate", "must not exceed rival.max_learning_rate.")
        return self


class RecordsSection(Section):
    """``[records]``: what is kept of every token of every step."""

    tokens: bool = True


class Config(Section):
    """A whole run. See the sections for what each key means."""

    run: RunSection = RunSection()
    policy: PolicySection = PolicySection()
    task: TaskSection = TaskSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    training: TrainingSection = TrainingSection()
    capo: CapoSection = CapoSection()
    eval: EvalSection = EvalSection()
    records: RecordsSection = RecordsSection()
    rival: RivalSection = RivalSection()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        training, algorithm = self.training, self.algorithm
        _check_batches(training)
        if training.steps is None and (training.epochs is None or self.task.train_problems is None):
            raise InputError(
                "training.steps",
                "must be given, or both training.epochs and task.train_problems.",
            )
        if algorithm.loss_type == "luspo" and algorithm.importance_sampling_level != "sequence":
            raise InputError(
                "algorithm.importance_sampling_level",
                "must be 'sequence' with algorithm.loss_type 'luspo'.",
            )
        if training.save_every is not None and training.save_every % algorithm.num_iterations:
            # TRL does not checkpoint the completions it reuses between iterations.
            raise InputError(
                "training.save_every",
                f"must be a multiple of algorithm.num_iterations ({algorithm.num_iterations}), "
                f"got {training.save_every}.",
            )
        if training.tf32 and self.run.device == "cpu":
            raise InputError("training.tf32", "must be false with run.device 'cpu'.")
        if self.capo.step_model == "sgd" and self.capo.moments == "optimizer":
            raise InputError(
                "capo.moments",
                "must be 'simulated' with capo.step_model 'sgd', which reads no moments.",
            )
        if self.capo.moments == "optimizer" and training.optimizer != "adamw":
            raise InputError(
                "capo.moments",
                f"must be 'simulated' with training.optimizer {training.optimizer!r}, which keeps no "
                "moments.",
            )
        _check_rule(self.capo.selection, algorithm)
        if self.rival.rule == "kl_adaptive" and self.capo.ledger is None:
            raise InputError(
                "rival.rule",
                "'kl_adaptive' needs measured steps: set capo.trust_region.policy_shift=none.",
            )
        return self

    def resolved(self) -> Config:
        """The same run with every default that follows from other values written out."""
        training, algorithm = self.training, self.algorithm
        loss_type, scaling = ALGORITHMS[algorithm.name]
        prompts_per_step = training.completions_per_step // training.num_generations
        steps = training.steps
        if steps is None:
            assert training.epochs is not None
            assert self.task.train_problems is not None
            batches = int(training.epochs * self.task.train_problems) // prompts_per_step
            if batches < 1:
                raise InputError(
                    "training.epochs",
                    f"must cover at least one step of {prompts_per_step} prompts, got "
                    f"{training.epochs} epochs of {self.task.train_problems} problems.",
                )
            steps = batches * algorithm.num_iterations
        save_every = training.save_every or max(1, steps // 10)
        return self.model_copy(
            update={
                "algorithm": algorithm.model_copy(
                    update={
                        "loss_type": algorithm.loss_type or loss_type,
                        "scale_rewards": algorithm.scale_rewards or scaling,
                    }
                ),
                "training": training.model_copy(
                    update={
                        "steps": steps,
                        "micro_batch": training.micro_batch or training.completions_per_step,
                        "save_every": _round_up(save_every, algorithm.num_iterations),
                    }
                ),
                "eval": self.eval.model_copy(
                    update={
                        "every_completions": self.eval.every_completions
                        or training.completions_per_step
                    }
                ),
            }
        )

    @property
    def steps(self) -> int:
        """Optimizer steps of a resolved run."""
        assert self.training.steps is not None, "resolved() fills the steps in"
        return self.training.steps

    def completions_after(self, step: int) -> int:
        """Completions consumed by ``step`` optimizer steps; iterations reuse a batch."""
        batches = math.ceil(step / self.algorithm.num_iterations)
        return batches * self.training.completions_per_step

    def identity(self) -> dict[str, Any]:
        """What decides the result: the resolved configuration without the run's name."""
        document = self.model_dump(mode="json")
        del document["run"]["name"]
        for section, key, default in _LATER:
            if document[section][key] == default:
                del document[section][key]
        return document


def parse_config(document: dict[str, Any]) -> Config:
    """Check a nested document and resolve it.

    Raises:
        InputError: the first thing that is wrong, named by its dotted key.
    """
    config: Config = validate(Config, document)
    return config.resolved()


def check_vocabulary(config: Config, vocab_size: int) -> None:
    """Refuse a top-k that the policy's vocabulary cannot fill.

    Raises:
        InputError: ``training.top_k`` or ``capo.top_k`` exceeds ``vocab_size``.
    """
    for field, top_k in (
        ("training.top_k", config.training.top_k),
        ("capo.top_k", config.capo.top_k if config.capo.judges else None),
    ):
        if top_k is not None and top_k > vocab_size:
            raise InputError(
                field, f"must be at most the policy's vocabulary size {vocab_size}, got {top_k}."
            )


def _check_rule(selection: object, algorithm: AlgorithmSection) -> None:
    if (
        isinstance(selection, TokenRuleTable)
        and selection.rule == "lopti"
        and algorithm.num_iterations % 2
    ):
        raise InputError("algorithm.num_iterations", "must be even with the rule 'lopti'.")


def _check_batches(training: TrainingSection) -> None:
    completions, generations = training.completions_per_step, training.num_generations
    if completions % generations:
        raise InputError(
            "training.completions_per_step",
            f"must be a multiple of training.num_generations ({generations}), got {completions}.",
        )
    if training.micro_batch is not None and completions % training.micro_batch:
        raise InputError(
            "training.micro_batch",
            f"must divide training.completions_per_step ({completions}), "
            f"got {training.micro_batch}.",
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
