"""The float64 oracle: curvature by brute force, one token at a time.

Nothing here is imported from ``capo`` and no closed form of the method is used. The policy is
written down as a function of the whole head W, and automatic differentiation does the rest:

    log π(a | W)                                  the policy, z = φ(W h + b) / T
    g   = A ∇_W log π(a)                          the token's gradient                   (eq. 7)
    H   = ∇²_W [A · π_W(a) / π_W₀(a)]  at W = W₀  Hessian of the surrogate, [Vd, Vd]     (eq. 8)
    F̃   = ∇log π(a) ∇log π(a)ᵀ                    sampled Fisher                         (eq. 9)
    F   = Σ_b π(b) ∇log π(b) ∇log π(b)ᵀ           exact Fisher
    Δ   = what a real ``torch.optim`` optimizer does with the gradient −g
    m_H = gᵀΔ + ½ ΔᵀHΔ,   m_F = ½ ΔᵀF̃Δ or ½ ΔᵀFΔ                                        (eq. 10)

Equations are those of arXiv 2510.00819. ``oracle_mp`` repeats the exercise with finite
differences in 120-digit arithmetic, for tokens so confident that float64 itself runs out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class SGD:
    """Ascent by ``lr`` times the gradient; torch's decay is coupled (part of the gradient)."""

    lr: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Momentum:
    """``torch.optim.SGD`` with momentum; ``buffer`` [V, d] is its momentum buffer."""

    lr: float
    momentum: float
    buffer: Tensor | None = None
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    grad_scale: float = 1.0


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam``/``AdamW``; the moments [V, d] are of the loss gradient.

    ``frozen``: the second moment stays that of the last step (no optimizer does this; METHOD's
    full-vocabulary approximation does).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    step: int = 0
    weight_decay: float = 0.0
    grad_scale: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class Given:
    """The step itself, [V, d]."""

    delta: Tensor


Step: TypeAlias = SGD | Momentum | Adam | Given


