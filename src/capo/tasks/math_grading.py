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

from capo.tasks.math_numbers import (
    compact,
    equal_numbers,
    for_algebra,
    plain_number,
    ungrouped,
    unwrapped,
)

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
_PHRASE = re.compile(r"(?i:\banswer\s*(?:is|:|=))(?:[\s:*$]|\\[(\[])*(?=([^\s:*$][^\n]{0,299}))")
_MATH_MODE = re.compile(r"\\[()\[\]]")
_CHOICE = re.compile(r"\A\(?[A-E][.)]\s+")  # "(C) 42"
_SENTENCE_END = re.compile(r"\.(?=[\s*$]|$)|,?\s(?:since|because|not)\b")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")
_FINAL_MARK = re.compile(r"(?<!#)####(?!#)\s*([^\s#][^\n]*)")


def grade_math(completion: str, answer: str) -> float:
    """Return 1.0 if the last answer stated in ``completion`` equals ``answer``, else 0.0.

    The stated answer is the content of the last ``\\boxed{...}``, else what follows the last of
    ``####`` and "answer is" (a heading may stand before that), else the last expression that
    math-verify finds near the end.

    Args:
        completion: any text whatever.
        answer: the reference, LaTeX or plain.
    """
    tail = completion[-_TAIL:].replace("\x00", " ")
    phrase = _phrase(tail)
    if phrase is not None:
        return float(_says(phrase, answer))
    stated = stated_answer(tail)
    if stated is not None:
        return float(_same(stated, answer))
    return float(_equal(tail[-_LAST_WORDS:], answer))


def final_answer(completion: str) -> str | None:
    """The answer stated in ``completion``, written so that equal numbers are equal texts; or None."""
    tail = completion[-_TAIL:].replace("\x00", " ")
    phrase = _phrase(tail)
    stated = stated_answer(tail) if phrase is None else _sentence(phrase)
    if stated is None:
        return None
    number = plain_number(stated)
    return _normalized(unwrapped(stated)) if number is None else str(number)


def _phrase(tail: str) -> str | None:
    """What follows "answer is" near the end, unless a box or a later ``####`` states the answer."""
    phrases = list(_PHRASE.finditer(tail, max(0, len(tail) - _LAST_WORDS - _LONGEST_ANSWER)))
    if not phrases or _boxed(tail) is not None:
        return None
    last = phrases[-1]
    return None if _FINAL_MARK.search(tail, last.start()) else _MATH_MODE.sub("$", last[1])


def _sentence(phrase: str) -> str:
    """The part of ``phrase`` before a further sentence: a check, a reason."""
    return _SENTENCE_END.split(phrase, maxsplit=1)[0].strip(' $.*`"')


def _says(phrase: str, answer: str) -> bool:
    """Whether what follows "answer is" gives the reference."""
    if _alike(phrase.strip(" $.*"), answer) or _alike(_sentence(phrase), answer):
        return True
    sentence = _sentence(_CHOICE.sub("", phrase))
    if _same(sentence, answer) or _same(sentence.rstrip("!"), answer):
        return True
    # "7 apples", but not one of "5, 7" or "5 million"
    wordy = plain_number(sentence) is None and for_algebra(sentence) == ungrouped(sentence)
    return wordy and bool(_WORD.search(sentence)) and _equal(sentence, answer)


def _alike(stated: str, answer: str) -> bool:
    """Whether two answers are the same text."""
    pairs = ((stated, answer), (unwrapped(stated), unwrapped(answer)))
    return any(_normalized(one) == _normalized(other) != "" for one, other in pairs)


def _same(stated: str, answer: str) -> bool:
    """Whether an answer that stands by itself is the reference: by text, as a number, by algebra."""
    if _alike(stated, answer):
        return True
    number, expected = plain_number(stated), plain_number(answer)
    if number is not None and expected is not None:
        return equal_numbers(number, expected)
    if len(stated) > _LONGEST_PARSED:
        return False
    readable = for_algebra(stated)
    return readable is not None and _equal(f"\\boxed{{{readable}}}", answer)


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
    """The content of the last complete ``\\boxed{...}``, else what follows the last ``####``."""
    content = _boxed(text)
    if content is not None:
        return content
    marks = _FINAL_MARK.findall(text)
    return ungrouped(str(marks[-1]).rstrip(" ,")) if marks else None


def _boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    while start >= 0:
        content = _braced(text, start + len("\\boxed"))
        if content is not None:
            return content
        start = text.rfind("\\boxed{", 0, start)
    return None


def _braced(text: str, opening: int) -> str | None:
    """The text between the brace at ``opening`` and its partner, or None if it has none."""
    depth = 0
    for index in range(opening, min(len(text), opening + 4 * _LONGEST_ANSWER)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[opening + 1 : index]
    return None


def _normalized(text: str) -> str:
    bare = compact(text).rstrip(".")
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
            gold, prediction = _parsed_reference(answer), _parsed(stated)
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
    readable = for_algebra(answer)
    if readable is None:
        return []
    expressions = _parsed("\\boxed{" + readable + "}")
    if _SUBSCRIPT.search(answer) and any(getattr(one, "is_number", False) for one in expressions):
        return []  # a number was read out of a formula that could not be: good for no comparison
    return expressions
