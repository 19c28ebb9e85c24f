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

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

import capo
from capo.core.errors import InputError
from capo.core.trust_region import auto_sequences, last_layers
from capo.integrations._trl_batch import ShiftRecord
from capo.integrations._trl_config import CAPOConfig
from capo.integrations._trl_deep import DeepPass
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


__all__ = ["CAPOConfig", "CAPOTrainer", "ShiftRecord", "TokenRecord"]

TokenCallback = Callable[[TokenRecord], None]
ShiftCallback = Callable[[ShiftRecord], None]


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

    def _check_depth(self, field_name: str, depth: int | str) -> None:
        try:
            last_layers(causal_lm(self.model).base_model, depth)
        except InputError as error:
            raise InputError(field_name, error.message) from None

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
        if region.predictor == "deep" or region.step_length == "quadratic":
            self._check_depth("trust_region.depth", region.depth)
        read_head(policy, self.temperature)
        if region.sequences == "auto":
            batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            prompts = math.ceil(batch / self.args.num_generations)
            region = replace(region, sequences=auto_sequences(prompts))
        return StepControl(
            region,
            iterations=self.args.num_iterations,
            seed=self.args.seed,
            shift_callbacks=shift_callbacks,
            # The KL penalty gives every completion a gradient.
            every_completion=self.args.beta > 0,
        )

    def _make_judge(self) -> Judge | None:
        args = self.args
        rule = args.rule() if isinstance(args, CAPOConfig) else None
        if rule is None:
            return None
        self._single_process("selection")
        if args.depth is not None:
            self._check_depth("depth", args.depth)
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
        halves = self._control is not None and self._control.region.step_length == "quadratic"
        gate = self._gate = GradientGate() if self._judge is not None or halves else None
        try:
            with capture_hidden(policy) as passes:
                loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._gate = None
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        hidden = predicting_positions(torch.cat(passes), mask.size(1))
        deep = None
        if gate is not None and bool(mask.any()):
            deep = DeepPass(
                policy=policy,
                head=read_head(policy, self.temperature),
                optimizer=unwrapped_optimizer(self.optimizer),
                autocast=self.accelerator.autocast,
                loss=loss,
                gate=gate,
                inputs=inputs,
                mask=mask.bool(),
                hidden=hidden,
                accumulation_steps=self.current_gradient_accumulation_steps,
                max_grad_norm=self.args.max_grad_norm or 0.0,
            )
        if gate is not None and self._judge is not None:
            depth = getattr(self.args, "depth", None)
            curvature = None if deep is None or depth is None else deep.curvature(depth)
            self._select(policy, inputs, mask, hidden, loss, gate, curvature)
        if self._control is not None:
            self._control.collect(
                inputs,
                mask.bool(),
                hidden,
                step=self.state.global_step,
                accumulation_steps=self.current_gradient_accumulation_steps,
                deep=deep,
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
        curvature: capo.TokenCurvature | None,
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
        optimizer = unwrapped_optimizer(self.optimizer)
        verdict = self._judge.judge(judged, head, optimizer, curvature)
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
