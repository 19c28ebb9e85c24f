"""How much of a batch's gradient is noise: the simple noise scale of the last layer's gradients.

Source: McCandlish et al., *An Empirical Model of Large-Batch Training*, arXiv 1812.06162, eq. 2.9 and
appendix A.1: ``B_simple = tr Σ / |G|²``, numerator and denominator averaged separately over steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from capo.core.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


class NoiseEstimate(NamedTuple):
    """Unbiased estimates from one batch; ``signal`` may be negative.

    Attributes:
        trace: tr Σ, the variance of one completion's gradient, summed over the head's entries.
        signal: |G|², the squared norm of the mean gradient.
    """

    trace: float
    signal: float


@torch.no_grad()
def gradient_noise(
    log_probs: Float[Tensor, "M V"],
    hidden: Float[Tensor, "M d"],
    token_ids: Int[Tensor, " M"],
    coefficients: Float[Tensor, " M"],
    completion: Int[Tensor, " M"],
    prompt: Int[Tensor, " n"],
) -> NoiseEstimate | None:
    """The noise of the completions' gradients ``g_b = Σ_t c_t w_t h_tᵀ``, ``w = e_a − π``.

    No ``[V, d]`` gradient is formed: ``⟨g_b, g_b'⟩ = Σ c_t c_t' (w_t·w_t')(h_t·h_t')``. Only completions of
    different prompts are independent (a group's advantages sum to 0), so |G|² is the mean over such pairs.

    Args:
        log_probs: log π at the tokens.
        hidden: input of the head there.
        token_ids: sampled tokens a.
        coefficients: c, what multiplies ``∇ log π_a`` in the loss, up to a common factor.
        completion: which completion each token is of, ascending from 0 to n − 1.
        prompt: which prompt each completion is of.

    Returns:
        None where there are fewer than two prompts, or every coefficient is 0.

    Raises:
        InputError: ``completion`` is not ascending, or names a completion that ``prompt`` lacks.
    """
    if bool((completion.diff() < 0).any()):
        raise InputError("completion", "must be ascending.")
    count = prompt.numel()
    if completion.numel() and int(completion.max()) >= count:
        raise InputError("completion", f"must be below the {count} completions of `prompt`.")
    if torch.unique(prompt).numel() < 2 or not bool((coefficients != 0).any()):
        return None
    w = -log_probs.exp()
    w[torch.arange(w.size(0), device=w.device), token_ids] += 1.0
    w *= coefficients.to(w.dtype)[:, None]
    h = hidden.to(w.dtype)
    inner = w.new_zeros(count, count)
    for own in range(count):  # one completion's tokens against all: never M × M numbers at once
        rows = completion == own
        products = (w[rows] @ w.T) * (h[rows] @ h.T)
        inner[own].index_add_(0, completion, products.sum(dim=0))
    apart = prompt[:, None] != prompt[None, :]
    signal = inner[apart.to(inner.device)].mean()
    return NoiseEstimate(*torch.stack([inner.diagonal().mean() - signal, signal]).tolist())


class NoiseScale:
    """The simple noise scale over a run: both estimates as running means, then divided.

    Args:
        keep: share that a running mean keeps from step to step.
    """

    def __init__(self, keep: float = 0.9) -> None:
        self.keep = keep
        self._trace = self._signal = 0.0

    def state_dict(self) -> dict[str, float]:
        """What :meth:`load_state_dict` continues from."""
        return {"trace": self._trace, "signal": self._signal}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue the running means of a run that is resumed."""
        self._trace, self._signal = float(state["trace"]), float(state["signal"])

    def observe(self, estimate: NoiseEstimate) -> float:
        """Take a step's estimate; ``B_simple`` in completions, infinite where no signal is seen.

        Numbers that are not finite are left out.
        """
        if not (math.isfinite(estimate.trace) and math.isfinite(estimate.signal)):
            return math.nan
        self._trace = self.keep * self._trace + (1 - self.keep) * estimate.trace
        self._signal = self.keep * self._signal + (1 - self.keep) * estimate.signal
        return self._trace / self._signal if self._signal > 0 else math.inf
