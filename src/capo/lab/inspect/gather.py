"""What the token report shows of a whole run: curves, the worst offenders, the range of the shifts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from capo import Reason
from capo.core.errors import InputError
from capo.lab.records import read_step, read_vocabulary, recorded_steps
from capo.lab.report.reading import MEASURED, Run, read_run
from capo.lab.report.series import reason_words
from capo.lab.report.tokens import visible

WORST = 40
CONTEXT = 3
CANDIDATES = 2_000  # contexts of a step that are told apart, the largest shifts first
REASONS = {int(one): reason_words(one.label) for one in Reason}


@dataclass
class Offenders:
    """Shift summed by token, and by token with what stands before it."""

    by_token: dict[str, list[float]] = field(default_factory=lambda: defaultdict(_nothing))
    by_context: dict[str, list[float]] = field(default_factory=lambda: defaultdict(_nothing))
    total: float = 0.0

    def table(self, which: str) -> list[dict[str, Any]]:
        """The worst, by their share of all policy shift."""
        held: dict[str, list[float]] = getattr(self, f"by_{which}")
        ranked = sorted(held.items(), key=lambda item: -item[1][0])[:WORST]
        return [
            {
                "key": key,
                "share": shift / self.total if self.total else 0.0,
                "count": int(count),
                "largest": largest,
                "rejected": int(rejected),
                "step": int(step),
            }
            for key, (shift, count, largest, rejected, step) in ranked
        ]


def _nothing() -> list[float]:
    return [0.0, 0.0, 0.0, 0.0, 0.0]


class Gathered:
    """A run and its recorded steps.

    Args:
        path: the run directory.

    Raises:
        InputError: it is no run, or recorded no token.
    """

    def __init__(self, path: Path) -> None:
        self.run: Run = read_run(path)
        folder = path / "tokens"
        self.files = {n: p for n, p in recorded_steps(folder).items() if read_step(p) is not None}
        if not self.files:
            raise InputError(
                "run",
                f"{path} has no recorded tokens; train with --tokens EVERY to record those of every "
                "so many steps (it changes no weight).",
            )
        self.words = read_vocabulary(folder)

    def arrays(self, number: int) -> dict[str, Any]:
        """A recorded step's arrays."""
        arrays = read_step(self.files[number])
        assert arrays is not None, "checked when the run was opened"
        return arrays

    def check_step(self, number: int) -> None:
        """Refuse a step that was not recorded.

        Raises:
            InputError: names the nearest ones that were.
        """
        if number in self.files:
            return
        near = sorted(self.files, key=lambda step: (abs(step - number), step))[:3]
        raise InputError(
            "--step",
            f"must be a recorded step, got {number}; the nearest are {', '.join(map(str, near))}.",
        )

    def word(self, token: int) -> str:
        """A token's text."""
        return self.words.get(int(token), f"⟨{int(token)}⟩")

    def survey(self) -> tuple[Offenders, dict[str, float]]:
        """Worst offenders over all recorded steps, and the range of both shifts' sizes."""
        offenders = Offenders()
        shifts, gains = [], []
        for number in self.files:
            arrays = self.arrays(number)
            shift = np.nan_to_num(arrays["policy_shift"].astype(float), posinf=0.0)
            shifts.append(_sketch(shift))
            gains.append(_sketch(np.abs(arrays.get("objective_shift", shift).astype(float))))
            offenders.total += float(shift.sum())
            self._add(offenders, number, arrays, shift)
        return offenders, {**_range("policy_shift", shifts), **_range("objective_shift", gains)}

    def _add(self, offenders: Offenders, number: int, arrays: dict[str, Any], shift: Any) -> None:
        ids = arrays["token_ids"]
        rejected = arrays.get("reason", np.zeros(ids.size)) > Reason.KEPT
        tokens, of = np.unique(ids, return_inverse=True)
        most = np.full(tokens.size, -np.inf)
        np.maximum.at(most, of, shift)
        columns = (np.bincount(of, shift), np.bincount(of), most, np.bincount(of, rejected))
        for token, *row in zip(tokens.tolist(), *(each.tolist() for each in columns), strict=True):
            _count(offenders.by_token[visible(self.word(token))], number, *row)
        largest = np.argsort(-shift)[:CANDIDATES]
        largest = largest[shift[largest] > 0]
        words = [self.word(token) for token in ids.tolist()]
        starts = arrays["offsets"]
        own = starts[np.searchsorted(starts, largest, side="right") - 1]
        columns = (largest, own, shift[largest], rejected[largest])
        for position, start, one, out in zip(*(each.tolist() for each in columns), strict=True):
            first = max(start, position - CONTEXT)
            before = "".join(words[first:position])
            cut = "…" if first > start else "^"
            key = f"{cut}{visible(before)}▸{visible(words[position])}"
            _count(offenders.by_context[key], number, one, 1, one, out)

    def curves(self) -> list[dict[str, Any]]:
        """What there is to draw over the steps: ``{key, label, log, points}``."""
        metrics, evals = self.run.metrics, self.run.evals
        found = [
            _curve("accuracy", "accuracy", evals["step"], evals["accuracy"], log=False),
            *(
                _curve(key, label, metrics["step"], metrics[name], log=log)
                for key, label, name, log in (
                    ("reward", "reward", "reward", False),
                    ("entropy", "entropy (nats)", "entropy", True),
                    ("measured", "policy shift of the step (nats)", MEASURED, True),
                    ("p99", "policy shift of its tokens, 99 %", "capo/policy_shift/p99", True),
                    ("rejected", "tokens rejected", "capo/rejection_rate", False),
                    ("scale", "trust region's scale", "capo/trust/scale", True),
                )
                if name in metrics
            ),
        ]
        return [curve for curve in found if len(curve["points"]) > 1]


def _count(
    held: list[float], step: int, shift: float, count: float, largest: float, rejected: float
) -> None:
    if largest >= held[2]:
        held[2], held[4] = largest, step
    held[0] += shift
    held[1] += count
    held[3] += rejected


def _sketch(values: Any) -> Any:
    """A few order statistics stand for a step's values."""
    values = values[np.isfinite(values) & (values > 0)]
    return np.quantile(values, (0.5, 0.9, 0.99, 1.0)) if values.size else np.zeros(4)


def _range(name: str, sketches: list[Any]) -> dict[str, float]:
    rows = np.stack(sketches)
    low, high = float(np.median(rows[:, 0])), float(rows[:, 2].max())
    high = high if high > 0 else 1.0
    return {f"{name}/low": min(max(low, high * 1e-6), high * 0.1), f"{name}/high": high}


def _curve(key: str, label: str, steps: Any, values: Any, *, log: bool) -> dict[str, Any]:
    return {"key": key, "label": label, "log": log, "points": list(_points(steps, values, log))}


def _points(steps: Any, values: Any, log: bool) -> Iterator[list[float]]:
    for step, value in zip(steps, values, strict=True):
        if np.isfinite(value) and (value > 0 or not log):
            yield [int(step), float(f"{value:.5g}")]
