"""``capo bench trust-region``: make the runs that are missing, then the report of all of them.

It can be stopped at any time: finished runs are kept, and the same command continues.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from capo.lab.options import at_least_one
from capo.lab.provenance import collect_provenance, cores
from capo.lab.study.estimate import estimate
from capo.lab.study.jobs import Job
from capo.lab.study.outcome import Outcome, Store
from capo.lab.study.plan import Plan, load_plan
from capo.lab.study.pool import Driver, workers
from capo.lab.study.stages import StudyResult, run_study

INTERRUPTED = 130


@dataclass
class Said:
    """One line on standard error for every run that is made."""

    console: Console
    expected: int
    quiet: bool
    made: int = 0

    def __call__(self, job: Job, outcome: Outcome) -> None:
        """Say how the run went."""
        self.made += 1
        if self.quiet:
            return
        at = outcome.to_target
        words = {
            "target": f"{outcome.target:g} after {at} completions",
            "collapse": f"collapsed within {outcome.completions} completions",
            "diverged": f"diverged within {outcome.completions} completions",
        }.get(outcome.ended, f"accuracy {outcome.final_accuracy:.3f} at {outcome.completions}")
        self.console.print(
            f"[{self.made} of about {self.expected}] {job.path}: {words}, {outcome.seconds:.0f} s",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = _parser().parse_args(arguments)
    at_least_one(options, "jobs")
    plan = load_plan(options.plan, options.preset)
    for preset in (plan.preset, plan.plain):
        Job(plan.raced("check", preset, {}), 0).config()  # a preset that cannot be read, at once
    store = Store(options.runs / "trust_region")
    console = Console(stderr=True)
    if options.dry_run:
        print(forecast(plan, store, options.only, options.jobs))
        return
    if not options.report_only:
        try:
            make_runs(plan, store, options.only, options.jobs, console, options.quiet)
        except KeyboardInterrupt:
            console.print("capo: interrupted; continue with the same command", highlight=False)
            sys.exit(INTERRUPTED)
    goals = report(plan, store, options.output)
    for sentence in goals:
        print(f"- {sentence}")
    print(f"report: {options.output / 'README.md'}")


def make_runs(
    plan: Plan, store: Store, only: str, jobs: int, console: Console, quiet: bool
) -> StudyResult:
    """Make the runs that are missing and match ``only``."""
    expected = sum(estimate(plan, store, only).runs.values())
    origin: dict[str, Any] = collect_provenance()
    with workers(jobs, origin) as runner:
        return run_study(plan, Driver(store, runner, only, heard=Said(console, expected, quiet)))


def report(plan: Plan, store: Store, output: Path) -> list[str]:
    """Write the report of the recorded runs that this plan asks for; return the goals' sentences."""
    from capo.lab.study.report import write_report

    driver = Driver(store, None)
    study = run_study(plan, driver)
    return [goal.sentence for goal in write_report(study, driver.known, output)]


def forecast(plan: Plan, store: Store, only: str, jobs: int) -> str:
    """The plan as a table: runs still to be made and their time, by stage."""
    guesser = estimate(plan, store, only)
    lines = [f"{'stage':<24}{'runs':>8}{'core minutes':>16}"]
    lines += [
        f"{stage:<24}{guesser.runs[stage]:>8}{seconds / 60:>16.1f}"
        for stage, seconds in guesser.seconds.items()
    ]
    runs, minutes = sum(guesser.runs.values()), sum(guesser.seconds.values()) / 60
    lines.append(f"{'all':<24}{runs:>8}{minutes:>16.1f}")
    lines.append(
        f"about {minutes / jobs:.0f} minutes with --jobs {jobs} on idle cores; which runs are made "
        "depends on what comes out, and this is a guess"
    )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="capo bench trust-region",
        description="Compare the trust region with GRPO and other step rules; write the report.",
    )
    add = parser.add_argument
    add("--preset", help="CAPO's default [default: the plan's]")
    add("--plan", type=Path, help="a TOML file [default: the plan that ships with the package]")
    add("--only", default="*", metavar="GLOB", help="make only runs of these STAGE/ARM")
    add("--jobs", type=int, default=cores(), help="processes, one thread each [%(default)s]")
    add("--runs", type=Path, default=Path("runs"), help="where the runs are kept [%(default)s]")
    add(
        "--output",
        type=Path,
        default=Path("results/trust_region"),
        help="the report's folder [%(default)s]",
    )
    add("--dry-run", action="store_true", help="print what would be run, and about how long")
    add("--report-only", action="store_true", help="only write the report of the recorded runs")
    add("--quiet", "-q", action="store_true", help="say nothing while at work")
    return parser


if __name__ == "__main__":
    main()
