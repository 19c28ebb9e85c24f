"""The code under test, called with the oracle's data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import capo
import oracle
from core.cases import FULL, Batch, Mode

# Every backend is held to the same oracle: add its name here.
IMPLEMENTATIONS = ("eager", "chunked")

FIELDS = ("objective_shift", "policy_shift", "log_prob", "entropy", "s", "variance")


def as_capo(step: oracle.Step, dtype: torch.dtype = torch.float64) -> Any:
    """The public class that the oracle's step stands for."""

    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    match step:
        case oracle.SGD(lr, weight_decay):
            return capo.SGDStep(lr, weight_decay)
        case oracle.Momentum():
            return capo.MomentumStep(
                step.lr,
                step.momentum,
                to(step.buffer),
                dampening=step.dampening,
                nesterov=step.nesterov,
                weight_decay=step.weight_decay,
                grad_scale=step.grad_scale,
            )
        case oracle.Given(delta):
            return capo.GivenStep(delta.to(dtype))
        case oracle.Adam():
            return capo.AdamStep(
                step.lr,
                step.betas,
                step.eps,
                to(step.exp_avg),
                to(step.exp_avg_sq),
                step.step,
                step.weight_decay,
                grad_scale=step.grad_scale,
                preconditioner="frozen" if step.frozen else "exact",
            )
    raise TypeError(step)


def arguments(
    batch: Batch, mode: Mode = FULL, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """``token_curvature``'s arguments for a batch."""

    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    return {
        "hidden": to(batch.hidden),
        "head_weight": to(batch.head.weight),
        "token_ids": batch.token_ids,
        "advantages": to(batch.advantages),
        "step": as_capo(batch.step, dtype),
        "coefficients": to(batch.coefficients),
        "temperature": batch.head.temperature,
        "logit_scale": batch.head.logit_scale,
        "logit_softcap": batch.head.logit_softcap,
        "head_bias": to(batch.head.bias),
        "top_k": mode.top_k,
        "renormalize": mode.renormalize,
    }


def curvature(
    batch: Batch, mode: Mode = FULL, dtype: torch.dtype = torch.float64, **changes: Any
) -> capo.TokenCurvature:
    """``capo.token_curvature`` of a batch, some arguments changed."""
    given = arguments(batch, mode, dtype) | changes
    return capo.token_curvature(
        given.pop("hidden"),
        given.pop("head_weight"),
        given.pop("token_ids"),
        given.pop("advantages"),
        **given,
    )


def assert_same(actual: Any, expected: Any, rtol: float = 1e-12, atol: float = 1e-16) -> None:
    """Two ``TokenCurvature`` agree in every field."""
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(actual, name),
            getattr(expected, name),
            rtol=rtol,
            atol=atol,
            msg=lambda m, name=name: f"{name}: {m}",
        )
