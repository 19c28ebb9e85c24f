"""The library's own Adam moments of the last-layer gradient (``moments="simulated"``, the paper's way)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError
from capo.core.statistics import chunked
from capo.core.statistics.groups import scatter_gradient, scatter_rows, scatters
from capo.core.statistics.options import current
from capo.core.statistics.problem import Problem
from capo.core.steps import AdamStep, SGDStep
from capo.core.validation import broadcast, check_mask, check_shapes, check_tokens, make_head

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from capo.core.statistics.result import Support


class LastLayerMoments:
    """Adam moments of the accepted tokens' last-layer gradient.

    Judging a batch reads the moments; afterwards :meth:`accumulate` adds the gradient of the accepted
    tokens (once per micro-batch) and :meth:`advance` moves the moments (once per optimizer step). In
    ``torch.optim``'s convention: moments of the *loss* gradient.

    Args:
        head_weight_shape: (V, d).
        betas: (β₁, β₂).
        eps: ε.
        weight_decay: decoupled decay λ of the optimizer that is simulated.
        device: where the two ``[V, d]`` tensors live.
        dtype: their dtype.
    """

    def __init__(
        self,
        head_weight_shape: tuple[int, int],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        shape = tuple(head_weight_shape)
        self.exp_avg = torch.zeros(shape, device=device, dtype=dtype)
        self.exp_avg_sq = torch.zeros(shape, device=device, dtype=dtype)
        self.grad: Float[Tensor, "V d"] | None = None
        self.step = 0
        self.adam_step(lr=0.0)  # checks the hyper-parameters

    def adam_step(self, lr: float, grad_scale: float = 1.0) -> AdamStep:
        """The step model at the current moments."""
        return AdamStep(
            lr,
            self.betas,
            self.eps,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            weight_decay=self.weight_decay,
            grad_scale=grad_scale,
        )

    def accumulate(
        self,
        hidden: Float[Tensor, "... d"],
        head_weight: Float[Tensor, "V d"],
        token_ids: Int[Tensor, "..."],
        advantages: Float[Tensor, "..."],
        *,
        weights: Float[Tensor, "..."] | None = None,
        coefficients: Float[Tensor, "..."] | None = None,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        head_bias: Float[Tensor, "V"] | None = None,
        top_k: int | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        scale: float | Float[Tensor, "..."] = 1.0,
        support: Support | None = None,
    ) -> None:
        """Add the loss gradient ``−Σ_i scale · weight_i · A_i (D w_i) h_iᵀ / T``.

        The arguments that are not listed are those of :func:`token_curvature`.

        Args:
            weights: accepted share of each token in [0, 1] (None: all accepted).
            scale: the loss normalisation, a number or per token (for GRPO ``1/(B · T_i)``).
            top_k: only the K judged rows (π renormalised over them), as :func:`token_curvature` does;
                None is the exact gradient of the last layer.
            support: ``curvature.support`` of the same tokens: spares the logits (``top_k`` only).
        """
        if tuple(head_weight.shape) != tuple(self.exp_avg.shape):
            raise InputError(
                "head_weight",
                f"must be {tuple(self.exp_avg.shape)}, got {tuple(head_weight.shape)}.",
            )
        chosen = check_mask(mask, token_ids)
        factor = broadcast("advantages", advantages, token_ids.shape)[chosen]
        factor = factor.to(self.exp_avg.dtype)
        extras = {"coefficients": coefficients, "weights": weights, "scale": scale}
        for name, extra in extras.items():
            if isinstance(extra, torch.Tensor):
                factor = factor * broadcast(name, extra, token_ids.shape)[chosen]
        if not isinstance(scale, torch.Tensor):
            factor = factor * scale
        if self.grad is None:
            self.grad = torch.zeros_like(self.exp_avg)
        add_gradient(
            self.grad,
            hidden,
            head_weight,
            token_ids,
            factor,
            chosen,
            top_k=top_k,
            support=support,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            head_bias=head_bias,
        )

    def advance(self, max_norm: float | None = None, grad_norm: float | None = None) -> None:
        """Move the moments with the accumulated gradient and clear it.

        Args:
            max_norm: clip the gradient like ``torch.nn.utils.clip_grad_norm_``, or None.
            grad_norm: the norm to clip by (that of the whole model); None uses the head's own.

        Raises:
            InputError: ``max_norm`` ≤ 0, or nothing was accumulated.
        """
        if max_norm is not None and not max_norm > 0:
            raise InputError("max_norm", f"must be a number > 0 or None, got {max_norm!r}.")
        if self.grad is None:
            raise InputError("grad", "must be accumulated before the moments can advance.")
        beta1, beta2 = self.betas
        if max_norm is not None:
            norm = self.grad.norm() if grad_norm is None else grad_norm
            self.grad.mul_(min(1.0, max_norm / (float(norm) + 1e-6)))
        self.exp_avg.lerp_(self.grad, 1.0 - beta1)
        self.exp_avg_sq.mul_(beta2).addcmul_(self.grad, self.grad, value=1.0 - beta2)
        self.step += 1
        self.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Moments, step and any gradient accumulated so far."""
        state: dict[str, Any] = {
            "exp_avg": self.exp_avg,
            "exp_avg_sq": self.exp_avg_sq,
            "step": self.step,
        }
        if self.grad is not None:
            state["grad"] = self.grad
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            InputError: the state is of a head of another shape.
        """
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != self.exp_avg.shape:
                raise InputError(
                    name,
                    f"must be {tuple(self.exp_avg.shape)}, got {tuple(state[name].shape)}.",
                )
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])
        self.step = int(state["step"])
        grad = state.get("grad")
        self.grad = None if grad is None else grad.to(self.exp_avg).clone()


def add_gradient(
    into: Float[Tensor, "V d"],
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    token_ids: Int[Tensor, "..."],
    factor: Float[Tensor, " N"],
    mask: Bool[Tensor, "..."],
    *,
    top_k: int | None,
    support: Support | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    head_bias: Float[Tensor, "V"] | None = None,
) -> None:
    """Add the head's loss gradient ``−Σ_i factor_i (D w_i) h_iᵀ / T`` to ``into``.

    Args:
        factor: of the ``N`` tokens of ``mask``, in their order.
        into, hidden, head_weight, token_ids, mask, top_k, support, temperature, logit_scale,
            logit_softcap, head_bias: as for :meth:`LastLayerMoments.accumulate`.

    Raises:
        InputError: shapes or token ids do not fit, or ``support`` is of other tokens.
    """
    check_shapes(hidden, head_weight, token_ids)
    check_tokens(token_ids[mask], head_weight.shape[0])
    if factor.numel() == 0:
        return
    with torch.no_grad():
        head = make_head(hidden, head_weight, head_bias, temperature, logit_scale, logit_softcap)
        problem = Problem(
            hidden.detach()[mask],
            head,
            token_ids[mask],
            factor.to(head.dtype),
            SGDStep(0.0),
            top_k,
            renormalize=True,
        )
        if top_k is None:
            _add_full(into, problem)
        else:
            _add_rows(into, problem, support or chunked.compute(problem).support)


def _add_rows(into: Float[Tensor, "V d"], problem: Problem, support: Support | None) -> None:
    if support is None or support.rows.shape[0] != problem.token_ids.shape[0]:
        raise InputError("support", "must come from a top_k curvature of the same tokens.")
    used, position = torch.unique(support.rows, return_inverse=True)
    coefficient = -problem.advantages[:, None] * support.residual
    hidden = problem.hidden.to(problem.dtype)
    if into.dtype == hidden.dtype and scatters(used.shape[0], support.rows.shape[1]):
        scatter_rows(
            into, coefficient, hidden, support.rows
        )  # no second tensor as large as the head
        return
    gradient = scatter_gradient(coefficient, hidden, position, used.shape[0])
    into.index_add_(0, used, gradient.to(into.dtype))


def _add_full(into: Float[Tensor, "V d"], problem: Problem) -> None:
    vocabulary = problem.head.vocabulary
    size = current(problem.hidden.device).held_tokens(vocabulary)
    for start in range(0, problem.token_ids.shape[0], size):
        chunk = problem.chunk(slice(start, start + size))
        held = chunk.hidden.new_empty(chunk.hidden.shape[0], vocabulary)
        accumulator = chunked.ValueAccumulator(chunk, *chunked.normalise(chunk, held))
        for block in chunked.vocabulary_blocks(chunk.head):
            coefficient = accumulator.coefficient(chunk.head.activate(held[:, block]), block)
            into[block] -= (coefficient.T @ chunk.hidden).to(into.dtype)
