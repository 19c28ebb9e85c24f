"""Curvature-aware policy optimization: look at a policy-gradient step before it is taken."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capo.core.budget import Budget, Interaction, interaction
    from capo.core.curvature import TokenCurvature, TruncationBound, token_curvature
    from capo.core.diagnoses import Diagnosis
    from capo.core.early_warning import EarlyWarning, StepReading, Warned, WarningConstants
    from capo.core.errors import InputError
    from capo.core.gradient_noise import gradient_noise
    from capo.core.moments import LastLayerMoments
    from capo.core.proposed import proposed_step
    from capo.core.rules import NatsThreshold, QuantileThresholds, SoftThresholds, make_rule
    from capo.core.selection import PAPER_THRESHOLDS, Reason, Selection, Thresholds, select
    from capo.core.steps import AdamStep, GivenStep, MomentumStep, SGDStep
    from capo.core.trust_region import TrustRegion, auto_policy_shift, make_trust_region
    from capo.integrations.monitor import CurvatureMonitor

__version__ = "0.1.0"

__all__ = [
    "PAPER_THRESHOLDS",
    "AdamStep",
    "Budget",
    "CurvatureMonitor",
    "Diagnosis",
    "EarlyWarning",
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
    "StepReading",
    "Thresholds",
    "TokenCurvature",
    "TruncationBound",
    "TrustRegion",
    "Warned",
    "WarningConstants",
    "__version__",
    "auto_policy_shift",
    "gradient_noise",
    "interaction",
    "make_rule",
    "make_trust_region",
    "proposed_step",
    "select",
    "token_curvature",
]

# The core needs torch, which takes a second to import: too long for `capo --help`.
_HOMES = {
    "TrustRegion": "capo.core.trust_region",
    "auto_policy_shift": "capo.core.trust_region",
    "make_trust_region": "capo.core.trust_region",
    "Budget": "capo.core.budget",
    "Interaction": "capo.core.budget",
    "interaction": "capo.core.budget",
    "TokenCurvature": "capo.core.curvature",
    "TruncationBound": "capo.core.curvature",
    "token_curvature": "capo.core.curvature",
    "Diagnosis": "capo.core.diagnoses",
    "EarlyWarning": "capo.core.early_warning",
    "StepReading": "capo.core.early_warning",
    "Warned": "capo.core.early_warning",
    "WarningConstants": "capo.core.early_warning",
    "InputError": "capo.core.errors",
    "gradient_noise": "capo.core.gradient_noise",
    "LastLayerMoments": "capo.core.moments",
    "proposed_step": "capo.core.proposed",
    "NatsThreshold": "capo.core.rules",
    "QuantileThresholds": "capo.core.rules",
    "SoftThresholds": "capo.core.rules",
    "make_rule": "capo.core.rules",
    "PAPER_THRESHOLDS": "capo.core.selection",
    "Reason": "capo.core.selection",
    "Selection": "capo.core.selection",
    "Thresholds": "capo.core.selection",
    "select": "capo.core.selection",
    "AdamStep": "capo.core.steps",
    "GivenStep": "capo.core.steps",
    "MomentumStep": "capo.core.steps",
    "SGDStep": "capo.core.steps",
    "CurvatureMonitor": "capo.integrations.monitor",  # needs the extra `trl`
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
