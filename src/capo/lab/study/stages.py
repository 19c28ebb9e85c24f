"""The parts of the study, each a generator: it asks for runs, receives outcomes, and goes on.

So a part can decide by what came out (a search, a narrowing) while others keep the workers busy,
and the same code makes runs, resumes, reads recorded ones for the report, and is tested on
invented outcomes. An outcome that is missing arrives as None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from capo.lab.study.jobs import BATCH, GROUP, ITERATIONS, LEARNING_RATE, SCHEDULE, Arm, Job, slug
from capo.lab.study.outcome import ArmResult, Outcome
from capo.lab.study.plan import Family, Plan, Round, Variant

T = TypeVar("T")
Stage = Generator[list[Job], list[Outcome | None], T]


class Incomplete(Exception):  # noqa: N818 - nothing went wrong
    """A part cannot go on, since a run that it depends on has not been made."""


def everything(outcomes: Sequence[Outcome | None]) -> list[Outcome]:
    """The outcomes, all of them.

    Raises:
        Incomplete: one is missing.
    """
    there = [outcome for outcome in outcomes if outcome is not None]
    if len(there) < len(outcomes):
        raise Incomplete
    return there


def race(arm: Arm, label: str, seeds: Sequence[int], name: str | None = None) -> Stage[ArmResult]:
    """The runs of one arm; those that are missing are left out."""
    outcomes = yield [arm.job(seed) for seed in seeds]
    there = tuple(outcome for outcome in outcomes if outcome is not None)
    return ArmResult(name or arm.name, label, arm, there, len(seeds))


# A: any learning rate


@dataclass(frozen=True)
class RangeResult:
    """An arm over the learning rate.

    Attributes:
        name, label: of the arm.
        points: learning rate and runs, ascending.
        ended: whether the climb ended at a learning rate that did not survive; those above it
            were not tried then.
    """

    name: str
    label: str
    points: tuple[tuple[float, ArmResult], ...]
    ended: bool

    @property
    def complete(self) -> bool:
        """Whether every seed of every point is there."""
        return bool(self.points) and all(result.complete for _, result in self.points)

    @property
    def survived(self) -> tuple[float, float] | None:
        """The longest stretch of neighbouring learning rates at which no seed collapsed."""
        best: tuple[float, float] | None = None
        start: float | None = None
        for learning_rate, result in self.points:
            if result.collapses or not result.outcomes:
                start = None
                continue
            start = learning_rate if start is None else start
            if best is None or learning_rate / start > best[1] / best[0]:
                best = (start, learning_rate)
        return best


def range_of(
    plan: Plan, name: str, label: str, preset: str, settings: Mapping[str, Any], *, rule: bool
) -> Stage[RangeResult]:
    """An arm at every learning rate; a rule climbs until a seed collapses."""
    seeds = plan.range.rule_seeds if rule else plan.measure.seeds
    arms = {
        learning_rate: plan.ranged(name, preset, settings, learning_rate, rule)
        for learning_rate in plan.range.learning_rates
    }
    waves = [[each] for each in arms] if rule else [list(arms)]
    points: list[tuple[float, ArmResult]] = []
    ended = False
    for wave in waves:
        outcomes = yield [arms[each].job(seed) for each in wave for seed in seeds]
        for index, each in enumerate(wave):
            own = outcomes[index * len(seeds) : (index + 1) * len(seeds)]
            there = tuple(outcome for outcome in own if outcome is not None)
            points.append((each, ArmResult(arms[each].name, label, arms[each], there, len(seeds))))
        if rule and points[-1][1].collapses:
            ended = True
            break
    return RangeResult(name, label, tuple(points), ended)


# B: the conservative regime


@dataclass(frozen=True)
class CollapseSearch:
    """Where aggressive GRPO collapses.

    Attributes:
        points: learning rate, collapsed runs, runs made; ascending.
        lowest: the lowest learning rate of the grid at which enough seeds collapse; None where
            the search ran into its limit.
    """

    points: tuple[tuple[float, int, int], ...]
    lowest: float | None


def grid_rate(start: float, index: int) -> float:
    """Point ``index`` of the √2 grid through ``start``, rounded to four digits."""
    return float(f"{start * math.sqrt(2) ** index:.3e}")


def lowest_collapsing(plan: Plan) -> Stage[CollapseSearch]:
    """Climb (or descend) the grid from its start to the lowest point that collapses.

    At a point, as few seeds are run as leave no doubt: once enough of them have survived, the
    others cannot change the verdict.
    """
    made: dict[float, tuple[int, int]] = {}

    def collapses(index: int) -> Stage[bool]:
        learning_rate = grid_rate(plan.collapse.start, index)
        arm, seeds, needed = (
            plan.collapsing(learning_rate),
            plan.measure.seeds,
            plan.collapse.needed,
        )
        first = len(seeds) - needed + 1  # were all of these to survive, no verdict would be left
        fallen = 0
        for wave in (seeds[:first], seeds[first:]):
            outcomes = everything((yield [arm.job(seed) for seed in wave]))
            fallen += sum(outcome.collapsed for outcome in outcomes)
            done = made.get(learning_rate, (0, 0))[1] + len(wave)
            made[learning_rate] = (fallen, done)
            if fallen + len(seeds) - done < needed:
                return False
        return fallen >= needed

    index, lowest = 0, None
    if (yield from collapses(0)):
        lowest = 0
        while index > -plan.collapse.limit:
            index -= 1
            if not (yield from collapses(index)):
                break
            lowest = index
        else:
            lowest = None
    else:
        while index < plan.collapse.limit:
            index += 1
            if (yield from collapses(index)):
                lowest = index
                break
    points = tuple((each, *made[each]) for each in sorted(made))
    return CollapseSearch(
        points, None if lowest is None else grid_rate(plan.collapse.start, lowest)
    )


@dataclass(frozen=True)
class ConservativeResult:
    """The search and, if it found something, the arm that follows from it."""

    search: CollapseSearch
    result: ArmResult | None


def conservative(plan: Plan) -> Stage[ConservativeResult]:
    """Find where GRPO collapses; then run the conservative regime that the paper derives."""
    search = yield from lowest_collapsing(plan)
    if search.lowest is None:
        return ConservativeResult(search, None)
    arm = plan.conservative_arm(search.lowest)
    result = yield from race(arm, "conservative GRPO", plan.measure.seeds, "conservative")
    return ConservativeResult(search, result)


# B and C: everyone at its best


@dataclass(frozen=True)
class Narrowing:
    """How a family was narrowed down.

    Attributes:
        name, label: of the family.
        rounds: per round its arms, best first: settings, mean score, runs so far.
        winner: all overrides of the best arm.
        own: those of them that are the family's, the learning rate excepted.
        result: the winner's runs on fresh seeds.
    """

    name: str
    label: str
    rounds: tuple[tuple[tuple[dict[str, Any], float, int], ...], ...]
    winner: dict[str, Any]
    own: dict[str, Any]
    result: ArmResult


def score(outcome: Outcome, budget: int) -> float:
    """Completions to the target; a run that did not get there is ranked by how far it was from it.

    Such a run counts its whole budget, even if it ended at its collapse, and on top of that the
    share of it that the accuracy was missing.
    """
    at = outcome.to_target
    if at is not None:
        return float(at)
    return budget * (1 + max(0.0, outcome.target - outcome.recent_accuracy))


Settings = dict[str, Any]
Ranking = tuple[tuple[Settings, float, int], ...]
"""Arms of a round, best first: settings, mean score, runs so far."""


def halve(
    arms: Sequence[Settings],
    rounds: Sequence[Round],
    arm_of: Callable[[Round, Settings], Arm],
    compose: Callable[[Ranking], Settings] | None = None,
) -> Stage[tuple[Settings, tuple[Ranking, ...]]]:
    """Successive halving: rounds of fresh seeds, fewer arms in each.

    Args:
        arms: what is compared, as settings.
        rounds: of which each keeps its share of the arms.
        arm_of: what is run of settings in a round.
        compose: makes one more arm of what the first round shows; it makes up for that round's runs.

    Returns:
        the best arm, and every round.
    """
    arms = list(arms)
    runs: list[list[float]] = [[] for _ in arms]
    standing = list(range(len(arms)))
    rankings: list[Ranking] = []

    def run(each: Round, indices: Sequence[int]) -> Stage[None]:
        jobs = [arm_of(each, arms[index]).job(seed) for index in indices for seed in each.seeds]
        outcomes = everything((yield jobs))
        for position, index in enumerate(indices):
            own = outcomes[position * len(each.seeds) : (position + 1) * len(each.seeds)]
            runs[index] += [score(outcome, each.budget) for outcome in own]

    def mean(index: int) -> float:
        return sum(runs[index]) / len(runs[index])

    for number, each in enumerate(rounds):
        if len(standing) == 1:
            break
        yield from run(each, standing)
        standing.sort(key=lambda index: (mean(index), index))
        rankings.append(tuple((arms[i], mean(i), len(runs[i])) for i in standing))
        standing = standing[: each.kept(len(standing))]
        if number == 0 and compose is not None:
            composed = compose(rankings[0])
            if composed not in arms:
                arms.append(composed)
                runs.append([])
                yield from run(each, [len(arms) - 1])
            if (index := arms.index(composed)) not in standing:
                standing.append(index)
    return arms[standing[0]], tuple(rankings)


def narrow(plan: Plan, family: Family, start: Mapping[str, Any], **fixed: Any) -> Stage[Narrowing]:
    """Rounds of fresh seeds, fewer arms in each; then the winner's final on the measure's seeds.

    Args:
        plan: the study.
        family: whose axes are combined.
        start: settings that the family starts from.
        **fixed: axes that are held at one value (dots as ``__``).
    """
    arms = [{**start, **family.set, **each} for each in family.combinations(**fixed)]
    winner, rounds = yield from halve(
        arms, plan.rounds, lambda each, settings: plan.screened(family, each, settings)
    )
    keys = {*family.axes, *family.set} - {LEARNING_RATE}
    own_settings = {key: value for key, value in winner.items() if key in keys}
    name = family.name if not fixed else f"{family.name}-same-batch"
    label = family.label if not fixed else f"{family.label}, CAPO's batch"
    preset = plan.preset if family.kind == "capo" else plan.plain
    shown = {key: value for key, value in winner.items() if key not in family.set}
    arm = plan.raced(f"{family.name}-{slug(shown)}", preset, winner)
    result = yield from race(arm, label, plan.measure.seeds, name)
    return Narrowing(name, label, rounds, winner, own_settings, result)


@dataclass(frozen=True)
class RuleResult:
    """A step rule of others: at its best, and its range of learning rates."""

    narrowing: Narrowing
    range: RangeResult


def rule_of(plan: Plan, family: Family, grpo: Mapping[str, Any]) -> Stage[RuleResult]:
    """Narrow a rule down from GRPO's best settings; then climb the learning rates with it."""
    start = {key: grpo[key] for key in (BATCH, GROUP, ITERATIONS, SCHEDULE) if key in grpo}
    narrowing = yield from narrow(plan, family, start)
    climb = yield from range_of(
        plan, family.name, family.label, plan.plain, narrowing.own, rule=True
    )
    return RuleResult(narrowing, climb)


