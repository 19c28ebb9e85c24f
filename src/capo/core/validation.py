"""Checks of :func:`capo.token_curvature`'s arguments: one sentence that names the field."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from capo.core.errors import InputError
from capo.core.statistics import IMPLEMENTATIONS
from capo.core.statistics.problem import Head, Problem, compute_dtype
from capo.core.steps import AdamStep, GivenStep, MomentumStep

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def make_head(
    hidden: Float[Tensor, "... d"],
    head_weight: Float[Tensor, "V d"],
    head_bias: Float[Tensor, "V"] | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    dtype: torch.dtype | None = None,
) -> Head:
    """A checked :class:`Head`."""
    if head_weight.ndim != 2:
        raise InputError("head_weight", f"must be [V, d], got shape {tuple(head_weight.shape)}.")
    if head_bias is not None and tuple(head_bias.shape) != (head_weight.shape[0],):
        raise InputError(
            "head_bias", f"must be [{head_weight.shape[0]}], got {tuple(head_bias.shape)}."
        )
    if not (_is_finite(temperature) and temperature > 0):
        raise InputError("temperature", f"must be a finite number > 0, got {temperature!r}.")
    if not _is_finite(logit_scale):
        raise InputError("logit_scale", f"must be a finite number, got {logit_scale!r}.")
    if logit_softcap is not None and not (_is_finite(logit_softcap) and logit_softcap > 0):
        raise InputError(
            "logit_softcap", f"must be a finite number > 0 or None, got {logit_softcap!r}."
        )
    dtype = dtype or compute_dtype(hidden, head_weight)
    return Head(
        head_weight.detach(),
        None if head_bias is None else head_bias.detach(),
        float(temperature),
        float(logit_scale),
        None if logit_softcap is None else float(logit_softcap),
        dtype,
    )


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def check_tensors(**tensors: object) -> None:
    """Raise :class:`InputError` unless every argument is a tensor (or None)."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise InputError(name, f"must be a torch.Tensor, got {type(value).__name__}.")


def check_choices(
    fisher: str, granularity: str, impl: str, top_k: int | None, renormalize: bool, vocabulary: int
) -> None:
    """Raise :class:`InputError` unless every choice is one that exists."""
    for name, value, allowed in (
        ("fisher", fisher, ("sampled", "exact")),
        ("granularity", granularity, ("token", "sequence", "batch")),
        ("impl", impl, IMPLEMENTATIONS),
    ):
        if value not in allowed:
            raise InputError(name, f"must be one of {', '.join(allowed)}, got {value!r}.")
    whole = isinstance(top_k, int) and not isinstance(top_k, bool)
    if top_k is not None and not (whole and 1 <= top_k <= vocabulary):
        raise InputError("top_k", f"must be an integer from 1 to V = {vocabulary}, got {top_k!r}.")
    if top_k is not None and not renormalize and granularity != "token":
        raise InputError(
            "renormalize",
            "False with top_k is bounded for a token's own step only: use granularity='token', "
            "renormalize=True or top_k=None.",
        )


def check_shapes(
    hidden: Float[Tensor, "... d"], head_weight: Float[Tensor, "V d"], token_ids: Int[Tensor, "..."]
) -> None:
    """Raise :class:`InputError` unless ``hidden`` is floating point and ``[*token_ids.shape, d]``."""
    if tuple(hidden.shape) != (*token_ids.shape, head_weight.shape[1]):
        raise InputError(
            "hidden",
            f"must be shaped like token_ids with d = {head_weight.shape[1]} at the end, "
            f"{(*token_ids.shape, head_weight.shape[1])}, got {tuple(hidden.shape)}.",
        )
    if not hidden.is_floating_point():
        raise InputError("hidden", f"must be floating point, got {hidden.dtype}.")


def check_mask(
    mask: Bool[Tensor, "..."] | None, token_ids: Int[Tensor, "..."]
) -> Bool[Tensor, "..."]:
    """A boolean mask shaped like ``token_ids`` (None: everything)."""
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise InputError("token_ids", f"must be integers, got {token_ids.dtype}.")
    if mask is None:
        return torch.ones_like(token_ids, dtype=torch.bool)
    if mask.shape != token_ids.shape:
        raise InputError(
            "mask",
            f"must be shaped like token_ids {tuple(token_ids.shape)}, got {tuple(mask.shape)}.",
        )
    return mask.bool()


def check_tokens(tokens: Int[Tensor, "N"], vocabulary: int) -> None:
    """Raise :class:`InputError` unless every token id is a row of the head."""
    if tokens.numel() and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary):
        raise InputError("token_ids", f"must be from 0 to V − 1 = {vocabulary - 1} where unmasked.")


def broadcast(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """``value`` without its graph, broadcast to the tokens."""
    try:
        return value.detach().broadcast_to(shape)
    except RuntimeError:
        raise InputError(
            name,
            f"must broadcast to token_ids {tuple(shape)}, got {tuple(value.shape)}.",
        ) from None


def resolve_groups(
    granularity: str,
    sequence_ids: Int[Tensor, "..."] | None,
    token_ids: Int[Tensor, "..."],
    chosen: Bool[Tensor, "..."],
) -> Int[Tensor, "N"] | None:
    """Group of each unmasked token, or None at token granularity."""
    if granularity == "token":
        return None
    if granularity == "batch":
        return torch.zeros_like(token_ids[chosen])
    if sequence_ids is None:
        if token_ids.ndim != 2:
            raise InputError("sequence_ids", "must be given unless token_ids is [B, T].")
        sequence_ids = torch.arange(token_ids.shape[0], device=token_ids.device)[:, None]
    return broadcast("sequence_ids", sequence_ids, token_ids.shape)[chosen]


def report_non_finite(
    problem: Problem,
    advantages: Tensor,
    coefficients: Tensor | None,
    chosen: Bool[Tensor, "..."],
) -> None:
    """Name the input that made the result non-finite; return if none did (an overflow)."""
    step = problem.step
    inputs: dict[str, Tensor | None] = {
        "hidden": problem.hidden,
        "head_weight": problem.head.weight,
        "head_bias": problem.head.bias,
        "advantages": broadcast("advantages", advantages, chosen.shape)[chosen],
        "coefficients": None if coefficients is None else coefficients[chosen],
    }
    match step:
        case AdamStep():
            inputs |= {"step.exp_avg": step.exp_avg, "step.exp_avg_sq": step.exp_avg_sq}
        case MomentumStep():
            inputs["step.momentum_buffer"] = step.momentum_buffer
        case GivenStep():
            inputs["step.delta"] = step.delta
        case _:
            pass
    for name, tensor in inputs.items():
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise InputError(name, "must be finite at every unmasked token, found NaN or infinity.")
