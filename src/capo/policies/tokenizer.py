"""The character tokenizer of the embedded policies: one token a character, 64 in all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<|pad|>", "<|eos|>", "<|unk|>"
# 3 special tokens and 61 characters: the digits and signs of the sums, and enough besides to
# write short English. A vocabulary larger than 50 keeps the paper's top-50 set meaningful.
CHARACTERS = "0123456789+=? -*/()<>.,:;!'\"\n%$#_&@" + "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = {text: index for index, text in enumerate([PAD, EOS, UNK, *CHARACTERS])}


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer; text outside `CHARACTERS` becomes the unknown token.

    Like Qwen2 it has no beginning-of-sequence token and adds nothing to a text; it pads on the left
    so that a batch of prompts ends where generation begins.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