def variant_of(plan: Plan, variant: Variant) -> Stage[ArmResult]:
    """A change of CAPO's default, raced as it is."""
    arm = plan.raced(f"variant-{variant.name}", plan.preset, variant.set)
    return (yield from race(arm, variant.label, plan.measure.seeds, variant.name))


# The whole


@dataclass(frozen=True)
class StudyResult:
    """Everything that is there; parts whose runs are missing are None or left out."""

    plan: Plan
    default: ArmResult | None
    capo_range: RangeResult | None
    grpo_range: RangeResult | None
    conservative: ConservativeResult | None
    grpo: Narrowing | None
    same_batch: Narrowing | None
    capo: Narrowing | None
    rules: tuple[RuleResult, ...]
    variants: tuple[ArmResult, ...]

    @property
    def races(self) -> list[ArmResult]:
        """All arms of the final, the default first."""
        narrowed = [each for each in (self.capo, self.grpo, self.same_batch) if each is not None]
        found = [
            self.default,
            *self.variants,
            *(each.result for each in narrowed),
            *(rule.narrowing.result for rule in self.rules),
            self.conservative.result if self.conservative else None,
        ]
        return [result for result in found if result is not None and result.outcomes]

    @property
    def ranges(self) -> list[RangeResult]:
        """All arms over the learning rate, CAPO first."""
        found = [self.capo_range, self.grpo_range, *(rule.range for rule in self.rules)]
        return [each for each in found if each is not None]


