"""The log-probabilities of the policy that sampled a batch, from the first training pass over it.

With several passes over the same completions TRL runs the model once more before the first, for the
denominators of the importance ratios. The first pass is of the same policy and gives the same numbers, so
that this pass can be left out; it is worth about what the trust region's trial costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from trl import GRPOTrainer

OLD = "old_per_token_logps"  # TRL's name


class OldLogProbs:
    """Leaves TRL's pass out where the first training pass will do.

    It does where every completion is trained on for the first time before the first step on its batch, and
    where nothing needs the numbers earlier (the correction for sampling by vLLM does).

    Args:
        trainer: whose batches.
    """

    def __init__(self, trainer: GRPOTrainer) -> None:
        args = trainer.args
        accumulated, generated = args.gradient_accumulation_steps, args.steps_per_generation
        computed = accumulated % (generated * trainer.num_iterations) != 0  # by TRL
        self.spares = (
            computed and accumulated == generated and not (args.use_vllm or args.use_liger_kernel)
        )
        self._skip = False
        self._seen: Float[Tensor, "B T"] | None = None

    @contextmanager
    def generating(self, training: bool) -> Iterator[None]:
        """Around the sampling of a batch."""
        self._skip = self.spares and training
        try:
            yield
        finally:
            self._skip = False

    def skips(self) -> bool:
        """Whether the pass that is asked for is the one to leave out: the first while sampling."""
        skip, self._skip = self._skip, False
        return skip

    def see(self, log_probs: Float[Tensor, "B T"]) -> None:
        """Hear of the log-probabilities of a training pass."""
        if self.spares and torch.is_grad_enabled():
            self._seen = log_probs.detach()

    def keep(self, inputs: dict[str, Any]) -> None:
        """After a training pass over ``inputs``: they are remembered for those that follow."""
        if self._seen is not None and OLD not in inputs:
            inputs[OLD] = self._seen
        self._seen = None
