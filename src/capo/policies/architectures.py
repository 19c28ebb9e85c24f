"""Tiny policies of several families, with the traits that matter to the curvature.

| architecture | head | logits |
|---|---|---|
| `qwen2`, `llama` | its own | `W h` |
| `gpt_neox` | its own; LayerNorm, so that `h` has a mean | `W h` |
| `gemma2` | the transposed embedding | soft-capped: `30·tanh(W h / 30)` |
| `cohere` | the transposed embedding | scaled: `¼·W h` |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from capo.policies.pretrain_config import PretrainConfig

Architecture = Literal["qwen2", "llama", "gpt_neox", "gemma2", "cohere"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)

GROUPED: tuple[Architecture, ...] = ("qwen2", "llama")  # that can be asked for `kv_heads`

SOFTCAP = 30.0  # Gemma 2's own; a tiny policy's logits reach where it bends
LOGIT_SCALE = 0.25  # Cohere's own 1/16 is for heads of thousands of inputs


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A policy with random weights, of the architecture and the shape that ``config`` asks for."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.positions,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if config.kv_heads is not None:
        shape["num_key_value_heads"] = config.kv_heads
    return _BUILDERS[config.architecture](shape)


def _qwen2(shape: dict[str, Any]) -> PreTrainedModel:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    own = {"num_key_value_heads": shape["num_attention_heads"]}
    return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=False, **own | shape))


def _llama(shape: dict[str, Any]) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    # grouped queries where the heads allow it, as in Llama 3
    heads = shape["num_attention_heads"]
    own = {"num_key_value_heads": heads if heads % 2 else heads // 2}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **own | shape))


def _gpt_neox(shape: dict[str, Any]) -> PreTrainedModel:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    # in the whole of so small a head; the default is a quarter
    rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            use_parallel_residual=True, tie_word_embeddings=False, rope_parameters=rotary, **shape
        )
    )


def _gemma2(shape: dict[str, Any]) -> PreTrainedModel:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    heads = shape["num_attention_heads"]
    head_dim = shape["hidden_size"] // heads
    return Gemma2ForCausalLM(
        Gemma2Config(
            num_key_value_heads=heads,
            head_dim=head_dim,
            query_pre_attn_scalar=head_dim,
            final_logit_softcapping=SOFTCAP,
            sliding_window=shape["max_position_embeddings"],
            tie_word_embeddings=True,
            # the attention logits' own soft-cap is lost by the other kernels
            attn_implementation="eager",
            **shape,
        )
    )


def _cohere(shape: dict[str, Any]) -> PreTrainedModel:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(
        CohereConfig(
            num_key_value_heads=shape["num_attention_heads"],
            logit_scale=LOGIT_SCALE,
            tie_word_embeddings=True,
            **shape,
        )
    )


_BUILDERS: dict[Architecture, Callable[[dict[str, Any]], PreTrainedModel]] = {
    "qwen2": _qwen2,
    "llama": _llama,
    "gpt_neox": _gpt_neox,
    "gemma2": _gemma2,
    "cohere": _cohere,
}
