"""What may be handed to a scorer that evaluates: honest answers, and nothing that could act."""

from __future__ import annotations

import json

import pytest
from reasoning_gym.factory import DATASETS

from capo.tasks.inert import evaluation, is_data, is_formula
from capo.tasks.reasoning import _entry, grade_job

SYMPY = {
    *("countdown", "puzzle24"),
    *("simple_integration", "intermediate_integration", "polynomial_multiplication"),
}
PYTHON = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}


def grade(dataset: str, answer: str, index: int = 0, **parameters: object) -> float:
    entry = [dataset, json.dumps(parameters), 7, index]
    return grade_job({"completion": f"<answer>{answer}</answer>", "entry": entry})


def test_every_dataset_that_evaluates_is_known() -> None:
    found = {name: evaluation(name) for name in DATASETS}
    assert {name for name, how in found.items() if how == "sympy"} == SYMPY
    assert {name for name, how in found.items() if how == "python"} == PYTHON


@pytest.mark.parametrize("dataset", sorted(SYMPY | PYTHON))
def test_the_datasets_own_answers_are_right(dataset: str) -> None:
    answers = [str(_entry(dataset, "{}", 7, index)["answer"]) for index in range(15)]
    # Where sympy finds no antiderivative, the dataset gives the integral of the question back; who
    # says that has solved nothing.
    asked = [(i, answer) for i, answer in enumerate(answers) if "Integral" not in answer]
    assert len(asked) > 8
    assert [grade(dataset, answer, index) for index, answer in asked] == [1.0] * len(asked)


def test_variables_of_the_configuration_are_allowed() -> None:
    own = {"variables": ["speed", "time_2"], "min_terms": 2, "max_terms": 2}
    answer = _entry("polynomial_multiplication", json.dumps(own), 7, 0)["answer"]
    assert "speed" in answer or "time_2" in answer
    assert grade("polynomial_multiplication", answer, **own) == 1.0


@pytest.mark.parametrize(
    ("dataset", "restated"),
    [
        ("binary_matrix", lambda gold: [[int(n) for n in r.split()] for r in gold.split("\n")]),
        ("spiral_matrix", lambda gold: [int(n) for n in gold.split()]),
        ("string_insertion", list),
        ("n_queens", lambda gold: [row.split() for row in gold.split("\n")]),
    ],
)
def test_lists_keep_their_partial_credit(dataset: str, restated) -> None:
    gold = str(_entry(dataset, "{}", 7, 0)["answer"])
    assert 0 < grade(dataset, str(restated(gold))) < 1


def test_what_a_scorer_does_to_its_entry_ends_with_the_completion(monkeypatch) -> None:
    def spoil(self, answer: str, entry: dict[str, object]) -> float:
        entry["answer"] = answer
        return 0.0

    before = _entry("leg_counting", "{}", 7, 3)["answer"]
    with monkeypatch.context() as patched:
        patched.setattr(DATASETS["leg_counting"][0], "score_answer", spoil)
        assert grade("leg_counting", "-1", 3) == 0.0
    assert _entry("leg_counting", "{}", 7, 3)["answer"] == before


@pytest.mark.parametrize(
    "answer",
    [
        "(3 + 4) * 5 - 2**3",
        "8*(45 - 17 - 2) - 14",
        "x**2/2 - sin(x) + C",
        "-exp(x)*sin(x)/2 + log(x, 2) + Rational(1, 2)",
        "x**-2 + x**(1/2) + X_1**0.5",
        " 1.5e3 +\t.5",
        "2*pi*r",
    ],
)
def test_formulas(answer: str) -> None:
    assert is_formula(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "'1'",
        '"x"',
        "'exec(\"1\") or 0'",
        "sin('1')",
        "f'{x}'",
        "b'1'",
        "5! + (eval)((chr)(49)+(chr)(43)+(chr)(49))",
        "5! + (eval#\n((chr)(49)))",
        "(eval)(x)",
        "eval (x)",
        "eval",
        "chr",
        "__import__('os').system('true')",
        "__x",
        "x__y",
        "\uff45\uff56\uff41\uff4c(x)",  # full width: Python reads eval
        "x² + 1",
        "١ + 1",
        "open('f', 'w')",
        "(1).real",
        "x.y z",
        "x.y",
        "x[0]",
        "[x]",
        "{x}",
        "[x for x in y]",
        "lambda: 1",
        "lambda",
        "x if y else z",
        "x == y",
        "x := 1",
        "sin(x=1)",
        "sin(*x)",
        "sin(x)(y)",
        "Integral(x, x)",
        "S(x)",
        "True",
        "1j",
        "1, 2",
        "x\\\n+ 1",
        "x # y",
        "x; y",
        "x @ y",
        "x & y",
        "9**9**9",
        "x**(9*9*9)",
        "(" * 100_000,
        "1" * 100_000,
        "-" * 100_000 + "1",
    ],
)
def test_what_is_no_formula(answer: str) -> None:
    assert not is_formula(answer)
    assert not is_formula(f"1 + ({answer})")


@pytest.mark.parametrize(
    "answer",
    ["0 1\n1 0", "_ Q _ _", "ABBA", "[[0, 1], [1, 0]]", "['A', 'B']", "(-1, 2.5)", "7", "'A B'"],
)
def test_data(answer: str) -> None:
    assert is_data(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "oracle_answer",  # what string_insertion calls the right one
        "",
        "print()",
        "[print()]",
        "[x]",
        "x.y",
        "[x for x in y]",
        "[f'{x}']",
        "b'1'",
        "'a' 'b'.c",
        "['\\x41']",
        "x or y()",
        "[1][0]",
        "{1: 2}",
        "1 + 1",
        "9**9**9",
        "['a'] # b",
        "lambda: 1",
        "(" * 100_000,
    ],
)
def test_what_is_no_data(answer: str) -> None:
    assert not is_data(answer)
