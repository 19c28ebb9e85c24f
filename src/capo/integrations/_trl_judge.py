"""The verdict on one micro-batch: curvature, selection, and what is logged of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import capo
from capo.core.batch_shift import batch_shift
from capo.core.moments import add_gradient
from capo.core.token_rules import TokenContext, TokenRule
from capo.integrations._trl_head import LMHead
from capo.integrations._trl_loss import gradient_weights
from capo.integrations._trl_sharded import Engine
from capo.integrations._trl_step import StepModel
from capo.integrations._trl_world import World

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.selection import Rule


SMALL_VOCABULARY = 4096
REWARD = "capo_reward"  # of a completion, among the trainer's inputs


@dataclass(frozen=True)
class TokenRecord:
    """What was judged and decided in one micro-batch. All tensors are on the CPU.

    Attributes:
        step: optimizer steps taken before this micro-batch.
        token_ids: sampled tokens, ``[B, T]``, right-padded.
        mask: True on the tokens that count, ``[B, T]``; elsewhere the other fields mean nothing.
        log_prob: log-probability (nats) under the policy that is trained, ``[B, T]``.
        entropy: entropy (nats) of the distribution the token was drawn from, ``[B, T]``.
        advantage: the trainer's advantage, ``[B, T]``, before ratio and clipping.
        objective_shift: m_H of the token's own step, ``[B, T]``.
        policy_shift: m_F of the token's own step (nats), ``[B, T]``.
        reason: `capo.Reason` of the verdict, int8 ``[B, T]``.
        weight: kept share of the token's gradient, ``[B, T]``; above 1 where a rule amplifies.
        prompt_ids: prompts, ``[B, P]``, left-padded.
        prompt_mask: True on the prompt's tokens, ``[B, P]``.
        reward: weighted sum of a completion's rewards, ``[B]``; NaN where it is not known.
    """

    step: int
    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    log_prob: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    advantage: Float[Tensor, "B T"]
    objective_shift: Float[Tensor, "B T"]
    policy_shift: Float[Tensor, "B T"]
    reason: Int[Tensor, "B T"]
    weight: Float[Tensor, "B T"]
    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    reward: Float[Tensor, " B"]


@dataclass(frozen=True)
class PolicyPass:
    """What one forward and loss of a micro-batch leave to be judged.

    Attributes:
        hidden: input of the LM head at the predicting positions, ``[B, T, d]``.
        token_ids: sampled tokens, ``[B, T]``.
        mask: True on the tokens that count, ``[B, T]``.
        loss_gradient: ``∂loss/∂log π``, ``[B, T]``.
        loss_scale: the loss's normalisation of each token, accumulation included, ``[B, 1]``.
        accumulation_steps: micro-batches in one optimizer step.
        context: for a rule that needs it.
    """

    hidden: Float[Tensor, "B T d"]
    token_ids: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    loss_gradient: Float[Tensor, "B T"]
    loss_scale: Float[Tensor, "B 1"]
    accumulation_steps: int
    context: TokenContext | None = None

    @property
    def effective_advantage(self) -> Float[Tensor, "B T"]:
        """Advantage × ratio × not-clipped: the gradient as if the token were a batch of one."""
        return -self.loss_gradient / self.loss_scale


@dataclass(frozen=True)
class Verdict:
    """Curvature and selection of one micro-batch.

    Attributes:
        curvature: per-token shifts, ``[B, T]``.
        selection: what the rule says.
        weights: factors on the tokens' gradients, denominators taken into account, ``[B, T]``.
        offset: what is added to them, or None, ``[B, T]``.
        batch_policy_shift: see :meth:`Judge.batch_shifts`; None where nobody asks for it.
        batch_objective_shift: see :meth:`Judge.batch_shifts`; None likewise.
        everywhere, everywhere_mask: curvature and mask of all processes' rows.
    """

    curvature: capo.TokenCurvature
    selection: capo.Selection
    weights: Float[Tensor, "B T"]
    batch_policy_shift: Float[Tensor, ""] | None
    batch_objective_shift: Float[Tensor, ""] | None
    everywhere: capo.TokenCurvature
    everywhere_mask: Bool[Tensor, "A T"]
    offset: Float[Tensor, "B T"] | None = None


class Judge:
    """Judges micro-batches: each token's own step by `rule`.

    Args:
        rule: the selection rule.
        step_model: the optimizer's step of the head.
        options: `fisher`, `top_k`, `renormalize` and `impl` of `capo.token_curvature`.
        world: the processes; a micro-batch is what all of them hold of it.
        wants_batch_shifts: whether the shifts of the step of all tokens together are asked for now; alike
            in all processes. Nothing but the log depends on them.
    """

    def __init__(
        self,
        rule: Rule | TokenRule,
        step_model: StepModel,
        options: dict[str, Any],
        world: World | None = None,
        wants_batch_shifts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.rule = rule
        self.step_model = step_model
        self.options = options
        self.world = world or World()
        self.wants_batch_shifts = wants_batch_shifts

    @torch.no_grad()
    def judge(
        self,
        policy_pass: PolicyPass,
        head: LMHead,
        engine: Engine,
        curvature: capo.TokenCurvature | None = None,
    ) -> Verdict:
        """Judge a micro-batch, and add what is accepted of it to the simulated gradient.

        By each token's own step of the head, or by `curvature` where that is known otherwise.
        """
        step = self.step_model.step(head, engine)
        curvature = curvature or capo.token_curvature(
            policy_pass.hidden,
            head.weight,
            policy_pass.token_ids,
            policy_pass.effective_advantage,
            step=step,
            mask=policy_pass.mask,
            **head.logit_options,
            **self.options,
        )
        everywhere, mask, own = self._everywhere(curvature, policy_pass.mask)
        everyones = self._select(everywhere, mask, policy_pass)
        selection = everyones
        if not self.world.alone:
            width = policy_pass.mask.size(1)
            selection = dataclasses.replace(
                everyones,
                weights=everyones.weights[own, :width],
                reason=everyones.reason[own, :width],
            )
        weights = gradient_weights(selection.weights, policy_pass.mask, selection.denominator)
        # `where`, not a product alone: a rejected token's gradient may be infinite or NaN.
        accepted = torch.where(weights == 0, 0.0, weights * policy_pass.loss_gradient)
        offset = None
        if selection.penalty is not None:
            offset = selection.penalty * policy_pass.loss_scale * policy_pass.mask
            accepted = accepted + offset
        batch_shifts: tuple[Tensor | None, Tensor | None] = (None, None)
        wanted = self.wants_batch_shifts()
        if self.world.alone:
            if wanted:
                batch_shifts = self.batch_shifts(policy_pass, head, step, accepted, curvature)
            self.step_model.accumulate(
                head,
                hidden=policy_pass.hidden,
                token_ids=policy_pass.token_ids,
                loss_gradient=accepted,
                curvature=curvature,
                top_k=self.options["top_k"],
            )
        else:
            top_k, batch_top_k = self.options["top_k"], self._batch_top_k(head)
            gradient = None
            if wanted:
                gradient = everyones_gradient(
                    self.world, policy_pass, head, accepted, curvature, batch_top_k
                )
                batch_shifts = self._global_shifts(policy_pass, head, step, accepted, gradient)
            if self.step_model.simulated:
                if gradient is None or top_k != batch_top_k:
                    gradient = everyones_gradient(
                        self.world, policy_pass, head, accepted, curvature, top_k
                    )
                self.step_model.add(gradient)
        return Verdict(curvature, selection, weights, *batch_shifts, everywhere, mask, offset)

    def _select(
        self,
        curvature: capo.TokenCurvature,
        mask: Bool[Tensor, "A T"],
        policy_pass: PolicyPass,
    ) -> capo.Selection:
        if isinstance(self.rule, TokenRule):
            assert policy_pass.context is not None, "a token rule is asked with its context"
            return self.rule.within(curvature, mask & curvature.mask, policy_pass.context)
        return capo.select(curvature, self.rule, mask)

    def _everywhere(
        self, curvature: capo.TokenCurvature, mask: Bool[Tensor, "B T"]
    ) -> tuple[capo.TokenCurvature, Bool[Tensor, "B T"], slice]:
        """The curvature of all processes' rows, their mask, and which rows are one's own.

        A rule may read its thresholds off the batch, so that it has to see all of it.
        """
        if self.world.alone:
            return curvature, mask, slice(0, mask.size(0))
        names = ("objective_shift", "policy_shift", "log_prob", "entropy", "s", "variance")
        fields = [getattr(curvature, name) for name in names]
        judged, counted = curvature.mask.to(fields[0].dtype), mask.to(fields[0].dtype)
        (*rows, judged, counted), own = self.world.rows(*fields, judged, counted)
        everywhere = dataclasses.replace(
            curvature,
            truncation_bound=None,
            support=None,
            mask=judged.bool(),
            **dict(zip(names, rows, strict=True)),
        )
        return everywhere, counted.bool(), own

    def _global_shifts(
        self,
        policy_pass: PolicyPass,
        head: LMHead,
        step: capo.SGDStep | capo.AdamStep,
        accepted: Float[Tensor, "B T"],
        gradient: Float[Tensor, "V d"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """:meth:`batch_shifts` of the step that all processes' tokens make together."""
        if isinstance(step, capo.AdamStep):
            step = dataclasses.replace(step, grad_scale=1.0)
        whole = gradient * policy_pass.accumulation_steps
        batch = capo.token_curvature(
            policy_pass.hidden,
            head.weight,
            policy_pass.token_ids,
            -accepted * (policy_pass.accumulation_steps / self.world.size),
            step=capo.GivenStep(step.of_gradient(whole, head.weight.to(whole.dtype))),
            mask=policy_pass.mask,
            **head.logit_options,
            **self.options | {"top_k": self._batch_top_k(head), "renormalize": True},
        )
        sums = [batch.policy_shift.sum(), batch.objective_shift.sum(), policy_pass.mask.sum()]
        policy, objective, tokens = self.world.total(torch.stack([s.double() for s in sums]))
        return policy / tokens.clamp(min=1), objective

    def _batch_top_k(self, head: LMHead) -> int | None:
        small = head.weight.size(0) <= SMALL_VOCABULARY
        return None if small else self.options["top_k"]

    def batch_shifts(
        self,
        policy_pass: PolicyPass,
        head: LMHead,
        step: capo.SGDStep | capo.AdamStep,
        accepted: Float[Tensor, "B T"],
        curvature: capo.TokenCurvature | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Policy and objective shift of the one step of all accepted tokens together.

        The step is the optimizer's for the gated gradient of this micro-batch (which stands in for
        the whole batch where gradients are accumulated), before gradient clipping. The policy shift
        is the mean over all tokens that count, rejected ones included: they move too. The objective
        shift is the predicted decrease of the loss. Small vocabularies are summed in full, which
        costs less than looking for each token's likeliest rows; of large ones the rows and probabilities
        of `curvature`, the tokens' own judgement, are used again where it has them.
        """
        top_k = self._batch_top_k(head)
        tokens = policy_pass.mask.sum().clamp(min=1)
        if isinstance(step, capo.AdamStep):
            # The accepted gradient is normalised already, as the real one is.
            step = dataclasses.replace(step, grad_scale=1.0)
        # Batch granularity takes the mean over tokens; the loss's own normalisation is wanted.
        advantages = -accepted * (tokens * policy_pass.accumulation_steps)
        support = None if curvature is None or top_k is None else curvature.support
        options = head.logit_options
        if support is not None and self.options["renormalize"] and _tells_probabilities(options):
            assert curvature is not None
            return batch_shift(
                policy_pass.hidden,
                head.weight,
                policy_pass.token_ids,
                advantages,
                step=step,
                support=support,
                mask=curvature.mask,
                temperature=options["temperature"],
                logit_scale=options["logit_scale"],
                fisher=self.options["fisher"],
                impl=self.options["impl"],
            )
        batch = capo.token_curvature(
            policy_pass.hidden,
            head.weight,
            policy_pass.token_ids,
            advantages,
            step=step,
            mask=policy_pass.mask,
            granularity="batch",
            **head.logit_options,
            **self.options | {"top_k": top_k, "renormalize": True},
        )
        first = policy_pass.mask.flatten().int().argmax()  # every unmasked token has the mean
        return batch.policy_shift.flatten()[first], batch.objective_shift.flatten()[first]


def everyones_gradient(
    world: World,
    policy_pass: PolicyPass,
    head: LMHead,
    accepted: Float[Tensor, "B T"],
    curvature: capo.TokenCurvature,
    top_k: int | None,
) -> Float[Tensor, "V d"]:
    """The head's gradient of the accepted tokens of all processes, whose losses are averaged."""
    weight, mask = head.weight, curvature.mask
    gradient = torch.zeros(weight.shape, device=weight.device)
    add_gradient(
        gradient,
        policy_pass.hidden,
        weight,
        policy_pass.token_ids,
        -accepted[mask],
        mask,
        top_k=top_k,
        support=curvature.support,
        **head.logit_options,
    )
    return world.total(gradient).div_(world.size)