Drive = Callable[[Mapping[str, Stage[Any]]], dict[str, Any]]


def run_study(plan: Plan, drive: Drive) -> StudyResult:
    """Run all parts with ``drive``, which returns the result of each, None where incomplete."""
    parts: dict[str, Stage[Any]] = {
        "default": race(
            plan.raced("capo-default", plan.preset, {}),
            "CAPO, default",
            plan.measure.seeds,
            "capo-default",
        ),
        "capo_range": range_of(plan, "capo", "CAPO, default", plan.preset, {}, rule=False),
        "grpo_range": range_of(plan, "grpo", "GRPO", plan.plain, {}, rule=False),
        "conservative": conservative(plan),
    }
    grpo, capo = plan.family("grpo"), plan.family("capo")
    if grpo is not None:
        batch = plan.default_config().training.completions_per_step
        parts["grpo"] = narrow(plan, grpo, {})
        parts["same_batch"] = narrow(plan, grpo, {}, **{BATCH.replace(".", "__"): batch})
    if capo is not None:
        parts["capo"] = narrow(plan, capo, {})
    for variant in plan.variants:
        parts[f"variant {variant.name}"] = variant_of(plan, variant)
    first = drive(parts)
    best = first.get("grpo")
    second: dict[str, Any] = {}
    if best is not None or grpo is None:
        winner = best.winner if best is not None else {}
        second = drive({family.name: rule_of(plan, family, winner) for family in plan.rules})
    named = ("default", "capo_range", "grpo_range", "conservative", "grpo", "same_batch", "capo")
    return StudyResult(
        plan=plan,
        **{name: first.get(name) for name in named},
        rules=tuple(each for each in second.values() if each is not None),
        variants=tuple(
            first[key] for key in parts if key.startswith("variant ") and first[key] is not None
        ),
    )
