"""Token rules of others, to be compared with: which tokens they mask or weigh, in a few lines each.

They read what curvature does not hold (advantages, groups, the pass over the batch), so they are asked
with a :class:`TokenContext` instead of being called. Each states its source and what it leaves out.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import torch

from capo.core.errors import InputError
from capo.core.selection import Denominator, Reason, Rule, Selection, make_selection

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.curvature import TokenCurvature


@dataclass(frozen=True)
class TokenContext:
    """What a token rule may know of a micro-batch beyond its curvature.

    Attributes:
        token_ids: sampled tokens, ``[B, T]``.
        advantage: the trainer's advantages, ``[B, T]``.
        old_log_prob: log-probability under the policy that sampled, nats, ``[B, T]``.
        acting: False where the loss gives a token no gradient (a clipped ratio), ``[B, T]``.
        group: completions of one prompt share a number, ``[B]``.
        iteration: passes made over these completions before this one.
        seed: of the rules that draw; another one for every micro-batch.
    """

    token_ids: Int[Tensor, "B T"]
    advantage: Float[Tensor, "B T"]
    old_log_prob: Float[Tensor, "B T"]
    acting: Bool[Tensor, "B T"]
    group: Int[Tensor, "B"]
    iteration: int = 0
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Random numbers of this micro-batch, on the CPU."""
        return torch.Generator().manual_seed(self.seed % 2**63)


@runtime_checkable
class TokenRule(Protocol):
    """A selection rule that needs a :class:`TokenContext`."""

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Select among the tokens of ``mask``."""
        ...


def _masked_out(
    rejected: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"], denominator: Denominator
) -> Selection:
    weights = torch.where(rejected, 0.0, 1.0)
    reason = torch.where(rejected, int(Reason.RULE), int(Reason.KEPT))
    return make_selection(weights, reason, mask, denominator, (Reason.RULE,))


def _check(name: str, value: float, low: float, high: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"≥ {low:g}"
        raise InputError(name, f"must be a number {allowed}, got {value!r}.")


@dataclass(frozen=True)
class GTPO:
    """Conflict-aware weights and an entropy filter (https://arxiv.org/abs/2508.03772).

    A token is in conflict where completions of one prompt with positive and with negative advantage
    have the same token at the same place, in an unbroken run from their first token on, or up to their
    last. There, negative updates are skipped and positive ones amplified by ``bonus`` (once for each
    run). Completions whose mean entropy exceeds ``max_entropy`` are left out whole.

    Defaults and details follow the authors' code (winstonsmith1897/GTPO). Left out, since they are no
    selection: the entropy subtracted from the advantage, and the division by the number of conflicts.

    Args:
        max_entropy: nats a token, ≥ 0.
        bonus: factor of a positive conflict token, ≥ 1.
    """

    max_entropy: float = 0.7
    bonus: float = 2.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check("max_entropy", self.max_entropy, 0.0)
        _check("bonus", self.bonus, 1.0)

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights 0, 1, ``bonus`` or ``bonus``²."""
        lengths = mask.sum(-1, keepdim=True)
        # Right-padded: the place from the end, with the padding moved to the end as well.
        place = torch.arange(mask.size(1), device=mask.device)
        back = (lengths - 1 - place).remainder(mask.size(1))
        runs = [_conflict_run(context.token_ids, mask, context)]
        mirrored = _conflict_run(context.token_ids.gather(1, back), mask, context)
        runs.append(mirrored.gather(1, back))
        positive = context.advantage > 0
        weights = torch.ones_like(curvature.log_prob)
        for run in runs:
            weights = torch.where(run, torch.where(positive, self.bonus * weights, 0.0), weights)
        entropy = (curvature.entropy * mask).sum(-1, keepdim=True) / lengths.clamp_min(1)
        weights = torch.where(entropy > self.max_entropy, 0.0, weights)
        reason = torch.where(weights == 1, int(Reason.KEPT), int(Reason.RULE))
        return make_selection(weights, reason, mask, "all", (Reason.RULE,))


def _conflict_run(
    ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], context: TokenContext
) -> Bool[Tensor, "B T"]:
    """The unbroken run of conflicts from the first place on; only ``mask`` counts, which is a prefix."""
    sign = context.advantage.sign()
    same_group = context.group[:, None] == context.group[None, :]  # B, B
    alike = (ids[:, None] == ids[None]) & mask[:, None] & mask[None] & same_group[..., None]
    positive = (alike & (sign[None] > 0)).any(1)
    negative = (alike & (sign[None] < 0)).any(1)
    conflict = positive & negative & (sign != 0)
    return conflict.int().cumprod(1).bool()


