"""Sizes that trade memory for speed; results do not depend on them beyond rounding."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Options:
    """Chunk sizes of the ``chunked`` backend."""

    token_chunk: int = 256  # tokens whose logits of one vocabulary block are held
    vocab_chunk: int = 1024  # vocabulary rows a block
    logit_buffer: int = 1 << 23  # elements held where a step needs a token's whole row of logits
    elementwise_block: int = 1 << 16  # elements of a cache-sized piece of elementwise work
    compile: bool | None = None  # fuse with torch.compile: True, False, or where it pays (None)


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
