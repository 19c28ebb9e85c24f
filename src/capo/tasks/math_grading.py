"""Whether a completion's final answer equals a reference, by text first and then by math-verify.

No input may raise, and none may take long: text is bounded before anything parses it, and
expressions whose evaluation could explode (towers of powers, factorials of factorials, deep
nesting) are compared as text only. math-verify's own time limits are switched off, because they
rest on SIGALRM, which works in the main thread alone: the limit is that of `capo.tasks.pool`.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

from capo.tasks.math_numbers import BETWEEN_DIGITS, equal_numbers, is_split, plain_number, unwrapped

_TAIL = 4_000  # characters of a completion that are looked at: the final answer is at its end
_LONGEST_ANSWER = 256  # characters
_LAST_WORDS = 300  # characters searched for an answer that is not boxed
_LONGEST_PARSED = 320  # characters
_SMALL = Fraction(1, 100)
_LARGEST_POWER = 10_000
_DEEPEST_NESTING = 8  # math-verify's time doubles with every level or two of nested fractions
_ENDLESS = re.compile(r"\\[dt]?(sum|prod|int|lim|binom|choose|exp|Gamma|zeta)(?![A-Za-z])")
_SMALL_FACTORIAL = re.compile(r"(?<![0-9])[0-9]{1,3}!(?!!)")
_FACTORIAL = re.compile(r"[0-9)}\]!]\s*!")  # "Great! It is 7." has none
_EXPONENT = re.compile(r"[eE]([+-]?[0-9]+)")
_SUBSCRIPT = re.compile(r"[A-Za-z}]\s*_")
_PHRASE = re.compile(r"(?i:\banswer\s*(?:is|:|=)\s*:?)([^\n]{1,300})")
_FINAL_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]+)")
_GROUPS = re.compile(r"(?<![0-9,(\[{])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])")
_SENTENCE_END = re.compile(r"[.;!]\s")
_SPACING = re.compile(r"\\[,;:! ]|\\left|\\right|\\displaystyle|[\s$]")


def grade_math(completion: str, answer: str) -> float:
    """Return 1.0 if the last answer stated in ``completion`` equals ``answer``, else 0.0.

    The stated answer is the content of the last ``\\boxed{...}``, else what follows the last
    ``####`` or the last "answer is", whichever comes later, else the last expression that math-verify
    finds near the end.

    Args:
        completion: any text whatever.
        answer: the reference, LaTeX or plain.
    """
    tail = completion[-_TAIL:].replace("\x00", " ")
    stated = stated_answer(tail)
    if stated is not None:
        return float(_same(stated, answer))
    phrase = _phrase(tail)
    if phrase is not None:
        return float(_same(phrase, answer) or _equal(phrase, answer))
    return float(_equal(tail[-_LAST_WORDS:], answer))


def final_answer(completion: str) -> str | None:
    """The answer stated in ``completion``, written so that equal numbers are equal texts; or None."""
    tail = completion[-_TAIL:].replace("\x00", " ")
    stated = stated_answer(tail)
    if stated is None:
        stated = _phrase(tail)
    if stated is None:
        return None
    number = plain_number(stated)
    return _normalized(unwrapped(stated)) if number is None else str(number)


def _same(stated: str, answer: str) -> bool:
    """Whether an answer that stands by itself is the reference: by text, as a number, by algebra."""
    for one, other in ((stated, answer), (unwrapped(stated), unwrapped(answer))):
        if _normalized(one) == _normalized(other) != "":
            return True
    number, expected = plain_number(stated), plain_number(answer)
    if number is not None and expected is not None:
        return equal_numbers(number, expected)
    if expected is not None and is_split(stated):  # which a parser of LaTeX reads as one
        return False
    return _equal(f"\\boxed{{{stated}}}", answer)


def prepare_grading() -> None:
    """See `capo.tasks.worker.Grader`: the parser is imported and builds its tables at first use."""
    for stated, answer in (
        ("2\\sqrt{3}", "\\sqrt{12}"),
        ("x^2 - 1", "(x - 1)(x + 1)"),
        ("{1, 2}", "2,1"),
    ):
        grade_math(f"\\boxed{{{stated}}}", answer)


def grade_job(payload: dict[str, Any]) -> float:
    """See `capo.tasks.worker.Grader`."""
    return grade_math(payload["completion"], payload["answer"])


def stated_answer(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}``, else what follows the last ``####``.

    Exactly four marks, and no later "answer is": else they were a heading's.
    """
    start = text.rfind("\\boxed{")
    while start >= 0:
        content = _braced(text, start + len("\\boxed"))
        if content is not None:
            return content
        start = text.rfind("\\boxed{", 0, start)
    marks = list(_FINAL_MARK.finditer(text))
    if not marks or _PHRASE.search(text, marks[-1].end()):
        return None
    return _GROUPS.sub(lambda number: number[0].replace(",", ""), marks[-1][1])


