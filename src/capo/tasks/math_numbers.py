"""Plain numbers as people write them, exactly: decimals, fractions, powers of ten, in text or LaTeX.

math-verify rounds to six decimals, so that 1e-8 would equal 2e-8, and does not read ``4.5e33``.
Numbers are therefore compared here, as fractions.
"""

from __future__ import annotations

import re
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)  # relative; absolute at most where one of the two is an integer
_LARGEST_EXPONENT = 400
_LONGEST = 300  # characters

_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|bf|boldsymbol|operatorname|mbox)"
    r"\s*\{([^{}]*)\}"
)
_GAP = r"(?:\\[,;:! $]|\\left|\\right|\\displaystyle|\\q?quad|[\s$~])"
_GAPS = re.compile(rf"(?<=[0-9])({_GAP}+)(?=[0-9])|{_GAP}")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]*)?")
_THOUSANDS = re.compile(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9]|,[0-9])")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_POWER = re.compile(r"(?:(.+?)(?:\\times|\\cdot|\*|×|·))?10\^(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))")
_SCIENTIFIC = re.compile(r"(.+?)[eE]([+-]?[0-9]+)")
_FRACTION = re.compile(
    r"([+-]?)\\[dt]?frac(?:\{([^{}]+)\}\{([^{}]+)\}|([0-9])\{([0-9]+)\}|([0-9]) ?([0-9]))"
)
_MIXED = re.compile(r"([+-]?)([0-9]+)(?: ([0-9]+/[0-9]+)|(\\[dt]?frac.+))")  # 2 1/2
_OPEN = r"\\(?:text|mathrm|textrm|mbox)\s*\{"
_UNIT = re.compile(
    rf"(?<![_^])(?:(?:{_GAP}|/|\\cdot)*{_OPEN}(?:[^{{}}0-9,;=]|(?<=[A-Za-z)])\^?-?[1-9])*\}}"
    rf"(?:\s*\^\s*(?:\{{\s*[+-]?[0-9]+\s*\}}|[0-9]))?)+{_GAP}*\.?\Z"
)
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_ANOTHER_NUMBER = {
    *_SCALES,
    "dozen",
    "or",
    "and",
    "plus",
    "minus",
    "point",
    "tenths",
    "hundredths",
    "thousandths",
}
_NO_UNIT = _ANOTHER_NUMBER | {"e", "i"}
_UPRIGHT = re.compile(rf"{_OPEN}\s*([ei])\s*\}}")
_SCALED = re.compile(rf"(?<=[0-9])\s+((?i:{'|'.join(_SCALES)})\b[A-Za-z ]*)\.?\Z")
_SEPARATOR = re.compile(
    rf"(?:,\s*)?{_OPEN}[\s,~]*(?:or|and)[\s~]*\}}|(?<=[0-9}}$]),?\s+(?:or|and)\s+(?=[-+\\$0-9])"
)
_DROPPED = re.compile(
    rf"{_OPEN}(?!\s*(?:for|if|when|where|mod)\b)"
    rf"[^{{}}]*(?:\b(?i:{'|'.join(sorted(_ANOTHER_NUMBER))})\b|\}}{_GAP}*[0-9])"
)


def plain_number(text: str) -> Fraction | None:
    """The number that ``text`` is, with or without a unit in ``\\text{…}``; None if it is none."""
    if len(text) > _LONGEST:
        return None
    number = _number(_bare(text))
    if number is not None:
        return number
    rest, words = _without_unit(_SCALED.sub(r"\\text{\1}", text))
    number = _number(_bare(rest))
    while number is not None and words and words[0] in _SCALES:
        number *= 10 ** _SCALES[words.pop(0)]
    return None if _NO_UNIT.intersection(words) else number


def for_algebra(text: str) -> str | None:
    """``text`` such that math-verify reads all of it; None where it would leave a number out.

    It takes ``5\\text{ million}`` for 5, ``3\\text{ feet }4`` for 3, and ``1 2`` for a sum.
    """
    parts = ungrouped(_SEPARATOR.sub(", ", _UPRIGHT.sub(r"\1", text))).split(",")
    if len(parts) > 1:
        for index, (rest, words) in enumerate(map(_without_unit, parts)):
            if re.search("[0-9]", rest) and not _NO_UNIT.intersection(words):
                parts[index] = rest
    text = ",".join(parts)
    digit, value = re.search("[0-9]", text), compact(unwrapped(text)).rpartition("=")[2]
    if digit and _DROPPED.search(text, digit.start()):
        return None
    return None if re.fullmatch("[-+0-9.,/() ]*", value) and re.search("[0-9] ", value) else text


def ungrouped(text: str) -> str:
    """``text`` without the commas of 1,000, other than in brackets: (1,200) is a pair."""
    if re.search(r"[(\[{]", text):
        return text
    return _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)


def compact(text: str) -> str:
    """``text`` without its spacing, but for one blank between two digits: 2 1/2 is not 21/2."""
    return _GAPS.sub(lambda gap: " " if gap[1] else "", text)


def _without_unit(text: str) -> tuple[str, list[str]]:
    """``text`` without the unit at its end, and the words of that."""
    unit = _UNIT.search(text)
    if unit is None:
        return text, []
    return text[: unit.start()], [word.lower() for word in _WORD.findall(unit[0])]


def unwrapped(text: str) -> str:
    """``text`` without fonts and text boxes around its parts."""
    return _WRAPPED.sub(r"\1", text)


def equal_numbers(one: Fraction, other: Fraction) -> bool:
    """Integers exactly, others to a relative 1e-6: 0.333333 is a third, 1234567.5 not 1234567."""
    if one.denominator == other.denominator == 1:
        return one == other
    scale = max(abs(one), abs(other))
    if 1 in (one.denominator, other.denominator):
        scale = min(scale, Fraction(1))
    return abs(one - other) <= TOLERANCE * scale


def _bare(text: str) -> str:
    text = compact(unwrapped(text)).replace("{,}", ",").replace("−", "-")
    text = text.removesuffix(".")
    if text[:1] == "{" and text[-1:] == "}":
        text = text[1:-1]
    return text[1:-1] if re.fullmatch(r"\([0-9.]+\)", text) else text


def _number(text: str) -> Fraction | None:
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    for pattern in (_POWER, _SCIENTIFIC):
        match = pattern.fullmatch(text)
        if match:
            mantissa, exponent = match[1] or "1", next(filter(None, match.groups()[1:]))
            return _scaled(mantissa, exponent)
    match = _MIXED.fullmatch(text)
    if match:
        part = _number(match[3] or match[4])
        if part is None or not 0 < part < 1:
            return None
        return Fraction(f"{match[1]}1") * (int(match[2]) + part)
    match = _FRACTION.fullmatch(text)
    if match:
        over, under = [part for part in match.groups()[1:] if part is not None]
        return _ratio(over, under, -1 if match[1] == "-" else 1)
    over, slash, under = text.partition("/")
    return _ratio(over, under, 1) if slash else None


def _scaled(mantissa: str, exponent: str) -> Fraction | None:
    if not _DECIMAL.fullmatch(mantissa) or len(exponent) > 5:
        return None
    if abs(int(exponent)) > _LARGEST_EXPONENT:
        return None
    return Fraction(mantissa) * Fraction(10) ** int(exponent)


def _ratio(over: str, under: str, sign: int) -> Fraction | None:
    if not _DECIMAL.fullmatch(over) or not _DECIMAL.fullmatch(under) or Fraction(under) == 0:
        return None
    return sign * Fraction(over) / Fraction(under)
