"""One table of a grid: a row a cell, interval estimates over its seeds."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from capo.lab.study.statistics import Value, exactly, median_of
from capo.lab.sweep.intervals import Interval, interval
from capo.lab.sweep.reading import CellResult, GridResult, Run, labels

REJECTION = "capo/rejection_rate"


def row_of(result: CellResult, label: str, target: float | None) -> dict[str, Any]:
    """The figures of a cell; None where nothing can be said yet."""
    runs = result.runs
    row: dict[str, Any] = {
        "cell": result.cell.name,
        "label": label,
        "variant": result.cell.variant,
        **({"condition": result.cell.condition} if result.cell.condition else {}),
        **result.cell.at,
        **(result.cell.chosen or {}),
        "seeds": len(runs),
        "wanted": result.wanted,
    }
    trained = [run for run in runs if run.evaluations]
    if not trained or target is None:
        return row
    to_target = [completions_to_target(run, target) for run in trained]
    row |= {
        "base_accuracy": fmean(run.base_accuracy for run in trained),
        "final_accuracy": final_accuracy(trained).as_dict(),
        "best_accuracy": interval([run.best_accuracy for run in trained]).as_dict(),
        "mean_accuracy": interval([run.mean_accuracy for run in trained]).as_dict(),
        "collapsed": sum(run.collapsed for run in trained),
        "diverged": sum(run.ended == "diverged" for run in trained),
        "target": target,
        "reached": sum(value.exact for value in to_target),
        "completions_to_target": _median(to_target),
        "rejection_mean": _mean([rejections(run) for run in trained], fmean),
        "rejection_peak": _mean([rejections(run) for run in trained], max),
        "seconds": fmean(run.mark.seconds for run in trained),
    }
    return row


def final_accuracy(runs: Sequence[Run]) -> Interval:
    """Over the seeds."""
    return interval([run.final_accuracy for run in runs])


def rejections(run: Run) -> list[float]:
    """Rejection rate of every step that judged tokens."""
    return [rate for _, rate in run.series(REJECTION) if math.isfinite(rate)]


def _mean(series: list[list[float]], of: Any) -> float | None:
    found = [of(each) for each in series if each]
    return fmean(found) if found else None


def completions_to_target(run: Run, target: float) -> Value:
    """Completions to the target; more than the run had where it did not get there.

    One that diverged would not have got there with all of its planned ones either.
    """
    at = run.to_target(target)
    if at is not None:
        return exactly(at)
    return Value(
        run.planned if run.ended == "diverged" else run.evaluations[-1].completions, math.inf
    )


def _median(to_target: Sequence[Value]) -> dict[str, Any]:
    """The median, a lower bound where runs that did not get there leave it open."""
    found = median_of(to_target)
    return {"value": int(found.low), "bound": not found.exact}


def table_of(result: GridResult) -> list[dict[str, Any]]:
    """A row a cell, in the grid's order."""
    names = labels([each.cell for each in result.cells])
    return [
        row_of(each, name, result.target(each.cell.condition))
        for each, name in zip(result.cells, names, strict=True)
    ]


def shown(row: dict[str, Any], target: float | str) -> dict[str, str]:
    """A row for people."""
    return {
        "": row["label"],
        "seeds": str(row["seeds"])
        if row["seeds"] == row["wanted"]
        else f"{row['seeds']}/{row['wanted']}",
        "final accuracy": _interval(row.get("final_accuracy")),
        "mean over training": _interval(row.get("mean_accuracy")),
        "collapsed": _plain(row.get("collapsed")),
        f"completions {_to(target)}": _completions(row.get("completions_to_target")),
        "rejected": _rejected(row),
        "seconds": _plain(row.get("seconds"), ".0f"),
    }


def _to(target: float | str) -> str:
    return target if isinstance(target, str) else f"to {target:g}"


def _interval(value: dict[str, float] | None) -> str:
    return "-" if value is None else Interval(**value).text()  # type: ignore[arg-type]


def _plain(value: float | None, form: str = "d") -> str:
    return "-" if value is None else format(value, form)


def _completions(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    return f"> {value['value']:,}" if value["bound"] else f"{value['value']:,}"


def _rejected(row: dict[str, Any]) -> str:
    if row.get("rejection_mean") is None:
        return "-"
    return f"{row['rejection_mean']:.1%} (peak {row['rejection_peak']:.1%})"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table of texts."""
    if not rows:
        return "(nothing yet)"
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows]
    return "\n".join(lines)


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows, intervals as three columns."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {key if k == "value" else f"{key}_{k}": v for k, v in value.items()}
        else:
            flat[key] = value
    return flat
