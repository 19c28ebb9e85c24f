"""Sampling: reproducible, and invisible to everybody else."""

from __future__ import annotations

import pytest
import torch

from capo import InputError
from capo.policies import Policy, load_policy, sample_completions
from capo.tasks import load_task

PROMPTS = [p.prompt for p in load_task("sums").eval_problems(24, 0)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy("embedded:sums")


def test_shape_and_reproducibility(policy: Policy) -> None:
    first = sample_completions(policy, PROMPTS, 3, 1.0, 24, seed=5)
    assert [len(texts) for texts in first] == [3] * len(PROMPTS)
    assert first == sample_completions(policy, PROMPTS, 3, 1.0, 24, seed=5)
    assert first != sample_completions(policy, PROMPTS, 3, 1.0, 24, seed=6)
    assert any(len(set(texts)) > 1 for texts in first)


def test_global_state_is_untouched(policy: Policy) -> None:
    policy.model.train()
    settings = policy.model.generation_config.to_dict()
    before = torch.get_rng_state()
    sample_completions(policy, PROMPTS, 2, 1.0, 8, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert policy.model.training
    assert policy.model.generation_config.to_dict() == settings
    policy.model.eval()


def test_greedy_and_top_1_agree(policy: Policy) -> None:
    greedy = sample_completions(policy, PROMPTS, 2, 0.0, 24, seed=0)
    assert all(a == b for a, b in greedy)
    assert greedy == sample_completions(policy, PROMPTS, 2, 1.0, 24, seed=1, top_k=1)


def test_batches_do_not_change_the_likeliest_answer(policy: Policy) -> None:
    """Left padding and batch mates are invisible to a prompt."""
    mixed = [*PROMPTS[:6], "1+2+3?", "7?"]
    together = sample_completions(policy, mixed, 1, 0.0, 24, seed=0)
    alone = [sample_completions(policy, [p], 1, 0.0, 24, seed=0)[0] for p in mixed]
    assert together == alone
    assert together == sample_completions(policy, mixed, 1, 0.0, 24, seed=0, batch_size=3)


def test_temperature_is_applied_to_the_logits(policy: Policy) -> None:
    """Frequencies of the first sampled token match softmax(logits / T)."""
    prompt, temperature, n = PROMPTS[0], 4.0, 4000
    ids = policy.tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0, -1]
    expected = torch.softmax(logits / temperature, 0)
    [texts] = sample_completions(policy, [prompt], n, temperature, 1, seed=3, batch_size=n)
    token = int(expected.argmax())
    frequency = sum(text == policy.tokenizer.decode([token]) for text in texts) / n
    p = float(expected[token])
    assert 0.02 < p < 0.98
    assert abs(frequency - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_stops_at_the_limit_and_at_the_end_token(policy: Policy) -> None:
    [[text]] = sample_completions(policy, PROMPTS[:1], 1, 0.0, 5, seed=0)
    assert len(text) == 5
    [[whole]] = sample_completions(policy, PROMPTS[:1], 1, 0.0, 24, seed=0)
    assert whole.startswith(text)
    assert len(whole) < 23
    assert "<|" not in whole


def test_no_prompts(policy: Policy) -> None:
    assert sample_completions(policy, [], 4, 1.0, 8, seed=0) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("max_new_tokens", 0),
        ("top_k", 0),
        ("batch_size", 0),
    ],
)
def test_bad_arguments(policy: Policy, field: str, value: float) -> None:
    arguments = {"n": 1, "temperature": 1.0, "max_new_tokens": 4, "seed": 0} | {field: value}
    with pytest.raises(InputError) as error:
        sample_completions(policy, PROMPTS[:1], **arguments)  # type: ignore[arg-type]
    assert error.value.field == field
