"""The tokens with the highest policy shift, from the per-token records of a run."""

from __future__ import annotations

import heapq
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from capo import Reason
from capo.lab.report.reading import Run
from capo.lab.report.series import reason_words

OFFENDERS = 25  # rows of the table, per run
CONTEXT = 24  # tokens shown on either side
VERDICTS = {int(one): reason_words(one.label) for one in Reason}
NEEDED = ("offsets", "token_ids", "policy_shift")


@dataclass(frozen=True)
class Offender:
    """One token, its numbers (None where not recorded), and the completion around it."""

    step: int
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
    heap: list[tuple[float, int, int]] = []  # policy shift, -file, -position: earliest wins a tie
    files = sorted((run.path / "tokens").glob("step-*.npz"))
    tokens = unreadable = 0
    for number, path in enumerate(files):
        arrays = _load(path)
        if arrays is None:
            unreadable += 1
            continue
        shift = np.nan_to_num(arrays["policy_shift"].astype(float), nan=-1.0, posinf=np.inf)
        tokens += shift.size
        for position in _top(shift, count):
            heapq.heappush(heap, (float(shift[position]), -number, -int(position)))
            if len(heap) > count:
                heapq.heappop(heap)
    vocabulary = _vocabulary(run.path / "tokens" / "vocab.json")
    chosen = sorted(heap, reverse=True)
    return TokenSummary(
        tuple(_describe(files, chosen, vocabulary)), tokens, len(files) - unreadable, unreadable
    )


def _top(values: Any, count: int) -> Any:
    if values.size <= count:
        return np.arange(values.size)
    return np.argpartition(-values, count)[:count]


def _load(path: Path) -> dict[str, Any] | None:
    """The arrays of one step; None for a file that a killed writer left unfinished."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    size = arrays["token_ids"].size if set(NEEDED) <= set(arrays) else -1
    return arrays if size == arrays.get("policy_shift", np.empty(0)).size else None


def _vocabulary(path: Path) -> dict[int, str]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pairs = enumerate(entries) if isinstance(entries, list) else entries.items()
    return {int(key): str(text) for key, text in pairs}


def _describe(
    files: list[Path], chosen: list[tuple[float, int, int]], vocabulary: dict[int, str]
) -> Iterator[Offender]:
    cache: dict[int, dict[str, Any]] = {}
    for shift, minus_number, minus_position in chosen:
        number, position = -minus_number, -minus_position
        if number not in cache:
            cache[number] = _load(files[number]) or {}
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
            step=_step_of(files[number]),
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


def _step_of(path: Path) -> int:
    match = re.search(r"(\d+)$", path.stem)
    return int(match.group(1)) if match else 0


def visible(text: str) -> str:
    """Text with its line breaks and tabs shown; a lone space would not be seen either."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
    return shown.replace(" ", "␣") if not shown.strip() else shown
