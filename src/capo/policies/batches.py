"""Batches of lessons as tokens, made in this process or by others beside it."""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from capo.core.errors import InputError
from capo.policies.lessons import Teacher, draw_lessons, make_teacher, task_of
from capo.policies.tokenizer import build_tokenizer, train_bpe

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from capo.policies.pretrain_config import PretrainConfig
    from capo.tasks import Task

IGNORED = -100  # label of a position without a loss, F.cross_entropy's own default
_TEXTS_FOR_MERGES = 4000  # lessons that a BPE tokenizer is trained on
_TRIES = 1000  # lessons in a row that are too long, before the recipe counts as impossible
_CHUNK = 1024  # lessons that a worker makes at a time: to begin costs as much as a few hundred
_AHEAD = 3  # chunks in the making, a worker


def make_tokenizer(config: PretrainConfig, task: Task) -> PreTrainedTokenizerBase:
    """The tokenizer of a recipe, trained on lessons of its task where it is a BPE."""
    if config.vocabulary is None:
        return build_tokenizer(config.positions)
    rng, teacher = random.Random(f"merges {config.seed}"), make_teacher(task, config.seed)
    lessons = draw_lessons(rng, config, teacher, _TEXTS_FOR_MERGES)
    texts = [lesson.prompt + lesson.completion for lesson in lessons]
    return train_bpe(texts, config.vocabulary, config.positions)


Row = tuple[list[int], list[int]]
"""The tokens of a prompt and of its completion with the end-of-sequence token."""


def _length(row: Row) -> int:
    return len(row[0]) + len(row[1])


@dataclass(frozen=True)
class Batches:
    """Batches of lessons as tokens.

    Attributes:
        config: the recipe.
        task: of the problems; none is from its held-out split.
        teacher: who answers them.
        tokenizer: of prompts and completions.
    """

    config: PretrainConfig
    task: Task
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, config: PretrainConfig) -> Batches:
        """The batches of a recipe, its tokenizer included."""
        task = task_of(config)
        tokenizer = make_tokenizer(config, task)
        return cls(config, task, make_teacher(task, config.seed), tokenizer)

    def stream(
        self, rng: random.Random
    ) -> Generator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]], None, None]:
        """Batches without end, as `draw` returns them. Closing it ends the workers, if there are any."""
        size, together = self.config.batch_size, self.config.sorted_batches
        for rows in self._drawn(rng, size * together):
            if together > 1:  # alike in length: less padding
                rows.sort(key=_length)
            starts = list(range(0, len(rows), size))
            if together > 1:
                rng.shuffle(starts)
            for start in starts:
                yield self._padded(rows[start : start + size])

    def draw(self, rng: random.Random) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Draw a batch. A completion that the task leaves no room for gives way to another.

        Returns:
            token ids ``[B, T]``, right-padded, and labels ``[B, T]`` in which only the completion and
            its end-of-sequence token count.

        Raises:
            InputError: the task leaves hardly any completion room.
        """
        return self._padded(self.rows(rng, self.config.batch_size))

    def rows(self, rng: random.Random, count: int) -> list[Row]:
        """Prompts and completions as tokens."""
        rows: list[Row] = []
        for _ in range(_TRIES):
            rows += self._fitting(rng, count - len(rows))
            if len(rows) == count:
                return rows
        raise InputError(
            "task.params.max_completion_tokens",
            f"is too small for worked answers: {self.task.max_completion_tokens}.",
        )

    def _drawn(self, rng: random.Random, count: int) -> Iterator[list[Row]]:
        """So many rows again and again."""
        if not self.config.workers:
            while True:
                yield self.rows(rng, count)
        with ProcessPoolExecutor(
            self.config.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self.config, self.tokenizer),
        ) as pool:
            try:
                chunks = itertools.chain.from_iterable(_made(pool, self.config.workers))
                while True:
                    yield list(itertools.islice(chunks, count))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _padded(self, rows: list[Row]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        length = max(_length(row) for row in rows)
        tokens = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), IGNORED)
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            tokens[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = torch.tensor(completion)
        return tokens, labels

    def _fitting(self, rng: random.Random, count: int) -> list[Row]:
        """``count`` lessons as tokens, less those that are too long."""
        lessons = draw_lessons(rng, self.config, self.teacher, count)
        prompts = self.tokenizer([lesson.prompt for lesson in lessons])["input_ids"]
        completions = self.tokenizer([lesson.completion for lesson in lessons])["input_ids"]
        ended = [[*ids, self.tokenizer.eos_token_id] for ids in completions]
        pairs = zip(prompts, ended, strict=True)
        limit = self.task.max_completion_tokens
        return [pair for pair in pairs if len(pair[1]) <= limit]


def _made(pool: ProcessPoolExecutor, workers: int) -> Iterator[list[Row]]:
    """Chunks in their order, a few ahead in the making."""
    numbers = itertools.count()
    ahead: deque[Future[list[Row]]] = deque(
        pool.submit(_chunk, next(numbers)) for _ in range(_AHEAD * workers)
    )
    while True:
        rows = ahead.popleft().result()
        ahead.append(pool.submit(_chunk, next(numbers)))
        yield rows


class _Worker:
    """What a worker process has: the recipe and its tokenizer."""

    config: PretrainConfig
    task: Task
    tokenizer: PreTrainedTokenizerBase


def _begin(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    from capo.lab.pool import begin_worker

    begin_worker()
    torch.set_num_threads(1)
    _Worker.config, _Worker.task, _Worker.tokenizer = config, task_of(config), tokenizer


def _chunk(number: int) -> list[Row]:
    """The lessons of that number: the same whoever makes them."""
    config = _Worker.config
    teacher = make_teacher(_Worker.task, (config.seed + 1) * 1_000_003 + number)
    batches = Batches(config, _Worker.task, teacher, _Worker.tokenizer)
    return batches.rows(random.Random(f"lessons {config.seed} {number}"), _CHUNK)
