"""Problems from files: every field name in use, splits that never meet, errors that say where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capo import InputError
from capo.tasks import Task, load_task


def _write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _many(count: int, shift: int = 0) -> list[dict[str, str]]:
    return [
        {"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(shift, count + shift)
    ]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "p", "answer": "42"}, "42"),
        ({"question": "p", "answer": "So 6*7.\n#### 1,042"}, "1042"),
        ({"problem": "p", "solution": r"Thus $\boxed{\frac{1}{2}}$ is it."}, r"\frac{1}{2}"),
        ({"problem": "p", "solution": r"\boxed{1}, no: \boxed{x_{3}}"}, "x_{3}"),
        ({"problem": "p", "answer": 27.0}, "27.0"),
        ({"question": "p", "final_answer": ["2"], "solution": ["long"]}, "2"),
        ({"problem": "p", "answer": "7", "solution": r"\boxed{8}"}, "7"),
    ],
)
def test_fields(tmp_path: Path, row: dict[str, Any], answer: str) -> None:
    task = load_task("math", path=_write(tmp_path / "a.jsonl", [row]), template="{problem}!")
    every = [*task._train, *task._eval]  # type: ignore[attr-defined]
    assert [(p.prompt, p.answer) for p in every] == [("p!", answer)]


def test_splits(tmp_path: Path) -> None:
    task = load_task("math", path=_write(tmp_path / "a.jsonl", _many(300) + _many(50)))
    assert isinstance(task, Task)
    held_out = len(task._eval)  # type: ignore[attr-defined]
    assert 10 <= held_out <= 60
    train, evals = task.train_problems(300 - held_out, 0), task.eval_problems(held_out, 0)
    assert len({p.id for p in train + evals}) == 300
    assert task.train_problems(20, 3) == task.train_problems(20, 3) != task.train_problems(20, 4)
    with pytest.raises(InputError, match="problems available"):
        task.train_problems(301, 0)


def test_eval_file_is_never_trained_on(tmp_path: Path) -> None:
    task = load_task(
        "math",
        path=_write(tmp_path / "a.jsonl", _many(30)),
        eval_path=_write(tmp_path / "b.jsonl", _many(20, shift=20)),
    )
    train, evals = task.train_problems(20, 0), task.eval_problems(20, 0)
    assert not {p.id for p in train} & {p.id for p in evals}
    with pytest.raises(InputError):
        task.train_problems(21, 0)


def test_dataset_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    _write(data / "train.jsonl", _many(20))
    _write(data / "test.jsonl", _many(5, shift=100))
    task = load_task("math", path=str(data), eval_split="test")
    assert len(task.train_problems(20, 0)) == 20
    assert len(task.eval_problems(5, 0)) == 5
    with pytest.raises(InputError, match="split 'validation'"):
        load_task("math", path=str(data), split="validation")


def test_line_separators_inside_strings(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"problem": "a\u2028b", "answer": "1"}\n\n', encoding="utf-8")
    load_task("math", path=str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no problems"),
        ('{"problem": "p", "answer": "1"}\n{"problem": ', "line 2 .* not JSON"),
        ("[1]\n", "line 1 .* not a JSON object"),
        ('{"answer": "1"}\n', "row 1 .* problem or question"),
        ('{"problem": "p"}\n', "row 1 .* answer or final_answer or solution"),
        ('{"problem": "p", "solution": "by magic"}\n', "row 1 .* answer"),
        ('{"problem": "p", "answer": ""}\n', "row 1 .* answer"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        load_task("math", path=str(path))
    assert error.value.field == "path"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"path": "nowhere.jsonl"}, "path"),
        ({"path": "nowhere", "template": "no place"}, "template"),
        ({"path": "nowhere", "max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
def test_bad_parameters(params: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as error:
        load_task("math", **params)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("task", "parameters", "field"),
    [
        ("math", {"path": 5}, "path"),
        ("math", {"path": "x.jsonl", "eval_split": 3}, "eval_split"),
        ("math", {"path": "x.jsonl", "template": 1}, "template"),
        ("math", {"path": "x.jsonl", "max_completion_tokens": "many"}, "max_completion_tokens"),
        ("reasoning_gym", {"dataset": 5}, "dataset"),
        ("reasoning_gym", {"dataset": "leg_counting", "parameters": 1}, "parameters"),
        (
            "reasoning_gym",
            {"dataset": "leg_counting", "max_completion_tokens": 0},
            "max_completion_tokens",
        ),
    ],
)
def test_what_is_of_another_kind_is_named(
    task: str, parameters: dict[str, Any], field: str
) -> None:
    with pytest.raises(InputError) as error:
        load_task(task, **parameters)
    assert error.value.field == field
