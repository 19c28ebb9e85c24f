"""Hard selection: keep iff low ≤ m_H ≤ high and m_F ≤ δ_F (METHOD: the paper's masks)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capo

KEPT, POLICY, LOW, HIGH, MASKED = (
    capo.Reason.KEPT,
    capo.Reason.POLICY_SHIFT,
    capo.Reason.OBJECTIVE_LOW,
    capo.Reason.OBJECTIVE_HIGH,
    capo.Reason.MASKED,
)


def shifts(
    objective: Any, policy: Any, mask: Any = None, dtype: torch.dtype = torch.float32
) -> capo.TokenCurvature:
    """A curvature with these shifts; the other fields are of no interest to the rule."""
    m_h, m_f = torch.tensor(objective, dtype=dtype), torch.tensor(policy, dtype=dtype)
    zeros = torch.zeros_like(m_h)
    keep = torch.ones_like(m_h).bool() if mask is None else torch.tensor(mask)
    return capo.TokenCurvature(
        objective_shift=m_h,
        policy_shift=m_f,
        log_prob=zeros,
        entropy=zeros,
        s=zeros,
        variance=zeros,
        truncation_bound=None,
        mask=keep,
    )


def test_verdicts_and_reasons() -> None:
    curvature = shifts(
        objective=[0.0, 0.0, -0.3, 0.3, 0.1, -0.1], policy=[0.0, 2.0, 0.0, 0.0, 1.0, 0.5]
    )
    rule = capo.Thresholds(policy_shift=1.0, objective_shift=(-0.2, 0.2))
    selection = capo.select(curvature, rule)
    assert selection.weights.tolist() == [1, 0, 0, 0, 1, 1]
    assert selection.reason.dtype == torch.int8
    assert selection.reason.tolist() == [KEPT, POLICY, LOW, HIGH, KEPT, KEPT]
    assert selection.rejection_rate.item() == pytest.approx(0.5)
    rates = {k: v.item() for k, v in selection.rejection_rate_by_reason.items()}
    assert rates == pytest.approx(
        {"policy_shift": 1 / 6, "objective_low": 1 / 6, "objective_high": 1 / 6}
    )


def test_boundaries_are_kept() -> None:
    rule = capo.Thresholds(policy_shift=0.25, objective_shift=(-0.5, 0.5))
    at = shifts([-0.5, 0.5, 0.0], [0.25, 0.25, 0.25])
    assert capo.select(at, rule).weights.tolist() == [1, 1, 1]
    beyond = shifts(
        [math.nextafter(-0.5, -1), math.nextafter(0.5, 1), 0.0],
        [0.25, 0.25, math.nextafter(0.25, 1)],
        dtype=torch.float64,
    )
    assert capo.select(beyond, rule).reason.tolist() == [LOW, HIGH, POLICY]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (capo.Thresholds(), [KEPT, KEPT, KEPT]),
        (capo.Thresholds(policy_shift=1.0), [KEPT, KEPT, POLICY]),
        (capo.Thresholds(objective_shift=(0.0, None)), [LOW, KEPT, KEPT]),
        (capo.Thresholds(objective_shift=(None, 0.0)), [KEPT, KEPT, HIGH]),
        (capo.Thresholds(objective_shift=(-1.0, 0.5)), [LOW, KEPT, HIGH]),
        (capo.Thresholds(policy_shift=0.0), [KEPT, POLICY, POLICY]),
    ],
)
def test_a_missing_threshold_rejects_nothing(rule: capo.Thresholds, reason: list[int]) -> None:
    curvature = shifts([-2.0, 0.0, 2.0], [0.0, 0.5, 4.0])
    assert capo.select(curvature, rule).reason.tolist() == reason


def test_what_is_not_a_number_is_not_kept() -> None:
    """An overflow somewhere must not let a token through."""
    rule = capo.Thresholds(policy_shift=1.0, objective_shift=(-1.0, 1.0))
    selection = capo.select(shifts([math.nan, 0.0, math.inf], [0.0, math.nan, math.inf]), rule)
    assert selection.weights.tolist() == [0, 0, 0]
    assert selection.rejection_rate == 1
    assert sum(v.item() for v in selection.rejection_rate_by_reason.values()) == pytest.approx(1)


def test_masked_tokens_are_neither_kept_nor_counted() -> None:
    curvature = shifts(
        [[0.0, 9.0], [0.0, 9.0]], [[0.0, 0.0], [0.0, 0.0]], [[True] * 2, [False] * 2]
    )
    rule = capo.Thresholds(objective_shift=(-1.0, 1.0))
    selection = capo.select(curvature, rule)
    assert selection.weights.tolist() == [[1, 0], [0, 0]]
    assert selection.reason.tolist() == [[KEPT, HIGH], [MASKED, MASKED]]
    assert selection.rejection_rate == 0.5
    # a mask of one's own narrows the curvature's: what was never judged cannot be kept
    narrowed = capo.select(curvature, rule, mask=torch.tensor([[True, False], [True, True]]))
    assert narrowed.weights.tolist() == [[1, 0], [0, 0]]
    assert narrowed.reason[0].tolist() == [KEPT, MASKED]
    assert narrowed.rejection_rate == 0


@pytest.mark.parametrize("denominator", ["kept", "all"])
def test_the_denominator_is_handed_on(denominator: Any) -> None:
    rule = capo.Thresholds(policy_shift=1.0, denominator=denominator)
    assert capo.select(shifts([0.0], [0.0]), rule).denominator == denominator


def test_the_denominator_defaults_to_kept() -> None:
    assert capo.select(shifts([0.0], [0.0]), capo.Thresholds()).denominator == "kept"


def test_published_thresholds() -> None:
    published = {
        name: (rule.policy_shift, tuple(rule.objective_shift))
        for name, rule in capo.PAPER_THRESHOLDS.items()
    }
    assert published == {
        "capo": (1e-4, (-1e-2, 1e-2)),
        "dr_capo": (1e-3, (-5e-4, 5e-4)),
        "reincapo": (1e-5, (-1e-1, 1e-1)),
    }


values = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
tokens = st.lists(st.tuples(values, values.map(abs), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    tokens=tokens,
    policy=st.none() | values.map(abs),
    low=st.none() | values,
    high=st.none() | values,
)
def test_a_token_is_kept_iff_it_meets_every_threshold(
    tokens: list[tuple[float, float, bool]],
    policy: float | None,
    low: float | None,
    high: float | None,
) -> None:
    if low is not None and high is not None and low > high:
        low, high = high, low
    m_h, m_f, mask = ([t[i] for t in tokens] for i in range(3))
    rule = capo.Thresholds(policy_shift=policy, objective_shift=(low, high))
    selection = capo.select(shifts(m_h, m_f, mask), rule)
    rejected = 0
    for h, f, judged, weight, reason in zip(
        m_h, m_f, mask, selection.weights.tolist(), selection.reason.tolist(), strict=True
    ):
        broken = set()
        if policy is not None and f > policy:
            broken.add(POLICY)
        if low is not None and h < low:
            broken.add(LOW)
        if high is not None and h > high:
            broken.add(HIGH)
        allowed = {MASKED} if not judged else (broken or {KEPT})
        assert reason in allowed
        assert weight == (1.0 if judged and not broken else 0.0)
        rejected += bool(judged and broken)
    rate = rejected / max(sum(mask), 1)
    assert selection.rejection_rate.item() == pytest.approx(rate)
    # each rejected token is counted under one reason
    by_reason = sum(v.item() for v in selection.rejection_rate_by_reason.values())
    assert by_reason == pytest.approx(rate)
