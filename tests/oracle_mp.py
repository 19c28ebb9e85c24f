"""The arbiter for confident tokens: the oracle again, in 120-digit arithmetic.

At 1 − π(a) = 1e-8 the gradient of a token is eight digits away from cancelling, and what is
second order in it sixteen: float64 autograd is then no authority. Here every derivative is a
central difference of the policy itself, taken with steps so small that truncation and rounding
are both below 1e-50. Inputs are the exact values of the float tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from mpmath import mp, mpf
from torch import Tensor

from oracle import SGD, Adam, Given, Head, Judgement, Momentum, Step, kept_rows, restrict

Real: TypeAlias = Any  # mpmath's mpf; the package has no types
Matrix: TypeAlias = list[list[Real]]

DIGITS = 120
NUDGE = "1e-30"


def exact(tensor: Tensor) -> Any:
    """The tensor's values as (nested lists of) mpf, without rounding."""
    values = tensor.double().tolist()

    def convert(x: Any) -> Any:
        return [convert(y) for y in x] if isinstance(x, list) else mpf(x)

    return convert(values)


class ExactHead:
    """log π(· | W) of a head, in mpmath."""

    def __init__(self, head: Head, hidden: Tensor) -> None:
        self.weight: Matrix = exact(head.weight)
        self.hidden: list[Real] = exact(hidden)
        self.bias: list[Real] = [mpf(0)] * len(self.weight)
        if head.bias is not None:
            self.bias = exact(head.bias)
        self.temperature = mpf(head.temperature)
        self.scale = mpf(head.logit_scale)
        self.softcap = None if head.logit_softcap is None else mpf(head.logit_softcap)

    def logit(self, k: int, row: Sequence[Real]) -> Real:
        y = mp.fdot(row, self.hidden) + self.bias[k]
        y = self.scale * y
        if self.softcap is not None:
            y = self.softcap * mp.tanh(y / self.softcap)
        return y / self.temperature

    def log_policy(self, weight: Matrix) -> list[Real]:
        logits = [self.logit(k, row) for k, row in enumerate(weight)]
        log_sum = mp.log(mp.fsum(mp.exp(z) for z in logits))
        return [z - log_sum for z in logits]

    def score(self, token: int) -> Matrix:
        """∇_W log π(token) by central differences, one entry of W at a time."""
        nudge = mpf(NUDGE)
        logits = [self.logit(k, row) for k, row in enumerate(self.weight)]
        powers = [mp.exp(z) for z in logits]

        def moved(k: int, j: int, offset: Real) -> Real:
            """log π(token) with W[k, j] moved: of the logits, only the k-th notices."""
            row = list(self.weight[k])
            row[j] += offset
            logit = self.logit(k, row)
            others = mp.fsum(power for i, power in enumerate(powers) if i != k)
            return (logit if k == token else logits[token]) - mp.log(others + mp.exp(logit))

        return [
            [(moved(k, j, nudge) - moved(k, j, -nudge)) / (2 * nudge) for j in range(len(row))]
            for k, row in enumerate(self.weight)
        ]

    def along(self, delta: Matrix) -> Callable[[Real], list[Real]]:
        """η ↦ log π(· | W + ηΔ)."""

        def at(eta: Real) -> list[Real]:
            moved = [
                [w + eta * x for w, x in zip(row, change, strict=True)]
                for row, change in zip(self.weight, delta, strict=True)
            ]
            return self.log_policy(moved)

        return at


def take_step_mp(step: Step, gradient: Matrix, weight: Matrix) -> Matrix:
    """The optimizer's published update rule (torch.optim's documentation), entry by entry."""
    if isinstance(step, Given):
        return exact(step.delta)
    zeros = [[mpf(0)] * len(row) for row in weight]
    if isinstance(step, Adam):
        state = step.exp_avg, step.exp_avg_sq
    else:
        state = getattr(step, "buffer", None), None
    first, second = (zeros if x is None else exact(x) for x in state)
    entry = _adam(step) if isinstance(step, Adam) else _sgd(step)
    return [
        [entry(*entries) for entries in zip(*rows, strict=True)]
        for rows in zip(gradient, first, second, weight, strict=True)
    ]


