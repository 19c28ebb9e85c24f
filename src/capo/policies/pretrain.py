"""The recipe of the embedded policy: supervised pre-training on a mixture of strategies.

``capo pretrain --output DIR`` runs it with the defaults below, which are the recipe of the shipped
checkpoint. Everything is procedural: no data file is read.
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
from capo.policies.loading import Policy
from capo.policies.measure import measure
from capo.policies.pretrain_config import PretrainConfig
from capo.policies.strategies import STRATEGIES
from capo.policies.tokenizer import EOS, PAD, VOCABULARY, build_tokenizer
from capo.tasks.sums import Sums, draw_terms, is_held_out, problem_of

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["PretrainConfig", "PretrainReport", "pretrain", "weights_hash"]

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"
_IGNORED = -100  # label of a position without a loss, F.cross_entropy's own default
_PROMPT_AND_COMPLETION = 128  # positions; the sums need 34


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
        tokenizer = build_tokenizer(_PROMPT_AND_COMPLETION)
        model = build_model(config)
        losses = list(_train(model, config, progress))
        model.eval()
        policy = Policy(model=model, tokenizer=tokenizer, source=str(directory))
        measured = measure(
            policy, Sums(), problems=config.eval_problems, k=config.eval_k, seed=config.eval_seed
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


def build_model(config: PretrainConfig) -> PreTrainedModel:
    """A Qwen2 with random weights. The head is its own, not the transposed embedding."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    ids = {"eos_token_id": VOCABULARY[EOS], "pad_token_id": VOCABULARY[PAD], "bos_token_id": None}
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCABULARY),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=_PROMPT_AND_COMPLETION,
            tie_word_embeddings=False,
            **ids,
        )
    )


def draw_batch(
    rng: random.Random, config: PretrainConfig
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Draw sums outside the eval split, each answered by a strategy of the mixture.

    Returns:
        token ids ``[B, T]``, right-padded, and labels ``[B, T]`` in which only the answer and its
        end-of-sequence token count.
    """
    task = Sums()
    names = list(config.strategies)
    chosen = rng.choices(names, weights=[config.strategies[k] for k in names], k=config.batch_size)
    rows: list[tuple[list[int], int]] = []
    for name in chosen:
        terms = draw_terms(rng, task.smallest, task.largest)
        while is_held_out(terms):
            terms = draw_terms(rng, task.smallest, task.largest)
        prompt = problem_of(terms).prompt
        text = prompt + STRATEGIES[name](terms, rng)
        rows.append(([VOCABULARY[c] for c in text] + [VOCABULARY[EOS]], len(prompt)))
    length = max(len(ids) for ids, _ in rows)
    tokens = torch.full((len(rows), length), VOCABULARY[PAD])
    labels = torch.full((len(rows), length), _IGNORED)
    for row, (ids, prompt_length) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, prompt_length : len(ids)] = torch.tensor(ids[prompt_length:])
    return tokens, labels


def weights_hash(directory: str | Path) -> str:
    """The SHA-256 of a policy's weights file, in hexadecimal."""
    return hashlib.sha256((Path(directory) / WEIGHTS).read_bytes()).hexdigest()


def _train(
    model: PreTrainedModel,
    config: PretrainConfig,
    progress: Callable[[int, int, float], None] | None,
) -> Iterator[float]:
    rng = random.Random(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.adam_betas,
        weight_decay=config.weight_decay,
    )
    model.train()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, config)
        tokens, labels = draw_batch(rng, config)
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
