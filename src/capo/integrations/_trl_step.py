"""The step of the head that a token's update is judged by, from the trainer's own optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

import capo
from capo.core.errors import InputError
from capo.integrations._trl_head import LMHead
from capo.integrations._trl_sharded import Engine

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

StepModelName = Literal["adam", "sgd"]
MomentsName = Literal["simulated", "optimizer"]


_ADAM_STATE = {"exp_avg", "exp_avg_sq", "step"}


class StepModel:
    """Builds, at every judgement, the step that the optimizer is about to take.

    Learning rate, betas, ε and weight decay are those of the optimizer's parameter group that holds
    the head, so schedules and per-group settings are followed; where the optimizer has no such
    setting (or does not train the head), `fallback` is used.

    Args:
        kind: ``"adam"`` or ``"sgd"``.
        moments: ``"simulated"``, the paper's: Adam moments of the last-layer gradient of the
            accepted tokens, kept here (two [V, d] tensors). ``"optimizer"``: read the real state.
            With tied embeddings that state holds the input embedding's gradient too, which no token
            of the batch caused through the head; and before the first step it is empty.
        grad_scale: factor on a token's own gradient where it meets the moments.
        fallback: `betas`, `eps` and `lr` where the optimizer has none.
    """

    def __init__(
        self,
        kind: StepModelName,
        moments: MomentsName,
        grad_scale: float,
        fallback: dict[str, Any],
    ) -> None:
        self.kind = kind
        self.grad_scale = grad_scale
        self.simulated = kind == "adam" and moments == "simulated"
        self.moments: capo.LastLayerMoments | None = None
        self._fallback = fallback
        self._pending_state: dict[str, Any] | None = None

    def step(self, head: LMHead, engine: Engine) -> capo.SGDStep | capo.AdamStep:
        """The step model at this moment of training.

        Raises:
            InputError: the moments are to be the optimizer's and it has none for the head.
        """
        group = self._group(head, engine)
        lr = float(group["lr"])
        if self.kind == "sgd":
            return capo.SGDStep(lr)
        if self.simulated:
            return self._simulated_moments(head, group).adam_step(lr, self.grad_scale)
        return self._optimizer_step(head.parameter, engine, group, lr)

    def accumulate(
        self,
        head: LMHead,
        *,
        hidden: Float[Tensor, "B T d"],
        token_ids: Float[Tensor, "B T"],
        loss_gradient: Float[Tensor, "B T"],
        curvature: capo.TokenCurvature,
        top_k: int | None,
    ) -> None:
        """Add a judged micro-batch to the simulated gradient of the coming optimizer step.

        Args:
            head: the head, whose `step` was asked for before.
            hidden: input of the head at the predicting positions.
            token_ids: sampled tokens.
            loss_gradient: ``∂loss/∂log π`` as it is back-propagated: gated, and normalised by the
                loss. Its negative takes the place of the advantage.
            curvature: the judgement, whose vocabulary rows are used again.
            top_k: vocabulary rows that a token's gradient is confined to, or None for all.
        """
        if self.moments is not None:
            self.moments.accumulate(
                hidden,
                head.weight,
                token_ids,
                -loss_gradient,
                mask=curvature.mask,
                top_k=top_k,
                support=curvature.support,
                **head.logit_options,
            )

    def add(self, gradient: Float[Tensor, "V d"]) -> None:
        """Add a gradient of the head, that of all processes, to the simulated one of the coming step."""
        if self.moments is not None:
            so_far = self.moments.grad
            self.moments.grad = gradient.clone() if so_far is None else so_far.add_(gradient)

    def advance(self, max_norm: float | None = None, grad_norm: float | None = None) -> None:
        """Take the accumulated gradient into the simulated moments.

        Args:
            max_norm: what the trainer clips the norm of the whole gradient to, or None.
            grad_norm: that norm before clipping.
        """
        if self.moments is not None:
            self.moments.advance(max_norm=max_norm, grad_norm=grad_norm)

    def discard(self) -> None:
        """Forget the accumulated gradient: the optimizer skipped its step."""
        if self.moments is not None:
            self.moments.grad = None

    def state_dict(self) -> dict[str, Any] | None:
        """The simulated moments' state, or None where there is none."""
        return self._pending_state if self.moments is None else self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        # The moments are created at the first judgement, when the optimizer's betas are known.
        self._pending_state = state
        self.moments = None

    def _simulated_moments(self, head: LMHead, group: dict[str, Any]) -> capo.LastLayerMoments:
        if self.moments is None:
            self.moments = capo.LastLayerMoments(
                (head.weight.size(0), head.weight.size(1)),
                betas=self._betas(group),
                eps=self._eps(group),
                weight_decay=_decoupled_decay(group),
                device=head.weight.device,
            )
            if self._pending_state is not None:
                self.moments.load_state_dict(self._pending_state)
                self._pending_state = None
        return self.moments

    def _optimizer_step(
        self,
        parameter: nn.Parameter,
        engine: Engine,
        group: dict[str, Any],
        lr: float,
    ) -> capo.AdamStep:
        state = engine.state_of(parameter)
        # Empty before the first step: then the betas tell whether there will be an Adam state.
        has_adam_state = state.keys() >= _ADAM_STATE if state else "betas" in group
        if not (parameter.requires_grad and has_adam_state):
            raise InputError(
                "moments",
                f"'optimizer' needs an Adam state ({', '.join(sorted(_ADAM_STATE))}) of the LM head, "
                f"which {type(engine.optimizer).__name__} does not keep; use 'simulated'.",
            )
        return capo.AdamStep(
            lr,
            self._betas(group),
            self._eps(group),
            state.get("exp_avg"),
            state.get("exp_avg_sq"),
            int(state.get("step", 0)),
            _decoupled_decay(group),
            grad_scale=self.grad_scale,
        )

    def _group(self, head: LMHead, engine: Engine) -> dict[str, Any]:
        group = engine.group_of(head.parameter)
        if group is not None:
            return group
        # A frozen head (LoRA): the step is the one that training it along would take.
        return {**self._fallback, "lr": engine.groups[0]["lr"]}

    def _betas(self, group: dict[str, Any]) -> tuple[float, float]:
        beta1, beta2 = group.get("betas", self._fallback["betas"])[:2]
        return float(beta1), float(beta2)

    def _eps(self, group: dict[str, Any]) -> float:
        eps = group.get("eps")  # Adafactor keeps a pair of another meaning under that name
        return float(eps if isinstance(eps, int | float) else self._fallback["eps"])


def _decoupled_decay(group: dict[str, Any]) -> float:
    """λ of AdamW. Adam's coupled decay enters the gradient instead and is no part of the step."""
    return float(group.get("weight_decay", 0.0)) if group.get("decoupled_weight_decay") else 0.0


def keeps_moments(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is Adam, by whose own moments a token can be judged."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def unwrapped_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper, whose state is keyed by the parameters."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
