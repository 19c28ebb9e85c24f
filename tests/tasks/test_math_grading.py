"""Grading of mathematics: right is right in any notation, and no text raises or hangs."""

from __future__ import annotations

import signal
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capo.tasks.math_grading import final_answer, grade_math, stated_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"so \boxed{42}.", "42.0"),
        (r"\boxed{1} then \boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{\dfrac34}", r"\frac{3}{4}"),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{x \in [1, 2]}", "[1,2]"),
        (r"\boxed{2^{10}}", "1024"),
        (r"\boxed{5!}", "120"),
        ("so\n#### 1,042", "1042"),
        ("#### (1,2)", "(1,2)"),
        ("#### 1, 2", "1, 2"),
        ("The final answer is $7$.", "7"),
        ("#### Step 1\n3 + 4\nThe answer is 7.", "7"),
        ("The answer is 8.\n#### 7", "7"),
        ("The answer is 1. Wait, the answer is 2.", "2"),
        ("#### The answer is 7", "7"),
        ("The answer is 5. Check: 3+4 = 7", "5"),
        ("The answer is **7**, since 12 - 5 = 7.", "7"),
        ("The answer is 7 apples.", "7"),
        ("The answer is:\n\n$$\n7\n$$", "7"),
        (r"The answer is \(\frac{1}{2}\). Good.", "0.5"),
        ("**Answer:**\n7", "7"),
        (r"The answer is \[7\]", "7"),
        ("The answer is (C) 42.", "42"),
        ("The answer is C. 42.", "C"),
        ("The answer is 7!", "7"),
        ("The answer is 1,200 dollars.", "1200"),
        (r"\boxed{2,500\text{ and }7,500}", "2500,7500"),
        (r"\boxed{16,100}", "16, 100"),
        ("The answer is 7, not 8.", "7"),
        ("The answer is $2,500$ and $7,500$.", "2500,7500"),
        ("The answer is 0.5. Bye", "1/2"),
        ("The answer is 5 million.", "5000000"),
        ("The answer is 5 or 7.", "5,7"),
        ("Great! In sum (as an int, in the lim): the answer is $7$.", "7"),
        (r"\boxed{\text{east}}", r"\text{east}"),
        (r"\boxed{4.5 \times 10^{33} \text{ erg/s}}", "4.5e33"),
        (r"\boxed{x = 1 \cdot 10^{-8}}", "1e-8"),
        (r"\boxed{\textbf{(073)}}", "73"),
        (r"\boxed{1{,}042}", "1042"),
        (r"\boxed{0.333333}", r"\frac{1}{3}"),
        ("The answer is 1,3,5.", "5,3,1"),
        (r"\boxed{3} and then an open \boxed{4", "3"),
        ("9" * 100_000 + r"\boxed{42}", "42"),
        ("\x00 \\boxed{42}\x00", "42"),
    ],
)
def test_right(completion: str, answer: str) -> None:
    assert grade_math(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{41}", "42"),
        (r"\boxed{42} no, \boxed{43}", "42"),
        ("The answer is 5. Check: 3+4 = 7", "7"),
        ("The answer is 1. Wait, the answer is 2.", "1"),
        ("The answer is 5, because 3+4 = 7", "7"),
        ("The answer is 5. Hence\n3+4 = 7", "7"),
        ("The answer is 5 million.", "5"),
        ("The answer is 5 or 7.", "7"),
        ("The answer is 1,3,5.", "5"),
        ("The answer is 7.\n#### 8", "7"),
        (r"\boxed{(1,200, 3)}", "(1200, 3)"),
        (r"\boxed{8}, so the answer is 7", "7"),
        (r"\boxed{}", "42"),
        ("", "42"),
        ("I do not know", "42"),
        (r"\boxed{\text{east}}", r"\text{west}"),
        (r"\boxed{-(\frac{1}{3} E_{1}+\frac{2}{3} E_{2})}", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
        (r"\boxed{2e-8}", "1e-8"),
        (r"\boxed{\frac{2 \times 10^{-8}}{1}}", "1e-8"),
        (r"\boxed{1000001}", "1000002"),
        (r"\boxed{1234567.5}", "1234567"),
        (r"\boxed{42} " + "blah " * 10_000, "42"),  # stated long before the end
    ],
)
def test_wrong(completion: str, answer: str) -> None:
    assert grade_math(completion, answer) == 0.0


HOSTILE = [
    "\x00" * 10_000,
    "{" * 200_000,
    "\\boxed{" * 50_000,
    "\\boxed{" + "{" * 100_000 + "}" * 100_000 + "}",
    "\\boxed{" + "(" * 120 + "1" + ")" * 120 + "}",
    "\\boxed{" + "\\frac{1}{" * 24 + "2" + "}" * 24 + "}",
    "\\boxed{9^{9^{9^{9^9}}}}",
    "\\boxed{((10^{999})^{999})^{999}}",
    "\\boxed{9**9**9**9}",
    "\\boxed{10^{999999999999}}",
    "\\boxed{((99!)!)!}",
    "\\boxed{99999999!}",
    "\\boxed{\\sum_{k=1}^{10^9} k^k}",
    "\\boxed{\\binom{1000000000}{500000000}}",
    "\\boxed{" + "9" * 250 + "}",
    "\\boxed{\\frac{1}{0}}",
    "\\boxed{\\left(\\right)}}}}{{{",
    "\\boxed{__import__('os').system('true')}",
    "\\boxed{$$$$$\\$\\$}",
    "#### " + "1," * 100_000,
    "1/" * 100_000,
    "9^" * 100_000,
    "\ud800 \U0010ffff \u202e \\boxed{\ud800}",
    "= " * 50_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_and_quick(text: str) -> None:
    grade_math(r"\boxed{x}", "y")  # the parser's tables are built on first use
    started = time.monotonic()
    assert grade_math(text, "42") == 0.0
    assert time.monotonic() - started < 20  # seconds, on a busy machine


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(alphabet="0123456789+-*/^!(){}[]\\ $=.,xpi\x00frac", max_size=120))
def test_never_raises(text: str) -> None:
    assert grade_math(text, "42") in (0.0, 1.0)
    assert grade_math("\\boxed{" + text, "42") in (0.0, 1.0)


