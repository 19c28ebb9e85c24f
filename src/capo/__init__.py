"""Curvature-aware policy optimization: look at a policy-gradient step before it is taken."""

from __future__ import annotations

from capo.core.budget import Budget, Interaction, interaction
from capo.core.curvature import TokenCurvature, TruncationBound, token_curvature
from capo.core.errors import InputError
from capo.core.moments import LastLayerMoments
from capo.core.proposed import proposed_step
from capo.core.rules import NatsThreshold, QuantileThresholds, SoftThresholds
from capo.core.selection import PAPER_THRESHOLDS, Reason, Selection, Thresholds, select
from capo.core.steps import AdamStep, GivenStep, MomentumStep, SGDStep

__version__ = "0.1.0"

__all__ = [
    "PAPER_THRESHOLDS",
    "AdamStep",
    "Budget",
    "GivenStep",
    "InputError",
    "Interaction",
    "LastLayerMoments",
    "MomentumStep",
    "NatsThreshold",
    "QuantileThresholds",
    "Reason",
    "SGDStep",
    "Selection",
    "SoftThresholds",
    "Thresholds",
    "TokenCurvature",
    "TruncationBound",
    "__version__",
    "interaction",
    "proposed_step",
    "select",
    "token_curvature",
]
