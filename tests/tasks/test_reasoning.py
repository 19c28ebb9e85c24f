"""Datasets of reasoning-gym as tasks: disjoint splits, their own scores, errors with a hint."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import pytest

from capo import InputError
from capo.tasks import Task, grade_many, load_task
from capo.tasks.reasoning import _HASH_ORDERED, ReasoningGym


def test_splits_are_disjoint_and_deterministic() -> None:
    task = load_task("reasoning_gym", dataset="leg_counting", min_animals=1, max_animals=2)
    assert isinstance(task, Task)
    train, held_out = task.train_problems(60, 0), task.eval_problems(60, 0)
    assert train == task.train_problems(60, 0) != task.train_problems(60, 1)
    questions = {p.prompt for p in train}
    assert len(questions) == 60
    for seed in range(5):  # whatever the seeds
        assert not questions & {p.prompt for p in task.eval_problems(60, seed)}
    assert len({p.prompt for p in held_out}) == 60
    assert "<answer>" in train[0].prompt


@pytest.mark.parametrize("dataset", ["leg_counting", "countdown", "spell_backward", "maze"])
def test_gold_is_right_and_wrong_is_not(dataset: str) -> None:
    task = load_task("reasoning_gym", dataset=dataset)
    problems = task.eval_problems(8, 0)
    # countdown's own reference answer leaves room for other ways: its expression is in metadata
    golds = [p.answer for p in problems]
    gold = grade_many(
        task, [f"<answer>1</answer> no <answer>{a}</answer>" for a in golds], problems
    )
    assert gold == [1.0] * 8
    for wrong in ("{}", "<answer></answer>", "<answer>x</answer>", "", "<answer>{}"):
        texts = [wrong.format(answer) for answer in golds]
        assert all(0 <= r < 1 for r in grade_many(task, texts, problems))


def test_parameters_reach_the_dataset() -> None:
    one = load_task("reasoning_gym", dataset="leg_counting", min_animals=1, max_animals=1)
    assert all(
        "," not in p.prompt.split("you have")[1].split("?")[0] for p in one.train_problems(5, 0)
    )
    nested = load_task("reasoning_gym", dataset="leg_counting", parameters={"max_animals": 4})
    assert nested == load_task("reasoning_gym", dataset="leg_counting", max_animals=4)


def test_large_numbers_are_left_out_of_questions_answers_and_solutions() -> None:
    small = load_task("reasoning_gym", dataset="gsm_symbolic", largest_number=50)
    assert isinstance(small, ReasoningGym)
    problems = [*small.train_problems(60, 0), *small.eval_problems(60, 0)]
    texts = [problem.prompt + " " + problem.answer for problem in problems]
    for entry in itertools.islice(small.training_stream(0), 60):
        texts += [entry["question"], entry["answer"], entry["metadata"]["answer_cot"]]
    numbers = [float(n) for text in texts for n in re.findall(r"\d+(?:\.\d+)?", text)]
    assert max(numbers) <= 50
    assert len({problem.prompt for problem in problems}) == 120
    every = load_task("reasoning_gym", dataset="gsm_symbolic").train_problems(60, 0)
    assert any(float(problem.answer) > 50 for problem in every)
    assert (
        grade_many(small, [f"<answer>{p.answer}</answer>" for p in problems], problems)
        == [1.0] * 120
    )


@pytest.mark.parametrize(
    ("params", "field", "says"),
    [
        ({}, "dataset", "is required"),
        ({"dataset": "leg_countin"}, "dataset", "did you mean leg_counting"),
        ({"dataset": "leg_counting", "max_animal": 3}, "max_animal", "did you mean max_animals"),
        ({"dataset": "leg_counting", "seed": 3}, "seed", "leave it out"),
        ({"dataset": "leg_counting", "max_animals": -3}, "parameters", "refuses"),
        ({"dataset": "leg_counting", "template": "x"}, "template", "must contain"),
        ({"dataset": "gsm_symbolic", "largest_number": 0}, "largest_number", "at least 1"),
        ({"dataset": "gsm_symbolic", "largest_number": 2.5}, "largest_number", "at least 1"),
    ],
)
def test_bad_parameters(params: dict[str, object], field: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        load_task("reasoning_gym", **params)
    assert error.value.field == field


def test_a_split_that_runs_out_says_how_much_there_is() -> None:
    few = {"min_animals": 1, "max_animals": 1, "max_instances": 2}
    task = load_task("reasoning_gym", dataset="leg_counting", **few)
    with pytest.raises(InputError, match=r"must be at most [0-9]+, the held-out questions found"):
        task.eval_problems(100, 0)


@pytest.mark.parametrize("dataset", sorted(_HASH_ORDERED))
def test_what_differs_between_processes_needs_a_hash_seed(
    monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    for value in (None, "random"):
        with monkeypatch.context() as patched:
            patched.delenv("PYTHONHASHSEED", raising=False)
            if value:
                patched.setenv("PYTHONHASHSEED", value)
            with pytest.raises(InputError, match="PYTHONHASHSEED=0") as error:
                load_task("reasoning_gym", dataset=dataset)
            assert error.value.field == "dataset"
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    load_task("reasoning_gym", dataset=dataset)


DRAWS = """
import json, sys, warnings
from reasoning_gym.factory import DATASETS, create_dataset
warnings.simplefilter("ignore")
names = sorted(set(DATASETS) - {"composite", "word_ladder"} - set(sys.argv[1:]))  # refused anyway
made = {name: create_dataset(name, seed=3, size=4) for name in names}
print("made", json.dumps({name: str([each[i] for i in range(4)]) for name, each in made.items()}))
"""


@pytest.mark.slow
def test_no_other_dataset_differs_between_processes() -> None:
    command = [sys.executable, "-c", DRAWS, *_HASH_ORDERED]
    one, other = (
        json.loads(
            subprocess.run(
                command,
                env=os.environ | {"PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
                timeout=600,
            )
            .stdout.partition("made ")[2]
            .partition("\n")[0]
        )
        for seed in ("0", "7")
    )
    assert len(one) > 90
    assert [name for name in one if one[name] != other[name]] == []
