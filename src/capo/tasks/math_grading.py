"""Whether a completion's final answer equals a reference, by text first and then by math-verify.

No input may raise, and none may take long: text is bounded before anything parses it, and
expressions whose evaluation could explode (towers of powers, factorials of factorials, deep nesting)
are compared as text only. math-verify's own time limits are switched off, because they rest on SIGALRM, which
works in the main thread alone.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

_TAIL = 4_000  # characters of a completion that are looked at: the final answer is at its end
_LONGEST_ANSWER = 256  # characters
_LAST_WORDS = 300  # characters searched for an answer that is not boxed
_LARGEST_POWER = 10_000
_DEEPEST_NESTING = 8  # math-verify's time doubles with every level or two of nested fractions
_ENDLESS = re.compile(r"\\[dt]?(sum|prod|int|lim|binom|choose|exp|Gamma|zeta)(?![A-Za-z])")
_SMALL_FACTORIAL = re.compile(r"(?<![0-9])[0-9]{1,3}!(?!!)")
_FACTORIAL = re.compile(r"[0-9)}\]!]\s*!")  # "Great! It is 7." has none
_FINAL_MARK = re.compile(r"####\s*([^\n]+)")
_SPACING = re.compile(r"\\[,;:! ]|\\left|\\right|\\displaystyle|[\s$]")


def grade_math(completion: str, answer: str) -> float:
    """Return 1.0 if the last answer stated in ``completion`` equals ``answer``, else 0.0.

    The stated answer is the content of the last ``\\boxed{...}``, else what follows the last
    ``####``, else the last expression that math-verify finds near the end.

    Args:
        completion: any text whatever.
        answer: the reference, LaTeX or plain.
    """
    tail = completion[-_TAIL:].replace("\x00", " ")
    stated = stated_answer(tail)
    if stated is not None and _normalized(stated) == _normalized(answer) != "":
        return 1.0
    if stated is None:
        stated, wrap = tail[-_LAST_WORDS:], "{}"
    else:
        wrap = "\\boxed{{{}}}"
    too_long = len(stated) > max(_LONGEST_ANSWER, _LAST_WORDS)
    if too_long or _may_explode(stated) or _may_explode(answer):
        return 0.0
    return float(_equal(wrap.format(stated), "\\boxed{" + answer + "}"))


def prepare_grading() -> None:
    """See `capo.tasks.worker.Grader`: the parser builds its tables at its first use."""
    grade_math("\\boxed{\\frac{2}{4}}", "0.5")


def grade_job(payload: dict[str, Any]) -> float:
    """See `capo.tasks.worker.Grader`."""
    return grade_math(payload["completion"], payload["answer"])


def stated_answer(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}``, else what follows the last ``####``."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        content = _braced(text, start + len("\\boxed"))
        if content is not None:
            return content
        start = text.rfind("\\boxed{", 0, start)
    marks = _FINAL_MARK.findall(text)
    return str(marks[-1]).replace(",", "") if marks else None


def _braced(text: str, opening: int) -> str | None:
    """The text between the brace at ``opening`` and its partner, or None if it has none."""
    depth = 0
    for index in range(opening, min(len(text), opening + 4 * _LONGEST_ANSWER)):
        depth += (text[index] == "{") - (text[index] == "}")
        if depth == 0:
            return text[opening + 1 : index]
    return None


def _normalized(text: str) -> str:
    bare = _SPACING.sub("", text).rstrip(".")
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
    from math_verify import verify

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gold, prediction = _parsed_reference(answer), _parsed(stated)
            return bool(gold and prediction and verify(gold, prediction, timeout_seconds=None))
    except Exception:
        # Whatever a parser chokes on is not a right answer. (RecursionError included.)
        return False


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    # It would warn that nothing limits the time; the bounds above do.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    expressions: list[Any] = parse(text, parsing_timeout=None)
    return expressions


@lru_cache(maxsize=4096)
def _parsed_reference(answer: str) -> list[Any]:
    return _parsed(answer)  # one reference is compared with a whole group of completions
