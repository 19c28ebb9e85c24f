"""Training on a task whose completions are graded in worker processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capo.lab.ingredients import accuracy_reward
from capo.lab.run import train
from capo.lab.rundir import RunDirectory
from capo.tasks import load_task
from run_kit import tiny

ONE_STEP = ("training.steps=1", "training.save_every=1", "training.max_completion_tokens=16")


@pytest.mark.slow
def test_a_run_on_problems_of_a_file(tmp_path: Path) -> None:
    rows = [{"problem": f"{i}+20+30?", "answer": str(50 + i)} for i in range(10, 99)]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ("task.name=math", f'task.params={{path="{path}", template="{{problem}}"}}')
    config = tiny(*task, *ONE_STEP, "eval.problems=4")
    run = RunDirectory(train(config, tmp_path / "run"))
    assert run.state == "finished"
    assert 0 <= run.rows("evals.jsonl")[-1]["accuracy"] <= 1


def test_the_reward_survives_hostile_completions() -> None:
    task = load_task("reasoning_gym", dataset="countdown")
    problems = task.train_problems(4, 0)
    columns = {
        "prompts": [p.prompt for p in problems],
        "answer": [p.answer for p in problems],
        "id": [p.id for p in problems],
    }
    right = f"<answer>{problems[0].answer}</answer>"
    hostile = ["<answer>9**9**9**9</answer>", "\x00\ud800", "<answer>" * 1_000_000]
    rewards = accuracy_reward(task)(completions=[right, *hostile], **columns)
    assert rewards[0] == 1.0
    assert all(reward < 1 for reward in rewards[1:])
