"""Sizes that trade memory for speed; results do not depend on them beyond rounding."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


LOGITS_A_BLOCK = 1 << 18  # small enough for a cache, large enough to hide a call's own cost


@dataclass(frozen=True)
class Options:
    """Chunk sizes of the ``chunked`` backend."""

    token_chunk: int | None = None  # tokens a chunk; None: as many as make a block of 2¹⁸ logits
    vocab_chunk: int = 1024  # vocabulary rows a block
    logit_buffer: int = 1 << 23  # elements held where a step needs a token's whole row of logits
    elementwise_block: int = 1 << 16  # elements of a cache-sized piece of elementwise work
    compile: bool | None = None  # fuse with torch.compile: True, False, or where it pays (None)

    def tokens(self, vocabulary: int) -> int:
        """Tokens a chunk, for a head of that many rows."""
        if self.token_chunk is not None:
            return self.token_chunk
        return max(1, LOGITS_A_BLOCK // min(vocabulary, self.vocab_chunk))

    def held_tokens(self, vocabulary: int) -> int:
        """Tokens a chunk where whole rows of logits are held."""
        return max(1, min(self.tokens(vocabulary), self.logit_buffer // vocabulary))

    def pieces(self, tokens: int, elements: int) -> Iterator[slice]:
        """Runs of tokens whose elementwise work, ``elements`` each, fits into the cache."""
        size = max(1, self.elementwise_block // max(1, elements))
        for start in range(0, tokens, size):
            yield slice(start, start + size)


_DEFAULT = Options()
_OPTIONS: ContextVar[Options] = ContextVar("capo_statistics_options", default=_DEFAULT)


def current() -> Options:
    """The options in force."""
    return _OPTIONS.get()


@contextmanager
def options(**changes: int | bool | None) -> Iterator[Options]:
    """Change chunk sizes inside a ``with`` block: ``options(token_chunk=64, vocab_chunk=8192)``."""
    value = replace(_OPTIONS.get(), **changes)  # type: ignore[arg-type]
    token = _OPTIONS.set(value)
    try:
        yield value
    finally:
        _OPTIONS.reset(token)
