"""Ways to write an answer down, right and nearly right; shares no code with the grader."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?([eE][+-]?\d+)?")
FRACTION = re.compile(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}|(-?\d+)/(\d+)")


class Item(NamedTuple):
    """One problem of a file: its gold answer, the worked solution it carries, if one ends in it."""

    file: str
    number: int
    gold: str
    solution: str | None
    order_is_free: bool

    @property
    def label(self) -> str:
        return f"{self.file}[{self.number}]"


def read(directory: Path, file: str) -> list[Item]:
    rows = (directory / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")
    return [_item(file, i, json.loads(row)) for i, row in enumerate(filter(None, rows))]


def _item(file: str, number: int, row: dict[str, Any]) -> Item:
    if file.startswith("gsm8k"):
        gold, solution = row["answer"].rsplit("####", 1)[1].strip(), row["answer"]
    elif file == "minerva_math":
        gold, solution = boxed(row["solution"]), row["solution"]
    elif file == "olympiadbench":
        gold, solution = ", ".join(row["final_answer"]), None
    else:
        gold, solution = str(row["answer"]), row.get("solution")
    return Item(file, number, gold, solution, bool(row.get("is_multiple_answer")))


def boxed(text: str) -> str:
    start = text.rindex("\\boxed{") + len("\\boxed{")
    depth, end = 1, start
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start : end - 1].strip()


def bare(gold: str) -> str:
    """The answer without its dollar signs."""
    return re.sub(r"(?<!\\)\$", "", gold).strip().removesuffix(".").strip()


def components(gold: str) -> list[str]:
    """The parts between commas outside brackets."""
    parts, depth = [""], 0
    for character in bare(gold):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def right(item: Item) -> Iterator[str]:
    """Completions whose answer is the gold one."""
    gold = bare(item.gold)
    prose = f"${gold}$" if "$" in item.gold or "\\" in gold or "^" in gold else gold
    yield f"First we count, then we add 3 and 4.\nHence \\boxed{{{gold}}}."
    yield f"\\[ x = \\boxed{{{gold}}} \\]"
    yield f"We tried 12 cases of which 5 remain. The final answer is {prose}."
    for other in (*_of_number(gold), *_of_fraction(gold)):
        yield f"So we get $\\boxed{{{other}}}$."
    if item.order_is_free and len(components(gold)) > 1:
        yield f"So \\boxed{{{', '.join(reversed(components(gold)))}}}"
    if item.solution is not None:
        yield item.solution


def wrong(item: Item) -> Iterator[str]:
    """Completions whose answer is nearly the gold one."""
    gold = bare(item.gold)
    parts = components(gold)
    if item.order_is_free and len(set(parts)) > 1:
        rest = [part for part in parts if part != parts[-1]]
        yield f"So \\boxed{{{', '.join(rest)}}}"
    value = _value(gold)
    if value is not None:
        near = [value * 2] if 0 < abs(value) < Fraction(1, 100) or abs(value) > 10**6 else []
        near += [] if near and abs(value) > 10**6 else [value + 1, value - 1]
        near += [-value] if value else []
        for other in near:
            yield f"So \\boxed{{{_written(other, gold)}}}."
            yield f"We tried 12 cases. The final answer is ${_written(other, gold)}$."
    elif len(parts) == 1 and "=" not in gold and gold[:1] not in "([" and "text" not in gold:
        yield f"So \\boxed{{{gold} + 1}}."
        yield f"So \\boxed{{-({gold})}}."


def _value(gold: str) -> Fraction | None:
    if NUMBER.fullmatch(gold):
        return Fraction(Decimal(gold.replace(",", "")))
    match = FRACTION.fullmatch(gold)
    if match is None:
        return None
    sign, over, under, plain, below = match.groups()
    return Fraction(f"{sign}{over}") / int(under) if under else Fraction(int(plain), int(below))


def _written(value: Fraction, like: str) -> str:
    if value.denominator == 1 and "e" not in like:
        return str(value.numerator)
    if "frac" in like or "/" in like:
        sign = "-" if value < 0 else ""
        return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    return f"{float(value):.12g}"


def _of_number(gold: str) -> Iterator[str]:
    if not NUMBER.fullmatch(gold):
        return
    value = Fraction(Decimal(gold.replace(",", "")))
    if "e" in gold:
        mantissa, exponent = gold.split("e")
        yield f"{mantissa} \\times 10^{{{int(exponent)}}}"
        yield f"{mantissa} \\cdot 10^{{{int(exponent)}}}"
        return
    if value.denominator == 1:
        yield f"{value.numerator}"
        yield f"{value.numerator}.0"
        yield f"\\frac{{{2 * value.numerator}}}{{2}}"
        yield f"\\text{{{value.numerator}}}"
        if abs(value) > 999:
            yield f"{value.numerator:,}"
            yield f"{value.numerator:,}".replace(",", "{,}")
    else:
        yield f"\\dfrac{{{value.numerator}}}{{{value.denominator}}}"
        yield f"{value.numerator}/{value.denominator}"
        yield f"{gold}0"


def _of_fraction(gold: str) -> Iterator[str]:
    value = _value(gold)
    if value is None or NUMBER.fullmatch(gold):
        return
    sign, over = "-" if value < 0 else "", abs(value.numerator)
    yield f"{sign}\\dfrac{{{over}}}{{{value.denominator}}}"
    yield f"{sign}\\tfrac{{{3 * over}}}{{{3 * value.denominator}}}"
    yield f"{value.numerator}/{value.denominator}"
    yield f"x = {sign}\\frac{{{over}}}{{{value.denominator}}}"
    if 10**6 % value.denominator == 0:  # a terminating decimal
        yield f"{Decimal(value.numerator) / Decimal(value.denominator)}"
