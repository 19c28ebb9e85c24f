"""How early collapses are warned of, and how often stable runs are.

    capo bench warning --freeze --output results/warning    # choose the constants, on other runs
    capo bench warning --output results/warning             # judge them

Every run trains under `capo.CurvatureMonitor` and is evaluated as it goes. *Halved*: the first evaluation
below half of the best one so far. *Lead*: optimizer steps from the first warning to that. *False alarm*: a
warning in a run that never halves. Runs that are recorded in the output already are not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.options import at_least_one
from capo.lab.provenance import collect_provenance
from capo.lab.rundir import write_text
from capo.lab.warning.plan import RunPlan, freezing_runs, judged_runs
from capo.lab.warning.watched import Watched, watch_run

FREEZING, JUDGED = "freezing.json", "judged.json"


def main(arguments: list[str] | None = None) -> None:
    """Make the runs, write the record, and the report."""
    parser = argparse.ArgumentParser(
        prog="capo bench warning", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--freeze", action="store_true", help="choose the constants instead")
    parser.add_argument("--seeds", type=int, default=5, help="of every group of judged runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--report-only", action="store_true", help="make no run")
    parser.add_argument("--output", type=Path, default=Path("results/warning"), help="directory")
    options = parser.parse_args(arguments)
    at_least_one(options, "seeds", "jobs")
    plans = freezing_runs() if options.freeze else judged_runs(options.seeds)
    path = options.output / (FREEZING if options.freeze else JUDGED)
    if options.report_only and not read(path)["runs"]:
        raise InputError("--output", f"{str(path)!r} records no run; leave --report-only out.")
    options.output.mkdir(parents=True, exist_ok=True)
    runs = make_runs(plans, path, 0 if options.report_only else options.jobs)
    from capo.lab.warning import report

    document = read(path)
    document["command"] = "capo bench warning" + (
        " --freeze" if options.freeze else f" --seeds {options.seeds}"
    )
    if options.freeze:
        document |= report.freezing(runs)
    else:
        document |= report.judged(runs)
        report.save_figure(runs, options.output)
    write(path, document)
    report.write_readme(options.output)
    print("\n".join(report.lines(document)))


def make_runs(plans: Sequence[RunPlan], path: Path, jobs: int) -> list[Watched]:
    """The planned runs that ``path`` records, after making (in ``jobs`` processes) those that it does not."""
    document = read(path)
    done = {_name(row["group"], row["seed"], row["settings"]): row for row in document["runs"]}
    missing = [p for p in plans if _name(p.group, p.seed, p.settings) not in done] if jobs else []
    if missing:
        document["provenance"] = [*document.get("provenance", []), collect_provenance()]
    for made in _made(missing, jobs):
        row = made.to_dict()
        done[_name(made.group, made.seed, made.settings)] = row
        document["runs"] = list(done.values())
        write(path, document)
    names = [_name(p.group, p.seed, p.settings) for p in plans]
    return [Watched.from_dict(done[name]) for name in names if name in done]


def _made(plans: Sequence[RunPlan], jobs: int) -> Iterator[Watched]:
    if not plans:
        return
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(plans))) as pool:
        yield from pool.imap_unordered(watch_run, plans)


def _name(group: str, seed: int, settings: dict[str, Any]) -> str:
    return json.dumps([group, seed, settings], sort_keys=True)


def read(path: Path) -> dict[str, Any]:
    """A record; one without runs where there is none."""
    if not path.is_file():
        return {"runs": []}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a record: a run a line, so that a change of one is a change of a line."""
    rows = [json.dumps(row) for row in document["runs"]]
    rest = {key: value for key, value in document.items() if key != "runs"}
    head = json.dumps(rest, indent=1)[1:-1].rstrip()
    text = "{" + (f"{head}," if head else "") + '\n "runs": [\n  ' + ",\n  ".join(rows)
    write_text(path, text + "\n ]\n}\n")