def test_works_in_any_thread_and_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGALRM)
    rewards: list[float] = []
    thread = threading.Thread(target=lambda: rewards.append(grade_math(r"\boxed{\frac12}", "0.5")))
    thread.start()
    thread.join()
    assert rewards == [1.0]
    assert signal.getsignal(signal.SIGALRM) is before


@pytest.mark.parametrize(
    ("stated", "answer"),
    [
        (r"5\text{ million}", "5000000"),
        ("5 million", "5000000"),
        (r"\$5\text{ million dollars}", "5 million dollars"),
        (r"7\text{ or }5", r"5\text{ or }7"),
        (r"5\text{ and }6\text{ and }7", "5,6,7"),
        (r"x=5\text{ or }x=7", "5,7"),
        (r"10\text{ cm}, 20\text{ cm}", "10,20"),
        (r"0.1\mathrm{~m}/\mathrm{s}", "0.1"),
        (r"5 \text{ m/s}^{2}.", "5"),
        (r"7e37 \mathrm{erg} \cdot \mathrm{s}^{-1}", "7e37"),
        (r"2\sqrt{3}\text{ cm}", r"\sqrt{12}"),
        (r"3+2\mathrm{i}", "3+2i"),
    ],
)
def test_words_in_an_answer(stated: str, answer: str) -> None:
    assert grade_math(f"\\boxed{{{stated}}}", answer) == 1.0


@pytest.mark.parametrize(
    ("stated", "answer"),
    [
        (r"5\text{ or }7", "5"),
        (r"5\text{ and }6\text{ and }7", "5"),
        (r"5\text{ or more}", "5"),
        (r"5\text{ million}", "5"),
        (r"5\text{ dozen}", "5"),
        (r"3\text{ feet }4\text{ inches}", "3"),
        ("5", r"5\text{ or }7"),
        ("5", r"5\text{ million}"),
        ("3", r"3\text{ feet }4\text{ inches}"),
        (r"10\text{ cm}, 20\text{ cm}", "10"),
        (r"2\mathrm{i}", "2"),
    ],
)
def test_words_that_make_another_number(stated: str, answer: str) -> None:
    assert grade_math(f"\\boxed{{{stated}}}", answer) == 0.0


@pytest.mark.parametrize(
    ("stated", "answer", "right"),
    [
        ("2 1/2", "2.5", True),
        ("2.5", "2 1/2", True),
        (r"-2\,\frac{1}{2}", "-2.5", True),
        (r"2 1/2\text{ cups}", "5/2", True),
        ("1 000", "1000", True),
        (r"1\,000\,000", "1000000", True),
        (r"\frac 1 2", "0.5", True),
        ("2^3 3^2", "72", True),
        ("10.5", "2 1/2", False),
        ("2 1/2", "21/2", False),
        ("2 3/2", "5/2", False),
        ("1 0.5", "10.5", False),
        ("1 2", "12", False),
        ("12", "1 2", False),
        ("x = 1 2", "3", False),
        ("5$ $7", "57", False),
    ],
)
def test_blanks_between_digits(stated: str, answer: str, right: bool) -> None:
    assert grade_math(f"\\boxed{{{stated}}}", answer) == float(right)


def test_stated_answer() -> None:
    assert stated_answer(r"\boxed{a{b}c} and \boxed{d") == "a{b}c"
    assert stated_answer("#### 3\n#### 1,000 ") == "1000"
    assert stated_answer("#### 1,000, 2,000") == "1000, 2000"
    assert stated_answer("#### 7\n##### Check") == "7"
    for listed in ("(1,2)", "(1,200)", "1, 2", "1,2,3", "1,2000"):
        assert stated_answer(f"#### {listed}") == listed
    assert stated_answer("nothing") is None


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("#### Step 1\n3 + 4\nThe answer is 7.", "7"),
        ("The answer is 5. Check: 3+4 = 7", "5"),
        ("The answer is 8.\n#### 1,007", "1007"),
        (r"\boxed{2 1/2}", "5/2"),
        (r"\boxed{1 2}", "1 2"),
        ("So it is 7.", None),
    ],
)
def test_final_answer(completion: str, answer: str | None) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"\boxed{5\text{ million dollars}}", "5,000,000", True),
        (r"\boxed{5\text{ cm}^2}", "5", True),
        (r"\boxed{9.8\ \text{m}/\text{s}^{2}}", "9.8", True),
        (r"\boxed{4 \text{ kg} \cdot \text{m/s}}", "4", True),
        (r"\boxed{-2 1/2}", "-2.5", True),
        (r"\boxed{1 000 000}", "1000000", True),
        ("so\n#### (1,2)", "(1,2)", True),
        ("so\n#### 1, 2", "1, 2", True),
        ("so\n#### 1,234", "1234", True),
        ("so\n#### $1,234.50", "1234.5", True),
        ("#### Step 1\nAdd.\nThe answer is 7.", "7", True),
        ("##### 7", "8", False),
        ("The answer is 7. Check: 3+4 = 7", "7", True),
        ("The answer is $x = 7$.", "7", True),
    ],
)
def test_what_a_number_is_and_where_it_stands(completion: str, answer: str, right: bool) -> None:
    assert grade_math(completion, answer) == float(right)
