"""Per-token records on disk: one compact file a step, plus the vocabulary to read it with."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capo.lab.rundir import write_text, written_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from capo.integrations.trl import TokenRecord

# One value per token, in the type that its use needs: shifts span many orders of magnitude.
_PER_TOKEN = {
    "token_ids": np.int32,
    "log_prob": np.float32,
    "entropy": np.float16,
    "advantage": np.float32,
    "objective_shift": np.float32,
    "policy_shift": np.float32,
    "weight": np.float32,
    "reason": np.int8,
}
_FILE = re.compile(r"step-(\d+)\.npz")
_NEEDED = {"offsets", "token_ids", "policy_shift"}


class TokenWriter:
    """Collects a step's micro-batches; hand it to the trainer as a token callback.

    A file holds completions back to back: those of completion ``i`` are
    ``array[offsets[i]:offsets[i + 1]]`` of every per-token array; its prompt likewise is
    ``prompt_ids[prompt_offsets[i]:prompt_offsets[i + 1]]``, and its reward ``reward[i]``.
    """

    def __init__(self, directory: Path, wants: Callable[[int], bool] = lambda step: True) -> None:
        """Write the steps (from 1) that ``wants`` names to ``directory``, made when it is needed."""
        self.directory = directory
        self.wants = wants
        self._pending: list[TokenRecord] = []

    def __call__(self, record: TokenRecord) -> None:
        """Keep a judged micro-batch."""
        if self.wants(record.step + 1):
            self._pending.append(record)

    def flush(self, step: int) -> None:
        """Write the file of optimizer step ``step`` (from 1), if any token was judged for it."""
        records, self._pending = self._pending, []
        if not records:
            return
        self.directory.mkdir(exist_ok=True)
        path = self.directory / f"step-{step:06d}.npz"
        with written_aside(path) as aside, aside.open("wb") as handle:
            np.savez_compressed(handle, **pack(records))


def pack(records: list[TokenRecord]) -> dict[str, Any]:
    """Masked ``[B, T]`` micro-batches as flat arrays with offsets."""
    lengths = [record.mask.bool().sum(-1).numpy() for record in records]
    prompt_lengths = [record.prompt_mask.bool().sum(-1).numpy() for record in records]
    arrays: dict[str, Any] = {
        "offsets": _offsets(lengths),
        "prompt_offsets": _offsets(prompt_lengths),
        "prompt_ids": np.concatenate(
            [r.prompt_ids[r.prompt_mask.bool()].numpy() for r in records]
        ).astype(np.int32),
    }
    arrays["reward"] = np.concatenate([r.reward.float().numpy() for r in records])
    for name, dtype in _PER_TOKEN.items():
        flat = [getattr(r, name)[r.mask.bool()].float().numpy() for r in records]
        arrays[name] = np.concatenate(flat).astype(dtype)
    return arrays


def write_vocabulary(directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """``vocab.json``: token id -> its text."""
    directory.mkdir(exist_ok=True)
    ids = sorted(set(tokenizer.get_vocab().values()))
    texts = {index: tokenizer.decode([index]) for index in ids}
    write_text(directory / "vocab.json", json.dumps(texts, ensure_ascii=False))


def recorded_steps(directory: Path) -> dict[int, Path]:
    """The files of a run's recorded steps, in order."""
    found = ((_FILE.fullmatch(path.name), path) for path in directory.glob("step-*.npz"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_step(path: Path) -> dict[str, Any] | None:
    """The arrays of one step as `pack` made them; None for a file that cannot be read.

    Runs recorded by older versions lack some of them (``reward``).
    """
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    if not set(arrays) >= _NEEDED or arrays["token_ids"].size != arrays["policy_shift"].size:
        return None
    return arrays


def read_vocabulary(directory: Path) -> dict[int, str]:
    """Token id -> its text; empty where that was not kept."""
    try:
        entries = json.loads((directory / "vocab.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    pairs = enumerate(entries) if isinstance(entries, list) else entries.items()
    return {int(key): str(text) for key, text in pairs}


def _offsets(lengths: list[Any]) -> Any:
    return np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
