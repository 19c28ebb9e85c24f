"""CAPO in TRL: :class:`CAPOTrainer` is `GRPOTrainer` whose every token's step is judged first.

    from capo.integrations.trl import CAPOConfig, CAPOTrainer

    trainer = CAPOTrainer(model, reward_funcs=reward, args=CAPOConfig(), ...)

All of TRL stays as it is: the loss is TRL's own, whatever its `loss_type`, and so are generation,
rewards, metrics and checkpoints. Between the loss and its backward pass the trainer reads the
loss's gradient with respect to the log-probabilities, judges each token by the curvature of its own
step in the last layer (arXiv 2510.00819), and gates its gradient. Therefore

- the logged loss does not change, only its gradient does;
- the KL gradient (`beta`) of a rejected token is masked along with its policy gradient, and judged
  as part of it;
- the entropy bonus and the MoE balancing loss do not act through the sampled tokens'
  log-probabilities and are left alone.

Before each optimizer step the trust region foresees the policy shift of the whole step and shortens it to
its budget (`_trl_trust.py` has the order of things).

With `selection=None, trust_region=None` (and `advantage_baseline="group"`) the trainer is `GRPOTrainer`,
bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer

import capo
from capo.core.errors import InputError
from capo.core.statistics import IMPLEMENTATIONS
from capo.core.trust_region import last_layers
from capo.integrations._trl_batch import ShiftRecord
from capo.integrations._trl_head import (
    capture_hidden,
    causal_lm,
    predicting_positions,
    read_head,
)
from capo.integrations._trl_judge import (
    Judge,
    PolicyPass,
    TokenRecord,
    shift_metrics,
    token_record,
)
from capo.integrations._trl_loss import LOSS_TYPES, GradientGate, token_loss_scale
from capo.integrations._trl_state import load_state, save_state
from capo.integrations._trl_step import StepModel, unwrapped_optimizer
from capo.integrations._trl_trust import StepControl

if TYPE_CHECKING:
    from torch import Tensor

    from capo.core.selection import Rule

__all__ = ["CAPOConfig", "CAPOTrainer", "ShiftRecord", "TokenRecord"]

TokenCallback = Callable[[TokenRecord], None]
ShiftCallback = Callable[[ShiftRecord], None]

_CHOICES = {
    "step_model": ("adam", "sgd"),
    "moments": ("simulated", "optimizer"),
    "fisher": ("sampled", "exact"),
    "advantage_baseline": ("group", "none"),
    "impl": IMPLEMENTATIONS,
}


@dataclass
class CAPOConfig(GRPOConfig):  # type: ignore[misc]
    """`GRPOConfig` and what CAPO adds to it.

    The defaults are what our measurements support (results/trust_region): a trust region on every step
    whose budget sets itself, four passes over the same completions, no token selection. The paper's
    algorithm is ``selection="capo", trust_region=None, num_iterations=1``; plain GRPO is
    ``trust_region=None``. With the trust region, ``learning_rate`` is an upper bound only.
    Dr.CAPO is ``selection="dr_capo", loss_type="dr_grpo", scale_rewards="none"``; ReinCAPO is
    ``selection="reincapo", advantage_baseline="none"``.

    Args:
        selection: which tokens may act. ``"capo"``, ``"dr_capo"`` or ``"reincapo"``, the paper's
            thresholds; or a dict of `policy_shift` (nats), `objective_shift` ([low, high], either
            may be None) and `denominator` (``"kept"``: each sequence is renormalised over its kept
            tokens; ``"all"``: the loss's denominators stay), with `rule` ``"soft"``, ``"quantile"``
            or ``"nats"`` for another rule's arguments (`capo.make_rule`); or None, no selection.
        step_model: whose step is judged, ``"adam"`` (the paper's) or ``"sgd"``.
        moments: Adam's moments: ``"simulated"`` from the last-layer gradients of accepted tokens
            (the paper's), or the ``"optimizer"``'s own. The latter need no memory, but with tied
            embeddings they hold the input embedding's gradient as well.
        fisher: policy shift from the ``"sampled"`` (the paper's) or the ``"exact"`` Fisher.
        curvature_top_k: vocabulary rows per token in the curvature: the sampled token and the
            likeliest others; None for all. (`top_k` is GRPOConfig's, of sampling.)
        renormalize: renormalise the policy over those rows, as the paper does.
        grad_scale: factor on a token's own gradient where it meets Adam's moments.
        advantage_baseline: ``"group"``, TRL's advantages; ``"none"``, REINFORCE without a baseline:
            the advantage is the weighted sum of the rewards, neither centred nor scaled.
        impl: backend of the curvature, see `capo.token_curvature`.
        trust_region: keep every optimizer step within a policy shift. None: off. ``"auto"``: a budget
            that follows from entropy, batch and length. A number: the budget δ, mean KL in nats a token.
            A dict: `capo.TrustRegion`'s arguments, `policy_shift` None to measure without scaling.

    Raises:
        InputError: a value is not allowed; names the field and what is.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "selection",
        "trust_region",
    ]

    learning_rate: float = field(
        default=1e-4,
        metadata={"help": "With a trust region an upper bound: the budget sets the step's length."},
    )
    num_iterations: int = field(
        default=4, metadata={"help": "Optimizer steps on the same completions."}
    )
    selection: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Preset 'capo', 'dr_capo' or 'reincapo', or a dict of thresholds."},
    )
    step_model: str = field(default="adam", metadata={"help": "'adam' or 'sgd'."})
    moments: str = field(default="simulated", metadata={"help": "'simulated' or 'optimizer'."})
    fisher: str = field(default="sampled", metadata={"help": "'sampled' or 'exact'."})
    curvature_top_k: int | None = field(
        default=50, metadata={"help": "Vocabulary rows per token in the curvature; None: all."}
    )
    renormalize: bool = field(
        default=True, metadata={"help": "Renormalise the policy over the top-k rows."}
    )
    grad_scale: float = field(
        default=1.0, metadata={"help": "Factor on a token's gradient where it meets the moments."}
    )
    advantage_baseline: str = field(
        default="group", metadata={"help": "'group', or 'none' for REINFORCE."}
    )
    impl: str = field(default="auto", metadata={"help": "Backend of the curvature."})
    trust_region: dict[str, Any] | str | float | None = field(
        default="auto",
        metadata={"help": "'auto', a budget in nats a token, or a dict of options; None: off."},
    )

    def __post_init__(self) -> None:
        """Check what CAPO adds, then let TRL check the rest."""
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(repr(choice) for choice in allowed)
                raise InputError(name, f"must be {choices}, got {getattr(self, name)!r}.")
        top_k = self.curvature_top_k
        if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
            raise InputError("curvature_top_k", f"must be an integer ≥ 1 or None, got {top_k!r}.")
        if not self.grad_scale > 0:
            raise InputError("grad_scale", f"must be positive, got {self.grad_scale!r}.")
        if self.advantage_baseline == "none" and self.multi_objective_aggregation != (
            "sum_then_normalize"
        ):
            raise InputError(
                "advantage_baseline",
                "'none' needs multi_objective_aggregation='sum_then_normalize', since it does not "
                "normalise.",
            )
        if isinstance(self.trust_region, str):
            self.trust_region = _number(self.trust_region)
        self.rule()
        self.region()

    def region(self) -> capo.TrustRegion | None:
        """The trust region that `trust_region` stands for, or None.

        Raises:
            InputError: `trust_region` is not possible.
        """
        return capo.make_trust_region(self.trust_region)

    def rule(self) -> Rule | None:
        """The selection rule that `selection` stands for, or None.

        Raises:
            InputError: `selection` names no preset or rule, or its arguments are impossible.
        """
        return capo.make_rule(self.selection)


def _number(text: str) -> str | float:
    """A number that a command line handed over as text."""
    try:
        return float(text)
    except ValueError:
        return text


class CAPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` that judges every token's step before it is taken.

    Args:
        *args: as for `GRPOTrainer`; `args` may be a plain `GRPOConfig`, which selects nothing.
        token_callbacks: called with a :class:`TokenRecord` for every micro-batch that was judged.
        shift_callbacks: called with a :class:`ShiftRecord` for every step that was measured.
        **kwargs: as for `GRPOTrainer`.

    Raises:
        InputError: the configuration does not fit the model or the way it is trained.
    """

    def __init__(
        self,
        *args: Any,
        token_callbacks: list[TokenCallback] | None = None,
        shift_callbacks: list[ShiftCallback] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the trainer as TRL does; then check that what it trains can be judged."""
        super().__init__(*args, **kwargs)
        self.token_callbacks = list(token_callbacks or ())
        self._judge = self._make_judge()
        self._control = self._make_control(list(shift_callbacks or ()))
        self._gate: GradientGate | None = None
        self._grad_norm: float | None = None
        self._rewards: Tensor | None = None
        if self._judge is not None or self._control is not None:
            self.add_callback(_AroundOptimizerStep(self._before_step, self._after_step))

    @property
    def last_policy_shift(self) -> float | None:
        """Measured policy shift of the last optimizer step (nats a token); None without `trust_region`."""
        return None if self._control is None else self._control.last_policy_shift

    def _single_process(self, field_name: str) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.accelerator.num_processes > 1:
            raise InputError(
                field_name,
                "is not supported with FSDP, DeepSpeed or several processes yet; train in a single "
                f"process or set {field_name}=None.",
            )

    def _make_control(self, shift_callbacks: list[ShiftCallback]) -> StepControl | None:
        region = self.args.region() if isinstance(self.args, CAPOConfig) else None
        if region is None:
            return None
        self._single_process("trust_region")
        policy = self.model
        if region.predictor == "deep":
            last_layers(causal_lm(policy).base_model, region.depth)  # raises where there are fewer
        read_head(policy, self.temperature)
        return StepControl(
            region,
            iterations=self.args.num_iterations,
            seed=self.args.seed,
            shift_callbacks=shift_callbacks,
        )

    def _make_judge(self) -> Judge | None:
        args = self.args
        rule = args.rule() if isinstance(args, CAPOConfig) else None
        if rule is None:
            return None
        self._single_process("selection")
        if self.loss_type not in LOSS_TYPES:
            raise InputError("loss_type", f"must be one of {', '.join(LOSS_TYPES)} with selection.")
        vocabulary = read_head(self.model, self.temperature).weight.size(0)
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
        return Judge(rule, step_model, options)

    # Between the loss and its backward pass

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if (self._judge is None and self._control is None) or not self.model.training:
            unchanged: Tensor = super()._compute_loss(model, inputs)
            return unchanged
        policy = self.accelerator.unwrap_model(model)
        gate = self._gate = None if self._judge is None else GradientGate()
        try:
            with capture_hidden(policy) as passes:
                loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._gate = None
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        hidden = predicting_positions(torch.cat(passes), mask.size(1))
        if gate is not None:
            self._select(policy, inputs, mask, hidden, loss, gate)
        if self._control is not None:
            self._control.collect(
                inputs,
                mask.bool(),
                hidden,
                step=self.state.global_step,
                accumulation_steps=self.current_gradient_accumulation_steps,
            )
        return loss

    def _select(
        self,
        policy: torch.nn.Module,
        inputs: dict[str, Any],
        mask: Tensor,
        hidden: Tensor,
        loss: Tensor,
        gate: GradientGate,
    ) -> None:
        assert self._judge is not None
        judged = PolicyPass(
            hidden=hidden,
            token_ids=inputs["completion_ids"],
            mask=mask.bool(),
            loss_gradient=gate.gradient(loss),
            loss_scale=self._loss_scale(mask, inputs) / self.current_gradient_accumulation_steps,
            accumulation_steps=self.current_gradient_accumulation_steps,
        )
        head = read_head(policy, self.temperature)
        verdict = self._judge.judge(judged, head, unwrapped_optimizer(self.optimizer))
        gate.weights = verdict.weights
        for name, value in shift_metrics(verdict, judged.mask).items():
            self._metrics["train"][name].append(value)
        if self.token_callbacks:
            record = token_record(self.state.global_step, inputs, judged, verdict)
            for callback in self.token_callbacks:
                callback(record)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        log_probs, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._gate is not None:
            log_probs = self._gate(log_probs)
        return (log_probs, *others)

    def _loss_scale(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        # As in TRL's loss: `num_items_in_batch` spans the generation batch.
        window_tokens = float(inputs["num_items_in_batch"].clamp(min=1))
        return token_loss_scale(
            self.loss_type,
            mask,
            max_completion_length=self.max_completion_length,
            window_tokens=window_tokens / self.args.steps_per_generation,
        )

    # Moments: once per optimizer step, with the gradient as it was clipped

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._grad_norm = float(norm)
        return norm

    def _before_step(self) -> None:
        if self._control is None:
            return
        policy = self.accelerator.unwrap_model(self.model)
        head = read_head(policy, self.temperature)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()  # done already where gradients are clipped
        self._control.before_step(
            policy,
            head,
            unwrapped_optimizer(self.optimizer),
            self.accelerator.autocast,
            exact_hidden=self.accelerator.mixed_precision == "no"
            and head.weight.dtype in (torch.float32, torch.float64),
        )

    def _after_step(self) -> None:
        skipped = self.accelerator.optimizer_step_was_skipped  # overflow under fp16
        if self._control is not None:
            self._control.restore(unwrapped_optimizer(self.optimizer))
            if skipped:
                self._control.discard()
            else:
                self._measure(self._control)
        if self._judge is not None:
            if skipped:
                self._judge.step_model.discard()
            elif self._grad_norm is None:
                self._judge.step_model.advance()
            else:
                self._judge.step_model.advance(self.args.max_grad_norm, self._grad_norm)
        self._grad_norm = None

    def _measure(self, control: StepControl) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        head = read_head(policy, self.temperature)
        ledger = control.after_step(
            policy, head, self.accelerator.autocast, self.state.global_step + 1
        )
        for name, value in ledger.items():
            self._metrics["train"][name].append(value)

    # REINFORCE without a baseline

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        if getattr(self.args, "advantage_baseline", "group") == "none":
            weighted = rewards * self.reward_weights.to(rewards.device)
            self._rewards = weighted.nansum(dim=1)  # no reward at all counts as none: 0
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._rewards is not None:
            own = output["advantages"].size(0)
            start = self.accelerator.process_index * own
            output["advantages"] = self._rewards[start : start + own]
            logged = self._logs["advantages"]  # the batch's group advantages are its last entries
            for _ in range(min(len(logged), self._rewards.numel())):
                logged.pop()
            logged.extend(self._rewards.tolist())
            self._rewards = None
        return output

    # Checkpoints

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save and not self.args.save_only_model:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            state: dict[str, Any] = {}
            if self._judge is not None:
                state |= self._judge.step_model.state_dict() or {}
            if self._control is not None:
                state |= self._control.state_dict()
            save_state(Path(self._get_output_dir(trial=trial)) / folder, state or None)

    def _load_optimizer_and_scheduler(self, checkpoint: str | os.PathLike[str] | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        simulated = self._judge is not None and self._judge.step_model.simulated
        state = load_state(Path(checkpoint), required=simulated)
        if self._control is not None:
            self._control.load_state_dict(state)
        state.pop("trust_region", None)
        if simulated and self._judge is not None:
            self._judge.step_model.load_state_dict(state)


class _AroundOptimizerStep(TrainerCallback):  # type: ignore[misc]
    """Calls before the optimizer steps and when it has stepped (or would have, but for overflow)."""

    def __init__(self, before: Callable[[], None], after: Callable[[], None]) -> None:
        self._before = before
        self._after = after

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._before()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._after()
