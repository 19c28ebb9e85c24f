"""What each optimizer step did to the policy, token by token, and the alarms that follow from it.

``ledger.jsonl`` names the tokens that every measured step moved most (its numbers are in
``metrics.jsonl``), ``alarms.jsonl`` holds the alarms of `CollapseWatch` with those of the step that
they blame. Both are logs like the others: a run that is continued cuts them back and goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from capo.lab.collapse import Alarm, CollapseWatch
from capo.lab.config import Config
from capo.lab.rundir import RunDirectory

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from capo.integrations.trl import ShiftRecord

MOVED = 5  # tokens named, of every step
MONITOR = "monitor"  # the kind of what a monitor has found
CONTEXT = 24  # tokens shown on either side

Row = dict[str, Any]
Decode = Callable[[list[int]], str]


def moved_tokens(record: ShiftRecord, decode: Decode, count: int = MOVED) -> list[Row]:
    """The tokens at which a step moved the policy most, most first.

    Args:
        record: of the step.
        decode: token ids -> text.
        count: tokens at most.

    Returns:
        for each the text of the token, of the prompt's end and of what stands before and after it;
        ``divergence`` (KL of the step there, nats) and its ``share`` of the whole record's;
        ``advantage``, and ``log_ratio``, the change of the token's own log-probability. A token that
        did not move is not named.
    """
    import torch

    counted = record.mask.bool() & torch.isfinite(record.divergence)
    divergence = torch.where(counted, record.divergence, 0.0).clamp(min=0).double()
    total = float(divergence.sum())
    if not total > 0:
        return []
    values, places = divergence.flatten().topk(min(count, divergence.numel()))
    width = divergence.size(1)
    rows = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value > 0:
            sequence, position = divmod(place, width)
            rows.append(
                {
                    **_context(record, sequence, position, decode),
                    "divergence": value,
                    "share": value / total,
                    "advantage": float(record.advantage[sequence, position]),
                    "log_ratio": float(record.log_ratio[sequence, position]),
                }
            )
    return rows


def _context(record: ShiftRecord, sequence: int, position: int, decode: Decode) -> Row:
    mask = record.mask[sequence].bool()
    here = int(mask[:position].sum())
    ids = _ids(record.token_ids[sequence], mask)
    prompt = _ids(record.prompt_ids[sequence], record.prompt_mask[sequence].bool())
    start, end = max(0, here - CONTEXT), here + 1 + CONTEXT
    return {
        "token": decode(ids[here : here + 1]),
        # The prompt is shown where the completion is, from its first token.
        "prompt": "" if start else "…" * (len(prompt) > CONTEXT) + decode(prompt[-CONTEXT:]),
        "before": "…" * (start > 0) + decode(ids[start:here]),
        "after": decode(ids[here + 1 : end]) + "…" * (end < len(ids)),
    }


def _ids(ids: Int[Tensor, " T"], mask: Tensor) -> list[int]:
    return [int(one) for one in ids[mask]]


class Ledger:
    """Writes ``ledger.jsonl``; hand it to the trainer as a shift callback.

    Args:
        directory: of the run; what it holds already is continued.
        decode: token ids -> text.
    """

    def __init__(self, directory: RunDirectory, decode: Decode) -> None:
        self.directory = directory
        self.decode = decode
        self._moved = {row["step"]: row["moved"] for row in directory.rows("ledger.jsonl")}

    def __call__(self, record: ShiftRecord) -> None:
        """Name the tokens of a step."""
        moved = self._moved[record.step] = moved_tokens(record, self.decode)
        self.directory.append("ledger.jsonl", {"step": record.step, "moved": moved})

    def moved(self, step: int) -> list[Row]:
        """The tokens that ``step`` moved most; none where it was not measured."""
        found: list[Row] = self._moved.get(step, [])
        return found


class Alarms:
    """Feeds a run's rows to a `CollapseWatch` and writes ``alarms.jsonl``.

    Args:
        config: of the run.
        directory: of the run; the rows it holds already restore the watch.
        ledger: knows the tokens; None where no step is measured.
        say: hears of every alarm.
    """

    def __init__(
        self,
        config: Config,
        directory: RunDirectory,
        ledger: Ledger | None,
        say: Callable[[str], None],
    ) -> None:
        self.directory = directory
        self.ledger = ledger
        self.say = say
        training = config.training
        self._watch = CollapseWatch(
            training.completions_per_step, training.num_generations, config.eval.problems
        )
        self._evaluation: Row | None = None
        self._length: float | None = None  # of the completions in use, tokens
        evaluations = {row["step"]: row for row in directory.rows("evals.jsonl")}
        if 0 in evaluations:
            self._raised_by(None, evaluations[0])
        for row in directory.rows("metrics.jsonl"):
            self._raised_by(row, evaluations.get(row["step"]))

    def evaluated(self, row: Row) -> None:
        """An evaluation; that of step 0 stands alone, any other comes before its step's row."""
        if row["step"] == 0:
            self._raised_by(None, row)
        else:
            self._evaluation = row

    def stepped(self, row: Row) -> None:
        """The row of an optimizer step."""
        evaluation, self._evaluation = self._evaluation, None
        for alarm in self._raised_by(row, evaluation):
            moved = self.ledger.moved(alarm.began) if self.ledger is not None else []
            position = {key: row[key] for key in ("step", "completions", "seconds")}
            self.directory.append("alarms.jsonl", {**position, **asdict(alarm), "moved": moved})
            self.say(f"alarm: {alarm.sentence}{_named(moved, alarm.began)}")

    def told(self, row: Row, began: int, sentence: str) -> None:
        """What a monitor has found by the step of ``row``."""
        position = {key: row[key] for key in ("step", "completions", "seconds")}
        alarm = {"kind": MONITOR, "began": began, "sentence": sentence, "moved": []}
        self.directory.append("alarms.jsonl", {**position, **alarm})
        self.say(sentence)

    def _raised_by(self, row: Row | None, evaluation: Row | None) -> list[Alarm]:
        watch, raised = self._watch, []
        if row is not None:
            # Where completions are used again, only their first step logs their length, and what a
            # step did is seen in the next one.
            step, late = row["step"], _number(row, "capo/trust/last_measured_policy_shift")
            self._length = length = _number(row, "completions/mean_length") or self._length
            if not watch.measured(step - 1):
                raised += watch.step(step - 1, late, length)
            raised += watch.step(step, _number(row, "capo/trust/measured_policy_shift"), length)
            raised += watch.batch(step, _number(row, "reward"))
        if evaluation is not None:
            raised += watch.evaluation(evaluation["step"], _number(evaluation, "accuracy"))
        return raised


def _number(row: Row, key: str) -> float | None:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _named(moved: Iterable[Row], step: int) -> str:
    words = [f"{row['token']!r} ({row['share']:.0%})" for row in moved]
    return f"; step {step} moved most: {', '.join(words)}" if words else ""
