"""Curvature-aware policy optimization: look at a policy-gradient step before it is taken."""

from __future__ import annotations

from capo.core.curvature import TokenCurvature, TruncationBound, token_curvature
from capo.core.errors import InputError
from capo.core.moments import LastLayerMoments
from capo.core.selection import PAPER_THRESHOLDS, Reason, Selection, Thresholds, select
from capo.core.steps import AdamStep, GivenStep, MomentumStep, SGDStep

__version__ = "0.1.0"

__all__ = [
    "PAPER_THRESHOLDS",
    "AdamStep",
    "GivenStep",
    "InputError",
    "LastLayerMoments",
    "MomentumStep",
    "Reason",
    "SGDStep",
    "Selection",
    "Thresholds",
    "TokenCurvature",
    "TruncationBound",
    "__version__",
    "select",
    "token_curvature",
]
