"""What a trainer's arguments make: the judge of its tokens and the control of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import capo
from capo.core.errors import InputError
from capo.core.token_rules import TokenRule
from capo.core.trust_region import auto_sequences, last_layers
from capo.integrations._trl_batch import ShiftRecord
from capo.integrations._trl_config import CAPOConfig
from capo.integrations._trl_head import causal_lm, read_head
from capo.integrations._trl_judge import Judge
from capo.integrations._trl_layout import check_head, check_layout, check_replicated
from capo.integrations._trl_loss import LOSS_TYPES
from capo.integrations._trl_step import StepModel
from capo.integrations._trl_trust import StepControl
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from trl import GRPOTrainer

TokenWatch = Callable[[int], bool]
ShiftCallback = Callable[[ShiftRecord], None]


def make_control(
    trainer: GRPOTrainer, world: World, shift_callbacks: list[ShiftCallback]
) -> StepControl | None:
    """The trust region on every step; None where there is to be none.

    Raises:
        InputError: names what cannot be controlled.
    """
    args = trainer.args
    region = args.region() if isinstance(args, CAPOConfig) else None
    if region is None:
        return None
    check_layout(trainer.accelerator, "trust_region")
    check_head(trainer.accelerator, trainer.model, "trust_region")
    if region.predictor == "deep" or region.step_length == "quadratic":
        _check_depth(trainer, "trust_region.depth", region.depth)
    if region.step_length == "quadratic":
        check_replicated(trainer.accelerator, "trust_region.step_length")
        _check_loss(trainer, "trust_region.step_length='quadratic'")
    read_head(trainer.model, trainer.temperature)
    if region.sequences == "auto":
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world.size
        prompts = math.ceil(batch / args.num_generations)
        region = replace(region, sequences=auto_sequences(prompts))
    return StepControl(
        region,
        iterations=args.num_iterations,
        seed=args.seed,
        shift_callbacks=shift_callbacks,
        # The KL penalty gives every completion a gradient.
        every_completion=args.beta > 0,
        world=world,
    )


def make_judge(
    trainer: GRPOTrainer, world: World, watch: TokenWatch | None
) -> tuple[Judge | None, TokenWatch | None]:
    """The judge of its tokens, None where nothing is to be judged; and at which steps it only watches.

    With a selection rule every step is judged, and told: there is nothing left to watch.

    Raises:
        InputError: names what cannot be judged.
    """
    args = trainer.args
    rule = args.rule() if isinstance(args, CAPOConfig) else None
    if rule is not None:
        watch = None
    elif watch is None:
        return None, None
    else:
        rule = _watching_rule(args)
    name = "selection" if watch is None else "token_watch"
    if isinstance(rule, TokenRule) and not world.alone:
        raise InputError("selection", f"{type(rule).__name__} needs a single process.")
    check_layout(trainer.accelerator, name)
    check_head(trainer.accelerator, trainer.model, name)
    if args.depth is not None:
        check_replicated(trainer.accelerator, "depth")
        _check_depth(trainer, "depth", args.depth)
    _check_loss(trainer, name)
    vocabulary = read_head(trainer.model, trainer.temperature).vocabulary
    if args.curvature_top_k is not None and args.curvature_top_k > vocabulary:
        raise InputError(
            "curvature_top_k",
            f"must be at most the vocabulary size {vocabulary} or None for all of it, "
            f"got {args.curvature_top_k}.",
        )
    step_model = StepModel(
        args.step_model,
        args.moments,
        args.grad_scale,
        {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
    )
    options = {
        "fisher": args.fisher,
        "top_k": args.curvature_top_k,
        "renormalize": args.renormalize,
        "impl": args.impl,
    }
    return Judge(
        rule, step_model, options, world, lambda: watch is None and logs_next(trainer)
    ), watch


def logs_next(trainer: GRPOTrainer) -> bool:
    """Whether the trainer logs when it has taken the step that it is at."""
    args, state = trainer.args, trainer.state
    if args.logging_strategy != "steps":
        return (
            str(args.logging_strategy.value) == "epoch"
        )  # which step is the last, only its end tells
    every = state.logging_steps if state.max_steps > 0 else args.logging_steps
    first = args.logging_first_step and state.global_step == 0
    return bool(first or (state.global_step + 1) % max(1, int(every)) == 0)


def _watching_rule(args: object) -> capo.Thresholds:
    """A rule that keeps every token."""
    if not isinstance(args, CAPOConfig):
        raise InputError("token_watch", "needs args to be a CAPOConfig.")
    if args.step_model == "adam" and args.moments == "simulated":
        # What is simulated step by step cannot be looked at now and then.
        raise InputError("moments", "must be 'optimizer' with token_watch (or step_model 'sgd').")
    return capo.Thresholds()


def _check_loss(trainer: GRPOTrainer, name: str) -> None:
    if trainer.loss_type not in LOSS_TYPES:
        raise InputError("loss_type", f"must be one of {', '.join(LOSS_TYPES)} with {name}.")


def _check_depth(trainer: GRPOTrainer, field: str, depth: int | str) -> None:
    try:
        last_layers(causal_lm(trainer.model).base_model, depth)
    except InputError as error:
        raise InputError(field, error.message) from None
