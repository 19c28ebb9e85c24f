"""Completions of a policy, sampled in batches, without disturbing anybody's random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from capo.core.errors import InputError
from capo.policies.loading import Policy


def sample_completions(
    policy: Policy,
    prompts: Sequence[str],
    n: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_k: int | None = None,
    *,
    batch_size: int = 512,
) -> list[list[str]]:
    """Sample ``n`` completions of every prompt.

    The global random state of torch, the model's mode (train or eval) and its settings are as they
    were when this returns. The outcome depends on ``seed`` and ``batch_size`` alone.

    Args:
        policy: what to sample from, on whatever device it is.
        prompts: texts to continue.
        n: completions per prompt, at least 1.
        temperature: the logits are divided by it; 0 takes the likeliest token every time.
        max_new_tokens: a completion stops at its end-of-sequence token or after so many tokens.
        seed: of this call's own random numbers.
        top_k: sample from the ``top_k`` likeliest tokens only; ``None`` for the full vocabulary.
        batch_size: sequences generated at a time.

    Returns:
        ``len(prompts)`` lists of ``n`` texts, special tokens left out.

    Raises:
        InputError: an argument out of its range.
    """
    _check(
        n=n, temperature=temperature, max_new_tokens=max_new_tokens, top_k=top_k, size=batch_size
    )
    flat = [prompt for prompt in prompts for _ in range(n)]
    texts: list[str] = []
    with _own_random_state(seed), _eval_mode(policy):
        for start in range(0, len(flat), batch_size):
            chunk = flat[start : start + batch_size]
            texts += _generate(policy, chunk, temperature, max_new_tokens, top_k)
    return [texts[i : i + n] for i in range(0, len(texts), n)]


def _generate(
    policy: Policy, prompts: list[str], temperature: float, max_new_tokens: int, top_k: int | None
) -> list[str]:
    from transformers import GenerationConfig

    tokenizer, model = policy.tokenizer, policy.model
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    inputs = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
    # Every knob is set: an unset one would be filled from the model's own generation_config.
    choice = (
        {"do_sample": True, "temperature": temperature, "top_k": top_k or 0, "top_p": 1.0}
        if temperature > 0
        else {"do_sample": False}
    )
    own = model.generation_config.eos_token_id if model.generation_config else None
    ends = {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
    settings = GenerationConfig(
        **choice,
        max_new_tokens=max_new_tokens,
        num_beams=1,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(ends),
    )
    with torch.no_grad():
        output = model.generate(**inputs, generation_config=settings)
    completions = output[:, inputs["input_ids"].shape[1] :]
    decoded: list[str] = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return decoded


@contextlib.contextmanager
def _own_random_state(seed: int) -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _eval_mode(policy: Policy) -> Iterator[None]:
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


def _check(
    *, n: int, temperature: float, max_new_tokens: int, top_k: int | None, size: int
) -> None:
    for field, value in (("n", n), ("max_new_tokens", max_new_tokens), ("batch_size", size)):
        if value < 1:
            raise InputError(field, f"must be at least 1, got {value}.")
    if not 0 <= temperature < float("inf"):
        raise InputError("temperature", f"must be finite and at least 0, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise InputError("top_k", f"must be at least 1, or None for all tokens, got {top_k}.")
