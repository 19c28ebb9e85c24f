"""Worked answers: careful ones are right by the dataset's own grader, sloppy ones seldom."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st
from reasoning_gym.utils import extract_answer

from capo import InputError
from capo.policies.batches import Batches, make_tokenizer
from capo.policies.families import relations, shortest_path
from capo.policies.lessons import draw_lessons, make_teacher, task_of
from capo.policies.pretrain_config import PretrainConfig
from capo.policies.recipes import recipe_names, recipe_settings
from capo.policies.tokenizer import train_bpe
from capo.policies.worked import WORKED

RECIPES = {name: PretrainConfig.from_dict(recipe_settings(name)) for name in recipe_names()}
WITH_DATASET = {
    config.task.params["dataset"]: config
    for config in RECIPES.values()
    if config.task.name == "reasoning_gym"
}


def entries(config: PretrainConfig, count: int) -> tuple[Any, list[dict[str, Any]]]:
    """Entries from reasoning-gym itself, not through our task."""
    ours = ("dataset", "template", "max_completion_tokens", "largest_number")
    params = {k: v for k, v in config.task.params.items() if k not in ours}
    made = reasoning_gym.create_dataset(
        config.task.params["dataset"], seed=77, size=count, **params
    )
    return made, [made[index] for index in range(count)]


def test_every_dataset_with_strategies_has_a_recipe() -> None:
    assert set(WITH_DATASET) == set(WORKED)


@pytest.mark.parametrize("dataset", WORKED)
def test_careful_is_right_and_the_others_seldom(dataset: str) -> None:
    made, questions = entries(WITH_DATASET[dataset], 200)
    rng = random.Random(0)
    for name, strategy in WORKED[dataset].items():
        answers = [extract_answer(strategy(entry, rng)) for entry in questions]
        right = sum(
            made.score_answer(answer, entry) == 1
            for answer, entry in zip(answers, questions, strict=True)
        )
        assert None not in answers
        assert right == 200 if name == "careful" else right <= 70, name


@pytest.mark.parametrize("dataset", WORKED)
def test_lessons_leave_the_held_out_questions_out(dataset: str) -> None:
    config = WITH_DATASET[dataset]
    task = task_of(config)
    lessons = draw_lessons(random.Random(0), config, make_teacher(task, 0), 500)
    held_out = {problem.prompt for problem in task.eval_problems(100, 0)}
    assert not held_out & {lesson.prompt for lesson in lessons}
    again = draw_lessons(random.Random(0), config, make_teacher(task, 0), 500)
    assert lessons == again
    assert lessons != draw_lessons(random.Random(0), config, make_teacher(task, 1), 500)


def test_word_problems_have_worked_steps_of_the_promised_length() -> None:
    config = RECIPES["gsm_symbolic"]
    batches = Batches.of(config)
    lessons = draw_lessons(random.Random(0), config, batches.teacher, 500)
    lengths = [
        len(ids) + 1 for ids in batches.tokenizer([x.completion for x in lessons])["input_ids"]
    ]
    assert sum(60 <= length <= 200 for length in lengths) > 0.8 * 500
    assert sum(bool(re.search(r"\d\s*=|=\s*\D?\d", x.completion)) for x in lessons) > 0.8 * 500


def test_a_slip_is_carried_into_the_answer() -> None:
    _, questions = entries(RECIPES["gsm_symbolic"], 100)
    rng, seen = random.Random(0), 0
    for entry in questions:
        right = WORKED["gsm_symbolic"]["careful"](entry, rng)
        wrong = WORKED["gsm_symbolic"]["slip"](entry, rng)
        answer = extract_answer(wrong)
        assert answer is not None
        steps, _, last = right.partition("\nThe answer is")[0].rpartition("\n")
        assert wrong.startswith(steps)  # all but the last step as it was
        if entry["answer"] in last.split(" ")[-1]:
            seen += 1
            assert answer in wrong.partition("\nThe answer is")[0].rpartition("\n")[2]
    assert seen > 10


def test_filtering_says_what_is_kept_and_on_which_side_a_number_is() -> None:
    _, questions = entries(RECIPES["number_filtering"], 200)
    rng, equal = random.Random(0), 0
    for entry in questions:
        meta = entry["metadata"]
        bound = float(meta["filter_value"])
        for name, right in (("careful", True), ("opposite", False)):
            steps, _, said = WORKED["number_filtering"][name](entry, rng).partition(" <answer>")
            rule, _, verdicts = steps.partition(": ")
            holds = {">": float.__gt__, "<": float.__lt__, ">=": float.__ge__, "<=": float.__le__}[
                rule
            ]
            kept = []
            for verdict in verdicts.split(", "):
                number, side, word = verdict.split()
                assert side == (
                    ">" if float(number) > bound else "<" if float(number) < bound else "="
                )
                assert (word == "yes") == holds(float(number), bound)
                equal += side == "="
                kept += [number] * (word == "yes")
            assert (kept == meta["result"]) == right or not meta["original_numbers"]
            assert said == f"{kept}</answer>"
    assert equal > 10


def test_paths_go_where_the_story_goes() -> None:
    _, questions = entries(RECIPES["family_relationships"], 100)
    for entry in questions:
        meta, story = entry["metadata"], entry["question"]
        start, *steps = shortest_path(story, meta["person1"], meta["person2"]).split(", ")
        person = meta["person1"]
        assert start == person
        for step in steps:
            role, other = step.split(" of ")
            sentences = [s for s in story.split(". ") if person in s and other in s]
            if role == "spouse":
                assert any(s.startswith((f"{person} is", f"{other} is")) for s in sentences)
            else:
                parent, child = (person, other) if role == "parent" else (other, person)
                couple = re.search(
                    rf"(\w+ is married to {parent}|{parent} is married to \w+)", story
                )
                assert couple
                called = story[couple.end() :].split(". ")[1]
                assert child in called
            person = other
        assert person == meta["person2"]


def test_who_is_not_connected_has_no_path() -> None:
    story = "Ann is married to Bob. They have children called Cid, Dan and Eve."
    assert relations(story)["Eve"] == [("child", "Ann"), ("child", "Bob")]
    assert shortest_path(story, "Cid", "Dan") == "Cid, child of Ann, parent of Dan"
    with pytest.raises(ValueError, match="not connected"):
        shortest_path(story, "Ann", "Zoe")


def test_bpe_is_deterministic_lossless_and_spells_numbers() -> None:
    config = RECIPES["gsm_symbolic"]
    one, other = (make_tokenizer(config, task_of(config)) for _ in range(2))
    assert one.get_vocab() == other.get_vocab()
    assert len(one) == config.vocabulary
    assert len(one("12345")["input_ids"]) == 5
    for pieces in (entries(config, 50)[1], [{"question": "naïve\t<answer>€ ½</answer> \n"}]):
        for entry in pieces:
            text = entry["question"]
            assert one.decode(one(text)["input_ids"]) == text


@given(st.text(max_size=60))
def test_any_text_survives_the_bpe(text: str) -> None:
    assert BPE.decode(BPE(text)["input_ids"]) == text


BPE = train_bpe(["the cat sat on the mat, the cat"] * 10, 264, 64)


def test_a_bpe_larger_than_its_texts_is_refused() -> None:
    with pytest.raises(InputError, match="must be at most"):
        train_bpe(["aab"], 400, 64)


@pytest.mark.parametrize(
    ("values", "field", "says"),
    [
        ({"task": {"name": "chess"}}, "task.name", "sums"),
        ({"task": {"name": "reasoning_gym"}}, "task.params.dataset", "must be one of aiw"),
        ({"architecture": "mamba"}, "architecture", "qwen2"),
        ({"vocabulary": 12}, "vocabulary", "258"),
        ({"strategies": {"careful": 0.4, "drop": 0.6}}, "strategies", "'drop' is unknown"),
        ({"sorted_batches": 0}, "sorted_batches", "1"),
    ],
)
def test_bad_recipes(values: dict[str, Any], field: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        PretrainConfig.from_dict(values)
    assert error.value.field == field


def test_bad_task_parameters_are_named() -> None:
    settings = recipe_settings("aiw")
    settings["task"]["params"]["max_entitiez"] = 3
    with pytest.raises(InputError, match="did you mean max_entities") as error:
        task_of(PretrainConfig.from_dict(settings))
    assert error.value.field == "task.params.max_entitiez"


def test_completions_without_room_are_refused() -> None:
    settings = recipe_settings("aiw") | {"vocabulary": None, "batch_size": 2}
    settings["task"]["params"]["max_completion_tokens"] = 2
    with pytest.raises(InputError, match="is too small for worked answers: 2"):
        Batches.of(PretrainConfig.from_dict(settings)).draw(random.Random(0))


def test_recipes_are_what_their_command_says() -> None:
    import shlex

    from capo.lab.sources import parse_override

    for config in RECIPES.values():
        settings: dict[str, Any] = {}
        words = shlex.split(config.command())[4:]
        assert words[::2] == ["--set"] * (len(words) // 2)
        for word in words[1::2]:
            settings |= parse_override(f"set.{word}")["set"]
        assert PretrainConfig.from_dict(settings) == config, json.dumps(settings)
