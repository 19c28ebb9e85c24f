"""Policies: the embedded one with its recipe, and any Hugging Face model directory."""

from __future__ import annotations

from capo.policies.loading import EMBEDDED, Policy, load_policy
from capo.policies.sampling import sample_completions

__all__ = ["EMBEDDED", "Policy", "load_policy", "sample_completions"]
