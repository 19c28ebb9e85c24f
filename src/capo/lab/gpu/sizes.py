"""The sizes at which the stages run: the real ones, a trial, and a dry run without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Core:
    """The core's problem, and how often each call is timed."""

    tokens: int = 24_576
    width: int = 3584
    vocabulary: int = 152_064
    top_k: int = 50
    chunked_tokens: int = 4096
    dict_tokens: int = 256
    repeats: int = 20
    sweep: tuple[dict[str, int], ...] = (
        {},
        {"rows": 128, "stages": 4},
        {"rows": 128, "width": 128},
        {"warps": 16},
        {"tokens": 64, "rows": 256, "stages": 4},
    )
    held: tuple[int, ...] = (1 << 27, 1 << 28)  # logits held at a time, beside the table's
    sweep_tokens: int = 6144


@dataclass(frozen=True)
class Policy:
    """A random-weight Qwen2 and the batch of its update step."""

    name: str
    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    completions: int
    completion_tokens: int
    prompt_tokens: int = 64
    generations: int = 8
    cycles: int = 4  # at most
    timed: int = 2  # steps of a trainer's turn, after one that is not timed
    seconds: float = 100.0  # no new turn after so long

    @property
    def tokens(self) -> int:
        """Completion tokens of a step."""
        return self.completions * self.completion_tokens

    def config(self) -> dict[str, Any]:
        """Arguments of ``Qwen2Config``."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 4096,
        }


QWEN_1_5B = Policy("Qwen2-1.5B", 28, 1536, 8960, 12, 2, 151_936, True, 16, 1024)
QWEN_7B = Policy(
    "Qwen2-7B", 28, 3584, 18_944, 28, 4, 152_064, False, 8, 1024, timed=1, seconds=115.0
)


@dataclass(frozen=True)
class Sizes:
    """All stages at one scale."""

    scale: str
    core: Core = field(default_factory=Core)
    policies: tuple[Policy, ...] = (QWEN_1_5B, QWEN_7B)
    copy_bytes: int = 1 << 32
    matmul: int = 8192
    check_tokens: tuple[int, ...] = (1, 131, 1031)
    check_vocabulary: int = 20_011
    check_width: int = 1000
    suite: tuple[str, ...] = ()  # pytest arguments


def sizes_of(scale: str) -> Sizes:
    """The sizes of ``scale``."""
    if scale == "full":
        return Sizes("full")
    if scale == "quick":
        core = Core(
            tokens=4096,
            chunked_tokens=512,
            dict_tokens=64,
            repeats=3,
            sweep=({}, {"rows": 128, "stages": 4}),
            held=(1 << 27,),
            sweep_tokens=2048,
        )
        policies = (
            # Few layers, so that all stages fit on the device and into their time at once.
            replace(
                QWEN_1_5B,
                name="Qwen2-1.5B, 4 layers",
                layers=4,
                completions=8,
                completion_tokens=512,
                cycles=1,
                timed=1,
                seconds=45.0,
            ),
            replace(QWEN_7B, name="Qwen2-7B, 4 layers", layers=4, cycles=1, seconds=60.0),
        )
        return Sizes("quick", core, policies, suite=("-k", "any_problem and (1 or 2)"))
    core = Core(
        tokens=24,
        width=32,
        vocabulary=200,
        top_k=5,
        chunked_tokens=8,
        dict_tokens=8,
        repeats=2,
        sweep=({}, {"rows": 64}),
        held=(1 << 12,),
        sweep_tokens=8,
    )
    policy = Policy("tiny Qwen2", 2, 32, 64, 4, 2, 200, False, 4, 8, 4, 2, cycles=1, timed=1)
    return Sizes(
        "tiny",
        core,
        (policy,),
        copy_bytes=1 << 22,
        matmul=128,
        check_tokens=(1, 17),
        check_vocabulary=130,
        check_width=20,
        suite=("-k", "any_problem and 1 and 7"),
    )
