"""Evaluation suites: which tasks, how many problems, how many completions, at which temperature."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from capo.core.errors import InputError
from capo.lab.sections import NonNegativeFloat, PositiveInt, Section, Seed, validate

if TYPE_CHECKING:
    from capo.tasks import Problem, Task

DEFAULT_PROBLEMS = 256  # of a task that makes its problems up; a file is evaluated whole
_VARIABLE = re.compile(r"\$\{(\w+)\}")


class SuiteTask(Section):
    """``[[tasks]]``: one row of the report.

    ``dataset`` is a JSONL file, relative to the suite's own, or a Hub name for ``math`` (all of
    ``split`` is evaluated), a name for ``reasoning_gym``, absent for ``sums``. ``${NAME}`` in it stands
    for an environment variable. ``problems`` are as many as there are where it is absent.
    """

    name: str
    task: str = "math"
    dataset: str | None = None
    split: str = "test"
    params: dict[str, Any] = Field(default_factory=dict)
    problems: PositiveInt | None = None
    k: PositiveInt = 1
    temperature: NonNegativeFloat = 1.0
    top_k: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    batch_size: PositiveInt = 512
    seed: Seed = 20251000


class Suite(Section):
    """A suite; ``[defaults]`` holds keys of ``[[tasks]]`` for those that leave them out."""

    defaults: dict[str, Any] = Field(default_factory=dict)
    tasks: list[dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Entry:
    """One task of a suite, loaded: its settings, its grader and its problems."""

    settings: SuiteTask
    task: Task
    problems: list[Problem]


def suite_names() -> list[str]:
    """Names of the suites that ship with the package, sorted."""
    names = (entry.name for entry in resources.files("capo.suites").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_suite(source: str) -> list[Entry]:
    """Read a suite and load every task and problem of it.

    Args:
        source: a TOML file, the name of a suite that ships with the package, or a JSONL file of mathematical
            problems, which is a suite of that one task.

    Raises:
        InputError: anything that cannot be used, data that is missing among it.
    """
    text, directory = _text(source)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(source, f"is not valid TOML: {error}.") from None
    suite = validate(Suite, document)
    settings = [
        validate(SuiteTask, suite.defaults | table, prefix=("tasks", str(number)))
        for number, table in enumerate(suite.tasks)
    ]
    names = [each.name for each in settings]
    for name in names:
        if names.count(name) > 1:
            raise InputError("tasks", f"two of them are named {name!r}; names must differ.")
    return [_loaded(each, directory) for each in settings]


def _text(source: str) -> tuple[str, Path]:
    if source in suite_names():
        file = resources.files("capo.suites").joinpath(f"{source}.toml")
        return file.read_text(encoding="utf-8"), Path()
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        return (
            f"[[tasks]]\nname = {json.dumps(path.stem)}\ndataset = {json.dumps(path.name)}\n",
            path.parent,
        )
    if path.is_file():
        return path.read_text(encoding="utf-8"), path.parent
    near = difflib.get_close_matches(source, suite_names(), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"suites are {', '.join(suite_names())}."
    raise InputError("--suite", f"{source!r} is neither a file nor a suite; {hint}")


def _loaded(settings: SuiteTask, directory: Path) -> Entry:
    from capo.tasks import load_task

    field = f"tasks.{settings.name}"
    try:
        task = load_task(settings.task, **_parameters(settings, directory))
        number = settings.problems or int(getattr(task, "eval_size", DEFAULT_PROBLEMS))
        return Entry(settings, task, task.eval_problems(number, settings.seed))
    except InputError as error:
        raise InputError(f"{field}.{_key(error.field)}", error.message) from None


def _key(field: str) -> str:
    """The suite's key for what a task complains about."""
    return {"path": "dataset", "eval_path": "dataset", "n": "problems"}.get(field, field)


def _parameters(settings: SuiteTask, directory: Path) -> dict[str, Any]:
    dataset = settings.dataset
    if settings.task == "math":
        if dataset is None:
            raise InputError("dataset", "is required by task 'math'.")
        dataset = _VARIABLE.sub(_variable, dataset)
        if (directory / dataset).exists():
            dataset = str(directory / dataset)
        # Everything that is there is held out: a suite trains nothing.
        own = {"path": dataset, "split": settings.split, "eval_path": dataset}
        return own | {"eval_split": settings.split} | settings.params
    if dataset is None:
        return settings.params
    return {"dataset": dataset} | settings.params


def _variable(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if not value:
        raise InputError("dataset", f"needs the environment variable {match[1]}, which is not set.")
    return value
