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
from capo.policies.batches import IGNORED, Batches
from capo.policies.loading import Policy
from capo.policies.measure import measure
from capo.policies.pretrain_config import PretrainConfig

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["PretrainConfig", "PretrainReport", "pretrain", "weights_hash"]

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"


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
        InputError: ``output_dir`` is not an empty directory and ``overwrite`` is False, or there is no
            such device.
    """
    directory = Path(output_dir)
    if directory.exists() and not directory.is_dir():
        raise InputError("output", f"'{directory}' is a file; give a directory.")
    if directory.exists() and any(directory.iterdir()) and not overwrite:
        raise InputError("output", f"'{directory}' is not empty; give another or --overwrite.")
    check_device(config)
    started = time.monotonic()
    with _deterministic(config.seed, config.threads):
        batches = Batches.of(config)
        task, tokenizer = batches.task, batches.tokenizer
        model = build_model(config, tokenizer)
        model.to(config.device)
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
        "steps": len(losses),
        "seconds": round(time.monotonic() - started, 1),
    }
    recipe = _recipe(config, model, directory, figures)
    (directory / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return PretrainReport(directory=directory, losses=losses, recipe=recipe)


def check_device(config: PretrainConfig) -> None:
    """Refuse a device that is not there.

    Raises:
        InputError: ``device``.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device", "'cuda' needs a GPU, and torch finds none; use 'cpu'.")


def weights_hash(directory: str | Path) -> str:
    """The SHA-256 of a policy's weights file, in hexadecimal."""
    return hashlib.sha256((Path(directory) / WEIGHTS).read_bytes()).hexdigest()


def _train(
    model: PreTrainedModel,
    batches: Batches,
    progress: Callable[[int, int, float], None] | None,
) -> Iterator[float]:
    config = batches.config
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
        fused=config.device == "cuda" or None,
    )
    mixed = torch.autocast(config.device, dtype=torch.bfloat16, enabled=config.bf16)
    model.train()
    for step, share, batch in _steps(config, batches):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, share, config)
        tokens, labels = (part.to(config.device) for part in batch)
        # no attention mask: padding is on the right, which a causal model never looks at
        with mixed:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T-1, V]
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        if progress is not None:
            progress(step + 1, config.steps, loss.item())
        yield loss.item()


def _steps(
    config: PretrainConfig, batches: Batches
) -> Iterator[tuple[int, float, tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]]]:
    """Step, how much of the training is over (of its steps or of its time), and the batch."""
    with contextlib.closing(batches.stream(random.Random(config.seed))) as stream:
        started = None
        for step, batch in zip(range(config.steps), stream, strict=False):
            started = started or time.monotonic()
            share = step / config.steps
            if config.max_seconds is not None:
                share = max(share, (time.monotonic() - started) / config.max_seconds)
            if share >= 1:
                return
            yield step, share, batch


def _schedule(step: int, share: float, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine to zero, as a factor of the peak learning rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.max_seconds is None:
        share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * share))


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
