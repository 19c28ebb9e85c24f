"""Two processes, under torchrun and under Ray, train as one does, and as verl does without CAPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from verl_engine.cases import CASES
from verl_engine.conftest import HERE, Run, python, read, succeeded

ROUNDING = 3e-7
"""Of float32 weights of order one, after a few steps of at most 1e-4 each."""
JUDGED = ["thresholds", "thresholds-packed", "quantiles", "sgd", "both", "gspo"]
ENGINES = [
    *JUDGED,
    "step",
    "step-tied",
    "step-gathered",
    "trust",
    "dynamic",
    "tied",
    "fused",
    "lora",
    "first",
    "through",
    "second-half",
]
UNDER_RAY = ["off", "both"]


def weights_apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one["weights"].keys() == other["weights"].keys()
    return max(
        float((value - other["weights"][name]).abs().max())
        for name, value in one["weights"].items()
    )


def numbers(result: dict[str, Any], name: str) -> list[float]:
    return [value for update in result["metrics"] for value in update[name]]


def rows(results: list[dict[str, Any]], name: str) -> list[torch.Tensor]:
    """A field of the records of every micro-batch, the processes' rows one after the other."""
    every = zip(*(result["records"] for result in results), strict=True)
    return [torch.cat([record[name] for record in records]) for records in every]


@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_train_as_one(results: Run, name: str) -> None:
    one, two = results(name, 1), results(name, 2)
    assert [r["world"] for r in one + two] == [1, 2, 2]
    assert {r["engine"] for r in one + two} == {"CAPOEngine"}
    assert weights_apart(two[0], two[1]) == 0.0
    assert weights_apart(one[0], two[0]) <= ROUNDING
    for metric in ("loss", "grad_norm"):
        assert numbers(two[0], metric) == pytest.approx(numbers(one[0], metric), rel=3e-5, abs=1e-6)


@pytest.mark.parametrize("name", [*JUDGED, "tied", "fused", "lora"])
def test_masks_and_both_shifts_are_those_of_one_process(results: Run, name: str) -> None:
    one, two = results(name, 1), results(name, 2)
    alone, together = rows(one, "weight"), rows(two, "weight")
    assert len(alone) == len(together) > 0
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b)
    mask = torch.cat(rows(one, "mask"))
    kept = torch.cat(alone)[mask] > 0
    assert 0 < int(kept.sum()) < kept.numel(), "a rule that keeps or rejects all says nothing"
    for shift in ("policy_shift", "objective_shift"):
        a, b = torch.cat(rows(one, shift))[mask], torch.cat(rows(two, shift))[mask]
        assert torch.allclose(a, b, rtol=1e-3, atol=3e-7)
        assert float(a.abs().max()) > 1e-6


@pytest.mark.parametrize("name", ["trust", "both", "lora"])
def test_the_same_part_of_every_step_is_taken(results: Run, name: str) -> None:
    one, two = results(name, 1)[0], results(name, 2)[0]
    scales, budgets = numbers(one, "capo/trust/scale"), numbers(one, "capo/trust/budget")
    shifts = numbers(one, "capo/trust/measured_policy_shift")
    # Each of two processes reports the same number.
    assert numbers(two, "capo/trust/scale")[::2] == numbers(two, "capo/trust/scale")[1::2]
    assert numbers(two, "capo/trust/scale")[::2] == pytest.approx(scales, rel=1e-3)
    assert numbers(two, "capo/trust/measured_policy_shift")[::2] == pytest.approx(shifts, rel=5e-3)
    assert any(scale < 0.9 for scale in scales)
    assert all(shift <= budget for shift, budget in zip(shifts, budgets, strict=True))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ["off", "empty"])
