"""A monitored run of verl is verl's own, bit for bit; what is read is read over all processes."""

from __future__ import annotations

import math

import pytest

from verl_engine.conftest import Run
from verl_engine.test_equality import numbers, weights_apart

PREFIX = "capo/monitor/"
PAIRS = {
    "monitored": "stock",
    "monitored-all": "stock-all",
    "monitored-tied": "stock-tied",
    "monitored-lora": "stock-lora",
    "monitored-packed": "stock-packed",
    "monitored-bfloat16": "stock-bfloat16",
    "monitored-sgd": "stock-sgd",
}
ALWAYS = (
    "policy_shift/p99",
    "objective_shift/p01",
    "rejection_rate",
    "entropy",
    "measured_policy_shift",
    "observed_objective_shift",
    "excess",
    "warning_score",
    "warning",
    "overhead",
)
FORESEEN = ("predicted_policy_shift", "head_policy_shift")
ALIKE = (
    "policy_shift/mean",
    "policy_shift/p99",
    "objective_shift/p50",
    "rejection_rate",
    "entropy",
)
CLOCK = ("perf", "mfu")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_nothing_changes_bit_for_bit(results: Run, name: str, world: int) -> None:
    stock, seen = results(PAIRS[name], world), results(name, world)
    assert [r["world"] for r in stock + seen] == [world] * 2 * world
    assert {r["engine"] for r in seen} == {"CAPOEngine"}
    assert {r["engine"] for r in stock} == {"FSDPEngineWithLMHead"}
    for a, b in zip(stock, seen, strict=True):
        assert weights_apart(a, b) == 0.0
        theirs = {k: v for k, v in a["metrics"][0].items() if not k.startswith(CLOCK)}
        ours = {k: v for k, v in b["metrics"][0].items() if not k.startswith((*CLOCK, PREFIX))}
        assert theirs == ours
        assert any(key.startswith(PREFIX) for key in b["metrics"][0])


@pytest.mark.parametrize("name", PAIRS)
def test_everything_is_logged_for_every_step(results: Run, name: str) -> None:
    run = results(name, 2)[0]
    steps = len(numbers(run, PREFIX + "measured_policy_shift"))
    assert steps >= 4  # every step, once by each of two processes
    for key in (*ALWAYS, *(FORESEEN if name != "monitored-lora" else ())):
        values = numbers(run, PREFIX + key)
        assert len(values) == steps, key
        assert all(map(math.isfinite, values)), key
        if key != "overhead":
            assert values[::2] == values[1::2], f"{key} differs between processes"
    assert all(shift > 0 for shift in numbers(run, PREFIX + "measured_policy_shift"))


def test_gradient_noise_needs_two_prompts_in_a_process(results: Run) -> None:
    """Of a mini-batch of four, one process has two prompts and each of two has one."""
    assert min(numbers(results("monitored-all", 2)[0], PREFIX + "gradient_noise")) > 0
    assert min(numbers(results("monitored", 1)[0], PREFIX + "gradient_noise")) > 0
    assert PREFIX + "gradient_noise" not in results("monitored", 2)[0]["metrics"][0]


def test_two_processes_read_what_one_does(results: Run) -> None:
    one, two = results("monitored-all", 1)[0], results("monitored-all", 2)[0]
    for key in ALIKE:
        alone, together = numbers(one, PREFIX + key), numbers(two, PREFIX + key)[::2]
        assert together == pytest.approx(alone, rel=2e-3, abs=1e-7), key
    # All completions are measured: the same tokens, whichever process has them.
    for key in ("measured_policy_shift", "predicted_policy_shift", "head_policy_shift"):
        alone, together = numbers(one, PREFIX + key), numbers(two, PREFIX + key)[::2]
        assert together == pytest.approx(alone, rel=5e-3), key


def test_the_head_foresees_little_of_the_whole(results: Run) -> None:
    run = results("monitored-all", 1)[0]
    whole = numbers(run, PREFIX + "measured_policy_shift")
    head = numbers(run, PREFIX + "head_policy_shift")
    assert all(0 < h < w for h, w in zip(head, whole, strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_a_resumed_run_reads_on(results: Run, world: int) -> None:
    through = results("monitored-through", world)[0]
    results("monitored-first-half", world)
    resumed = results("monitored-second-half", world)[0]
    assert weights_apart(through, resumed) == 0.0
    rest, read = through["metrics"][1], resumed["metrics"][0]
    for key in ("warning_score", "measured_policy_shift", "policy_shift/p99"):
        assert read[PREFIX + key] == rest[PREFIX + key], key
    # Absent in both where the running means show no signal.
    assert read.get(PREFIX + "gradient_noise") == rest.get(PREFIX + "gradient_noise")
