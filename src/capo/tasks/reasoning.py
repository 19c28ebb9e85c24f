"""The procedural datasets of reasoning-gym, graded by their own ``score_answer``.

Source: https://github.com/open-thought/reasoning-gym. Each dataset makes a question from a seed and
an index, and scores what a completion says between ``<answer>`` and ``</answer>``.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

from capo.core.errors import InputError
from capo.tasks.base import Problem, check_prompting, check_texts
from capo.tasks.inert import evaluation, is_data, is_formula
from capo.tasks.pool import LONGEST

TEMPLATE = (
    "{problem}\nThink step by step, and put the final answer, and nothing else, "
    "between <answer> and </answer>.\n"
)
_HELD_OUT_ONE_IN = 5
_TRIES = 20  # questions generated for one wanted, before the dataset counts as exhausted
_SIZE = 1 << 20  # virtual: questions are made when they are asked for
_OURS = ("seed", "size")
# They draw from sets of text, whose order Python shuffles in every process (reasoning-gym 0.1.25).
_HASH_ORDERED = frozenset(
    {"codeio", "intermediate_integration", "isomorphic_strings", "knight_swap", "list_functions"}
    | {"polynomial_multiplication", "ransom_note"}
)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class ReasoningGym:
    """One dataset of reasoning-gym.

    Whether a question is held out is decided by a hash of the question, one in five being so:
    whatever the seeds, no question is both trained on and evaluated on, and none occurs twice in a
    draw. An answer is right iff its score is 1; in between there is partial credit, which is the
    dataset's own affair, and a reward in training all the same.

    Args:
        dataset: its name in reasoning-gym, as in ``leg_counting``.
        parameters: of the dataset's configuration; ``seed`` and ``size`` are the draw's.
        template: the prompt; ``{problem}`` stands for the question.
        max_completion_tokens: tokens a completion may take.
        largest_number: questions are left out that have a larger number in themselves, in their answer or
            in the dataset's own solution; None: none is.

    Raises:
        InputError: an unknown dataset or parameter, a value that the dataset refuses, a template
            without ``{problem}``, or a dataset whose questions differ from process to process
            while ``PYTHONHASHSEED`` is not a number.
    """

    dataset: str
    parameters: dict[str, Any] = field(default_factory=dict)
    template: str = TEMPLATE
    max_completion_tokens: int = 1024
    largest_number: int | None = None

    name: ClassVar[str] = "reasoning_gym"

    def __post_init__(self) -> None:
        """Check the parameters by making the dataset once."""
        check_texts(self, "dataset")
        check_prompting(self.template, self.max_completion_tokens)
        if not isinstance(self.parameters, dict):
            raise InputError("parameters", f"must be a table, got {self.parameters!r}.")
        largest = self.largest_number
        if largest is not None and (type(largest) is not int or largest < 1):
            raise InputError(
                "largest_number", f"must be an integer of at least 1, got {largest!r}."
            )
        known = _parameters(self.dataset)
        if self.dataset in _HASH_ORDERED and not os.environ.get("PYTHONHASHSEED", "").isdecimal():
            raise InputError(
                "dataset",
                f"{self.dataset!r} makes other questions in every process, graders among them; "
                "start Python with the environment variable PYTHONHASHSEED=0, or choose another.",
            )
        for name in self.parameters:
            if name in _OURS:
                raise InputError(name, "follows from the run's seed; leave it out.")
            if name not in known:
                raise InputError(
                    name, f"is not a parameter of dataset {self.dataset!r}{_near(name, known)}"
                )
        try:
            _entry(self.dataset, self._key, 0, 0)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                "parameters", f"dataset {self.dataset!r} refuses {self.parameters}: {reason}."
            ) from error

    @property
    def _key(self) -> str:
        return json.dumps(self.parameters, sort_keys=True)

    def train_problems(self, n: int, seed: int) -> list[Problem]:
        """See `capo.tasks.base.Task.train_problems`."""
        return self._draw(n, seed, held_out=False)

    def eval_problems(self, n: int, seed: int) -> list[Problem]:
        """See `capo.tasks.base.Task.eval_problems`."""
        return self._draw(n, seed, held_out=True)

    def training_stream(self, seed: int) -> Iterator[dict[str, Any]]:
        """The dataset's entries that are not held out, without end; some come more than once.

        Other than in `train_problems`, an entry has its metadata (``question``, ``answer``,
        ``metadata``).
        """
        for epoch in itertools.count():
            digest = hashlib.sha256(f"{self.dataset} stream {seed} {epoch}".encode()).digest()
            entries = _dataset(self.dataset, self._key, int.from_bytes(digest[:4], "big"))
            for index in range(_SIZE):
                entry: dict[str, Any] = entries[index]
                if not _is_held_out(str(entry["question"])) and self._is_small_enough(entry):
                    yield entry

    def grade(self, completion: str, problem: Problem) -> float:
        """The dataset's score of the completion's answer, in [0, 1]; 1 is right. Never raises."""
        from capo.tasks.grading import grade_many

        return grade_many(self, [completion], [problem])[0]

    def final_answer(self, completion: str) -> str | None:
        """What stands between the last ``<answer>`` and its end, white space evened out."""
        text, end, _ = completion[-LONGEST:].rpartition("</answer>")
        _, start, answer = text.rpartition("<answer>")
        return " ".join(answer.split()) if start and end else None

    def grading_job(self, completion: str, problem: Problem) -> dict[str, Any]:
        """See `capo.tasks.grading.PooledTask`."""
        *_, seed, index = problem.id.split("/")
        return {
            "kind": "reasoning_gym",
            "completion": completion,
            "entry": [self.dataset, self._key, int(seed), int(index)],
        }

    def _draw(self, n: int, seed: int, *, held_out: bool) -> list[Problem]:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError("n", f"must be an integer of at least 1, got {n!r}.")
        split = "held-out" if held_out else "train"
        digest = hashlib.sha256(f"{self.dataset} {split} {seed}".encode()).digest()
        start = int.from_bytes(digest[:4], "big")
        found: dict[str, Problem] = {}
        for index in range(min(_SIZE, _TRIES * _HELD_OUT_ONE_IN * n + 1000)):
            entry = _dataset(self.dataset, self._key, start)[index]
            question = str(entry["question"])
            if _is_held_out(question) != held_out or question in found:
                continue
            if self._is_small_enough(entry):
                prompt = self.template.replace("{problem}", question)
                place = f"reasoning_gym/{self.dataset}/{start}/{index}"
                found[question] = Problem(prompt=prompt, answer=str(entry["answer"]), id=place)
                if len(found) == n:
                    return list(found.values())
        raise InputError(
            "n", f"must be at most {len(found)}, the {split} questions found, got {n}."
        )

    def _is_small_enough(self, entry: dict[str, Any]) -> bool:
        if self.largest_number is None:
            return True
        texts = (entry["question"], entry["answer"], entry["metadata"].get("answer_cot", ""))
        numbers = _NUMBER.findall(" ".join(map(str, texts)).replace(",", ""))
        return all(float(number) <= self.largest_number for number in numbers)


def prepare_grading() -> None:
    """See `capo.tasks.worker.Grader`."""
    import reasoning_gym  # noqa: F401


def grade_job(payload: dict[str, Any]) -> float:
    """See `capo.tasks.worker.Grader`."""
    from reasoning_gym.utils import extract_answer

    name, key, seed, index = payload["entry"]
    answer = extract_answer(payload["completion"])
    dataset = _dataset(name, key, seed)
    if answer is None or not _is_inert(answer, name, dataset.config):
        return 0.0
    # A copy: what a scorer does to its entry must not meet the next completion.
    return float(dataset.score_answer(answer, copy.deepcopy(_entry(name, key, seed, index))))


def _is_inert(answer: str, dataset: str, configuration: Any) -> bool:
    """Whether the dataset's scorer can do nothing with ``answer`` but score it."""
    how = evaluation(dataset)
    if how is None:
        return True
    if how == "python":
        return is_data(answer)
    names = (getattr(configuration, name, ()) for name in ("symbols", "variables"))
    return is_formula(answer, {str(one) for several in names for one in several})


def _parameters(dataset: str) -> list[str]:
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise InputError(
            "dataset", f"{dataset!r} is no dataset of reasoning-gym{_near(dataset, list(DATASETS))}"
        )
    fields = dataclasses.fields(DATASETS[dataset][1])
    return [one.name for one in fields if one.init and one.name not in _OURS]


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f"; allowed: {', '.join(known[:20])}{', …' if len(known) > 20 else ''}."


@lru_cache(maxsize=64)
def _dataset(name: str, key: str, seed: int) -> Any:
    from reasoning_gym.factory import create_dataset

    parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(key).items()}
    return create_dataset(name, seed=seed, size=_SIZE, **parameters)


@lru_cache(maxsize=4096)
def _entry(name: str, key: str, seed: int, index: int) -> dict[str, Any]:
    entry: dict[str, Any] = _dataset(name, key, seed)[index]
    return entry


def _is_held_out(question: str) -> bool:
    digest = hashlib.sha256(" ".join(question.split()).encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0
