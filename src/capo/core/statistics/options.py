"""Sizes that trade memory for speed; results do not depend on them beyond rounding."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


@dataclass(frozen=True)
class Options:
    """Chunk sizes of the ``chunked`` backend; the defaults are a CPU's.

    Small enough for a cache, large enough to hide a call's own cost. On a GPU that cost is some sixty
    launches a block: see :data:`ON_GPU`.
    """

    token_chunk: int | None = (
        None  # tokens a chunk; None: as many as make a block of `block` logits
    )
    vocab_chunk: int = 1024  # vocabulary rows a block
    block: int = 1 << 18  # logits a block
    logit_buffer: int = 1 << 23  # elements held where a step needs a token's whole row of logits
    elementwise_block: int = 1 << 16  # elements of a cache-sized piece of elementwise work
    compile: bool | None = None  # fuse with torch.compile: True, False, or where it pays (None)

    def tokens(self, vocabulary: int) -> int:
        """Tokens a chunk, for a head of that many rows."""
        if self.token_chunk is not None:
            return self.token_chunk
        return max(1, self.block // min(vocabulary, self.vocab_chunk))

    def held_tokens(self, vocabulary: int) -> int:
        """Tokens a chunk where whole rows of logits are held."""
        return max(1, min(self.tokens(vocabulary), self.logit_buffer // vocabulary))

    def pieces(self, tokens: int, elements: int) -> Iterator[slice]:
        """Runs of tokens whose elementwise work, ``elements`` each, fits into the cache."""
        size = max(1, self.elementwise_block // max(1, elements))
        for start in range(0, tokens, size):
            yield slice(start, start + size)


ON_GPU = {
    "vocab_chunk": 4096,
    "block": 1 << 26,
    "logit_buffer": 1 << 26,
    "elementwise_block": 1 << 26,
}
"""What differs on a GPU: 256 MB a block in float32.

With a CPU's sizes 4096 tokens over 152 064 rows make 2384 blocks of some sixty launches, and took 3.5 s on
an H200 (``results/gpu``): 1.5 ms a block, whose product is 1.9 GFLOP. With these they make 38. Rows a block
stay few: a block's sums lose about ``eps · rows`` (:func:`capo.core.statistics.rest.rest_of_sums`).
"""

_CHANGES: ContextVar[dict[str, int | bool | None]] = ContextVar(
    "capo_statistics_options",
    default={},  # noqa: B039 - never written to
)


def current(device: torch.device) -> Options:
    """The options in force for work on a device."""
    sizes = ON_GPU if device.type == "cuda" else {}
    return replace(Options(), **(sizes | _CHANGES.get()))  # type: ignore[arg-type]


@contextmanager
def options(**changes: int | bool | None) -> Iterator[Options]:
    """Change chunk sizes inside a ``with`` block: ``options(token_chunk=64, vocab_chunk=8192)``."""
    merged = _CHANGES.get() | changes
    value = replace(Options(), **merged)  # type: ignore[arg-type]
    token = _CHANGES.set(merged)
    try:
        yield value
    finally:
        _CHANGES.reset(token)
