"""The tokens with the highest policy shift, from the per-token records of a run."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capo import Reason
from capo.lab.records import read_step, read_vocabulary, recorded_steps
from capo.lab.report.reading import Run
from capo.lab.report.series import reason_words

OFFENDERS = 25  # rows of the table, per run
CONTEXT = 24  # tokens shown on either side
VERDICTS = {int(one): reason_words(one.label) for one in Reason}


@dataclass(frozen=True)
class Offender:
    """One token, its numbers (None where not recorded), and the completion around it.

    It is token ``position`` of completion ``completion`` of its step, both from 0.
    """

    step: int
    completion: int
    position: int
    text: str
    prompt: str
    before: str
    after: str
    probability: float | None
    advantage: float | None
    objective_shift: float | None
    policy_shift: float
    verdict: str
    kept: bool


@dataclass(frozen=True)
class TokenSummary:
    """The worst offenders of a run, worst first, and how many tokens they were chosen from."""

    offenders: tuple[Offender, ...]
    tokens: int
    steps: int
    unreadable: int


def worst_offenders(run: Run, count: int = OFFENDERS) -> TokenSummary:
    """The ``count`` tokens of highest policy shift; none of them if the run kept no records."""
    heap: list[tuple[float, int, int]] = []  # policy shift, -step, -position: earliest wins a tie
    files = recorded_steps(run.path / "tokens")
    tokens = unreadable = 0
    for number, path in files.items():
        arrays = read_step(path)
        if arrays is None:
            unreadable += 1
            continue
        shift = np.nan_to_num(arrays["policy_shift"].astype(float), nan=-1.0, posinf=np.inf)
        tokens += shift.size
        for position in _top(shift, count):
            heapq.heappush(heap, (float(shift[position]), -number, -int(position)))
            if len(heap) > count:
                heapq.heappop(heap)
    vocabulary = read_vocabulary(run.path / "tokens")
    chosen = sorted(heap, reverse=True)
    return TokenSummary(
        tuple(_describe(files, chosen, vocabulary)), tokens, len(files) - unreadable, unreadable
    )


def _top(values: Any, count: int) -> Any:
    if values.size <= count:
        return np.arange(values.size)
    return np.argpartition(-values, count)[:count]


def _describe(
    files: dict[int, Path], chosen: list[tuple[float, int, int]], vocabulary: dict[int, str]
) -> Iterator[Offender]:
    cache: dict[int, dict[str, Any]] = {}
    for shift, minus_number, minus_position in chosen:
        number, position = -minus_number, -minus_position
        if number not in cache:
            cache[number] = read_step(files[number]) or {}
        arrays = cache[number]
        sequence = int(np.searchsorted(arrays["offsets"], position, side="right")) - 1
        start, end = (int(bound) for bound in arrays["offsets"][sequence : sequence + 2])
        ids = [int(token) for token in arrays["token_ids"][start:end]]
        texts = [vocabulary.get(token, f"⟨{token}⟩") for token in ids]
        here = position - start
        cut_left, cut_right = here > CONTEXT, len(texts) > here + 1 + CONTEXT
        log_prob = _value(arrays, "log_prob", position)
        reason = _value(arrays, "reason", position)
        yield Offender(
            step=number,
            completion=sequence,
            position=here,
            text=visible(texts[here]),
            prompt="" if cut_left else _prompt(arrays, sequence, vocabulary),
            before="…" * cut_left + visible("".join(texts[max(0, here - CONTEXT) : here])),
            after=visible("".join(texts[here + 1 : here + 1 + CONTEXT])) + "…" * cut_right,
            probability=None if log_prob is None else float(np.exp(log_prob)),
            advantage=_value(arrays, "advantage", position),
            objective_shift=_value(arrays, "objective_shift", position),
            policy_shift=shift,
            verdict="not recorded" if reason is None else VERDICTS.get(int(reason), f"{reason:g}"),
            kept=reason == Reason.KEPT,
        )


def _prompt(arrays: dict[str, Any], sequence: int, vocabulary: dict[int, str]) -> str:
    """The end of the prompt that the completion answers, if prompts were recorded."""
    offsets = arrays.get("prompt_offsets", np.empty(0))
    if "prompt_ids" not in arrays or offsets.size < sequence + 2:
        return ""
    start, end = int(offsets[sequence]), int(offsets[sequence + 1])
    ids = [int(token) for token in arrays["prompt_ids"][max(start, end - CONTEXT) : end]]
    text = "".join(vocabulary.get(token, f"⟨{token}⟩") for token in ids)
    return "…" * (end - start > CONTEXT) + visible(text)


def _value(arrays: dict[str, Any], name: str, position: int) -> float | None:
    if name not in arrays or arrays[name].size <= position:
        return None
    return float(arrays[name][position])


def visible(text: str) -> str:
    """Text with its line breaks and tabs shown; a lone space would not be seen either."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return shown.replace(" ", "␣") if not shown.strip() else shown
