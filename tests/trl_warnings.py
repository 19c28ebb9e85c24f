"""Warnings that TRL and transformers raise about each other, and about nothing of ours."""

from __future__ import annotations

THIRD_PARTY = (
    # TRL 1.16 reads the property and calls the methods that transformers 5.23 has renamed.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_(en|dis)able` is deprecated:FutureWarning",
    # torch.compile, by which the core fuses a kernel, imports what torch itself has deprecated.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
