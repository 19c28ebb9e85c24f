"""The tokenizers of the pre-trained policies: one token a character, or a byte-level BPE."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from capo.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<|pad|>", "<|eos|>", "<|unk|>"
# 3 special tokens and 61 characters: the digits and signs of the sums, and enough besides to
# write short English. A vocabulary larger than 50 keeps the paper's top-50 set meaningful.
CHARACTERS = "0123456789+=? -*/()<>.,:;!'\"\n%$#_&@" + "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = {text: index for index, text in enumerate([PAD, EOS, UNK, *CHARACTERS])}
SMALLEST_BPE = 2 + 256  # the special tokens and the bytes


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer; text outside `CHARACTERS` becomes the unknown token.

    Like Qwen2 it has no beginning-of-sequence token and adds nothing to a text; it pads on the left
    so that a batch of prompts ends where generation begins.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return _as_transformers(backend, max_length, unk_token=UNK)


def train_bpe(texts: Iterable[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every text comes back as it was, and every digit is a token.

    Args:
        texts: to learn the merges from.
        vocabulary: entries, the end-of-sequence and the padding token among them.
        max_length: tokens that the model is made for.

    Raises:
        InputError: the texts have too few different pairs for so many entries.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocabulary:
        raise InputError(
            "vocabulary",
            f"must be at most {backend.get_vocab_size()}: the task's texts have no further pairs, "
            f"got {vocabulary}.",
        )
    return _as_transformers(backend, max_length)


def _as_transformers(backend: Any, max_length: int, **special: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **special,
    )
