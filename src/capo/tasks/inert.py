"""Which answers may be handed to a scorer that evaluates them, as Python or through sympy.

Several graders of reasoning-gym hand an answer to `eval` or to sympy's ``parse_expr``, which is
`eval` after some rewriting. Both lists below say what is allowed, character by character and node by
node; what they do not name is refused.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Collection
from functools import lru_cache
from typing import Literal

Evaluation = Literal["python", "sympy"]

_LARGEST_EXPONENT = 100
_FUNCTIONS = frozenset(
    {"sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"}
    | {"exp", "log", "ln", "sqrt", "abs", "Abs", "Rational"}
)
_VARIABLE = re.compile(r"[A-Za-z]_?[0-9]*|pi")
_PYTHON = re.compile(r"\b(?:eval|exec)\(\s*(?:answer|user)")
_SYMPY = re.compile(r"\b(?:parse_expr|sympify|S)\(")
_OWN_PARSER = re.compile(r"^\s*def parse_expr\(", re.MULTILINE)  # propositional_logic's: no eval

_FORMULA_TEXT = re.compile(r"[A-Za-z0-9_.+\-*/(), \t\r\n]*")  # no quote, bracket, comment, escape
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.UAdd, ast.USub)
_FORMULA = (ast.Expression, ast.BinOp, ast.UnaryOp, *_OPERATORS, ast.Name, ast.Load, ast.Call)

_WORD = r"(?:-?[0-9]+|[A-Za-z]+|_+)"  # a board's "_ Q _"; no variable of a scorer, as oracle_answer
_WORDS = re.compile(rf"\s*{_WORD}(?:\s+{_WORD})*\s*", re.ASCII)
_DATA_TEXT = re.compile(r"[A-Za-z0-9_.+\-'\"\[\](), \t\r\n]*")
_DATA = (ast.Expression, ast.List, ast.Tuple, ast.Load, ast.UnaryOp, ast.USub, ast.UAdd)


@lru_cache
def evaluation(dataset: str) -> Evaluation | None:
    """With what the dataset's scorer evaluates an answer; None: it does not."""
    from reasoning_gym.factory import DATASETS

    source = inspect.getsource(sys.modules[DATASETS[dataset][0].__module__])
    if _SYMPY.search(source) and not _OWN_PARSER.search(source):
        return "sympy"
    return "python" if _PYTHON.search(source) else None


def is_formula(answer: str, variables: Collection[str] = ()) -> bool:
    """Whether ``answer`` is arithmetic on numbers and variables, with a few functions of them.

    No text in quotes, for sympy evaluates it once more wherever it expects an expression; no
    attribute, index, comparison or call of anything but those functions; no tower of powers.

    Args:
        answer: any text whatever.
        variables: names allowed besides single letters (with an index, as in ``x_1``) and ``pi``.
    """
    nodes = _nodes(answer) if _FORMULA_TEXT.fullmatch(answer) else None
    return nodes is not None and all(_is_arithmetic(node, variables) for node in nodes)


def is_data(answer: str) -> bool:
    """Whether ``answer`` is words and integers, or lists of numbers and quoted text."""
    if _WORDS.fullmatch(answer):
        return True
    nodes = _nodes(answer) if _DATA_TEXT.fullmatch(answer) else None
    return nodes is not None and all(
        type(node.value) in (int, float, str)
        if isinstance(node, ast.Constant)
        else isinstance(node, _DATA)
        for node in nodes
    )


def _nodes(answer: str) -> list[ast.AST] | None:
    try:
        return list(ast.walk(ast.parse(answer.strip(), mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _is_arithmetic(node: ast.AST, variables: Collection[str]) -> bool:
    match node:
        case ast.Constant(value):
            return type(value) in (int, float)
        case ast.Call(func, _, keywords):
            return isinstance(func, ast.Name) and func.id in _FUNCTIONS and not keywords
        case ast.Name(name):
            return bool(_VARIABLE.fullmatch(name)) or name in _FUNCTIONS or name in variables
        case ast.BinOp(_, ast.Pow(), exponent):
            return _is_small(exponent)
    return isinstance(node, _FORMULA)


def _is_small(exponent: ast.expr) -> bool:
    """Whether an exponent is a plain number or name; no tower of powers is worth a worker."""
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    if isinstance(exponent, ast.BinOp):  # as in x**(1/2)
        return isinstance(exponent.op, ast.Div) and _is_small(exponent.left)
    if isinstance(exponent, ast.Name):
        return True
    value = exponent.value if isinstance(exponent, ast.Constant) else None
    return isinstance(value, int | float) and abs(value) <= _LARGEST_EXPONENT
