"""The K largest logits of a row that arrives in blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from capo.core.statistics.rest import ABSENT

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

GROUP = 32  # columns whose maximum is looked at before any of them is sorted


class RunningTopK:
    """Streaming top-k without the sampled token.

    Selecting K of a whole block costs more than the block's matmul on a CPU. The K largest entries lie
    in the K groups with the largest maxima, and once a few blocks have been seen only few groups reach
    the smallest entry held: only those are sorted.

    Args:
        like: ``[n]`` tensor that gives dtype and device.
        k: number of entries to keep (0 allowed).
        descending: False keeps the smallest (a negative logit scale turns the order).
    """

    def __init__(self, like: Float[Tensor, "n"], k: int, *, descending: bool = True) -> None:
        self.k = k
        self.sign = 1.0 if descending else -1.0
        self.top = like.new_empty(like.shape[0], 0)
        self.rows = torch.empty(like.shape[0], 0, dtype=torch.int64, device=like.device)

    def update(
        self,
        y: Float[Tensor, "n v"],
        offset: int,
        position: Int[Tensor, "n"],
        present: Bool[Tensor, "n"],
    ) -> tuple[Int[Tensor, "n c"], Float[Tensor, "n e"]]:
        """Take in a block whose first row is ``offset``; ``y`` is left unchanged.

        Returns the block's columns that were considered, and the values among them and among the
        entries held so far that were turned away.
        """
        n, v = y.shape
        if self.k == 0:
            return self.rows, self.top
        column = position[:, None]
        kept = y.gather(1, column)
        if self.sign < 0:
            y = -y
        y.scatter_(1, column, torch.where(present[:, None], ABSENT, y.gather(1, column)))
        top, rows = self._contenders(y, n, v)
        if self.sign > 0:
            y.scatter_(1, column, kept)
        merged = torch.cat([self.top, top], 1)
        merged_rows = torch.cat([self.rows, rows + offset], 1)
        self.top, order = merged.topk(min(self.k, merged.shape[1]), dim=1)
        self.rows = merged_rows.gather(1, order)
        return rows, self.sign * merged.scatter_(1, order, ABSENT)

    def _contenders(
        self, y: Float[Tensor, "n v"], n: int, v: int
    ) -> tuple[Float[Tensor, "n c"], Int[Tensor, "n c"]]:
        whole = v - v % GROUP
        groups = whole // GROUP
        if groups <= self.k and self.top.shape[1] < self.k:
            top, rows = y.topk(min(self.k, v), dim=1)
            return top, rows
        grouped = y[:, :whole].view(n, groups, GROUP)
        maxima = grouped.amax(dim=2)
        count = min(self.k, groups)
        if self.top.shape[1] == self.k:
            threshold = self.top[:, -1:]
            count = min(count, int((maxima > threshold).sum(dim=1).max()))
        chosen = maxima.topk(count, dim=1).indices if count else maxima.new_empty((n, 0)).long()
        picked = grouped.gather(1, chosen[:, :, None].expand(n, count, GROUP)).reshape(n, -1)
        inside = torch.arange(GROUP, device=y.device)
        rows = (chosen[:, :, None] * GROUP + inside).reshape(n, -1)
        tail = torch.arange(whole, v, device=y.device).expand(n, v - whole)
        return torch.cat([picked, y[:, whole:]], 1), torch.cat([rows, tail], 1)

    def result(self) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Values and vocabulary rows, largest first."""
        return self.sign * self.top, self.rows