@dataclass(frozen=True)
class STAPO:
    """Silence rare spurious tokens (https://arxiv.org/abs/2602.15620).

    A token is masked iff its advantage is positive, its probability below ``probability`` and its
    entropy below the ``entropy_quantile`` of the tokens; the loss is renormalised over the rest. The
    paper's thresholds belong to its models: the defaults are those of its published summary.

    Args:
        probability: in [0, 1].
        entropy_quantile: in [0, 1].
    """

    probability: float = 0.01
    entropy_quantile: float = 0.05

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check("probability", self.probability, 0.0, 1.0)
        _check("entropy_quantile", self.entropy_quantile, 0.0, 1.0)

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights 0 or 1."""
        if not bool(mask.any()):
            return _masked_out(~mask, mask, "kept")
        ordered = curvature.entropy[mask].sort().values
        bound = ordered[round(self.entropy_quantile * (ordered.numel() - 1))]
        unlikely = curvature.log_prob.exp() < self.probability
        spurious = (context.advantage > 0) & unlikely & (curvature.entropy < bound)
        return _masked_out(spurious, mask, "kept")


@dataclass(frozen=True)
class Lopti:
    """Low-probability token isolation (https://arxiv.org/abs/2505.12929).

    A batch is passed over twice: the first pass updates with the tokens whose probability, when they
    were sampled, was at most ``probability``, the second with the others. ``num_iterations`` must be
    even; the default follows the authors' code (zhyang2226/AR-Lopti).

    Args:
        probability: η in (0, 1).
    """

    probability: float = 0.4

    def __post_init__(self) -> None:
        """Check the argument."""
        _check("probability", self.probability, 0.0, 1.0)

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights 0 or 1."""
        low = context.old_log_prob.exp() <= self.probability
        return _masked_out(low if context.iteration % 2 else ~low, mask, "all")


@dataclass(frozen=True)
class Reweight:
    """Advantage reweighting: weight ``alpha·π + 1 − alpha`` (https://arxiv.org/abs/2505.12929).

    Args:
        alpha: in [0, 1]; 0 changes nothing. The paper uses 0.1 to 0.3.
    """

    alpha: float = 0.3

    def __post_init__(self) -> None:
        """Check the argument."""
        _check("alpha", self.alpha, 0.0, 1.0)

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights in [1 − alpha, 1]."""
        weights = self.alpha * context.old_log_prob.exp() + 1 - self.alpha
        reason = torch.full_like(mask, int(Reason.RULE), dtype=torch.int8)
        return make_selection(
            weights.to(curvature.log_prob.dtype), reason, mask, "all", (Reason.RULE,)
        )


def covariance(
    curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
) -> Float[Tensor, "B T"]:
    """A token's part of the covariance of log-probability and advantage; −∞ outside of ``mask``.

    ``(log π − mean)(A − mean)``, the means over all tokens: https://arxiv.org/abs/2505.22617, eq. 10.
    """
    count = mask.sum().clamp_min(1)

    def centred(values: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        return values - torch.where(mask, values, 0.0).sum() / count

    product = centred(curvature.log_prob) * centred(context.advantage)
    return torch.where(mask, product, -math.inf)


@dataclass(frozen=True)
class ClipCov:
    """Mask a few tokens of large covariance, at random (https://arxiv.org/abs/2505.22617).

    Of the tokens with ``low < covariance < high`` whose ratio is not clipped already, ``share`` of all
    tokens (at least one, if there is any) are masked. Defaults as published (PRIME-RL, verl).

    Args:
        share: in [0, 1].
        low: covariance above which a token may be masked.
        high: covariance below which it may.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check("share", self.share, 0.0, 1.0)
        _check("high", self.high, self.low)

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights 0 or 1."""
        cov = covariance(curvature, mask, context)
        inside = (cov > self.low) & (cov < self.high) & context.acting
        candidates = inside.flatten().nonzero().flatten()
        number = max(int(self.share * int(mask.sum())), 1)
        order = torch.randperm(candidates.numel(), generator=context.generator())
        rejected = torch.zeros_like(mask).flatten()
        rejected[candidates[order[:number].to(candidates.device)]] = True
        return _masked_out(rejected.view_as(mask), mask, "all")


@dataclass(frozen=True)
class KLCov:
    """A penalty on the tokens of the largest covariance (https://arxiv.org/abs/2505.22617).

    ``coefficient · |log π − log π_old|`` is added to the loss of the ``share`` of tokens (at least one)
    with the largest covariance. In the first pass over a batch nothing has moved yet, and the penalty
    has no gradient. Defaults as published.

    Args:
        share: in [0, 1].
        coefficient: ≥ 0.
    """

    share: float = 2e-4
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments."""
        _check("share", self.share, 0.0, 1.0)
        _check("coefficient", self.coefficient, 0.0)

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights 1; the penalty in ``Selection.penalty``."""
        number = min(max(int(self.share * int(mask.sum())), 1), int(mask.sum()))
        top = covariance(curvature, mask, context).flatten().topk(number).indices
        penalty = torch.zeros_like(curvature.log_prob).flatten()
        penalty[top] = self.coefficient
        penalty = penalty.view_as(curvature.log_prob)
        # The derivative of |x| at 0 is 0, as torch has it.
        sign = (curvature.log_prob - context.old_log_prob).sign()
        selection = _masked_out(torch.zeros_like(mask), mask, "all")
        return dataclasses.replace(selection, penalty=penalty * sign)


Proxy = Literal["random", "surprise", "entropy", "gap", "last_layer"]


@dataclass(frozen=True)
class SameRate:
    """A control: as many tokens are rejected as another rule rejects, but others.

    Args:
        by: who goes first: ``"random"``; ``"surprise"``, the least likely; ``"entropy"``, those drawn
            from the flattest distribution; ``"gap"``, the largest ``|A|(1 − π)``, the size of the
            gradient with respect to the token's own logit; ``"last_layer"``, the largest m_F, for the
            same number of tokens ranked by what CAPO's own rule ranks them by.
        like: whose rate it is, a preset of the paper or a rule's arguments.
    """

    by: Proxy = "random"
    like: Any = "capo"

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.by not in get_args(Proxy):
            raise InputError("by", f"must be one of {', '.join(get_args(Proxy))}, got {self.by!r}.")
        if isinstance(self._rule(), TokenRule):
            raise InputError("like", "must be a rule that reads the shifts.")

    def _rule(self) -> Rule:
        from capo.core.rules import make_rule

        rule = make_rule(self.like)
        if rule is None or isinstance(rule, TokenRule):
            raise InputError("like", "must be a rule that reads the shifts.")
        return rule

    def within(
        self, curvature: TokenCurvature, mask: Bool[Tensor, "B T"], context: TokenContext
    ) -> Selection:
        """Weights 0 or 1."""
        like = self._rule()(curvature, mask)
        number = int((mask & (like.weights == 0)).sum())
        score = self._score(curvature, context).double()
        worst = torch.where(mask, score, -math.inf).flatten().topk(number).indices
        rejected = torch.zeros_like(mask).flatten()
        rejected[worst] = True
        return _masked_out(rejected.view_as(mask), mask, like.denominator)

    def _score(self, curvature: TokenCurvature, context: TokenContext) -> Float[Tensor, "B T"]:
        if self.by == "random":
            drawn = torch.rand(curvature.log_prob.shape, generator=context.generator())
            return drawn.to(curvature.log_prob.device)
        if self.by == "surprise":
            return -curvature.log_prob
        if self.by == "entropy":
            return curvature.entropy
        if self.by == "gap":
            return context.advantage.abs() * -curvature.log_prob.expm1()
        return curvature.policy_shift.nan_to_num(nan=math.inf)


TOKEN_RULES: dict[str, type[Any]] = {
    "gtpo": GTPO,
    "stapo": STAPO,
    "lopti": Lopti,
    "reweight": Reweight,
    "clip_cov": ClipCov,
    "kl_cov": KLCov,
    "same_rate": SameRate,
}
"""Token rules that a configuration can name."""


def filled(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The rule's arguments with every default written out.

    Raises:
        InputError: an argument is unknown or impossible.
    """
    rule = TOKEN_RULES[name]
    allowed = [field.name for field in dataclasses.fields(rule)]
    unknown = sorted(set(arguments) - set(allowed))
    if unknown:
        raise InputError(unknown[0], f"is not known to {name!r}, which takes {', '.join(allowed)}.")
    made = rule(**arguments)
    return {field: getattr(made, field) for field in allowed}
