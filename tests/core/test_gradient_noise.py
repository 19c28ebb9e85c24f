"""The noise scale against explicit gradients in float64, and on gradients whose noise is known."""

from __future__ import annotations

import math

import pytest
import torch

from capo import InputError, gradient_noise
from capo.core.gradient_noise import NoiseEstimate, NoiseScale

COMPLETION = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
PROMPT = torch.tensor([0, 0, 1, 2])


def batch(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens, vocabulary, width = COMPLETION.numel(), 7, 5
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    coefficients = torch.randn(tokens, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, -1), hidden, ids, coefficients


def test_against_the_gradients_themselves() -> None:
    """By autograd through a head whose logits are these."""
    log_probs, hidden, ids, coefficients = batch()
    gradients = []
    for own in range(4):
        rows = own == COMPLETION
        # logits = log π + h·0: the gradient with respect to a zero head is that of log π_a.
        head = torch.zeros(7, 5, dtype=torch.float64, requires_grad=True)
        logits = log_probs[rows] + hidden[rows] @ head.T
        picked = torch.log_softmax(logits, -1).gather(1, ids[rows, None])[:, 0]
        (gradient,) = torch.autograd.grad((coefficients[rows] * picked).sum(), head)
        gradients.append(gradient.flatten())
    apart = [(a, b) for a in range(4) for b in range(4) if PROMPT[a] != PROMPT[b]]
    signal = sum(float(gradients[a] @ gradients[b]) for a, b in apart) / len(apart)
    trace = sum(float(g @ g) for g in gradients) / 4 - signal
    found = gradient_noise(log_probs, hidden, ids, coefficients, COMPLETION, PROMPT)
    assert found is not None
    assert found.signal == pytest.approx(signal, rel=1e-10)
    assert found.trace == pytest.approx(trace, rel=1e-10)


def test_scale_of_the_coefficients_cancels() -> None:
    log_probs, hidden, ids, coefficients = batch(1)
    one = gradient_noise(log_probs, hidden, ids, coefficients, COMPLETION, PROMPT)
    other = gradient_noise(log_probs, hidden, ids, 3 * coefficients, COMPLETION, PROMPT)
    assert one is not None
    assert other is not None
    assert other.trace / other.signal == pytest.approx(one.trace / one.signal, rel=1e-9)


def test_nothing_to_tell() -> None:
    log_probs, hidden, ids, coefficients = batch()
    same = torch.zeros(4, dtype=torch.long)
    assert gradient_noise(log_probs, hidden, ids, coefficients, COMPLETION, same) is None
    assert gradient_noise(log_probs, hidden, ids, 0 * coefficients, COMPLETION, PROMPT) is None


def test_bad_input() -> None:
    log_probs, hidden, ids, coefficients = batch()
    with pytest.raises(InputError, match=r"completion: must be ascending"):
        gradient_noise(log_probs, hidden, ids, coefficients, COMPLETION.flip(0), PROMPT)
    with pytest.raises(InputError, match=r"completion: must be below the 3 completions"):
        gradient_noise(log_probs, hidden, ids, coefficients, COMPLETION, PROMPT[:3])


def test_both_estimates_are_averaged_before_they_are_divided() -> None:
    scale = NoiseScale(keep=0.5)
    assert scale.observe(NoiseEstimate(8.0, -1.0)) == math.inf
    assert math.isnan(scale.observe(NoiseEstimate(math.nan, math.inf)))
    assert scale.observe(NoiseEstimate(8.0, 2.0)) == pytest.approx((2 + 4) / (-0.25 + 1))
