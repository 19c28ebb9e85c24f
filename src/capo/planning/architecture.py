"""A causal language model's sizes, read from its ``config.json``.

The parameter counts are those of transformers ≥ 5, where the routed experts of a layer are two parameters
(`gate_up_proj` and `down_proj`), each ``[experts, …]``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from capo.core.errors import InputError

PLAIN_MLP = ("gpt_neox", "gpt2", "phi", "starcoder2", "gpt_bigcode")
"""Families whose MLP has two matrices; all others have a gate as well."""
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "starcoder2")
QKV_BIAS = ("qwen2", "qwen2_moe")
ALL_BIASES = ("gpt_neox", "gpt2", "phi", "starcoder2", "gpt_bigcode")
TWO_NORMS_MORE = ("gemma2", "gemma3", "gemma3_text")
HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text")
UNSUPPORTED = ("mamba", "mamba2", "t5", "bert", "rwkv", "jamba", "zamba", "falcon_mamba")

Count = Annotated[int, Field(ge=1)]


def _any(*names: str) -> Any:
    return Field(default=None, validation_alias=AliasChoices(*names))


class _ConfigFile(BaseModel):
    """The keys of a ``config.json`` that say how large a model is."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_type: str = "llama"
    hidden_size: Count | None = _any("hidden_size", "n_embd", "d_model")
    num_hidden_layers: Count | None = _any("num_hidden_layers", "n_layer", "num_layers")
    vocab_size: Count | None = None
    num_attention_heads: Count | None = _any("num_attention_heads", "n_head")
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count | None = _any("intermediate_size", "n_inner", "ffn_dim")
    tie_word_embeddings: bool | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    num_experts: Annotated[int, Field(ge=0)] | None = _any(
        "num_experts", "num_local_experts", "n_routed_experts"
    )
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    n_shared_experts: Annotated[int, Field(ge=0)] | None = None
    shared_expert_intermediate_size: Annotated[int, Field(ge=0)] | None = None
    first_k_dense_replace: Annotated[int, Field(ge=0)] = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None

    q_lora_rank: Count | None = None
    kv_lora_rank: Count | None = None
    qk_nope_head_dim: Annotated[int, Field(ge=0)] | None = None
    qk_rope_head_dim: Annotated[int, Field(ge=0)] | None = None
    v_head_dim: Count | None = None


@dataclass(frozen=True)
class Architecture:
    """A causal language model's sizes, in numbers (not bytes).

    Attributes:
        name: the model's family.
        width: d, the input of the LM head.
        layers: decoder layers.
        vocabulary: V, rows of the LM head.
        parameters: all of them; a tied embedding counts once.
        active: those that one token passes through, without the input embedding and the head.
        largest_module: most parameters that one module owns itself (a layer's routed experts, or the
            embedding): what is gathered and moved at once when a step is tried.
        largest_parameter: the largest single parameter below the head.
        attention: ``heads × head size`` summed over layers: a token's work per token attended to.
        tied: whether the head is the input embedding.
    """

    name: str
    width: int
    layers: int
    vocabulary: int
    parameters: int
    active: int
    largest_module: int
    largest_parameter: int
    attention: int
    tied: bool

    @property
    def head(self) -> int:
        """Parameters of the LM head, ``V × d``."""
        return self.vocabulary * self.width

    @property
    def backbone(self) -> int:
        """Parameters below the head."""
        return self.parameters - (0 if self.tied else self.head)