def _tells_probabilities(options: dict[str, Any]) -> bool:
    """Whether a residual of the head is a multiple of a probability."""
    return options["logit_softcap"] is None and options["logit_scale"] != 0


def shift_metrics(verdict: Verdict) -> dict[str, float]:
    """The metrics of one micro-batch, keyed as they are logged. One transfer to the host."""
    selection, curvature, mask = verdict.selection, verdict.everywhere, verdict.everywhere_mask
    values = {
        "rejection_rate": selection.rejection_rate,
        **{
            f"rejection_rate/{reason}": rate
            for reason, rate in selection.rejection_rate_by_reason.items()
        },
        **quantiles(
            "policy_shift", curvature.policy_shift[mask], p50=0.5, p90=0.9, p99=0.99, max=1
        ),
        **quantiles(
            "objective_shift", curvature.objective_shift[mask], p01=0.01, p50=0.5, p99=0.99
        ),
        "tokens": mask.sum(),
    }
    for name in ("policy_shift", "objective_shift"):
        if (value := getattr(verdict, f"batch_{name}")) is not None:
            values[f"batch/{name}"] = value
    numbers = torch.stack([value.float() for value in values.values()]).tolist()
    return {f"capo/{name}": number for name, number in zip(values, numbers, strict=True)}


def quantiles(name: str, values: Float[Tensor, " N"], **at: float) -> dict[str, Tensor]:
    """``name/key`` for every quantile asked for; NaN where there are no values."""
    if values.numel() == 0:  # a NaN is left out of the logged mean
        return {f"{name}/{key}": values.new_tensor(float("nan")) for key in at}
    ordered = values.sort().values
    last = values.numel() - 1
    return {f"{name}/{key}": ordered[round(share * last)] for key, share in at.items()}


def token_record(step: int, inputs: dict[str, Any], judged: PolicyPass, verdict: Verdict) -> Any:
    """The :class:`TokenRecord` of a judged micro-batch."""
    advantages = inputs["advantages"]
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    fields = {
        "token_ids": judged.token_ids,
        "mask": judged.mask,
        "log_prob": verdict.curvature.log_prob,
        "entropy": verdict.curvature.entropy,
        "advantage": advantages.expand_as(judged.token_ids),
        "objective_shift": verdict.curvature.objective_shift,
        "policy_shift": verdict.curvature.policy_shift,
        "reason": verdict.selection.reason,
        "weight": verdict.selection.weights,
        "prompt_ids": inputs["prompt_ids"],
        "prompt_mask": inputs["prompt_mask"].bool(),
        "reward": inputs.get(REWARD, torch.full((judged.mask.size(0),), torch.nan)),
    }
    # A copy, since the trainer reuses its buffers and a callback may keep the record.
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in fields.items()}
    return TokenRecord(step=step, **copies)
