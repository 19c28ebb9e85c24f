"""Loading a policy, and refusing what is not one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from capo import InputError
from capo.policies import EMBEDDED, load_policy
from capo.policies.tokenizer import CHARACTERS, VOCABULARY, build_tokenizer

SHIPPED = EMBEDDED["embedded:sums"]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "copy"))


def test_embedded_policy() -> None:
    policy = load_policy("embedded:sums")
    assert policy.source == "embedded:sums"
    assert policy.model.config.model_type == "qwen2"
    assert policy.model.dtype == torch.float32
    assert not policy.model.training
    assert sum(p.numel() for p in policy.model.parameters()) < 1_500_000
    head = policy.model.get_output_embeddings().weight
    assert head.data_ptr() != policy.model.get_input_embeddings().weight.data_ptr()
    assert head.shape[0] == len(policy.tokenizer) > 50
    assert policy.tokenizer.padding_side == "left"
    assert policy.tokenizer.pad_token_id != policy.tokenizer.eos_token_id
    assert policy.model.generation_config.eos_token_id == policy.tokenizer.eos_token_id
    assert policy.model.generation_config.pad_token_id == policy.tokenizer.pad_token_id


def test_a_policy_comes_where_and_in_the_numbers_that_are_asked_for(copy: Path) -> None:
    policy = load_policy(copy, dtype=torch.bfloat16, device="meta")
    assert (policy.model.device.type, policy.model.dtype) == ("meta", torch.bfloat16)
    saved = load_policy(copy, dtype=torch.bfloat16)
    saved.model.save_pretrained(copy)
    assert load_policy(copy).model.dtype == torch.float32
    assert load_policy(copy, dtype=None).model.dtype == torch.bfloat16


def test_every_load_is_a_fresh_copy(copy: Path) -> None:
    first, second = load_policy(copy), load_policy(str(copy))
    with torch.no_grad():
        first.model.lm_head.weight.zero_()
    assert second.model.lm_head.weight.abs().sum() > 0


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(128).save_pretrained(tmp_path)
    for tokenizer in (build_tokenizer(128), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(VOCABULARY) == 64
        for text in ("37+58+26?", "  two  spaces\nand a line ", CHARACTERS, "it 's 1 , 2 ."):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text)
            assert tokenizer.decode(ids) == text
        assert tokenizer("A\u00e9")["input_ids"] == [tokenizer.unk_token_id] * 2
        batch = tokenizer(["1", "123"], padding=True)
        assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2


def test_missing_directory(tmp_path: Path) -> None:
    for source in ("embedded:nothing", str(tmp_path / "nowhere"), str(SHIPPED / "config.json")):
        with pytest.raises(InputError, match="embedded:sums") as error:
            load_policy(source)
        assert error.value.field == "policy.path"


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load_policy(tmp_path)


def test_no_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer"):
        load_policy(copy)


def test_damaged_files(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match=r"model in .* cannot be loaded"):
        load_policy(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer in .* cannot be loaded"):
        load_policy(copy)


def test_tokenizer_larger_than_the_model(copy: Path) -> None:
    tokenizer = build_tokenizer(128)
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(InputError, match="does not match the model: its largest token id is 64"):
        load_policy(copy)


def test_tokenizer_without_an_end(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no eos_token"):
        load_policy(copy)


def test_model_that_ends_with_a_token_the_tokenizer_lacks(copy: Path) -> None:
    settings = json.loads((copy / "generation_config.json").read_text())
    settings["eos_token_id"] = 1000
    (copy / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"ends a completion with token id \[1000\]"):
        load_policy(copy)


def test_padding_token_falls_back_to_the_end(copy: Path) -> None:
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["pad_token"] = None
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    policy = load_policy(copy)
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id
