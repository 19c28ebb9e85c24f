"""Each diagnosis where it is due, once, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

from capo.core.diagnoses import Diagnoses, DiagnosisLimits

HEALTHY = {
    "rejection_rate": 0.05,
    "rejection_rate/policy_shift": 0.05,
    "rejection_rate/objective_low": 0.0,
    "rejection_rate/objective_high": 0.0,
    "policy_shift/p50": 3e-7,
    "policy_shift/p99": 4e-3,
    "measured_policy_shift": 1e-3,
    "head_policy_shift": 5e-4,
    "reward": 0.5,
    "overhead": 0.1,
}


def run(
    rows: list[dict[str, float]], *, warned: bool = False, **options: Any
) -> list[tuple[str, int, str]]:
    diagnoses = Diagnoses(**options)
    for step, row in enumerate(rows, start=1):
        diagnoses.observe(step, {**HEALTHY, **row}, warned=warned)
    return [(one.kind, one.step, one.sentence) for one in diagnoses.found]


def test_nothing_is_wrong_with_a_healthy_run() -> None:
    assert run([{}] * 50) == []
    assert run([{}] * 50, warned=True) == []  # it rejects tokens


def test_nearly_all_tokens_rejected() -> None:
    tight = {"rejection_rate": 0.97, "rejection_rate/objective_low": 0.9}
    ((kind, step, sentence),) = run([{}] * 3 + [tight] * 20)
    assert kind == "thresholds too tight"
    assert step == 8  # the mean over five
    for part in ("step 8", "97%", "objective shifts below their lower bound", "3e-07 nats"):
        assert part in sentence
    assert run([tight] * 4) == []  # not before a window is full
    assert run([{}, {}, tight, {}, {}] * 5) == []  # one step is none


def fall(**row: float) -> list[dict[str, float]]:
    none = {"rejection_rate": 0.0, "rejection_rate/policy_shift": 0.0, **row}
    return [none] * 9 + [{**none, "reward": 0.1}] * 9


def test_none_rejected_and_the_head_does_not_see_it() -> None:
    ((kind, _, sentence),) = run(fall(head_policy_shift=1e-6))
    assert kind == "head too shallow"
    for part in ("no token would be rejected", "foresees 1e-06", "0.001 nats"):
        assert part in sentence
    ((kind, _, sentence),) = run(fall(head_policy_shift=float("nan")))
    assert kind == "head too shallow"
    assert "does not move" in sentence


def test_none_rejected_though_the_head_sees_it() -> None:
    ((kind, _, sentence),) = run(fall(head_policy_shift=8e-4, rejection_rate=0.004))
    assert kind == "thresholds too loose"
    for part in ("only 0.4% of the tokens", "too loose", "0.004 nats"):
        assert part in sentence


def test_a_warning_counts_as_a_collapse() -> None:
    none = {"rejection_rate": 0.0, "head_policy_shift": 1e-6}
    assert run([none] * 9) == []
    assert [kind for kind, *_ in run([none] * 9, warned=True)] == ["head too shallow"]


def test_a_collapse_that_rejects_tokens_says_nothing_of_thresholds() -> None:
    assert run(fall(rejection_rate=0.2)) == []


def test_rewards_of_a_few_batches_are_no_fall() -> None:
    none = {"rejection_rate": 0.0, "head_policy_shift": 1e-6}
    noisy = [{**none, "reward": reward} for reward in (0.9, 0.1, 0.6, 0.2) * 6]
    assert run(noisy) == []
    again = {**none, "reward": math.nan}  # passes over the same completions
    assert run([none, again, again, again] * 12) == []
    falls = [none, again] * 9 + [{**none, "reward": 0.1}, again] * 9
    assert [kind for kind, *_ in run(falls)] == ["head too shallow"]


def test_overhead() -> None:
    ((kind, step, sentence),) = run([{"overhead": 9.0}] * 2 + [{"overhead": 0.6}] * 20)
    assert (kind, step) == ("overhead", 7)  # the first two compile kernels
    for part in ("60%", "every=3", "sequences=8"):
        assert part in sentence
    assert "depth" not in sentence
    assert "depth=0" in run([{"overhead": 0.6}] * 9, deep=True)[0][2]
    assert run([{"overhead": 9.0}] * 2 + [{"overhead": 0.2}] * 20) == []
    assert run([{"overhead": 0.6}] * 20, every=4) == []  # a quarter of it on average


def test_limits_can_be_set() -> None:
    limits = DiagnosisLimits(nearly_all=0.04)
    assert [kind for kind, *_ in run([{}] * 9, limits=limits)] == ["thresholds too tight"]
