"""A parameter displaced by a part of Adam's coming step, in few passes over memory.

Made and added, the step of a 16-bit parameter takes 17 elementwise passes in float32, 144 bytes a
parameter; one kernel reads four tensors and writes one, 10 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from capo.core.statistics import triton_backend, triton_launch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BLOCK = 1024  # elements of one program of the kernel
NARROW_OR_SINGLE = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class AdamMove:
    """Adam or AdamW with moments, and nothing but decoupled decay beside them.

    Attributes:
        lr, betas, eps, weight_decay: of the parameter's group; the decay is decoupled.
        exp_avg, exp_avg_sq: shaped like the parameter.
        step: of the step to come, 1 for the first.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    exp_avg: Float[Tensor, "..."]
    exp_avg_sq: Float[Tensor, "..."]
    step: int

    @staticmethod
    def of(kind: type, group: dict[str, Any], state: dict[str, Any], step: int) -> AdamMove | None:
        """From an optimizer's class, settings and state; None where the step is another one.

        Args:
            kind: the optimizer's class.
            group: its settings for the parameter.
            state: its state for the parameter.
            step: steps taken so far.
        """
        if kind not in (torch.optim.Adam, torch.optim.AdamW) or "exp_avg" not in state:
            return None
        decoupled = kind is torch.optim.AdamW or group.get("decoupled_weight_decay", False)
        coupled = group["weight_decay"] and not decoupled
        if group["amsgrad"] or group.get("maximize", False) or coupled:
            return None
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return AdamMove(
            float(group["lr"]),
            (beta1, beta2),
            float(group["eps"]),
            float(group["weight_decay"]),
            state["exp_avg"],
            state["exp_avg_sq"],
            step + 1,
        )

    def moved(
        self, value: Float[Tensor, "..."], grad: Float[Tensor, "..."], scale: float
    ) -> Float[Tensor, "..."] | None:
        """``value + scale · Δ`` in the dtype of ``value``, computed in float32 or wider.

        None where the tensors ask for the long way: several dtypes without a GPU, or strided ones.
        """
        tensors = (value, grad, self.exp_avg, self.exp_avg_sq)
        dtypes = {each.dtype for each in tensors}
        if (
            value.is_cuda
            and dtypes <= NARROW_OR_SINGLE
            and all(each.is_contiguous() for each in tensors)
            and triton_backend.available()
        ):
            return triton_backend.or_plain(
                lambda: self.by_kernel(value, grad, scale), lambda: self._plain(value, grad, scale)
            )
        return self._plain(value, grad, scale)

    def by_kernel(
        self, value: Float[Tensor, "..."], grad: Float[Tensor, "..."], scale: float
    ) -> Float[Tensor, "..."]:
        """The same by one Triton kernel, on contiguous tensors on a GPU (or in its interpreter)."""
        from capo.core import step_kernel

        beta1, beta2 = self.betas
        root, length = self._root(), scale * self.lr
        out = value.new_empty(value.shape)
        grid = (-(-value.numel() // BLOCK),)
        with triton_launch.on_device_of(value):
            step_kernel.moved_by_adam_kernel[grid](
                value,
                grad,
                self.exp_avg,
                self.exp_avg_sq,
                out,
                value.numel(),
                1.0 - length * self.weight_decay,
                1.0 - beta1,
                beta2,
                1.0 - beta2,
                root * self.eps,
                length * root / (1.0 - beta1**self.step),
                BLOCK=BLOCK,
            )
        return out

    def _plain(self, value: Tensor, grad: Tensor, scale: float) -> Tensor | None:
        """In six passes: the factors of the step are drawn out of the tensors."""
        dtypes = {each.dtype for each in (value, grad, self.exp_avg, self.exp_avg_sq)}
        if not (dtypes <= {torch.float32} or dtypes <= {torch.float64}):
            return None
        beta1, beta2 = self.betas
        root, length = self._root(), scale * self.lr
        first = torch.lerp(self.exp_avg, grad, 1.0 - beta1)
        second = torch.mul(self.exp_avg_sq, beta2).addcmul_(grad, grad, value=1.0 - beta2)
        second.sqrt_().add_(root * self.eps)
        kept = value * (1.0 - length * self.weight_decay) if self.weight_decay else value
        return torch.addcdiv(kept, first, second, value=-length * root / (1.0 - beta1**self.step))

    def _root(self) -> float:
        return math.sqrt(1.0 - self.betas[1] ** self.step)