def read_architecture(path: Path) -> Architecture:
    """Read a model's ``config.json``, or that of the model directory ``path``.

    Raises:
        InputError: there is no such file, or it does not say how large the model is.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text())
    except OSError:
        raise InputError(
            "--model", f"must be a model's config.json or its directory, got {str(path)!r}."
        ) from None
    except ValueError:
        raise InputError("--model", f"{str(file)!r} is not JSON; give a config.json.") from None
    return architecture_of(document)


def architecture_of(document: Any) -> Architecture:
    """The sizes of the model that a ``config.json`` describes.

    Args:
        document: its content. Of a multi-modal model the `text_config` is what counts.

    Raises:
        InputError: it is of another kind of model, or a size is missing or impossible.
    """
    if not isinstance(document, dict):
        raise InputError("--model", "must be a JSON object, as a model's config.json is.")
    inner = document.get("text_config")
    if isinstance(inner, dict):
        tied = {k: v for k, v in document.items() if k == "tie_word_embeddings"}
        document = tied | inner
    try:
        config = _ConfigFile.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError("--model", f"{key}: {first['msg']}, got {first['input']!r}.") from None
    if config.model_type in UNSUPPORTED:
        raise InputError(
            "--model",
            f"is a {config.model_type!r}; the plan knows decoders of attention and MLP layers "
            "(Llama, Qwen, Mistral, Gemma, GPT-NeoX, Mixtral, DeepSeek and their kin).",
        )
    sizes = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "num_attention_heads": config.num_attention_heads,
    }
    if missing := [name for name, value in sizes.items() if value is None]:
        raise InputError("--model", f"config.json must say {' and '.join(missing)}.")
    return _counted(config)


def _counted(config: _ConfigFile) -> Architecture:
    d, layers = config.hidden_size or 0, config.num_hidden_layers or 0
    vocabulary, family = config.vocab_size or 0, config.model_type
    tied = config.tie_word_embeddings
    tied = family in TIED_BY_DEFAULT if tied is None else tied
    attention, per_token = _attention(config)
    norms = _norms(config)
    # Learned positions (GPT-2) are left out: no token is multiplied with them.
    embedding, head = vocabulary * d, vocabulary * d
    dense, dense_parts = _mlp(config, config.intermediate_size or 4 * d)
    sparse = _sparse_layers(config)
    experts, routed, expert_active, expert_parts = _experts(config)
    everything = (layers - sparse) * dense + sparse * experts + layers * (attention + norms)
    everything += d * (2 if family in ALL_BIASES else 1)  # the last norm
    active = (layers - sparse) * dense + sparse * expert_active + layers * attention
    largest = [embedding]
    if layers > sparse:
        largest += dense_parts
    if sparse:
        largest += expert_parts
    return Architecture(
        name=family,
        width=d,
        layers=layers,
        vocabulary=vocabulary,
        parameters=everything + embedding + (0 if tied else head),
        active=active,
        largest_module=max(*largest, routed if sparse else 0),
        largest_parameter=max(largest),
        attention=layers * per_token,
        tied=tied,
    )


def _attention(config: _ConfigFile) -> tuple[int, int]:
    """Parameters of a layer's attention, and its ``heads × head size``."""
    d, heads = config.hidden_size or 0, config.num_attention_heads or 1
    if config.kv_lora_rank is not None:
        return _latent_attention(config, d, heads)
    size = config.head_dim or d // heads
    kv = config.num_key_value_heads or heads
    count = d * size * (heads + 2 * kv) + heads * size * d
    if config.model_type in ALL_BIASES:
        count += size * (heads + 2 * kv) + d
    elif config.model_type in QKV_BIAS:
        count += size * (heads + 2 * kv)
    elif config.attention_bias:
        count += size * (heads + 2 * kv) + d
    if config.model_type in HEAD_NORMS:
        count += 2 * size
    return count, heads * size


def _latent_attention(config: _ConfigFile, d: int, heads: int) -> tuple[int, int]:
    """DeepSeek's multi-head latent attention."""
    rank = config.kv_lora_rank or 0
    nope, rope = config.qk_nope_head_dim or 0, config.qk_rope_head_dim or 0
    value = config.v_head_dim or nope
    size = nope + rope
    query = d * heads * size
    if config.q_lora_rank is not None:
        query = config.q_lora_rank * (d + heads * size + 1)
    key_value = d * (rank + rope) + rank * (heads * (nope + value) + 1)
    return query + key_value + heads * value * d, heads * (size + value) // 2


def _norms(config: _ConfigFile) -> int:
    d = config.hidden_size or 0
    if config.model_type in ALL_BIASES:
        return 2 * 2 * d
    return (4 if config.model_type in TWO_NORMS_MORE else 2) * d


def _mlp(config: _ConfigFile, inner: int) -> tuple[int, list[int]]:
    d = config.hidden_size or 0
    matrices = 2 if config.model_type in PLAIN_MLP else 3
    biases = inner + d if config.model_type in ALL_BIASES else 0
    if config.mlp_bias:
        biases = 2 * inner + d
    return matrices * d * inner + biases, [d * inner]


def _sparse_layers(config: _ConfigFile) -> int:
    """Layers with routed experts."""
    if not config.num_experts:
        return 0
    skipped = set(config.mlp_only_layers or [])
    return sum(
        layer >= config.first_k_dense_replace
        and layer not in skipped
        and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers or 0)
    )


def _experts(config: _ConfigFile) -> tuple[int, int, int, list[int]]:
    """A sparse layer's parameters, its routed ones, those that a token uses, and its matrices."""
    experts = config.num_experts or 0
    if not experts:
        return 0, 0, 0, []
    d = config.hidden_size or 0
    inner = config.moe_intermediate_size or config.intermediate_size
    if inner is None:
        raise InputError("--model", "config.json must say moe_intermediate_size.")
    used = config.num_experts_per_tok
    if used is None or used > experts:
        raise InputError(
            "--model", f"num_experts_per_tok must be between 1 and {experts}, got {used}."
        )
    one = 3 * d * inner
    shared_inner = config.shared_expert_intermediate_size or 0
    shared = 3 * d * shared_inner + (d if shared_inner else 0)  # and its gate
    shared += (config.n_shared_experts or 0) * one
    router = d * experts
    routed = experts * one
    parts = [experts * 2 * d * inner, experts * d * inner]
    return routed + shared + router, routed, used * one + shared + router, parts
