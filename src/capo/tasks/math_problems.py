"""Mathematics problems from a file or a dataset, graded by math-verify."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from capo.core.errors import InputError
from capo.tasks.base import Problem, check_prompting, check_texts
from capo.tasks.math_grading import final_answer, stated_answer

_HELD_OUT_ONE_IN = 10
_QUESTION_FIELDS = ("problem", "question")
_ANSWER_FIELDS = ("answer", "final_answer", "solution")
TEMPLATE = "{problem}\nReason step by step, and put the final answer within \\boxed{}.\n"


@dataclass(frozen=True)
class MathProblems:
    """Problems with a field ``problem`` or ``question`` and one ``answer`` or ``solution``.

    An answer that is a worked solution is reduced to its last ``\\boxed{...}`` or to what follows
    its last ``####``. A problem that occurs twice counts once.

    Args:
        path: a JSONL file, or anything `datasets.load_dataset` takes: a directory or a Hub name.
        split: of the dataset, to train on. A JSONL file has no splits.
        eval_path: where the held-out problems are; by default a tenth of ``path``, chosen by a hash
            of the problem. Problems found there are never trained on.
        eval_split: of the dataset, to hold out; with no ``eval_path``, of ``path`` itself.
        config: of the dataset, where it has several.
        template: the prompt; ``{problem}`` stands for the problem.
        max_completion_tokens: tokens a completion may take.

    Raises:
        InputError: a file or dataset that cannot be read, a row without a problem or an answer,
            a split without problems, or a template without ``{problem}``.
    """

    path: str
    split: str = "train"
    eval_path: str | None = None
    eval_split: str | None = None
    config: str | None = None
    template: str = TEMPLATE
    max_completion_tokens: int = 1024
    _train: list[Problem] = field(init=False, repr=False, compare=False)
    _eval: list[Problem] = field(init=False, repr=False, compare=False)

    name: ClassVar[str] = "math"

    def __post_init__(self) -> None:
        """Read the files and keep the splits apart."""
        check_texts(self, "path", "split")
        for name in ("eval_path", "eval_split", "config"):
            if getattr(self, name) is not None:
                check_texts(self, name)
        check_prompting(self.template, self.max_completion_tokens)
        problems = self._read(self.path, self.split, "path")
        if self.eval_path is None and self.eval_split is None:
            held_out = {key: p for key, p in problems.items() if _is_held_out(key)}
        else:
            eval_path = self.path if self.eval_path is None else self.eval_path
            held_out = self._read(eval_path, self.eval_split or "test", "eval_path")
        train = [problem for key, problem in problems.items() if key not in held_out]
        object.__setattr__(self, "_train", train)
        object.__setattr__(self, "_eval", list(held_out.values()))

    def train_problems(self, n: int, seed: int) -> list[Problem]:
        """See `capo.tasks.base.Task.train_problems`."""
        return _sample(self._train, n, f"train {seed}")

    def eval_problems(self, n: int, seed: int) -> list[Problem]:
        """See `capo.tasks.base.Task.eval_problems`."""
        return _sample(self._eval, n, f"held-out {seed}")

    def grade(self, completion: str, problem: Problem) -> float:
        """See `capo.tasks.math_grading.grade_math`; runs in a process of bounded time."""
        from capo.tasks.grading import grade_many

        return grade_many(self, [completion], [problem])[0]

    def final_answer(self, completion: str) -> str | None:
        """See `capo.tasks.math_grading.final_answer`."""
        return final_answer(completion)

    @property
    def eval_size(self) -> int:
        """Held-out problems in all."""
        return len(self._eval)

    def grading_job(self, completion: str, problem: Problem) -> dict[str, Any]:
        """See `capo.tasks.grading.PooledTask`."""
        return {"kind": "math", "completion": completion, "answer": problem.answer}

    def _read(self, path: str, split: str, where: str) -> dict[str, Problem]:
        problems: dict[str, Problem] = {}
        for number, row in enumerate(_rows(path, split, where, self.config), start=1):
            question, answer = _question(row), _answer(row)
            if question is None or answer is None:
                lacking = _QUESTION_FIELDS if question is None else _ANSWER_FIELDS
                raise InputError(
                    where, f"row {number} of '{path}' has no usable field {' or '.join(lacking)}."
                )
            key = hashlib.sha256(" ".join(question.split()).encode()).hexdigest()[:16]
            prompt = self.template.replace("{problem}", question)
            problems.setdefault(key, Problem(prompt=prompt, answer=answer, id=f"math/{key}"))
        if not problems:
            raise InputError(where, f"'{path}' has no problems.")
        return problems


def _rows(path: str, split: str, where: str, config: str | None) -> Iterator[dict[str, Any]]:
    file = Path(path).expanduser()
    if file.is_file():
        yield from _json_lines(file, where)
        return
    if file.suffix in (".jsonl", ".json"):
        raise InputError(where, f"there is no file '{path}'.")
    from datasets import load_dataset

    try:
        rows: Iterable[dict[str, Any]] = load_dataset(str(path), config, split=split)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            where, f"'{path}' is neither a JSONL file nor a dataset with split {split!r}: {reason}"
        ) from error
    yield from rows


def _json_lines(file: Path, where: str) -> Iterator[dict[str, Any]]:
    # not splitlines(): a JSON string may hold U+2028, which that would break at
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(where, f"line {number} of '{file}' is not JSON: {error}.") from error
        if not isinstance(row, dict):
            raise InputError(where, f"line {number} of '{file}' is not a JSON object.")
        yield row


def _question(row: dict[str, Any]) -> str | None:
    found = (row.get(name) for name in _QUESTION_FIELDS)
    return next((text for text in found if isinstance(text, str) and text.strip()), None)


def _answer(row: dict[str, Any]) -> str | None:
    for name in _ANSWER_FIELDS:
        value = row.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is None or isinstance(value, list | dict | bool):
            continue
        text = str(value).strip()
        stated = stated_answer(text)
        if stated is not None:
            return stated.strip()
        if text and name != "solution":  # a solution without a marked answer cannot be graded
            return text
    return None


def _is_held_out(key: str) -> bool:
    return int(key, 16) % _HELD_OUT_ONE_IN == 0


def _sample(problems: list[Problem], n: int, seed: str) -> list[Problem]:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(problems):
        raise InputError("n", f"must be in 1..{len(problems)} (problems available), got {n!r}.")
    return random.Random(seed).sample(problems, n)