def _phrase(tail: str) -> str | None:
    """What follows the last "answer is", to the end of the sentence or line."""
    phrases = _PHRASE.findall(tail[-_LAST_WORDS - _LONGEST_ANSWER :])
    if not phrases:
        return None
    return str(_SENTENCE_END.split(phrases[-1], maxsplit=1)[0]).strip(" $.*")


def _braced(text: str, opening: int) -> str | None:
    """The text between the brace at ``opening`` and its partner, or None if it has none."""
    depth = 0
    for index in range(opening, min(len(text), opening + 4 * _LONGEST_ANSWER)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[opening + 1 : index]
    return None


def _normalized(text: str) -> str:
    bare = _SPACING.sub("", BETWEEN_DIGITS.sub("␣", text)).rstrip(".")
    return bare.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")


def _may_explode(text: str) -> bool:
    """Whether evaluating ``text`` could take unbounded time or memory."""
    text = text.replace("**", "^")
    if _depth(text) > _DEEPEST_NESTING:
        return True
    if _ENDLESS.search(text) or _FACTORIAL.search(_SMALL_FACTORIAL.sub("", text)):
        return True
    power = 1
    for exponent in _exponents(text):
        if "^" in exponent or "!" in exponent:
            return True
        for digits in re.findall("[0-9]+", exponent):
            if len(digits) > 6:
                return True
            power *= max(1, int(digits))
    return power > _LARGEST_POWER


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]" and depth > 0)
        deepest = max(deepest, depth)
    return deepest


def _exponents(text: str) -> Iterator[str]:
    for index in (match.end() for match in re.finditer(r"\^\s*", text)):
        if text[index : index + 1] in ("{", "("):
            yield _braced(text.replace("(", "{").replace(")", "}"), index) or text[index:]
        else:
            yield re.match(r"[+-]?(?:[0-9.]+|\S)?", text[index:])[0]  # type: ignore[index]


def _equal(stated: str, answer: str) -> bool:
    """Whether math-verify finds the reference in ``stated``."""
    from math_verify import verify

    expected = plain_number(answer)
    if expected is not None and _EXPONENT.search(answer):  # which math-verify does not read
        answer = _EXPONENT.sub(r" \\times 10^{\1}", answer)
    if len(stated) > _LONGEST_PARSED or _may_explode(stated) or _may_explode(answer):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gold, prediction = _parsed_reference("\\boxed{" + answer + "}"), _parsed(stated)
            found = bool(gold and prediction and verify(gold, prediction, timeout_seconds=None))
            return found and (expected is None or _as_small(prediction, expected))
    except Exception:
        # Whatever a parser chokes on is not a right answer. (RecursionError included.)
        return False


def _as_small(prediction: list[Any], expected: Fraction) -> bool:
    """math-verify rounds to six decimals: a number that small must agree in its leading digits."""
    if expected == 0 or abs(expected) >= _SMALL:
        return True
    sides = [getattr(one, "rhs", one) for one in prediction]  # of "x = 1e-8"
    values = [float(one.evalf()) for one in sides if getattr(one, "is_number", False)]
    return any(abs(value - expected) <= 1e-6 * abs(expected) for value in values)


def _parsed(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # It would warn that nothing limits the time; the bounds above do.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # What stands in a box is read as a whole or not at all: the parser would else fall back on the
    # last number in it, and find 2/3 in an expression that it cannot read.
    targets = [LatexExtractionConfig()]
    if not text.startswith("\\boxed{"):
        targets.append(ExprExtractionConfig())
    expressions: list[Any] = parse(text, targets, parsing_timeout=None)
    return expressions


@lru_cache(maxsize=4096)
def _parsed_reference(answer: str) -> list[Any]:
    # Cached: one reference is compared with a whole group of completions.
    expressions = _parsed(answer)
    if _SUBSCRIPT.search(answer) and any(getattr(one, "is_number", False) for one in expressions):
        return []  # a number was read out of a formula that could not be: good for no comparison
    return expressions
