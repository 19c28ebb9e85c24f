"""Which goals of the study were reached, in plain sentences computed from its outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from capo.lab.study.jobs import rate
from capo.lab.study.outcome import ArmResult
from capo.lab.study.stages import RangeResult, StudyResult
from capo.lab.study.statistics import (
    Estimate,
    Value,
    completions_to_target,
    median_estimate,
    ratio_of_medians,
)

Status = Literal["reached", "not reached", "undecided", "not measured", "as measured"]

WITHIN = 0.05  # accuracy below the best that "any learning rate" allows
CONSERVATIVE = (10.0, 30.0)  # times fewer completions: goal, aim
BEST_GRPO = (1.5, 3.0)
AHEAD = 1.0


@dataclass(frozen=True)
class Goal:
    """One goal and what came of it.

    Attributes:
        name: what it is about.
        status: as far as the finished runs tell.
        sentence: goal, verdict and figures.
    """

    name: str
    status: Status
    sentence: str


def all_goals(study: StudyResult, extras: Sequence[dict[str, Any]] = ()) -> list[Goal]:
    """The goals in the order of the issue.

    Args:
        study: its results.
        extras: goals of other measurements, with name, goal, value and reached.
    """
    goals = [any_learning_rate(study.capo_range), stable_range(study.grpo_range)]
    default = study.default
    cautious = study.conservative.result if study.conservative else None
    best = study.grpo.result if study.grpo else None
    same = study.same_batch.result if study.same_batch else None
    goals += [
        ratio_goal("against conservative GRPO", cautious, default, *CONSERVATIVE),
        ratio_goal("against GRPO with the same batch at its own best", same, default, None, None),
        ratio_goal("against GRPO at its best", best, default, *BEST_GRPO),
    ]
    if study.capo is not None:
        tuned = study.capo.result
        goals.append(ratio_goal("CAPO's default against CAPO at its best", default, tuned))
        goals.append(ratio_goal("CAPO at its best against GRPO at its best", best, tuned))
    for family in study.plan.rules:
        rule = next((r for r in study.rules if r.narrowing.name == family.name), None)
        raced = rule.narrowing.result if rule else None
        climbed = rule.range if rule else None
        name = f"ahead of {family.label}"
        goals.append(ratio_goal(f"{name}, completions", raced, default, AHEAD))
        goals.append(range_goal(f"{name}, learning rates", climbed, study.capo_range))
    goals += [_extra(each) for each in extras]
    return goals


def any_learning_rate(result: RangeResult | None) -> Goal:
    """Final accuracy within 0.05 of the best at every learning rate, no seed collapsed."""
    name = "any learning rate"
    if result is None or not result.points or not all(p.outcomes for _, p in result.points):
        return _missing(name)
    medians = [(final_median(point), learning_rate) for learning_rate, point in result.points]
    (worst, where), (best, _) = min(medians), max(medians)
    fallen = sum(point.collapses for _, point in result.points)
    runs = sum(len(point.outcomes) for _, point in result.points)
    lowest, highest = result.points[0][0], result.points[-1][0]
    met = best - worst <= WITHIN + 1e-12 and fallen == 0
    status: Status = "reached" if met else "not reached"
    return Goal(
        name,
        status,
        f"{_capital(name)} (from {rate(lowest)} to {rate(highest)}): goal ≤ {WITHIN:g} below the best "
        f"and no seed collapsed: {status}; the lowest median of the final accuracy is {worst:.3f} "
        f"(at {rate(where)}), {best - worst:.3f} below the best, {best:.3f}; "
        f"{fallen} of {runs} runs collapsed.{_partial(*(p for _, p in result.points))}",
    )


def stable_range(result: RangeResult | None) -> Goal:
    """Where plain GRPO survives, for comparison."""
    name = "the stable range of plain GRPO"
    if result is None or not any(point.outcomes for _, point in result.points):
        return _missing(name)
    fallen = [
        f"{rate(learning_rate)}: {point.collapses} of {len(point.outcomes)} collapsed, "
        f"final {final_median(point):.3f}"
        for learning_rate, point in result.points
        if point.outcomes
    ]
    return Goal(
        name,
        "as measured",
        f"{_capital(name)}: {survived_text(result)} ({'; '.join(fallen)})."
        f"{_partial(*(p for _, p in result.points))}",
    )


def ratio_goal(
    name: str,
    slow: ArmResult | None,
    fast: ArmResult | None,
    goal: float | None = None,
    aim: float | None = None,
) -> Goal:
    """How many times fewer completions ``fast`` takes to the target than ``slow``."""
    if slow is None or fast is None or not slow.outcomes or not fast.outcomes:
        return _missing(name)
    ratio = ratio_of_medians(
        *([completions_to_target(o) for o in r.outcomes] for r in (slow, fast))
    )
    figure = ratio.text(".1f", " ×")
    if goal is None:
        status: Status = "as measured"
        text = f"{_capital(name)}: {figure}"
    else:
        status = _status(ratio.value, goal)
        sign = ">" if goal == AHEAD else "≥"
        text = f"{_capital(name)}: goal {sign} {goal:g} ×: {status}, {figure}"
        if aim is not None:
            text += f"; aim {aim:g} ×: {_status(ratio.value, aim)}"
    medians = f"median {_completions(fast)} against {_completions(slow)} completions"
    return Goal(name, status, f"{text} ({medians}).{_partial(slow, fast)}")


def range_goal(name: str, rule: RangeResult | None, capo: RangeResult | None) -> Goal:
    """Whether CAPO survives a wider range of learning rates than another step rule."""
    if rule is None or capo is None or not rule.points or not capo.points:
        return _missing(name)
    status: Status = "reached" if _width(capo) > _width(rule) * (1 + 1e-9) else "not reached"
    points = [point for each in (rule, capo) for _, point in each.points]
    return Goal(
        name,
        status,
        f"{_capital(name)}: goal a wider range survived: {status}, "
        f"{survived_text(capo)} against {survived_text(rule)}.{_partial(*points)}",
    )


def final_median(result: ArmResult) -> float:
    """Median over seeds of the final accuracy."""
    return median(outcome.final_accuracy for outcome in result.outcomes)


def survived_text(result: RangeResult) -> str:
    """``1e-04 to 1e-02 (100 ×)``."""
    if result.survived is None:
        made = any(point.outcomes for _, point in result.points)
        return "no learning rate survived" if made else "not measured yet"
    low, high = result.survived
    return f"{rate(low)} to {rate(high)} ({high / low:.3g} ×)"


def completions_estimate(result: ArmResult) -> Estimate:
    """Median completions to the target over the seeds, with its interval."""
    return median_estimate([completions_to_target(outcome) for outcome in result.outcomes])


def _completions(result: ArmResult) -> str:
    return completions_estimate(result).value.text()


def _width(result: RangeResult) -> float:
    return 0.0 if result.survived is None else result.survived[1] / result.survived[0]


def _status(ratio: Value, goal: float) -> Status:
    """By the ratio of the medians: the goals are stated in figures, the interval says how sure."""
    enough = ratio.low > goal if goal == AHEAD else ratio.low >= goal
    if enough:
        return "reached"
    too_little = ratio.high <= goal if goal == AHEAD else ratio.high < goal
    return "not reached" if too_little else "undecided"


def _partial(*results: ArmResult) -> str:
    made, wanted = sum(len(r.outcomes) for r in results), sum(r.wanted for r in results)
    return "" if made == wanted else f" Preliminary: {made} of {wanted} runs."


def _missing(name: str) -> Goal:
    return Goal(name, "not measured", f"{_capital(name)}: not measured yet.")


def _extra(row: dict[str, Any]) -> Goal:
    status: Status = "reached" if row["reached"] else "not reached"
    name = str(row["name"])
    return Goal(name, status, f"{_capital(name)}: goal {row['goal']}: {status}, {row['value']}.")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