def test_nothing_selected_is_verls_own_engine_bit_for_bit(
    results: Run, name: str, world: int
) -> None:
    stock, off = results("stock", world), results(name, world)
    assert [r["world"] for r in stock + off] == [world] * 2 * world
    assert {r["engine"] for r in stock} == {"FSDPEngineWithLMHead"}
    assert {r["engine"] for r in off} == {"CAPOEngine"}
    for a, b in zip(stock, off, strict=True):
        assert weights_apart(a, b) == 0.0
        assert {k: v for k, v in a["metrics"][0].items() if not k.startswith(("perf", "mfu"))} == {
            k: v for k, v in b["metrics"][0].items() if not k.startswith(("perf", "mfu"))
        }


def test_a_selection_changes_the_weights(results: Run) -> None:
    stock = results("stock", 2)[0]
    for name in ("thresholds", "both"):
        assert weights_apart(stock, results(name, 2)[0]) > 1e-5


def test_packed_and_padded_sequences_are_judged_alike(results: Run) -> None:
    padded, packed = results("thresholds", 2), results("thresholds-packed", 2)
    for a, b in zip(rows(padded, "weight"), rows(packed, "weight"), strict=True):
        assert torch.equal(a, b)
    assert weights_apart(padded[0], packed[0]) <= ROUNDING


def test_dynamic_micro_batches_are_judged_as_fixed_ones(results: Run) -> None:
    """A threshold a token, and a mini-batch's own denominators: how it is cut does not matter."""
    assert len(results("dynamic", 1)[0]["records"]) != len(results("thresholds", 1)[0]["records"])
    for world in (1, 2):
        fixed, dynamic = results("thresholds", world)[0], results("dynamic", world)[0]
        assert weights_apart(fixed, dynamic) <= ROUNDING


def test_fused_kernels_with_a_tied_head_are_judged_alike(results: Run) -> None:
    plain, fused = results("tied", 2), results("fused", 2)
    for a, b in zip(rows(plain, "weight"), rows(fused, "weight"), strict=True):
        assert torch.equal(a, b)
    assert weights_apart(plain[0], fused[0]) <= ROUNDING


def test_bfloat16_trains_within_the_budget(results: Run) -> None:
    result = results("bfloat16", 2)[0]
    shifts = numbers(result, "capo/trust/measured_policy_shift")
    assert all(
        0 < shift <= 1.5 * budget
        for shift, budget in zip(shifts, numbers(result, "capo/trust/budget"), strict=True)
    )


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_of_verl_continues_to_the_same_weights(results: Run, world: int) -> None:
    through, half = results("through", world)[0], results("first-half", world)[0]
    resumed = results("second-half", world)[0]
    assert weights_apart(through, resumed) == 0.0
    assert weights_apart(half, resumed) > 1e-6
    again = [r["weight"] for r in through["records"][len(half["records"]) :]]
    for a, b in zip(again, (r["weight"] for r in resumed["records"]), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def under_ray(folder: Path) -> Path:
    succeeded(
        python(str(HERE / "ray_driver.py"), str(folder), *UNDER_RAY, VERL_ENGINE_VENDOR="capo")
    )
    return folder


@pytest.mark.parametrize("name", UNDER_RAY)
def test_two_workers_under_ray_train_as_under_torchrun(
    results: Run, under_ray: Path, name: str
) -> None:
    ray, torchrun = read(under_ray, name, "ray"), results(name, 2)
    assert len({r["pid"] for r in ray}) == 2
    assert [r["world"] for r in ray] == [2, 2]
    assert {r["engine"] for r in ray} == {"CAPOEngine"}
    for a, b in zip(ray, torchrun, strict=True):
        assert weights_apart(a, b) <= ROUNDING
        assert len(a["records"]) == len(b["records"])
        for x, y in zip(a["records"], b["records"], strict=True):
            assert torch.equal(x["weight"], y["weight"])
    assert numbers(ray[0], "loss") == pytest.approx(numbers(torchrun[0], "loss"), rel=1e-5)


def test_every_case_is_used() -> None:
    used = {*ENGINES, *UNDER_RAY, "stock", "off", "empty", "bfloat16", "first-half"}
    ours = {n for n, case in CASES.items() if not case.die and not case.after_death}
    assert used == {n for n in ours if not n.startswith(("monitored", "stock-"))}
