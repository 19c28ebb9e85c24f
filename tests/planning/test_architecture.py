"""Sizes from config.json, against the models that transformers really builds (on the meta device)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from capo import InputError
from capo.planning.architecture import architecture_of, read_architecture

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 300,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_key_value_heads": 4}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 2},
    "gemma3_text": {"head_dim": 16, "num_key_value_heads": 2},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
    "qwen2_moe": {**MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**MIXTURE, "num_experts": 4, "head_dim": 16, "decoder_sparse_step": 2},
    "deepseek_v3": {
        **MIXTURE,
        **LATENT,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}


def built(document):
    settings = {k: v for k, v in document.items() if k != "model_type"}
    config = AutoConfig.for_model(document["model_type"], **settings)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def counted(model):
    own = [
        sum(p.numel() for p in module._parameters.values() if p is not None)
        for module in model.modules()
    ]
    return sum(p.numel() for p in model.parameters()), max(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family):
    document = {"model_type": family, **SMALL, **FAMILIES[family]}
    config, model = built(document)
    parameters, largest = counted(model)
    for given in (document, json.loads(config.to_json_string())):  # as written, and in full
        found = architecture_of(given)
        assert found.parameters == parameters
        assert found.largest_module == largest
        assert found.largest_parameter == max(p.numel() for p in model.parameters())
        assert (
            found.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
            if (family != "gpt_neox")
            else not found.tied
        )


def test_active_is_what_a_token_is_multiplied_with():
    document = {"model_type": "llama", **SMALL}
    _, model = built(document)
    matrices = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
    assert architecture_of(document).active == matrices


# Published sizes: the number of parameters in the models' own cards.
LARGE = {
    "7 B": (
        7_615_616_512,
        7_615_616_512 - 2 * 152064 * 3584,
        {
            "model_type": "qwen2",
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "vocab_size": 152064,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
            "tie_word_embeddings": False,
        },
    ),
    "70 B": (
        70_553_706_496,
        70_553_706_496 - 2 * 128256 * 8192,
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "vocab_size": 128256,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
        },
    ),
    "671 B": (
        671_026_404_352,
        36_700_000_000,
        {
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "num_hidden_layers": 61,
            "vocab_size": 129280,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 3,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_published_sizes(name):
    parameters, active, document = LARGE[name]
    found = architecture_of(document)
    assert found.parameters == pytest.approx(parameters, rel=1e-4)
    assert found.active == pytest.approx(active, rel=0.03)


def test_of_a_multi_modal_model_the_language_model_counts(tmp_path):
    text = {"model_type": "gemma3_text", **SMALL, **FAMILIES["gemma3_text"]}
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 9}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert read_architecture(tmp_path) == architecture_of(text)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([1], "must be a JSON object"),
        ({"model_type": "mamba2"}, "is a 'mamba2'"),
        ({"hidden_size": 8}, "must say num_hidden_layers and vocab_size and num_attention_heads"),
        ({**SMALL, "hidden_size": 0}, "hidden_size: Input should be greater than or equal to 1"),
        ({**SMALL, "vocab_size": "many"}, "vocab_size: Input should be a valid integer"),
        ({**SMALL, "num_experts": 4, "num_experts_per_tok": 5}, "between 1 and 4, got 5"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(document, said):
    with pytest.raises(InputError, match=said):
        architecture_of(document)


def test_no_file_and_no_json(tmp_path: Path):
    with pytest.raises(InputError, match=r"--model: must be a model's config\.json"):
        read_architecture(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_architecture(tmp_path)
