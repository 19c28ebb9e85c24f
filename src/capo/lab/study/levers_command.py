"""``capo bench levers``: all levers of CAPO and of GRPO together, and the report of it.

It can be stopped at any time: finished runs are kept, and the same command continues.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from capo.lab.options import at_least_one
from capo.lab.provenance import collect_provenance, cores
from capo.lab.rundir import write_text
from capo.lab.study.command import INTERRUPTED, Said
from capo.lab.study.goals import BEST_GRPO, Goal, ratio_goal
from capo.lab.study.levers import Levers, LeversResult, levers_of, load_levers, on
from capo.lab.study.outcome import Outcome, Store
from capo.lab.study.pool import Driver, workers
from capo.lab.study.tables import (
    cell,
    narrowing_data,
    narrowings,
    origins,
    provenances,
    races_table,
    seconds_of,
    section,
    words,
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(arguments)
    at_least_one(options, "jobs")
    plan = load_levers(options.plan)
    store = Store(options.runs / "levers")
    console = Console(stderr=True)
    if not options.report_only:
        try:
            make_runs(plan, store, options.jobs, console, options.quiet)
        except KeyboardInterrupt:
            console.print("capo: interrupted; continue with the same command", highlight=False)
            sys.exit(INTERRUPTED)
    driver = Driver(store, None)
    results = driver({each.name: levers_of(plan, each) for each in plan.families})
    made = [each for each in results.values() if each is not None]
    for goal in write_report(plan, made, driver.known, options.output):
        print(f"- {goal.sentence}")
    print(f"report: {options.output / 'README.md'}")


def make_runs(plan: Levers, store: Store, jobs: int, console: Console, quiet: bool) -> None:
    """Make the runs that are missing."""
    said = Said(console, expected_runs(plan), quiet)
    with workers(jobs, collect_provenance()) as runner:
        driver = Driver(store, runner, heard=said)
        driver({family.name: levers_of(plan, family) for family in plan.families})


def expected_runs(plan: Levers) -> int:
    """Runs of the whole, the composed arms and the finals included."""
    standing, runs = plan.draw, 0
    for index, each in enumerate(plan.rounds):
        runs += standing * len(each.seeds)
        standing = each.kept(standing)
        if index == 0:
            runs += len(each.seeds)
            standing += 1
    return len(plan.families) * (runs + 2 * len(plan.all_seeds))


def write_report(
    plan: Levers, results: Sequence[LeversResult], outcomes: Sequence[Outcome], output: Path
) -> list[Goal]:
    """Write ``README.md`` and ``summary.json``; return the goals."""
    output.mkdir(parents=True, exist_ok=True)
    goals = all_goals(plan, results)
    raced = [race for each in results for race in (each.start, each.narrowing.result)]
    few = [on(each, plan.measure.seeds) for each in raced]
    target = plan.measure.target
    parts = [
        _head(plan, outcomes),
        "\n".join(["## Goals", "", *(f"- {goal.sentence}" for goal in goals), ""]),
        races_table(f"Seeds {_range(plan.measure.seeds)}, those of the study", few, target),
        races_table(f"The same and seeds {_range(plan.more_seeds)}", raced, target),
        *(_effects(each) for each in results),
        narrowings([each.narrowing for each in results]),
    ]
    write_text(output / "README.md", "\n".join(parts))
    summary = {
        "plan": plan.model_dump(mode="json"),
        "provenance": provenances(outcomes),
        "goals": [vars(goal) for goal in goals],
        "races": [
            {
                "label": each.label,
                "preset": each.arm.preset,
                "overrides": list(each.arm.overrides),
                "per_seed": {o.seed: o.to_target for o in each.outcomes},
            }
            for each in raced
        ],
        "effects": {each.family.name: [vars(e) for e in each.effects] for each in results},
        "narrowings": [narrowing_data(each.narrowing) for each in results],
    }
    write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    return goals


def all_goals(plan: Levers, results: Sequence[LeversResult]) -> list[Goal]:
    """CAPO against GRPO, each at its start and with all levers, on few and on many seeds."""
    arms: dict[tuple[str, str], Any] = {}
    for each in results:
        arms[each.family.kind, "start"] = each.start
        arms[each.family.kind, "levers"] = each.narrowing.result
    compared: list[tuple[str, tuple[str, str], tuple[str, str], tuple[float, ...]]] = [
        ("all levers together against GRPO at its best", ("grpo", "start"), ("capo", "levers"), BEST_GRPO),
        ("all levers together against GRPO with the same levers", ("grpo", "levers"), ("capo", "levers"), ()),
        ("CAPO's default against GRPO at its best", ("grpo", "start"), ("capo", "start"), ()),
        ("all levers together against CAPO's default", ("capo", "start"), ("capo", "levers"), ()),
        ("the same levers of GRPO against GRPO at its best", ("grpo", "start"), ("grpo", "levers"), ()),
    ]  # fmt: skip
    goals = []
    for seeds in (plan.measure.seeds, plan.all_seeds):
        for name, slow, fast, limits in compared:
            first, second = (
                None if (arm := arms.get(key)) is None else on(arm, seeds) for key in (slow, fast)
            )
            goals.append(ratio_goal(f"{len(seeds)} seeds, {name}", first, second, *limits))
    return goals


def _head(plan: Levers, outcomes: Sequence[Outcome]) -> str:
    measure = plan.measure
    return "\n".join(
        [
            "# All levers together, on the embedded policy",
            "",
            "Command: `capo bench levers`; this report alone from the recorded runs: "
            "`capo bench levers --report-only`.",
            "",
            f"{len(outcomes)} runs, {seconds_of(outcomes) / 60:.0f} core minutes.",
            *origins(outcomes),
            "",
            f"{plan.draw} combinations of each family's axes are drawn (its start among them) and halved "
            f"in {len(plan.rounds)} rounds of fresh seeds. After the first, one more joins: of every axis "
            "the level whose arms did best on average. CAPO and GRPO get the same axes but for those "
            "that only one of them has, the same number of draws, and the same rounds. The winner "
            "and the start are then judged on seeds that chose nothing, until "
            f"{plan.budget:,} completions; a run that is not there by then is censored. "
            f"*Completions to {measure.target:g}*, intervals and collapse are as in "
            "[the study](../trust_region/README.md).",
            "",
        ]
    )


def _effects(result: LeversResult) -> str:
    rows = [
        [words({each.axis: each.level}), f"{each.score:,.0f} ± {each.stderr:.0f}", str(each.arms)]
        for each in result.effects
    ]
    text = section(
        f"{result.family.label}: every level in company", ["level", "mean score", "arms"], rows
    )
    return text + (
        "\nMean over the drawn arms with this level, in the first round, with its standard error; low "
        "is good.\n"
    )


def _range(seeds: Sequence[int]) -> str:
    whole = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{seeds[0]} to {seeds[-1]}" if whole else ", ".join(map(cell, seeds))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capo bench levers",
        description="All levers together: draw, halve, judge; write the report.",
    )
    add = parser.add_argument
    add("--plan", type=Path, help="a TOML file [default: the plan that ships with the package]")
    add("--jobs", type=int, default=cores(), help="processes, one thread each [%(default)s]")
    add("--runs", type=Path, default=Path("runs"), help="where the runs are kept [%(default)s]")
    add("--output", type=Path, default=Path("results/levers"), help="the report's folder")
    add("--report-only", action="store_true", help="only write the report of the recorded runs")
    add("--quiet", "-q", action="store_true", help="say nothing while at work")
    return parser


if __name__ == "__main__":
    main()
