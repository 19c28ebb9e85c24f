"""The sums: two splits that never meet, and a grader that nothing surprises."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo import InputError
from capo.tasks import Problem, Task, load_task
from capo.tasks.sums import Sums, is_held_out, problem_of

SUMS = load_task("sums")
PROBLEM = problem_of((37, 58, 26))


def test_is_a_task() -> None:
    assert isinstance(SUMS, Task)
    assert SUMS.name == "sums"


def test_splits_are_disjoint_for_all_seeds() -> None:
    train = {p.id for seed in range(3) for p in SUMS.train_problems(2000, seed)}
    held_out = {p.id for seed in range(3) for p in SUMS.eval_problems(2000, seed)}
    assert not train & held_out
    assert len(train) > 5900  # seeds draw different problems


def test_splits_of_a_small_range_cover_it() -> None:
    task = load_task("sums", smallest=1, largest=6)
    held_out = sum(
        is_held_out((a, b, c)) for a in range(1, 7) for b in range(1, 7) for c in range(1, 7)
    )
    assert 0 < held_out < 216
    ids = {p.id for p in task.train_problems(216 - held_out, 0) + task.eval_problems(held_out, 1)}
    assert len(ids) == 216
    with pytest.raises(InputError, match="problems available"):
        task.eval_problems(held_out + 1, 0)


def test_deterministic_and_distinct() -> None:
    first = SUMS.train_problems(500, 7)
    assert first == SUMS.train_problems(500, 7)
    assert first != SUMS.train_problems(500, 8)
    assert len({p.id for p in first}) == 500
    assert SUMS.eval_problems(500, 7) == SUMS.eval_problems(500, 7)


def test_answers_are_the_sums() -> None:
    for problem in SUMS.train_problems(200, 0) + SUMS.eval_problems(200, 0):
        terms = [int(n) for n in re.findall("[0-9]+", problem.prompt)]
        assert len(terms) == 3
        assert int(problem.answer) == sum(terms)
        assert all(10 <= term <= 99 for term in terms)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("37+58=95 95+26=121", 1.0),
        ("=121", 1.0),  # no credit for the work, and none taken off
        ("37+58=95 95+26=121\n", 1.0),
        ("=0121", 1.0),
        ("37+58=95", 0.0),
        ("37+58=95 95+26=111", 0.0),
        ("37+58=95 95+26=1211", 0.0),
        ("37+58=95 95+26=121 ", 1.0),
        ("37+58=95 95+26=121 or so", 0.0),
        ("37+58=95 95+26=121=", 0.0),
        ("121", 0.0),
        ("", 0.0),
        ("=", 0.0),
        ("=１２１", 0.0),  # full-width digits
        ("=12 1", 0.0),
        ("=+121", 0.0),
        ("=\x00121", 0.0),
        ("=" + "9" * 1_000_000, 0.0),
        ("=" + "0" * 1_000_000 + "121", 0.0),
        ("{" * 100_000 + "=121", 1.0),
    ],
)
def test_grading(completion: str, reward: float) -> None:
    assert SUMS.grade(completion, PROBLEM) == reward


@given(st.text())
def test_grading_never_raises(text: str) -> None:
    assert SUMS.grade(text, PROBLEM) in (0.0, 1.0)


def test_worked_answer_fits() -> None:
    longest = "99+99=198 198+99=297"
    assert len(longest) + 1 <= SUMS.max_completion_tokens <= 24
    assert SUMS.grade(longest, Problem("99+99+99?", "297", "x")) == 1.0


@pytest.mark.parametrize(
    ("name", "params", "field", "allowed"),
    [
        ("sudoku", {}, "task", "math, reasoning_gym, sums"),
        ("sums", {"biggest": 9}, "biggest", "smallest, largest"),
        ("sums", {"smallest": -1}, "smallest", r"0\.\.999"),
        ("sums", {"smallest": 50, "largest": 20}, "largest", r"50\.\.999"),
        ("sums", {"largest": 1.5}, "largest", "integer"),
        ("sums", {"largest": True}, "largest", "integer"),
        ("math", {}, "path", "required"),
    ],
)
def test_bad_parameters(name: str, params: dict[str, object], field: str, allowed: str) -> None:
    with pytest.raises(InputError, match=allowed) as error:
        load_task(name, **params)
    assert error.value.field == field


@pytest.mark.parametrize("n", [0, -1, 10**9, True, 2.0])
def test_bad_count(n: int) -> None:
    with pytest.raises(InputError) as error:
        SUMS.train_problems(n, 0)
    assert error.value.field == "n"


def test_reward_noise_turns_its_share_of_the_rewards_round_and_no_evaluation():
    task = Sums(reward_noise=0.2)
    problem = task.train_problems(1, 0)[0]
    right = f"1+1={problem.answer}"
    rewards = [task.training_reward(right, problem, draw) for draw in range(4000)]
    assert rewards == [task.training_reward(right, problem, draw) for draw in range(4000)]
    assert abs(rewards.count(0.0) / 4000 - 0.2) < 0.03
    assert task.grade(right, problem) == 1.0
    assert {Sums().training_reward(right, problem, draw) for draw in range(100)} == {1.0}


@pytest.mark.parametrize("noise", [-0.1, 0.5, True, "much"])
def test_impossible_reward_noise_is_named(noise):
    with pytest.raises(InputError, match="reward_noise"):
        Sums(reward_noise=noise)
