"""Plain numbers as people write them, exactly: decimals, fractions, powers of ten, in text or LaTeX.

math-verify rounds to six decimals, so that 1e-8 would equal 2e-8, and does not read ``4.5e33``.
Numbers are therefore compared here, as fractions.
"""

from __future__ import annotations

import re
from fractions import Fraction

TOLERANCE = Fraction(1, 10**6)  # relative, where one of the two is not an integer
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
_UNITS = re.compile(r"(?:\\?\s|~|\\,)*\\(?:text|mathrm|textrm|mbox)\s*\{(?!\s*[+-]?[0-9]).*")


def plain_number(text: str) -> Fraction | None:
    """The number that ``text`` is, with or without a unit in ``\\text{…}``; None if it is none."""
    if len(text) > _LONGEST:
        return None
    number = _number(_bare(text))
    return _number(_bare(_UNITS.sub("", text, count=1))) if number is None else number


def unwrapped(text: str) -> str:
    """``text`` without fonts and text boxes around its parts."""
    return _WRAPPED.sub(r"\1", text)


def equal_numbers(one: Fraction, other: Fraction) -> bool:
    """Integers exactly, others to a relative 1e-6: 0.333333 is a third."""
    if one.denominator == other.denominator == 1:
        return one == other
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))


def _bare(text: str) -> str:
    text = _SPACING.sub("", unwrapped(text)).replace("{,}", ",").replace("−", "-")
    text = text.removesuffix(".")
    if text[:1] == "{" and text[-1:] == "}":
        text = text[1:-1]
    return text[1:-1] if re.fullmatch(r"\([0-9.]+\)", text) else text


def _number(text: str) -> Fraction | None:
    if _GROUPED.fullmatch(text):
        text = text.replace(",", "")
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
