"""A trust region on the optimizer's step: foresee its policy shift, and take no more than fits."""

from capo.core.trust_region.calibration import Calibration
from capo.core.trust_region.divergence import Divergence, Reference, choose_tokens
from capo.core.trust_region.followed import Followed
from capo.core.trust_region.options import (
    TrustRegion,
    auto_policy_shift,
    auto_sequences,
    make_trust_region,
)
from capo.core.trust_region.probe import MeanShift, Probe, last_layers
from capo.core.trust_region.step_length import StepChoice, StepLength
from capo.core.trust_region.trial import StepTrial

__all__ = [
    "Calibration",
    "Divergence",
    "Followed",
    "MeanShift",
    "Probe",
    "Reference",
    "StepChoice",
    "StepLength",
    "StepTrial",
    "TrustRegion",
    "auto_policy_shift",
    "auto_sequences",
    "choose_tokens",
    "last_layers",
    "make_trust_region",
]
