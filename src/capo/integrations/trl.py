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
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

import capo
from capo.core.token_rules import TokenContext, TokenRule
from capo.integrations._trl_batch import ShiftRecord
from capo.integrations._trl_card import PAPER, TAGS, add_section, card_section
from capo.integrations._trl_config import CAPOConfig
from capo.integrations._trl_deep import DeepPass
from capo.integrations._trl_head import (
    capture_hidden,
    predicting_positions,
)
from capo.integrations._trl_judge import (
    REWARD,
    PolicyPass,
    TokenRecord,
    shift_metrics,
    token_record,
)
from capo.integrations._trl_layout import make_engine
from capo.integrations._trl_loss import GradientGate, loss_scale_of
from capo.integrations._trl_make import ShiftCallback, TokenWatch, make_control, make_judge
from capo.integrations._trl_old import OldLogProbs
from capo.integrations._trl_sharded import Engine
from capo.integrations._trl_state import load_state, save_state
from capo.integrations._trl_step import unwrapped_optimizer
from capo.integrations._trl_trust import StepControl
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["CAPOConfig", "CAPOTrainer", "ShiftRecord", "TokenRecord", "card_section"]

TokenCallback = Callable[[TokenRecord], None]


class CAPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """`GRPOTrainer` that judges every token's step before it is taken.

    Args:
        *args: as for `GRPOTrainer`; `args` may be a plain `GRPOConfig`, which selects nothing.
        token_callbacks: called with a :class:`TokenRecord` for every micro-batch that was judged.
        shift_callbacks: called with a :class:`ShiftRecord` for every step that was measured.
        token_watch: where nothing is selected, judge the tokens for `token_callbacks` alone in the steps
            for which this is True (it is called with the optimizer steps taken before). The training
            stays the same to the bit, and no metric is added. Adam's moments must be the optimizer's own.
        **kwargs: as for `GRPOTrainer`.

    Raises:
        InputError: the configuration does not fit the model or the way it is trained.
    """

    _tag_names = TAGS
    _name = "CAPO"
    _paper = PAPER

    def __init__(
        self,
        *args: Any,
        token_callbacks: list[TokenCallback] | None = None,
        shift_callbacks: list[ShiftCallback] | None = None,
        token_watch: TokenWatch | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the trainer as TRL does; then check that what it trains can be judged."""
        super().__init__(*args, **kwargs)
        self.token_callbacks = list(token_callbacks or ())
        self._judge, self._watch = make_judge(self, self._world, token_watch)
        self._control = make_control(self, self._world, list(shift_callbacks or ()))
        # Without a step control the trainer is TRL's to the bit, its passes included.
        scales = self._control is not None and self._control.region.scales
        self._old = OldLogProbs(self) if scales else None
        self._known_engine: Engine | None = None
        self._unwrapped: torch.nn.Module | None = None
        self._gate: GradientGate | None = None
        self._grad_norm: float | None = None
        self._rewards: Tensor | None = None
        if self._judge is not None or self._control is not None:
            self.add_callback(
                _AroundOptimizerStep(self._begin, self._before_step, self._after_step)
            )

    @property
    def last_policy_shift(self) -> float | None:
        """Measured policy shift of the last step that was measured (nats a token), or None.

        With several passes a step is measured by the next pass over its completions.
        """
        return None if self._control is None else self._control.last_policy_shift

    @property
    def _world(self) -> World:
        return World(self.accelerator.num_processes, self.accelerator.process_index)

    def _engine(self) -> Engine:
        """Policy and optimizer as they are now; both are replaced when training begins."""
        known = self._known_engine
        optimizer = unwrapped_optimizer(self.optimizer)
        # Unwrapping walks over all modules, which is not for every micro-batch.
        if known is None or self._unwrapped is not self.model or known.optimizer is not optimizer:
            policy, self._unwrapped = self.accelerator.unwrap_model(self.model), self.model
            known = make_engine(self.accelerator, policy, optimizer, self.temperature, self._world)
            known.around_step(self._foresee, self._restore)
            self._known_engine = known
        return known

    # Between the loss and its backward pass

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        judges = self._judge is not None and (
            self._watch is None or self._watch(self.state.global_step)
        )
        if not (judges or self._control is not None) or not self.model.training:
            unchanged: Tensor = super()._compute_loss(model, inputs)
            return unchanged
        engine = self._engine()
        halves = self._control is not None and self._control.region.step_length == "quadratic"
        gate = self._gate = GradientGate() if judges or halves else None
        try:
            with capture_hidden(engine.policy) as passes:
                loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._gate = None
        if self._old is not None:
            self._old.keep(inputs)
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        hidden = predicting_positions(torch.cat(passes), mask.size(1))
        deep = None
        if gate is not None:
            judged = self._pass(inputs, mask, hidden, loss, gate)
            depth = getattr(self.args, "depth", None)
            # With several processes all take part, whether they have tokens or not.
            if (halves or depth is not None) and (not engine.world.alone or bool(mask.any())):
                deep = DeepPass(
                    engine=engine,
                    head=engine.head(),
                    autocast=self.accelerator.autocast,
                    loss=loss,
                    gate=gate,
                    inputs={**inputs, "advantages": judged.effective_advantage},
                    mask=judged.mask,
                    hidden=hidden,
                    accumulation_steps=self.current_gradient_accumulation_steps,
                    max_grad_norm=self.args.max_grad_norm or 0.0,
                )
            if judges:
                curvature = None if deep is None or depth is None else deep.curvature(depth)
                self._select(engine, inputs, judged, gate, curvature)
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

    def _pass(
        self,
        inputs: dict[str, Any],
        mask: Tensor,
        hidden: Tensor,
        loss: Tensor,
        gate: GradientGate,
    ) -> PolicyPass:
        gradient = gate.gradient(loss)
        return PolicyPass(
            hidden=hidden,
            token_ids=inputs["completion_ids"],
            mask=mask.bool(),
            loss_gradient=gradient,
            loss_scale=loss_scale_of(self, mask, inputs) / self.current_gradient_accumulation_steps,
            accumulation_steps=self.current_gradient_accumulation_steps,
            context=self._context(inputs, gate, gradient),
        )

    def _select(
        self,
        engine: Engine,
        inputs: dict[str, Any],
        judged: PolicyPass,
        gate: GradientGate,
        curvature: capo.TokenCurvature | None,
    ) -> None:
        assert self._judge is not None
        verdict = self._judge.judge(judged, engine.head(), engine, curvature)
        if self._watch is None:
            gate.weights, gate.offset = verdict.weights, verdict.offset
            for name, value in shift_metrics(verdict).items():
                self._metrics["train"][name].append(value)
        if self.token_callbacks:
            record = token_record(self.state.global_step, inputs, judged, verdict)
            for callback in self.token_callbacks:
                callback(record)

    def _context(
        self, inputs: dict[str, Any], gate: GradientGate, gradient: Tensor
    ) -> TokenContext | None:
        if self._judge is None or not isinstance(self._judge.rule, TokenRule):
            return None
        assert gate.output is not None, "the gate has seen the loss"
        token_ids, advantages = inputs["completion_ids"], inputs["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        old = inputs.get("old_per_token_logps")
        # Left-padded alike within a batch, so equal prompts are equal rows.
        group = torch.unique(inputs["prompt_ids"], dim=0, return_inverse=True)[1]
        per_generation = self.args.steps_per_generation // self.args.gradient_accumulation_steps
        passes = self.state.global_step // max(1, per_generation)
        return TokenContext(
            token_ids=token_ids,
            advantage=advantages.expand_as(token_ids),
            old_log_prob=(gate.output if old is None else old).detach(),
            acting=gradient != 0,
            group=group,
            iteration=passes % self.num_iterations,
            seed=self.args.seed + 1_000_003 * self.state.global_step + int(token_ids.sum()),
        )

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if self._old is not None and self._old.skips():
            return None, None, None
        log_probs, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._old is not None:
            self._old.see(log_probs)
        if self._gate is not None:
            log_probs = self._gate(log_probs)
        return (log_probs, *others)

    # Moments: once per optimizer step, with the gradient as it was clipped

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        self._grad_norm = float(norm)
        return norm

    def _begin(self) -> None:
        if self._control is not None:
            self._control.begin()
        if self._judge is not None:
            self._judge.step_model.discard()
        self._grad_norm = None

    def _before_step(self) -> None:
        if not self._engine().steps_in_backward:
            self._foresee()

    def _foresee(self) -> None:
        if self._control is None:
            return
        engine = self._engine()
        self._control.before_step(
            engine,
            self.accelerator.autocast,
            exact_hidden=self.accelerator.mixed_precision == "no" and engine.exact_hidden,
        )

    def _restore(self) -> None:
        if self._control is not None:
            self._control.restore(self._engine())

    def _after_step(self) -> None:
        skipped = self.accelerator.optimizer_step_was_skipped  # overflow under fp16
        dropped = self._control is not None and self._control.dropped
        self._restore()
        if self._control is not None:
            if skipped:
                self._control.discard()
            else:
                self._measure(self._control)
        if self._judge is not None:
            if skipped or dropped:
                self._judge.step_model.discard()
            elif self._grad_norm is None:
                self._judge.step_model.advance()
            else:
                self._judge.step_model.advance(self.args.max_grad_norm, self._grad_norm)
        self._grad_norm = None

    def _measure(self, control: StepControl) -> None:
        ledger = control.after_step(
            self._engine(), self.accelerator.autocast, self.state.global_step + 1
        )
        for name, value in ledger.items():
            self._metrics["train"][name].append(value)

    # Rewards: of REINFORCE without a baseline, and to be recorded

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        weighted = rewards * self.reward_weights.to(rewards.device)
        self._rewards = weighted.nansum(dim=1)  # no reward at all counts as none: 0
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with nullcontext() if self._old is None else self._old.generating(self.model.training):
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self._rewards is None:
            return output
        own = output["advantages"].size(0)
        start = self.accelerator.process_index * own
        if self.token_callbacks:  # shuffled and split along with its completions
            output[REWARD] = self._rewards[start : start + own]
        if getattr(self.args, "advantage_baseline", "group") == "none":
            output["advantages"] = self._rewards[start : start + own]
            logged = self._logs["advantages"]  # the batch's group advantages are its last entries
            for _ in range(min(len(logged), self._rewards.numel())):
                logged.pop()
            logged.extend(self._rewards.tolist())
        self._rewards = None
        return output

    # Model card and checkpoints

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the draft of a model card as TRL does, with a section on what CAPO did and saw."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(Path(self.args.output_dir) / "README.md", card_section(self))

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
    """Calls when training begins, before the optimizer steps, and when it has or overflow kept it from it."""

    def __init__(
        self, begin: Callable[[], None], before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        self._begin = begin
        self._before = before
        self._after = after

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._before()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._after()
