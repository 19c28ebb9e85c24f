"""`CurvatureMonitor`: look at a TRL run as it is, and change nothing of it.

    monitor = CurvatureMonitor(trainer)   # any GRPOTrainer, before trainer.train()

A callback sees neither advantages nor hidden states, so the monitor stands around two methods of this one
trainer (its loss and its log-probabilities), reads what they compute, and returns it untouched; a callback
tells it when the optimizer steps. Its readings go into the trainer's own log, and so to whatever the run
reports to. The weights stay those of the run without it, bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback
from trl import GRPOTrainer

from capo.core.diagnoses import Diagnoses, Diagnosis
from capo.core.early_warning import FROZEN as WARNED_BY
from capo.core.early_warning import EarlyWarning, StepReading, Warned
from capo.core.errors import InputError
from capo.core.trust_region import auto_sequences, last_layers
from capo.core.trust_region.probe import Depth
from capo.integrations._trl_head import (
    LMHead,
    capture_hidden,
    causal_lm,
    predicting_positions,
    read_head,
)
from capo.integrations._trl_judge import PolicyPass
from capo.integrations._trl_loss import GradientGate, loss_scale_of
from capo.integrations._trl_monitored import (
    check_options,
    check_trainer,
    own_step_model,
    would_be_rule,
)
from capo.integrations._trl_observe import StepObserver
from capo.integrations._trl_sharded import Engine
from capo.integrations._trl_step import unwrapped_optimizer
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from torch import Tensor

    from capo.core.selection import Rule

__all__ = ["CurvatureMonitor"]

PREFIX = "capo/monitor/"
TOP_K = 50  # vocabulary rows by which a token is judged, as in the paper

_log = logging.getLogger("capo.monitor")


class CurvatureMonitor:
    """Attaches to a `GRPOTrainer` and reports both shifts, their KL, noise, entropy and early warnings.

    Logged with the trainer's own metrics as ``capo/monitor/…`` (docs/metrics.md). A warning and each of the
    three diagnoses are also logged once, as a Python warning-level log record of ``capo.monitor``, and kept
    in :attr:`warnings` and :attr:`diagnoses`.

    Args:
        trainer: a `trl.GRPOTrainer` (or a subclass), before ``train()``.
        thresholds: whose rejections are counted: ``"capo"``, ``"dr_capo"``, ``"reincapo"``, a dict (see
            `capo.make_rule`) or a rule.
        every: look at every so many optimizer steps.
        sequences: completions of a step on which its policy shift is foreseen and measured, spread evenly
            over the prompts; ``"auto"``: two of each prompt, 8 to 32; None for all.
        depth: layers by which the step is foreseen: the last n and the head (0: the head alone, as in the
            paper, which costs next to nothing), or ``"all"`` (a pass with derivatives); ``"auto"``: 0,
            or ``"all"`` where the head is not trained.
        fisher: token policy shifts from the ``"sampled"`` (the paper's) or the ``"exact"`` Fisher.
        impl: backend of the curvature, see `capo.token_curvature`.

    Attributes:
        diagnoses: what was found to be wrong with thresholds, depth or cost, see `capo.Diagnosis`.
        warnings: the early warnings, see `capo.Warned`.
        readings: the latest step's readings by key, without the prefix.

    Raises:
        InputError: the trainer cannot be monitored, or an argument is not possible; names which.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        *,
        thresholds: Rule | dict[str, Any] | str = "capo",
        every: int = 1,
        sequences: int | Literal["auto"] | None = "auto",
        depth: Depth = "auto",
        fisher: Literal["sampled", "exact"] = "sampled",
        impl: str = "auto",
    ) -> None:
        """Check that the trainer can be looked at, then stand around its loss."""
        check_trainer(trainer)
        check_options(every, sequences, fisher, impl)
        rule = would_be_rule(thresholds)
        self.trainer = trainer
        self.every = every
        args = trainer.args
        head = read_head(self._policy(), trainer.temperature)
        if depth == "auto":
            depth = 0 if head.parameter.requires_grad else "all"
        if depth != 0:
            last_layers(causal_lm(self._policy()).base_model, depth)
        self._batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        if sequences == "auto":
            sequences = auto_sequences(math.ceil(self._batch / trainer.num_generations))
        self._options = {
            "fisher": fisher,
            "top_k": min(TOP_K, head.weight.size(0)),
            "renormalize": True,
            "impl": impl,
        }
        self._make_observer: Callable[[], StepObserver] = lambda: StepObserver(
            rule,
            own_step_model(trainer, self._head()),
            self._options,
            sequences=sequences,
            depth=depth,
            seed=args.seed,
        )
        self._observer: StepObserver | None = None
        self._armed: tuple[list[Tensor], GradientGate] | None = None
        self._grad_norm: float | None = None
        self._clock: Callable[[], float] = time.perf_counter
        self._own_seconds = self._began = 0.0
        self._looks, self._growth = False, 1.0
        self._unjudged: str | None = None
        self._said: set[str] = set()
        self.readings: dict[str, float] = {}
        self._diagnoses, self._warning = Diagnoses(every, deep=depth != 0), EarlyWarning()
        self._callback = _Callback(self)
        trainer.add_callback(self._callback)
        self._wrapped = {
            "_compute_loss": self._around_loss,
            "_get_per_token_logps_and_entropies": self._around_log_probs,
            "_clip_grad_norm": self._around_clip,
        }
        self._originals = {name: getattr(trainer, name) for name in self._wrapped}
        for name, wrapper in self._wrapped.items():
            setattr(trainer, name, wrapper)
        trainer.capo_monitor = self

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """What was diagnosed so far."""
        return self._diagnoses.found

    @property
    def warnings(self) -> list[Warned]:
        """The early warnings so far."""
        return self._warning.warned

    def detach(self) -> None:
        """Leave the trainer as it was. What was found stays readable."""
        for name, wrapper in self._wrapped.items():
            if self.trainer.__dict__.get(name) == wrapper:
                del self.trainer.__dict__[name]
        self.trainer.remove_callback(self._callback)
        self.trainer.__dict__.pop("capo_monitor", None)

    def _policy(self) -> torch.nn.Module:
        policy: torch.nn.Module = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return policy

    def _head(self) -> LMHead:
        return read_head(self._policy(), self.trainer.temperature)

    def _engine(self) -> Engine:
        trainer = self.trainer
        optimizer = unwrapped_optimizer(trainer.optimizer)
        return Engine(self._policy(), optimizer, trainer.temperature, World())

    # Around the loss

    def _around_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        original = self._originals["_compute_loss"]
        if not (self._looks and self.trainer.model.training):
            unobserved: Tensor = original(model, inputs)
            return unobserved
        passes: list[Tensor] = []
        gate = GradientGate()
        self._armed = (passes, gate)
        try:
            loss: Tensor = original(model, inputs)
        finally:
            self._armed = None
        began = self._clock()
        if gate.output is not None and gate.output.requires_grad:
            self._judge(inputs, loss, passes, gate)
        self._own_seconds += self._clock() - began
        return loss

    def _around_log_probs(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        original = self._originals["_get_per_token_logps_and_entropies"]
        if self._armed is None:
            unobserved: tuple[Any, ...] = original(*args, **kwargs)
            return unobserved
        (passes, gate), self._armed = self._armed, None
        with capture_hidden(self._policy()) as hidden:
            outputs: tuple[Any, ...] = original(*args, **kwargs)
        passes.extend(hidden)
        gate.output = outputs[0]  # read where it leaves; nothing is put into the graph
        return outputs

    def _around_clip(self, model: torch.nn.Module) -> Any:
        norm = self._originals["_clip_grad_norm"](model)
        if self._looks:
            self._grad_norm = float(norm)
        return norm

    def _judge(
        self, inputs: dict[str, Any], loss: Tensor, passes: list[Tensor], gate: GradientGate
    ) -> None:
        trainer = self.trainer
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        accumulation = trainer.current_gradient_accumulation_steps
        policy_pass = PolicyPass(
            hidden=predicting_positions(torch.cat(passes), mask.size(1)),
            token_ids=inputs["completion_ids"],
            mask=mask.bool(),
            loss_gradient=gate.gradient(loss),
            loss_scale=loss_scale_of(trainer, mask, inputs) / accumulation,
            accumulation_steps=accumulation,
        )
        if self._observer is None:
            self._observer = self._make_observer()
        try:
            self._observer.micro_batch(
                inputs, policy_pass, self._engine(), step=trainer.state.global_step
            )
        except InputError as error:  # numbers that are not finite: a run's end is not ours to bring
            self._unjudged = str(error)

    # Around the step

    def begin_step(self) -> None:
        """A new optimizer step's micro-batches are to come."""
        self._looks = self.trainer.state.global_step % self.every == 0
        self._began, self._own_seconds, self._unjudged = self._clock(), 0.0, None
        self._grad_norm = None

    def before_optimizer(self) -> None:
        """The gradients are clipped, and free of a loss scale: the trainer takes their norm in any case."""
        if not self._looks or self._observer is None:
            return
        began, trainer, engine = self._clock(), self.trainer, self._engine()
        self._observer.before_step(
            engine,
            trainer.accelerator.autocast,
            exact_hidden=trainer.accelerator.mixed_precision == "no" and engine.exact_hidden,
        )
        self._own_seconds += self._clock() - began

    def after_optimizer(self) -> None:
        """The optimizer stepped, or skipped its step for overflow."""
        self.readings = {}
        if not self._looks or self._observer is None:
            return
        began, trainer = self._clock(), self.trainer
        self._growth = self._foreseen_growth()  # now, before the scheduler moves on
        if trainer.accelerator.optimizer_step_was_skipped:
            self._observer.discard()
        else:
            self.readings = self._observer.after_step(
                self._engine(),
                trainer.accelerator.autocast,
                self._grad_norm,
                trainer.args.max_grad_norm or 0.0,
            )
        self._own_seconds += self._clock() - began

    def end_step(self) -> None:
        """The step is over: write down what was seen, before the trainer logs."""
        whole, step = self._clock() - self._began, self.trainer.state.global_step
        log = self.trainer._metrics["train"]
        if self._unjudged is not None and self._unjudged not in self._said:
            self._said.add(self._unjudged)
            _log.warning("step %d could not be judged: %s", step, self._unjudged)
        if not self.readings:
            return
        others = whole - self._own_seconds
        self.readings["overhead"] = self._own_seconds / others if others > 0 else 0.0
        self._warn(step)
        for name, value in self.readings.items():
            if math.isfinite(value):
                log[PREFIX + name].append(value)
        reward = log["reward"][-1] if log.get("reward") else math.nan
        for found in self._diagnoses.observe(
            step, {**self.readings, "reward": reward}, warned=self._warning.active
        ):
            _log.warning("%s", found.sentence)

    def _warn(self, step: int) -> None:
        readings = self.readings
        reading = StepReading(
            policy_shift=readings["measured_policy_shift"],
            entropy=readings["entropy"],
            completions=self._batch,
            iterations=self.trainer.num_iterations,
            mean_length=readings.pop("mean_length"),
            growth=self._growth,
        )
        warned = self._warning.observe(step, reading)
        if warned is not None:
            _log.warning("%s", warned.sentence)
        readings["excess"] = reading.excess
        readings["warning_score"] = self._warning.score
        readings["warning"] = float(self._warning.active)

    def _foreseen_growth(self) -> float:
        """How much the schedule still raises the learning rate within the horizon."""
        control = getattr(self.trainer, "_control", None)
        if control is not None and control.region.scales:
            return 1.0  # a trust region sets the step's length, the schedule does not
        schedule = getattr(self.trainer.lr_scheduler, "lr_lambdas", None)
        if not schedule:
            return 1.0
        now = self.trainer.lr_scheduler.last_epoch
        factors = [schedule[0](now + ahead) for ahead in range(WARNED_BY.horizon + 1)]
        return max(factors) / factors[0] if factors[0] > 0 else 1.0

    def restore(self) -> None:
        """Continue the early warning of a run that is resumed, from what it has logged."""
        for row in self.trainer.state.log_history:
            excess = row.get(f"{PREFIX}excess")
            if excess is not None:
                self._warning.feed(excess)


class _Callback(TrainerCallback):  # type: ignore[misc]
    """Tells the monitor where a step begins, is taken and ends."""

    def __init__(self, monitor: CurvatureMonitor) -> None:
        self._monitor = monitor

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._monitor.restore()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._monitor.begin_step()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._monitor.before_optimizer()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._monitor.after_optimizer()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._monitor.end_step()
