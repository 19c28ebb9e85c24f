"""What one optimizer step is seen to be, without a hand on it: tokens, prediction, measurement, noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import capo
from capo.core.gradient_noise import NoiseEstimate, NoiseScale, gradient_noise
from capo.core.selection import Reason
from capo.core.trust_region import Probe
from capo.core.trust_region.probe import Depth
from capo.integrations._trl_batch import StepBatch, core_head, eval_mode, head_logits, make_batch
from capo.integrations._trl_judge import PolicyPass, everyones_gradient, quantiles
from capo.integrations._trl_sample import Sample, draw_sample, part_of
from capo.integrations._trl_sharded import Engine
from capo.integrations._trl_step import StepModel
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from torch import Tensor

    from capo.core.selection import Rule

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class _Tokens:
    """The judged tokens of a step, micro-batch by micro-batch; ``[N]`` each."""

    policy_shift: list[Tensor] = field(default_factory=list)
    objective_shift: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    reason: list[Tensor] = field(default_factory=list)


class StepObserver:
    """Observes optimizer steps one after another. Nothing of the training is written to.

    Each of several processes observes its own completions, and every reading is over those of all.

    Args:
        rule: the selection rule whose rejections are counted, and not carried out.
        step_model: whose step a token's own shifts are of.
        options: `fisher`, `top_k`, `renormalize` and `impl` of `capo.token_curvature`.
        sequences: completions of a step on which it is foreseen and measured; None for all.
        depth: layers by which it is foreseen.
        seed: of the choice of completions, the only thing that is random here.
    """

    def __init__(
        self,
        rule: Rule,
        step_model: StepModel,
        options: dict[str, Any],
        *,
        sequences: int | None,
        depth: Depth,
        seed: int,
    ) -> None:
        self.rule = rule
        self.step_model = step_model
        self.options = options
        self.sequences = sequences
        self.depth = depth
        self.seed = seed
        self.noise = NoiseScale()
        self._forget()

    def _forget(self) -> None:
        self._tokens = _Tokens()
        self._samples: list[Sample] = []
        self._coefficients: list[Tensor] = []
        self._batch: StepBatch | None = None
        self._found: dict[str, float] = {}

    @torch.no_grad()
    def micro_batch(
        self,
        inputs: dict[str, Any],
        policy_pass: PolicyPass,
        engine: Engine,
        *,
        step: int,
    ) -> None:
        """Judge the tokens of a micro-batch between loss and backward, and keep some completions."""
        mask, head, world = policy_pass.mask, engine.head(), engine.world
        if world.alone and not bool(mask.any()):
            return
        curvature = capo.token_curvature(
            policy_pass.hidden,
            head.weight,
            policy_pass.token_ids,
            policy_pass.effective_advantage,
            step=self.step_model.step(head, engine),
            mask=mask,
            **head.logit_options,
            **self.options,
        )
        top_k = self.options["top_k"]
        if world.alone:
            self.step_model.accumulate(
                head,
                hidden=policy_pass.hidden,
                token_ids=policy_pass.token_ids,
                loss_gradient=policy_pass.loss_gradient,
                curvature=curvature,
                top_k=top_k,
            )
        elif self.step_model.simulated:
            self.step_model.add(
                everyones_gradient(
                    world, policy_pass, head, policy_pass.loss_gradient, curvature, top_k
                )
            )
        self._tokens.policy_shift.append(curvature.policy_shift[mask])
        self._tokens.objective_shift.append(curvature.objective_shift[mask])
        self._tokens.entropy.append(curvature.entropy[mask])
        self._tokens.reason.append(capo.select(curvature, self.rule, mask).reason[mask])
        index = len(self._samples)
        name = (self.seed * 1_000_003 + step) * 1_009 + index
        sample = draw_sample(
            inputs,
            mask,
            policy_pass.hidden,
            part_of(self.sequences, index, policy_pass.accumulation_steps),
            torch.Generator().manual_seed(name % (1 << 62)),
            world,
        )
        self._samples.append(sample)
        width = sample.token_ids.size(1)
        self._coefficients.append(-policy_pass.loss_gradient[sample.rows, :width][sample.mask])

    def before_step(
        self,
        engine: Engine,
        autocast: Autocast,
        *,
        exact_hidden: bool,
    ) -> None:
        """Foresee the step that is about to be taken.

        Args:
            engine: policy and optimizer, the gradients clipped.
            autocast: the trainer's mixed precision.
            exact_hidden: whether another forward pass gives the training pass's hidden states.
        """
        counted = sum(int(sample.mask.sum()) for sample in self._samples)
        device = next(engine.policy.parameters()).device
        if not self._samples or not engine.world.total_int(counted, device):
            self._forget()
            return

        def hidden() -> Tensor:
            with torch.no_grad(), autocast():
                return batch.run(engine)

        with eval_mode(engine.policy), engine.reading():
            head = engine.head()
            lm_head = core_head(head)
            batch = make_batch(self._samples, lm_head, engine.world)
            if not exact_hidden:
                batch = batch.with_hidden(hidden(), lm_head)
            probe = Probe(
                engine.backbone,
                hidden,
                lm_head,
                head.parameter,
                engine.proposed_step(),
                batch.reference,
                batch.hidden,
                batch.weights,
                None if engine.world.alone else engine.world.total,
            )
            self._foresee(probe, trained=head.parameter.requires_grad)
        noise = self._noise(batch)
        if noise is not None:
            self._found["gradient_noise"] = noise
        self._batch = batch

    def _foresee(self, probe: Probe, *, trained: bool) -> None:
        if trained or self.depth != 0:  # else nothing that is looked at moves
            whole = probe.mean(probe.along(self.depth))
            self._found["predicted_policy_shift"] = whole.policy
            self._found["predicted_objective_shift"] = whole.objective
        if trained:
            alone = whole if self.depth == 0 else probe.mean(probe.along(0))
            self._found["head_policy_shift"] = alone.policy

    def _noise(self, batch: StepBatch) -> float | None:
        chosen = batch.chosen
        completion = torch.repeat_interleave(
            torch.arange(batch.lengths.numel(), device=chosen.device), batch.lengths
        )
        prompts = [tuple(row) for s in batch.samples for row in _prompts(s)]
        names = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        estimate = gradient_noise(
            batch.reference.log_probs,
            batch.hidden,
            batch.reference.token_ids,
            torch.cat(self._coefficients)[chosen],
            completion[chosen],
            torch.tensor([names[prompt] for prompt in prompts]),
        )
        if not batch.world.alone:  # each process's is unbiased: so is their mean
            here = [0.0, 0.0, 0.0] if estimate is None else [*estimate, 1.0]
            trace, signal, count = batch.world.total(
                torch.tensor(here, dtype=torch.float64, device=chosen.device)
            ).tolist()
            estimate = NoiseEstimate(trace / count, signal / count) if count else None
        return None if estimate is None else self.noise.observe(estimate)

    @torch.no_grad()
    def after_step(
        self,
        engine: Engine,
        autocast: Autocast,
        grad_norm: float | None,
        clip: float,
    ) -> dict[str, float]:
        """Measure the step that was taken; the readings of it, empty where there was nothing to see.

        Args:
            engine, autocast: as before the step.
            grad_norm: the gradient's norm before clipping, or None.
            clip: what it was clipped to, or 0.
        """
        batch = self._batch
        if batch is None:
            self.discard()
            return {}
        with eval_mode(engine.policy), engine.reading():
            with autocast():
                hidden = batch.run(engine)
            divergence = batch.reference.to(head_logits(core_head(engine.head()), hidden))
        found = {
            **_token_readings(self._tokens, engine.world),
            **self._found,
            "measured_policy_shift": batch.mean(divergence.policy_shift),
            "observed_objective_shift": batch.mean(divergence.objective_shift),
            "mean_length": batch.mean_length,
        }
        if grad_norm is None:
            self.step_model.advance()
        else:
            self.step_model.advance(clip or None, grad_norm)
        self._forget()
        return found

    def discard(self) -> None:
        """Forget what was seen of a step that was not taken."""
        self.step_model.discard()
        self._forget()


def _prompts(sample: Sample) -> list[list[int]]:
    """The prompts of a sample's completions without their padding, which depends on the micro-batch."""
    rows = zip(sample.prompt_ids.tolist(), sample.prompt_mask.tolist(), strict=True)
    return [[token for token, real in zip(*row, strict=True) if real] for row in rows]


def _token_readings(tokens: _Tokens, world: World) -> dict[str, float]:
    """Over all tokens of the step, those of all processes. One transfer to the host."""
    shift, gain = torch.cat(tokens.policy_shift), torch.cat(tokens.objective_shift)
    reason, entropy = torch.cat(tokens.reason), torch.cat(tokens.entropy)
    if not world.alone:
        own = (shift, gain, reason, entropy, torch.ones_like(reason))
        (*all_of, there), _ = world.rows(*(column[None] for column in own))
        shift, gain, reason, entropy = (column[there > 0] for column in all_of)
    rejected = (Reason.POLICY_SHIFT, Reason.OBJECTIVE_LOW, Reason.OBJECTIVE_HIGH)
    values = {
        "policy_shift/mean": shift.mean(),
        **quantiles("policy_shift", shift, p50=0.5, p90=0.9, p99=0.99, max=1),
        "objective_shift/mean": gain.mean(),
        **quantiles("objective_shift", gain, p01=0.01, p50=0.5, p99=0.99, max=1),
        "rejection_rate": (reason != Reason.KEPT).float().mean(),
        **{f"rejection_rate/{one.label}": (reason == one).float().mean() for one in rejected},
        "entropy": entropy.mean(),
    }
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))
