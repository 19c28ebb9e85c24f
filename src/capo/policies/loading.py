"""From a name or a directory to a policy: a model, its tokenizer, and checks that they agree."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from capo.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = {"embedded:sums": Path(__file__).parent / "sums"}


@dataclass
class Policy:
    """A language model to be trained or sampled from.

    Attributes:
        model: a causal language model, in eval mode when loaded.
        tokenizer: its tokenizer; pads on the left and has a padding token.
        source: where it came from, as given to `load_policy`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str


def load_policy(
    source: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
) -> Policy:
    """Load a fresh copy of a policy, without touching the network.

    Args:
        source: ``"embedded:sums"`` or a Hugging Face model directory with its tokenizer.
        dtype: of the weights; None: as they were saved.
        device: where the weights go.

    Raises:
        InputError: the directory is missing or is not a model's, there is no tokenizer, or the
            tokenizer does not match the model.
    """
    directory = _directory_of(str(source))
    tokenizer = _load_tokenizer(directory)
    model = _load_model(directory, dtype)
    _check_match(tokenizer, model, directory)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval()
    model.to(device)
    return Policy(model=model, tokenizer=tokenizer, source=str(source))


def _directory_of(source: str) -> Path:
    if source in EMBEDDED:
        return EMBEDDED[source]
    embedded = ", ".join(sorted(EMBEDDED))
    if source.startswith("embedded:"):
        raise InputError("policy.path", f"no embedded policy {source!r}; there is {embedded}.")
    directory = Path(source).expanduser()
    if not directory.is_dir():
        raise InputError(
            "policy.path",
            f"{source!r} is not a directory; give {embedded} or a Hugging Face model directory.",
        )
    if not (directory / "config.json").is_file():
        raise InputError("policy.path", f"{source!r} has no config.json: not a model directory.")
    return directory


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    # Without this check transformers would make up an empty tokenizer from config.json alone.
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if not any((directory / name).is_file() for name in names):
        raise InputError("policy.path", f"'{directory}' has no tokenizer; it needs tokenizer.json.")
    try:
        tokenizer = _tokenizer_class(directory).from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise InputError(
            "policy.path", f"the tokenizer in '{directory}' cannot be loaded: {_brief(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            "policy.path",
            f"the tokenizer in '{directory}' has no eos_token, so no completion could end.",
        )
    return tokenizer


def _tokenizer_class(directory: Path) -> Any:
    """The class that reads the tokenizer as it was saved.

    transformers takes a Qwen2's tokenizer for Qwen2's own, with other pieces and another end, even
    where its file says that it is not.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = directory / "tokenizer_config.json"
    said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    generic = said.get("tokenizer_class") == PreTrainedTokenizerFast.__name__
    return PreTrainedTokenizerFast if generic else AutoTokenizer


def _load_model(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype or "auto", local_files_only=True
        )
    except Exception as error:
        raise InputError(
            "policy.path", f"the model in '{directory}' cannot be loaded: {_brief(error)}"
        ) from error


def _check_match(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, directory: Path
) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise InputError(
            "policy.path",
            f"the tokenizer in '{directory}' does not match the model: its largest token id is "
            f"{largest}, the model embeds ids up to {rows - 1}.",
        )
    if tokenizer.pad_token_id is None:
        return
    # a model that stops at a token which the tokenizer does not call its end was trained with
    # another tokenizer (an instruct model's list of end tokens must contain it)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = model.config.eos_token_id if ends is None else ends
    known = [ends] if isinstance(ends, int) else list(ends or [])
    if known and not set(known) <= set(tokenizer.get_vocab().values()):
        raise InputError(
            "policy.path",
            f"the tokenizer in '{directory}' does not match the model: the model ends a "
            f"completion with token id {known}, which the tokenizer does not have.",
        )


def _brief(error: Exception) -> str:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return first[0][:200]