@dataclass(frozen=True)
class Head:
    """The last layer: z = φ(W h + b)/T, φ(y) = c·tanh(scale·y/c), or scale·y without a soft-cap."""

    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def log_policy(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """log π(· | W) [R] of the head with its weight replaced by ``weight`` [R, d]."""
        y = weight @ hidden
        if self.bias is not None:
            y = y + self.bias
        y = self.logit_scale * y
        if self.logit_softcap is not None:
            y = self.logit_softcap * torch.tanh(y / self.logit_softcap)
        return torch.log_softmax(y / self.temperature, dim=0)

    def rows(self, index: Tensor) -> Head:
        """The sub-head of some vocabulary rows."""
        bias = None if self.bias is None else self.bias[index]
        return replace(self, weight=self.weight[index], bias=bias)


@dataclass(frozen=True)
class Judgement:
    """What the oracle says of one token (0-dim float64 tensors)."""

    objective_shift: Tensor
    sampled_shift: Tensor
    exact_shift: Tensor
    s: Tensor
    variance: Tensor
    log_prob: Tensor
    entropy: Tensor


FIELDS = tuple(Judgement.__dataclass_fields__)


def kept_rows(head: Head, hidden: Tensor, token: int, top_k: int | None) -> Tensor:
    """Row numbers of {token} ∪ the ``top_k`` − 1 largest other logits, sampled token first."""
    log_pi = head.log_policy(head.weight, hidden).tolist()
    others = sorted((k for k in range(len(log_pi)) if k != token), key=lambda k: -log_pi[k])
    count = len(log_pi) if top_k is None else top_k
    return torch.tensor([token, *others[: count - 1]])


def restrict(step: Step, index: Tensor) -> Step:
    """The same optimizer, owning only some rows of the head."""
    match step:
        case Adam(exp_avg=m, exp_avg_sq=v) if m is not None and v is not None:
            return replace(step, exp_avg=m[index], exp_avg_sq=v[index])
        case Momentum(buffer=b) if b is not None:
            return replace(step, buffer=b[index])
        case Given(delta):
            return Given(delta[index])
    return step


def take_step(step: Step, gradient: Tensor, weight: Tensor) -> Tensor:
    """What the real optimizer adds to ``weight`` when the ascent gradient is ``gradient``.

    The optimizer moves a parameter that starts at zero, so that the change is read without
    rounding. Decoupled decay is added to it; coupled decay needs the optimizer on the weight.
    """
    if isinstance(step, Given):
        return step.delta
    if isinstance(step, Adam):
        return take_adam_step(step, gradient, weight)
    start = weight if step.weight_decay else torch.zeros_like(weight)
    parameter = torch.nn.Parameter(start.clone())
    parameter.grad = -gradient.clone()
    if isinstance(step, SGD):
        options: dict[str, Any] = {}
    else:
        parameter.grad *= step.grad_scale
        options = {
            "momentum": step.momentum,
            "dampening": step.dampening,
            "nesterov": step.nesterov,
        }
    optimizer = torch.optim.SGD(
        [parameter], lr=step.lr, weight_decay=step.weight_decay, foreach=False, **options
    )
    if isinstance(step, Momentum) and step.buffer is not None:
        optimizer.state[parameter] = {"momentum_buffer": step.buffer.clone()}
    optimizer.step()
    return parameter.detach() - start


def take_adam_step(step: Adam, gradient: Tensor, weight: Tensor) -> Tensor:
    """``take_step`` of Adam."""
    decay = step.lr * step.weight_decay * weight
    if step.frozen:
        assert step.exp_avg is not None
        assert step.exp_avg_sq is not None
        beta1, beta2 = step.betas
        first = beta1 * step.exp_avg - (1 - beta1) * step.grad_scale * gradient
        root = (step.exp_avg_sq / (1 - beta2**step.step)).sqrt()
        return -step.lr * first / (1 - beta1 ** (step.step + 1)) / (root + step.eps) - decay
    parameter = torch.nn.Parameter(torch.zeros_like(weight))
    parameter.grad = -step.grad_scale * gradient
    adam = torch.optim.Adam([parameter], lr=step.lr, betas=step.betas, eps=step.eps, foreach=False)
    adam.state[parameter] = adam_state(step, weight)
    adam.step()
    return parameter.detach() - decay


def adam_state(step: Adam, like: Tensor) -> dict[str, Tensor]:
    """The state dict entry of ``torch.optim.Adam`` for a parameter shaped like ``like``."""
    zeros = torch.zeros_like(like)
    return {
        "step": torch.tensor(float(step.step)),
        "exp_avg": (zeros if step.exp_avg is None else step.exp_avg).clone(),
        "exp_avg_sq": (zeros if step.exp_avg_sq is None else step.exp_avg_sq).clone(),
    }


def score(head: Head, hidden: Tensor, token: int) -> Tensor:
    """∇_W log π(token), [R, d]."""
    weight = head.weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(head.log_policy(weight, hidden)[token], weight)
    return gradient


def token_step(
    head: Head,
    hidden: Tensor,
    token: int,
    advantage: float,
    step: Step,
    top_k: int | None = None,
    renormalize: bool = True,
) -> tuple[Head, int, Tensor]:
    """The token's own step: the head it lives on, the token's row there, Δ.

    Renormalised top-k is a smaller policy: the head *is* its kept rows. Otherwise the whole
    policy takes part and only the rows outside the set stand still.
    """
    index = kept_rows(head, hidden, token, top_k)
    if renormalize:
        sub = head.rows(index)
        delta = take_step(restrict(step, index), advantage * score(sub, hidden, 0), sub.weight)
        return sub, 0, delta
    delta = take_step(step, advantage * score(head, hidden, token), head.weight)
    still = torch.ones(len(delta), dtype=torch.bool)
    still[index] = False
    return head, token, delta.masked_fill(still[:, None], 0.0)


def judge_step(
    head: Head, hidden: Tensor, token: int, advantage: float, delta: Tensor
) -> Judgement:
    """m_H and m_F of the step ``delta`` [R, d], from the explicit Hessian and Fishers."""
    shape = head.weight.shape
    log_pi = head.log_policy(head.weight, hidden)
    scores = torch.stack([score(head, hidden, b).flatten() for b in range(shape[0])])  # [R, R·d]

    def surrogate(vec: Tensor) -> Tensor:
        return advantage * torch.exp(
            head.log_policy(vec.reshape(shape), hidden)[token] - log_pi[token]
        )

    hessian = torch.autograd.functional.hessian(surrogate, head.weight.flatten(), vectorize=True)
    exact = torch.einsum("b,bi,bj->ij", log_pi.exp(), scores, scores)
    sampled = torch.outer(scores[token], scores[token])
    x = delta.flatten()
    return Judgement(
        objective_shift=advantage * scores[token] @ x + 0.5 * x @ hessian @ x,
        sampled_shift=0.5 * x @ sampled @ x,
        exact_shift=0.5 * x @ exact @ x,
        s=scores[token] @ x,
        variance=x @ exact @ x,
        log_prob=log_pi[token],
        entropy=-(log_pi.exp() * log_pi).sum(),
    )


def judge_token(
    head: Head,
    hidden: Tensor,
    token: int,
    advantage: float,
    step: Step,
    *,
    top_k: int | None = None,
    renormalize: bool = True,
) -> Judgement:
    """The token judged under its own step; log-prob and entropy always of the full policy."""
    sub, row, delta = token_step(head, hidden, token, advantage, step, top_k, renormalize)
    log_pi = head.log_policy(head.weight, hidden)
    return replace(
        judge_step(sub, hidden, row, advantage, delta),
        log_prob=log_pi[token],
        entropy=-(log_pi.exp() * log_pi).sum(),
    )


def judge_group(
    head: Head,
    hidden: Tensor,
    tokens: list[int],
    advantages: list[float],
    step: Step,
    top_k: int | None = None,
) -> list[Judgement]:
    """A group's tokens under the one step of its mean gradient.

    hidden [n, d]. With ``top_k`` every token is a policy over its own kept rows, which is where its
    gradient lives and where the step of the whole head is judged. The group's own shift is the
    mean over the tokens returned.
    """
    members = [
        (h, token, A, kept_rows(head, h, token, top_k))
        for h, token, A in zip(hidden, tokens, advantages, strict=True)
    ]
    gradient = torch.zeros_like(head.weight)
    for h, _, A, index in members:
        gradient[index] += A * score(head.rows(index), h, 0) / len(members)
    delta = take_step(step, gradient, head.weight)
    judged = []
    for h, token, A, index in members:
        log_pi = head.log_policy(head.weight, h)
        entropy = -(log_pi.exp() * log_pi).sum()
        own = judge_step(head.rows(index), h, 0, A, delta[index])
        judged.append(replace(own, log_prob=log_pi[token], entropy=entropy))
    return judged
