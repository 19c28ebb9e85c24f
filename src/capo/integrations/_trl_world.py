"""The processes that train one policy together, and what they tell each other."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


class World:
    """The data-parallel processes, each with its own rows of every micro-batch.

    Everything that is decided about a batch is decided on what all processes hold, so that all decide
    alike: the rows of the processes, one after the other, are the micro-batch. With one process every
    method hands back what it was given.

    Every method with more than one process is a collective: all processes call it, in the same order.

    Args:
        size: number of processes.
        rank: of this one, in ``[0, size)``.
    """

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size = size
        self.rank = rank

    @property
    def alone(self) -> bool:
        """Whether there is only one process."""
        return self.size == 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.alone:
            return values
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def total_int(self, value: int, device: torch.device) -> int:
        """The sum of whole numbers."""
        return value if self.alone else int(self.total(torch.tensor(value, device=device)))

    def highest(self, values: Tensor) -> Tensor:
        """The largest over the processes, elementwise."""
        if self.alone:
            return values
        largest = values.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

    def rows(self, *tensors: Tensor) -> tuple[tuple[Tensor, ...], slice]:
        """The rows of all processes, one after the other, and which of them are one's own.

        Args:
            tensors: ``[B, T]`` each, of one shape; ``B`` and ``T`` may differ between processes, and the
                result is padded on the right with zeros.

        Returns:
            ``[B_1 + … + B_n, max T]`` of each tensor, and the own rows.
        """
        batch, width = tensors[0].shape
        if self.alone:
            return tensors, slice(0, batch)
        shapes = self._sizes(torch.tensor([batch, width], device=tensors[0].device))
        most, widest = int(shapes[:, 0].max()), int(shapes[:, 1].max())
        gathered = []
        for tensor in tensors:
            padded = tensor.new_zeros(most, widest)
            padded[:batch, :width] = tensor
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded)
            counts = shapes[:, 0].tolist()
            gathered.append(torch.cat([p[:n] for p, n in zip(parts, counts, strict=True)]))
        start = int(shapes[: self.rank, 0].sum())
        return tuple(gathered), slice(start, start + batch)

    def _sizes(self, own: Int[Tensor, " k"]) -> Int[Tensor, "n k"]:
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return torch.stack(parts).cpu()

    def prompts(self, inputs: dict[str, Any]) -> tuple[Int[Tensor, "B P"], slice]:
        """Something that is equal for equal prompts, for every row of the micro-batch; the own rows.

        The prompts themselves where there is one process, fingerprints of them where there are several
        (each pads its prompts to its own longest).
        """
        ids: Tensor = inputs["prompt_ids"]
        if self.alone:
            return ids.cpu(), slice(0, ids.size(0))
        prints = fingerprints(ids, inputs["prompt_mask"]).to(ids.device)
        (everyone,), own = self.rows(prints[:, None])
        return everyone.cpu(), own


def fingerprints(
    ids: Int[Tensor, "B P"], mask: Int[Tensor, "B P"] | Bool[Tensor, "B P"]
) -> Int[Tensor, " B"]:
    """63 bits of a hash of every row's unmasked tokens."""
    found = []
    for row, counted in zip(ids.cpu(), mask.cpu().bool(), strict=True):
        data = row[counted].to(torch.int64).numpy().tobytes()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        found.append(int.from_bytes(digest, "little") >> 1)
    return torch.tensor(found, dtype=torch.int64)


def weighted_mean(world: World, values: Float[Tensor, " M"], weights: Float[Tensor, " M"]) -> float:
    """The weighted mean over the tokens of all processes; one process sums in the values' own dtype."""
    if world.alone:
        return float((values * weights).sum() / weights.sum())
    wide = weights.double()
    above, below = world.total(torch.stack([values.double() @ wide, wide.sum()])).tolist()
    return above / below if below else 0.0
