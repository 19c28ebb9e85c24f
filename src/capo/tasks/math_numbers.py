"""Plain numbers as people write them, exactly: decimals, fractions, powers of ten, in text or LaTeX.

math-verify rounds to six decimals, so that 1e-8 would equal 2e-8, and does not read ``4.5e33``.
Numbers are therefore compared here, as fractions.
"""

from __future__ import annotations

import re
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)  # relative, where one of the two is not an integer
_FROM_AN_INTEGER = Fraction(1, 1000)  # at most, where one of the two is one
_LARGEST_EXPONENT = 400
_LONGEST = 300  # characters

_WRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|bf|boldsymbol|operatorname|mbox)"
    r"\s*\{([^{}]*)\}"
)
_SPACING = re.compile(r"\\[,;:! ]|\\left|\\right|\\displaystyle|\\q?quad|[\s$~]")
_GROUPED = re.compile(r"[+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)")
_POWER = re.compile(r"(?:(.+?)(?:\\times|\\cdot|\*|×|·))?10\^(?:\{([+-]?[0-9]+)\}|([+-]?[0-9]+))")
_SCIENTIFIC = re.compile(r"(.+?)[eE]([+-]?[0-9]+)")
_FRACTION = re.compile(
    r"([+-]?)\\[dt]?frac(?:\{([^{}]+)\}\{([^{}]+)\}|([0-9])\{([0-9]+)\}|([0-9])([0-9]))"
)
_JOINT = r"(?:\s|~|/|\\[,;:! ]|\\cdot)*"
_UNIT = r"\\(?:text|mathrm|textrm|mbox)\s*\{([^{}0-9]*)\}(?:\s*\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?"
_UNITS = re.compile(rf"{_JOINT}(?:{_UNIT}{_JOINT})+\.?\s*$")
_NO_UNIT = frozenset({"or", "and", "to", "by", "dozen", "hundred"})
_THOUSANDS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
BETWEEN_DIGITS = re.compile(r"(?<=[0-9])\s+(?=[0-9])")
_WORDS_BETWEEN = re.compile(
    r"[0-9]\s*\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]*[A-Za-z][^{}]*\}\s*[0-9]"
)
_MIXED = re.compile(r"([+-]?)([0-9]+) ([0-9]+)/([0-9]+)")
_SPACED = re.compile(r"[+-]?[0-9]{1,3}(?: [0-9]{3})+(?:\.[0-9]*)?")


def plain_number(text: str) -> Fraction | None:
    """The number that ``text`` is, with or without a unit in ``\\text{…}``; None if it is none."""
    if len(text) > _LONGEST:
        return None
    number = _number(_bare(text))
    unit = _UNITS.search(text)
    if number is not None or unit is None:
        return number
    words = re.findall(r"[a-z]+", unit[0].lower())
    number = None if _NO_UNIT.intersection(words) else _number(_bare(text[: unit.start()]))
    thousands = sum(_THOUSANDS.get(word, 0) for word in words)
    return None if number is None else number * 10**thousands


def is_split(text: str) -> bool:
    """Whether two numbers stand side by side, with white space or words between them."""
    return BETWEEN_DIGITS.search(text) is not None or _WORDS_BETWEEN.search(text) is not None


def unwrapped(text: str) -> str:
    """``text`` without fonts and text boxes around its parts."""
    return _WRAPPED.sub(r"\1", text)


def equal_numbers(one: Fraction, other: Fraction) -> bool:
    """Integers exactly, others to a relative 1e-6: 0.333333 is a third, 1234567.5 no integer."""
    if one.denominator == other.denominator == 1:
        return one == other
    allowed = TOLERANCE * max(abs(one), abs(other))
    if 1 in (one.denominator, other.denominator):
        allowed = min(allowed, _FROM_AN_INTEGER)
    return abs(one - other) <= allowed


def _bare(text: str) -> str:
    parts = [_SPACING.sub("", part) for part in BETWEEN_DIGITS.split(unwrapped(text))]
    text = " ".join(parts).replace("{,}", ",").replace("−", "-")
    text = text.removesuffix(".")
    if text[:1] == "{" and text[-1:] == "}":
        text = text[1:-1]
    return text[1:-1] if re.fullmatch(r"\([0-9.]+\)", text) else text


def _number(text: str) -> Fraction | None:
    if _GROUPED.fullmatch(text) or _SPACED.fullmatch(text):
        text = text.replace(",", "").replace(" ", "")
    mixed = _MIXED.fullmatch(text)
    if mixed:
        sign, whole, over, under = mixed.groups()
        part = _ratio(over, under, 1)
        return None if part is None else (int(whole) + part) * (-1 if sign == "-" else 1)
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    for pattern in (_POWER, _SCIENTIFIC):
        match = pattern.fullmatch(text)
        if match:
            mantissa, exponent = match[1] or "1", next(filter(None, match.groups()[1:]))
            return _scaled(mantissa, exponent)
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
