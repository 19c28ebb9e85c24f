"""verl's actor under judgement: between loss and backward pass, and around the optimizer's step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from capo.core.errors import InputError
from capo.core.trust_region import TrustRegion, auto_sequences
from capo.integrations._trl_head import capture_hidden, read_head
from capo.integrations._trl_judge import (
    Judge,
    PolicyPass,
    TokenRecord,
    shift_metrics,
    token_record,
)
from capo.integrations._trl_loss import GradientGate
from capo.integrations._trl_sharded import ShardedEngine
from capo.integrations._trl_step import StepModel
from capo.integrations._trl_trust import StepControl
from capo.integrations._trl_world import World
from capo.integrations._verl_batch import (
    Completions,
    actor_config,
    completions,
    micro_batch_count,
    packed_hidden,
    token_loss_scale,
)
from capo.integrations._verl_monitor import Monitor, foreseen_growth
from capo.integrations._verl_options import Options
from capo.integrations._verl_state import load_everywhere, save_once

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from tensordict import TensorDict
    from torch import Tensor


class PolicyView(ShardedEngine):
    """verl's sharded policy and its optimizer."""

    def forward(
        self, input_ids: Int[Tensor, "n L"], attention_mask: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n L d"]:
        """The backbone's last hidden states, positions counted from each prompt's first token."""
        with capture_hidden(self.policy) as passes:
            self.policy(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=1,
            )
        self.reshard()  # the last group stays gathered, so that its backward pass finds it
        return passes[-1]


@dataclasses.dataclass
class _Step:
    """One mini-batch on its way to an optimizer step."""

    view: PolicyView
    config: Any  # the actor's
    micro_batches: int
    ledger: dict[str, float]
    taken: bool = False


class Actor:
    """Judges what an engine of verl trains.

    Args:
        options: what to do.
        module: the policy, under FSDP2.
        optimizer: its optimizer.
        optimizer_config: verl's settings of it.
        dp_group: the data-parallel processes, all of them.
        autocast: the engine's mixed precision.
        exact_hidden: whether the engine computes in float32, and without dropout.
        seed: of the choice of completions on which steps are tried.
        token_callbacks: called with a :class:`TokenRecord` for every judged micro-batch.
    """

    def __init__(
        self,
        options: Options,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        optimizer_config: Any,
        dp_group: Any,
        autocast: Callable[[], AbstractContextManager[Any]],
        exact_hidden: bool,
        seed: int,
        token_callbacks: list[Callable[[TokenRecord], None]],
    ) -> None:
        self.module = module
        self.optimizer = optimizer
        self.max_norm = optimizer_config.clip_grad
        self.dp_group = dp_group
        self.autocast = autocast
        self.exact_hidden = exact_hidden
        self.token_callbacks = token_callbacks
        self.steps = 0  # optimizer steps asked for
        self.world = World(dist.get_world_size(dp_group), dist.get_rank(dp_group))
        self.judge = self._make_judge(options, optimizer_config)
        self.region = options.region()
        self.control = self._make_control(self.region, seed)
        self.monitor = self._make_monitor(options, optimizer_config, seed)
        self._now: _Step | None = None

    def _make_judge(self, options: Options, optimizer_config: Any) -> Judge | None:
        rule = options.rule()
        if rule is None:
            return None
        self._check_top_k(options)
        step_model = StepModel(
            options.step_model,  # type: ignore[arg-type]
            options.moments,  # type: ignore[arg-type]
            options.grad_scale,
            {"betas": tuple(optimizer_config.betas), "eps": 1e-8},
        )
        return Judge(rule, step_model, options.curvature, self.world)

    def _check_top_k(self, options: Options) -> None:
        vocabulary, top_k = read_head(self.module, 1.0).weight.size(0), options.curvature_top_k
        if top_k is not None and top_k > vocabulary:
            raise InputError(
                "fsdp_config.capo.curvature_top_k",
                f"must be at most the vocabulary size {vocabulary} or null, got {top_k}.",
            )

    def _make_monitor(self, options: Options, optimizer_config: Any, seed: int) -> Monitor | None:
        if options.monitored() is None:
            return None
        self._check_top_k(options)
        return Monitor(
            options,
            self.optimizer,
            {"betas": tuple(optimizer_config.betas), "eps": 1e-8},
            trained=read_head(self.module, 1.0).parameter.requires_grad,
            seed=seed,
            rank=self.world.rank,
        )

    def _make_control(self, region: TrustRegion | None, seed: int) -> StepControl | None:
        if region is None:
            return None
        return StepControl(region, iterations=1, seed=seed, shift_callbacks=[], world=self.world)

    def _view(self, temperature: float) -> PolicyView:
        return PolicyView(self.module, self.optimizer, temperature, self.world)

    # One optimizer step

    @contextmanager
    def step(self, data: TensorDict, loss_function: Any) -> Iterator[dict[str, float]]:
        """Around one mini-batch, from its first micro-batch to the optimizer's step.

        Args:
            data: the mini-batch.
            loss_function: verl's loss, bound to the actor's configuration.

        Yields:
            What there is to log of the step, filled when the block ends.

        Raises:
            InputError: the loss cannot be read, or every sequence has a temperature of its own.
        """
        temperature = data["temperature"]
        if isinstance(temperature, torch.Tensor) and temperature.numel() > 1:
            raise InputError("temperature", "must be one number for all sequences with CAPO.")
        config = actor_config(loss_function)
        count = micro_batch_count(data, self.dp_group)
        self._now = _Step(self._view(float(temperature)), config, count, {})
        if self.control is not None:
            self._prepare_control(self.control, config, len(data))
        if self.monitor is not None:
            completions = len(data) * self.world.size
            prompts = math.ceil(completions / max(config.rollout_n, 1))
            self.monitor.begin(completions, prompts, config.ppo_epochs)
        try:
            yield self._now.ledger
        finally:
            self._now = None

    def _prepare_control(self, control: StepControl, config: Any, rows: int) -> None:
        assert self.region is not None
        control.iterations = config.ppo_epochs
        control.every_completion = bool(config.use_kl_loss)  # its gradient asks for no advantage
        if self.region.sequences == "auto":
            prompts = math.ceil(rows * self.world.size / max(config.rollout_n, 1))
            control.region = dataclasses.replace(self.region, sequences=auto_sequences(prompts))

    def judged_loss(
        self, loss_function: Any, passes: list[Tensor], **arguments: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """verl's loss of a micro-batch, with every token's gradient gated by the verdict on it.

        Args:
            loss_function: verl's.
            passes: the hidden states of the micro-batch's forward pass.
            arguments: as verl calls its loss.
        """
        loss: Tensor
        metrics: dict[str, Any]
        now = self._now
        assert now is not None
        output, data = arguments["model_output"], arguments["data"]
        log_probs = output["log_probs"]
        gate = GradientGate()
        gated = gate(log_probs.values())
        output["log_probs"] = torch.nested.nested_tensor_from_jagged(gated, log_probs.offsets())
        loss, metrics = loss_function(**arguments)
        # The judgement is in full precision, whatever the pass is in.
        with torch.autocast(device_type=gated.device.type, enabled=False):
            laid = completions(data)
            hidden = packed_hidden(passes[-1], data)[laid.positions]
            if self.judge is not None:
                metrics = {**metrics, **self._select(self.judge, now, laid, hidden, loss, gate)}
            if self.monitor is not None:
                seen = self._pass(now, laid, hidden, loss, gate)
                self.monitor.micro_batch(laid.inputs, seen, now.view, self.steps)
            if self.control is not None:
                self.control.collect(
                    laid.inputs,
                    laid.mask,
                    hidden,
                    step=self.steps,
                    accumulation_steps=now.micro_batches,
                )
        return loss, metrics

    def _pass(
        self,
        now: _Step,
        laid: Completions,
        hidden: Float[Tensor, "B T d"],
        loss: Tensor,
        gate: GradientGate,
    ) -> PolicyPass:
        gradient = gate.gradient(loss)
        return PolicyPass(
            hidden=hidden,
            token_ids=laid.token_ids,
            mask=laid.mask,
            loss_gradient=torch.where(laid.mask, gradient[laid.positions], 0.0),
            loss_scale=token_loss_scale(now.config, laid.mask),
            accumulation_steps=now.micro_batches,
        )

    def _select(
        self,
        judge: Judge,
        now: _Step,
        laid: Completions,
        hidden: Float[Tensor, "B T d"],
        loss: Tensor,
        gate: GradientGate,
    ) -> dict[str, float]:
        judged = self._pass(now, laid, hidden, loss, gate)
        verdict = judge.judge(judged, now.view.head(), now.view)
        assert gate.output is not None
        weights = torch.ones_like(gate.output)
        weights[laid.positions[laid.mask]] = verdict.weights[laid.mask].to(weights.dtype)
        gate.weights = weights
        for callback in self.token_callbacks:
            callback(token_record(self.steps, laid.inputs, judged, verdict))
        return shift_metrics(verdict)

    def before_step(self, *_: Any) -> None:
        """Called by the optimizer with the clipped gradient, before it steps."""
        now = self._now
        if now is None:
            return
        now.taken = True
        if self.control is not None:
            self.control.before_step(now.view, self.autocast, exact_hidden=self.exact_hidden)
        if self.monitor is not None:
            self.monitor.before_step(now.view, self.autocast, exact_hidden=self.exact_hidden)

    def after_step(self, *_: Any) -> None:
        """Called by the optimizer when it has stepped."""
        now = self._now
        if now is None or self.control is None:
            return
        self.control.restore(now.view)
        now.ledger.update(self.control.after_step(now.view, self.autocast, self.steps + 1))

    def finish_step(self, grad_norm: float, scheduler: Any) -> None:
        """Take the judged gradient into the moments, clipped as the real one was.

        Args:
            grad_norm: of the whole model, before clipping. Where it is not finite, verl has skipped the
                step.
            scheduler: of the learning rate.
        """
        now = self._now
        taken = now is not None and now.taken
        if self.judge is not None:
            if taken and not (self.control is not None and self.control.dropped):
                self.judge.step_model.advance(self.max_norm, grad_norm)
            else:
                self.judge.step_model.discard()
        if self.control is not None and not taken:
            self.control.discard()
        if self.monitor is not None:
            if now is not None and taken:
                seen = self.monitor.after_step(
                    now.view,
                    self.autocast,
                    grad_norm,
                    self.max_norm or 0.0,
                    step=self.steps + 1,
                    growth=foreseen_growth(scheduler, self.steps),
                )
                now.ledger.update(seen)
            else:
                self.monitor.discard()
        self.steps += 1

    # Checkpoints

    def save(self, folder: Path) -> None:
        """Write CAPO's state into verl's checkpoint of this step."""
        state: dict[str, Any] = {"steps": self.steps}
        if self.judge is not None:
            state |= self.judge.step_model.state_dict() or {}
        if self.control is not None:
            state |= self.control.state_dict()
        if self.monitor is not None:
            state |= self.monitor.state_dict()
        save_once(folder, state, self.world)

    def load(self, folder: Path) -> None:
        """Continue from CAPO's state in verl's checkpoint.

        Raises:
            InputError: the simulated moments are needed and not there.
        """
        simulated = self.judge is not None and self.judge.step_model.simulated
        device = next(self.module.parameters()).device
        state = load_everywhere(folder, self.world, device, required=simulated)
        self.steps = int(state.pop("steps", 0))
        if self.control is not None:
            self.control.load_state_dict(state)
        state.pop("trust_region", None)
        if self.monitor is not None:
            self.monitor.load_state_dict(state)
        if simulated and self.judge is not None and state:
            self.judge.step_model.load_state_dict(state)
