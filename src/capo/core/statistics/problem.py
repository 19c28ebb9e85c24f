"""The validated input of a backend, and the head's logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from capo.core.steps import Step


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any input is float64, float32 for everything else (bf16 and fp16 included)."""
    return (
        torch.float64
        if any(t is not None and t.dtype == torch.float64 for t in tensors)
        else torch.float32
    )


class Activation(NamedTuple):
    """Logits of a block and the derivatives of ``φ`` there (scalars where φ is linear)."""

    z: Float[Tensor, "n v"]  # φ(y)/T
    slope: Float[Tensor, "n v"] | float  # φ′(y)
    bend: Float[Tensor, "n v"] | None  # φ″(y), None where φ is linear


@dataclass(frozen=True)
class Head:
    """The LM head: ``z = φ(W h + b)/T`` with ``φ(y) = c·tanh(scale·y/c)``, or ``scale·y`` without c."""

    weight: Float[Tensor, "V d"]
    bias: Float[Tensor, "V"] | None
    temperature: float
    scale: float
    softcap: float | None
    dtype: torch.dtype

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.weight.shape[0]

    def raw(self, hidden: Float[Tensor, "n d"], block: slice) -> Float[Tensor, "n v"]:
        """``y = W h + b`` on a block of rows, accumulated in the compute dtype."""
        y = hidden @ self.weight[block].to(self.dtype).T
        return y if self.bias is None else y.add_(self.bias[block].to(self.dtype))

    def activate(self, y: Float[Tensor, "n v"]) -> Activation:
        """``(z, φ′, φ″)`` from raw logits; ``y`` may be overwritten."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return Activation(y if factor == 1.0 else y.mul_(factor), self.scale, None)
        t = y.mul_(self.scale / self.softcap).tanh_()
        slope = self.scale * (1.0 - t * t)
        bend = (-2.0 * self.scale / self.softcap) * t * slope
        return Activation(t.mul_(self.softcap / self.temperature), slope, bend)

    @property
    def max_bend(self) -> float:
        """``max |φ″|``: ``4/(3√3) · scale²/c``."""
        return 0.0 if self.softcap is None else 4.0 / 27.0**0.5 * self.scale**2 / self.softcap


@dataclass(frozen=True)
class Problem:
    """N response tokens to judge; nothing here is masked any more."""

    hidden: Float[Tensor, "N d"]  # h_i, in the compute dtype or narrower
    head: Head
    token_ids: Int[Tensor, "N"]  # a_i
    advantages: Float[Tensor, "N"]  # A_i · coefficient_i, in the compute dtype
    step: Step
    top_k: int | None
    renormalize: bool

    @property
    def dtype(self) -> torch.dtype:
        """The dtype everything is accumulated in."""
        return self.head.dtype

    def chunk(self, block: slice) -> Problem:
        """The tokens of one chunk, hidden states cast to the compute dtype."""
        return Problem(
            self.hidden[block].to(self.dtype),
            self.head,
            self.token_ids[block],
            self.advantages[block],
            self.step,
            self.top_k,
            self.renormalize,
        )
