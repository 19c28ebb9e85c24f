"""One page: each claim of the paper, whether it holds at this scale, by what criterion, with numbers.

A claim is judged from the recorded numbers of a figure alone (``results/FIGURE/record.json``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capo.core.errors import InputError
from capo.lab.figures.claims import CLAIMS, Claim
from capo.lab.figures.criteria import Missing, Word
from capo.lab.figures.reproduce import RECORD
from capo.lab.rundir import write_text
from capo.lab.sweep.table import markdown

PAGE, DATA = "README.md", "verdicts.json"
BEGIN, END = "<!-- verdicts: begin -->", "<!-- verdicts: end -->"


@dataclass(frozen=True)
class Verdict:
    """A claim judged.

    Attributes:
        figure, claim, criterion: of the claim.
        verdict: the word.
        numbers: in a sentence.
        complete: whether every run of the figure was there.
    """

    figure: str
    claim: str
    criterion: str
    verdict: Word
    numbers: str
    complete: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def judge_all(results: Path) -> list[Verdict]:
    """Every claim, from the records that are there.

    Raises:
        InputError: a record cannot be read.
    """
    records = {name: _record(results / name) for name in {claim.figure for claim in CLAIMS}}
    return [judged(claim, records[claim.figure]) for claim in CLAIMS]


def judged(claim: Claim, record: dict[str, Any] | None) -> Verdict:
    """One claim; without what it needs it is not measured."""
    fixed = (claim.figure, claim.claim, claim.criterion)
    if record is None:
        return Verdict(*fixed, "not measured", "no record", complete=False)
    complete = record["runs"] == record["wanted"]
    try:
        word, numbers = claim.judge(record["numbers"])
    except (Missing, KeyError):
        return Verdict(*fixed, "not measured", "runs are missing", complete=complete)
    return Verdict(*fixed, word, numbers, complete)


def _record(folder: Path) -> dict[str, Any] | None:
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError("--results", f"{str(path)!r} is not valid JSON: {error}.") from None
    return document


def write_verdicts(found: Sequence[Verdict], results: Path) -> Path:
    """Write the page and its data.

    What the page says outside of the verdicts' marks is kept.
    """
    results.mkdir(parents=True, exist_ok=True)
    write_text(results / DATA, json.dumps([each.as_dict() for each in found], indent=1) + "\n")
    rows = [
        {
            "claim": each.claim,
            "verdict": f"**{each.verdict}**" + ("" if each.complete else " (runs are missing)"),
            "numbers": each.numbers,
            "criterion": each.criterion,
            "from": f"[{each.figure}]({each.figure}/README.md)",
        }
        for each in found
    ]
    body = f"{BEGIN}\n\n{markdown(rows)}\n\n{END}"
    page = results / PAGE
    old = page.read_text(encoding="utf-8") if page.is_file() else HEAD
    if BEGIN in old and END in old:
        text = old[: old.index(BEGIN)] + body + old[old.index(END) + len(END) :]
    else:
        text = f"{old.rstrip()}\n\n{body}\n"
    write_text(page, text)
    return page


HEAD = """# Results

A verdict on each claim of the paper at this scale: a 0.87 M-parameter policy on three-term sums, 96
completions a step. Each was judged by a criterion that stands in the code
(`src/capo/lab/figures/claims.py`), from the record of its figure. `capo lab reproduce FIGURE` makes a
figure anew, `capo lab verdicts` this table.
"""