def _adam(step: Adam) -> Callable[[Real, Real, Real, Real], Real]:
    beta1, beta2 = (mpf(b) for b in step.betas)
    lr, eps, decay, scale = (
        mpf(x) for x in (step.lr, step.eps, step.weight_decay, step.grad_scale)
    )
    t = step.step + 1

    def entry(g: Real, m: Real, v: Real, w: Real) -> Real:
        loss_gradient = -scale * g
        m = beta1 * m + (1 - beta1) * loss_gradient
        if step.frozen:
            v_hat = v / (1 - beta2**step.step)
        else:
            v_hat = (beta2 * v + (1 - beta2) * loss_gradient**2) / (1 - beta2**t)
        return -lr * decay * w - lr * m / (1 - beta1**t) / (mp.sqrt(v_hat) + eps)

    return entry


def _sgd(step: SGD | Momentum) -> Callable[[Real, Real, Real, Real], Real]:
    lr, decay = mpf(step.lr), mpf(step.weight_decay)

    def entry(g: Real, buffer: Real, _: Real, w: Real) -> Real:
        if isinstance(step, SGD):
            return lr * (g - decay * w)
        loss_gradient = -mpf(step.grad_scale) * g + decay * w
        mu = mpf(step.momentum)
        if step.buffer is None:
            buffer = loss_gradient
        else:
            buffer = mu * buffer + (1 - mpf(step.dampening)) * loss_gradient
        return -lr * (loss_gradient + mu * buffer if step.nesterov else buffer)

    return entry


def judge_token_mp(
    head: Head,
    hidden: Tensor,
    token: int,
    advantage: float,
    step: Step,
    *,
    top_k: int | None = None,
    renormalize: bool = True,
) -> Judgement:
    """``oracle.judge_token`` to more than thirty digits, rounded to float64 at the end."""
    with mp.workdps(DIGITS):
        whole = ExactHead(head, hidden)
        log_pi = whole.log_policy(whole.weight)
        index = kept_rows(head, hidden, token, top_k)
        if renormalize:
            policy, row = ExactHead(head.rows(index), hidden), 0
            step = restrict(step, index)
        else:
            policy, row = whole, token
        gradient = [[mpf(advantage) * x for x in line] for line in policy.score(row)]
        delta = take_step_mp(step, gradient, policy.weight)
        if not renormalize:
            kept = set(index.tolist())
            delta = [line if k in kept else [x * 0 for x in line] for k, line in enumerate(delta)]
        return _judge_along(policy, row, advantage, delta, log_pi, token)


def _judge_along(
    policy: ExactHead,
    row: int,
    advantage: float,
    delta: Matrix,
    log_pi: list[Real],
    token: int,
) -> Judgement:
    """Second-order expansion of surrogate and KL along η ↦ W + ηΔ at η = 0."""
    nudge = mpf(NUDGE)
    path = policy.along(delta)
    below, here, above = path(-nudge), path(mpf(0)), path(nudge)
    # d log π(b) / dη for every b: ∇log π(b)ᵀ Δ
    slopes = [(up - down) / (2 * nudge) for down, up in zip(below, above, strict=True)]
    ratios = [mp.exp(x[row] - here[row]) for x in (below, here, above)]
    first = (ratios[2] - ratios[0]) / (2 * nudge)
    rises = [b - a for a, b in pairwise(ratios)]
    second = (rises[1] - rises[0]) / nudge**2
    variance = mp.fsum(mp.exp(x) * slope**2 for x, slope in zip(here, slopes, strict=True))
    s = slopes[row]

    def rounded(x: Real) -> Tensor:
        return torch.tensor(float(x), dtype=torch.float64)

    return Judgement(
        objective_shift=rounded(mpf(advantage) * (first + second / 2)),
        sampled_shift=rounded(s**2 / 2),
        exact_shift=rounded(variance / 2),
        s=rounded(s),
        variance=rounded(variance),
        log_prob=rounded(log_pi[token]),
        entropy=rounded(-mp.fsum(mp.exp(x) * x for x in log_pi)),
    )
