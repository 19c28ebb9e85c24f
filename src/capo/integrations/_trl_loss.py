"""Reading a loss's gradient off its log-probabilities, and gating it token by token.

Every policy-gradient loss is a function of the log-probabilities of the sampled tokens, so
``∂loss/∂log π_t`` is all of it that a token's own step depends on: importance ratio, clipping,
soft gates and sequence-level ratios included. Reading that derivative from autograd (the graph
between log-probabilities and loss is a handful of elementwise operations) keeps every loss of the
trainer working without a copy of its formulas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

SEQUENCE_MEAN_LOSSES = ("grpo", "sapo")
WINDOW_MEAN_LOSSES = ("dapo", "cispo", "vespo")
LOSS_TYPES = (*SEQUENCE_MEAN_LOSSES, *WINDOW_MEAN_LOSSES, "bnpo", "dr_grpo", "luspo")


class GradientGate:
    """The identity on log-probabilities whose backward multiplies each token's gradient.

    ``y = sg(x) + w·(x − sg(x))``, exactly: the value passes bit for bit, the gradient is scaled by
    w. Because the gradient of the *log-probability* is gated, not a term of the loss, a token with
    w = 0 contributes nothing even where all tokens of a sequence share one importance ratio. Unlike
    the formula, the weights may be set after the loss is known, which they depend on.

    Attributes:
        weights: ``[B, T]`` factors, or None for the identity. Set it before backward.
        offset: ``[B, T]`` added to the gradient, after the factors; None for nothing.
        output: the gated log-probabilities, the leaf at which to read the loss's gradient.
    """

    def __init__(self) -> None:
        self.weights: Float[Tensor, "B T"] | None = None
        self.offset: Float[Tensor, "B T"] | None = None
        self.output: Float[Tensor, "B T"] | None = None

    def __call__(self, log_probs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return `log_probs`, gated."""
        gated: Tensor = _Gate.apply(log_probs, self)  # type: ignore[no-untyped-call]
        self.output = gated
        return gated

    def gradient(self, loss: Float[Tensor, ""]) -> Float[Tensor, "B T"]:
        """``∂loss/∂log π``, ungated. The loss can still be back-propagated afterwards."""
        if self.output is None:
            raise RuntimeError("the gate has not seen the log-probabilities of this loss")
        (gradient,) = torch.autograd.grad(
            loss, self.output, retain_graph=True, materialize_grads=True
        )
        return gradient.float()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, gate: GradientGate) -> Tensor:
        ctx.gate = gate
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        weights = ctx.gate.weights
        if weights is None:
            return gradient, None
        # `where`, not a product alone: a rejected token's gradient may be infinite or NaN.
        gated = torch.where(weights == 0, 0.0, gradient * weights)
        if ctx.gate.offset is not None:
            gated = gated + ctx.gate.offset
        return gated.to(gradient.dtype), None


def token_loss_scale(
    loss_type: str,
    mask: Int[Tensor, "B T"],
    *,
    max_completion_length: int,
    window_tokens: float,
) -> Float[Tensor, "B 1"]:
    """The factor with which a token's term enters the loss of its micro-batch.

    On-policy and without a KL term, ``loss = −Σ_{b,t} scale_b · A_b · log π_{b,t}`` up to a
    constant, before the division by the number of accumulation steps.

    Args:
        loss_type: a `loss_type` of TRL's `GRPOConfig`.
        mask: 1 on the tokens that count.
        max_completion_length: the fixed length by which Dr. GRPO divides.
        window_tokens: counted tokens of a micro-batch, averaged over the generation batch: by this
            `dapo`, `cispo` and `vespo` divide.

    Raises:
        InputError: `loss_type` is not known here.
    """
    batch = mask.size(0)
    lengths = mask.sum(-1, keepdim=True).clamp(min=1).float()
    if loss_type in SEQUENCE_MEAN_LOSSES:
        return 1.0 / (batch * lengths)
    if loss_type in WINDOW_MEAN_LOSSES:
        divisor = window_tokens
    elif loss_type == "bnpo":
        divisor = float(mask.sum().clamp(min=1))
    elif loss_type == "dr_grpo":
        divisor = float(batch * max_completion_length)
    elif loss_type == "luspo":
        divisor = float(batch)
    else:
        raise InputError("loss_type", f"must be one of {', '.join(LOSS_TYPES)}, got {loss_type!r}.")
    return torch.full_like(lengths, 1.0 / divisor)


def loss_scale_of(
    trainer: Any, mask: Int[Tensor, "B T"], inputs: dict[str, Any]
) -> Float[Tensor, "B 1"]:
    """`token_loss_scale` of a trainer's micro-batch, before the division by accumulation steps."""
    # As in TRL's loss: `num_items_in_batch` spans the generation batch.
    window_tokens = (
        float(inputs["num_items_in_batch"].clamp(min=1)) / trainer.accelerator.num_processes
    )
    return token_loss_scale(
        trainer.loss_type,
        mask,
        max_completion_length=trainer.max_completion_length,
        window_tokens=window_tokens / trainer.args.steps_per_generation,
    )


def gradient_weights(
    weights: Float[Tensor, "B T"], mask: Int[Tensor, "B T"], denominator: str
) -> Float[Tensor, "B T"]:
    """The gradient factors that a selection's weights amount to.

    Args:
        weights: kept share of every token, in [0, 1], 0 outside the mask.
        mask: 1 on the tokens that count.
        denominator: ``"all"`` leaves the loss's own denominators alone, so that rejection shortens
            the gradient. ``"kept"`` renormalises each sequence over what is kept of it, as the
            paper's authors do: its weights are multiplied by (its tokens / its kept tokens), and a
            sequence of which nothing is kept contributes nothing.
    """
    if denominator == "all":
        return weights
    kept = weights.sum(-1, keepdim=True)
    factor = mask.sum(-1, keepdim=True) / kept
    return weights * torch.where(kept > 0, factor, 0.0)
