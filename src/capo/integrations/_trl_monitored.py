"""What a trainer must be to be monitored, and by whose step its tokens are judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from trl import GRPOTrainer

import capo
from capo.core.errors import InputError
from capo.core.statistics import IMPLEMENTATIONS
from capo.core.token_rules import TokenRule
from capo.integrations._trl_head import LMHead
from capo.integrations._trl_loss import LOSS_TYPES
from capo.integrations._trl_step import StepModel, keeps_moments, unwrapped_optimizer

if TYPE_CHECKING:
    from capo.core.selection import Rule


def check_trainer(trainer: Any) -> None:
    """Refuse what cannot be looked at.

    Raises:
        InputError: names why.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise InputError("trainer", f"must be a GRPOTrainer, got {type(trainer).__name__}.")
    if "capo_monitor" in trainer.__dict__:
        raise InputError("trainer", "is monitored already; detach that monitor first.")
    if (
        trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled
        or trainer.accelerator.num_processes > 1
    ):
        raise InputError(
            "trainer",
            "must train in a single process, without FSDP and DeepSpeed, to be monitored.",
        )
    if trainer.loss_type not in LOSS_TYPES:
        raise InputError("trainer", f"must have a loss_type of {', '.join(LOSS_TYPES)}.")


def check_options(every: int, sequences: int | str | None, fisher: str, impl: str) -> None:
    """Refuse impossible arguments.

    Raises:
        InputError: names which.
    """
    if not (isinstance(every, int) and every >= 1):
        raise InputError("every", f"must be an integer ≥ 1, got {every!r}.")
    whole = isinstance(sequences, int) and not isinstance(sequences, bool) and sequences >= 1
    if not (whole or sequences in ("auto", None)):
        raise InputError("sequences", f"must be 'auto', an integer ≥ 1 or None, got {sequences!r}.")
    if fisher not in ("sampled", "exact"):
        raise InputError("fisher", f"must be 'sampled' or 'exact', got {fisher!r}.")
    if impl not in IMPLEMENTATIONS:
        raise InputError("impl", f"must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")


def would_be_rule(thresholds: Rule | dict[str, Any] | str) -> Rule:
    """The rule whose rejections are counted.

    Raises:
        InputError: there is none.
    """
    if callable(thresholds):
        return thresholds
    try:
        rule = capo.make_rule(thresholds)
    except InputError as error:
        raise InputError("thresholds", error.message) from None
    if rule is None:
        raise InputError("thresholds", "must be thresholds; None rejects nothing.")
    if isinstance(rule, TokenRule):
        raise InputError("thresholds", f"must be a rule of shifts; {type(rule).__name__} is none.")
    return rule


def own_step_model(trainer: GRPOTrainer, head: LMHead) -> StepModel:
    """The optimizer's own step of the head if it is SGD's or Adam's; else Adam's with simulated moments."""
    optimizer, args = unwrapped_optimizer(trainer.optimizer), trainer.args
    held = any(head.parameter is p for group in optimizer.param_groups for p in group["params"])
    own = held and head.parameter.requires_grad
    return StepModel(
        "sgd" if isinstance(optimizer, torch.optim.SGD) else "adam",
        "optimizer" if keeps_moments(optimizer) and own else "simulated",
        1.0,
        {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon},
    )
