"""Curvature-aware policy optimization: look at a policy-gradient step before it is taken."""

from __future__ import annotations

from capo.core.errors import InputError

__version__ = "0.1.0"

__all__ = ["InputError", "__version__"]
