"""Supervised pre-training of a tiny policy on a mixture of strategies.

``capo pretrain --output DIR`` runs it with the defaults of `PretrainConfig`, which are the recipe of
the shipped checkpoint; other recipes are in `capo.policies.recipes`. Everything is procedural: no
data file is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from capo.core.errors import InputError
from capo.policies.architectures import build_model
from capo.policies.lessons import Teacher, draw_lessons, make_teacher, task_of
from capo.policies.loading import Policy
from capo.policies.measure import measure
from capo.policies.pretrain_config import PretrainConfig
from capo.policies.tokenizer import build_tokenizer, train_bpe

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from capo.tasks import Task

__all__ = ["PretrainConfig", "PretrainReport", "pretrain", "weights_hash"]

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"
_IGNORED = -100  # label of a position without a loss, F.cross_entropy's own default
_TEXTS_FOR_MERGES = 4000  # lessons that a BPE tokenizer is trained on
_TRIES = 1000  # lessons in a row that are too long, before the recipe counts as impossible


@dataclass(frozen=True)
class PretrainReport:
    """What `pretrain` did.

    Attributes:
        directory: where the policy was written.
        losses: mean negative log-likelihood of an answer token, nats, one per optimizer step.
        recipe: the content of ``recipe.json``.
    """

    directory: Path
    losses: list[float]
    recipe: dict[str, Any]


def pretrain(
    config: PretrainConfig,
    output_dir: str | Path,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    overwrite: bool = False,
) -> PretrainReport:
    """Pre-train a policy, measure it, and write both with the recipe that made them.

    Deterministic on one machine given ``config``; the global random state and the number of threads
    are restored afterwards.

    Args:
        config: the recipe.
        output_dir: becomes a Hugging Face model directory with its tokenizer and ``recipe.json``.
        progress: called after every optimizer step with (steps taken, steps in all, loss).
        overwrite: whether ``output_dir`` may hold files already.

    Raises:
        InputError: ``output_dir`` is not an empty directory and ``overwrite`` is False.
    """
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError("output", f"'{directory}' is a file; give a directory.")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise InputError("output", f"'{directory}' is not empty; give another or --overwrite.")
    started = time.monotonic()
    with _deterministic(config.seed, config.threads):
        batches = Batches.of(config)
        task, tokenizer = batches.task, batches.tokenizer
        model = build_model(config, tokenizer)
        losses = list(_train(model, batches, progress))
        model.eval()
        policy = Policy(model=model, tokenizer=tokenizer, source=str(directory))
        measured = measure(
            policy, task, problems=config.eval_problems, k=config.eval_k, seed=config.eval_seed
        )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    figures = {
        "measured": measured.to_dict(),
        "final_loss": sum(losses[-100:]) / len(losses[-100:]),
        "seconds": round(time.monotonic() - started, 1),
    }
    recipe = _recipe(config, model, directory, figures)
    (directory / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return PretrainReport(directory=directory, losses=losses, recipe=recipe)


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

    def stream(self, rng: random.Random) -> Iterator[tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]:
        """Batches without end, as `draw` returns them."""
        size, together = self.config.batch_size, self.config.sorted_batches
        while True:
            rows = self._rows(rng, size * together)
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
        return self._padded(self._rows(rng, self.config.batch_size))

    def _padded(self, rows: list[Row]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        length = max(_length(row) for row in rows)
        tokens = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(rows), length), _IGNORED)
        for row, (prompt, completion) in enumerate(rows):
            end = len(prompt) + len(completion)
            tokens[row, :end] = torch.tensor(prompt + completion)
            labels[row, len(prompt) : end] = torch.tensor(completion)
        return tokens, labels

    def _rows(self, rng: random.Random, count: int) -> list[Row]:
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

    def _fitting(self, rng: random.Random, count: int) -> list[Row]:
        """``count`` lessons as tokens, less those that are too long."""
        lessons = draw_lessons(rng, self.config, self.teacher, count)
        prompts = self.tokenizer([lesson.prompt for lesson in lessons])["input_ids"]
        completions = self.tokenizer([lesson.completion for lesson in lessons])["input_ids"]
        ended = [[*ids, self.tokenizer.eos_token_id] for ids in completions]
        pairs = zip(prompts, ended, strict=True)
        limit = self.task.max_completion_tokens
        return [pair for pair in pairs if len(pair[1]) <= limit]


def weights_hash(directory: str | Path) -> str:
    """The SHA-256 of a policy's weights file, in hexadecimal."""
    return hashlib.sha256((Path(directory) / WEIGHTS).read_bytes()).hexdigest()


def _train(
    model: PreTrainedModel,
    batches: Batches,
    progress: Callable[[int, int, float], None] | None,
) -> Iterator[float]:
    config = batches.config
    rng = random.Random(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
    )
    model.train()
    for step, (tokens, labels) in zip(range(config.steps), batches.stream(rng), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        # no attention mask: padding is on the right, which a causal model never looks at
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T-1, V]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        if progress is not None:
            progress(step + 1, config.steps, loss.item())
        yield loss.item()


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine to zero, as a factor of the peak learning rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


@contextlib.contextmanager
def _deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and fix the number of threads: the order of a sum depends on it."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def _recipe(
    config: PretrainConfig,
    model: PreTrainedModel,
    directory: Path,
    figures: dict[str, Any],
) -> dict[str, Any]:
    import transformers

    return {
        "command": config.command(),
        "seed": config.seed,
        "config": config.model_dump(mode="json"),
        "weights": {
            "file": WEIGHTS,
            "sha256": weights_hash(directory),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        **figures,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
