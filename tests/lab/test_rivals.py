"""Step rules of others, on a model small enough to check every number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from capo import InputError
from capo.lab.rivals import FIRST_NORMS, KLAdaptive, SkipOnSpike
from capo.lab.sources import load_config
from run_kit import TINY

ANY: tuple[Any, ...] = (None, None, None)


def model_and_optimizer(lr: float = 0.1) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)


def backward(model: torch.nn.Module, scale: float = 1.0) -> float:
    """A gradient, and its norm."""
    model.zero_grad()
    (scale * model(torch.ones(5, 3)).square().sum()).backward()
    return float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def contents(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [each.detach().clone() for each in (*model.parameters(), *state)]


class Stepper:
    """Steps of a tiny model under a rule, as the trainer takes them."""

    def __init__(self, factor: float = 2.0, window: int = 20) -> None:
        self.model, self.optimizer = model_and_optimizer()
        self.norm = 0.0
        self.skipped: list[float] = []
        self.rule = SkipOnSpike(
            factor, window, lambda: self.norm, lambda _, value: self.skipped.append(value)
        )

    def __call__(self, norm: float) -> bool:
        """Whether a step with this gradient norm changed anything at all."""
        if not self.optimizer.state:  # moments to compare with
            backward(self.model)
            self.optimizer.step()
        before = contents(self.model, self.optimizer)
        backward(self.model)
        self.norm = norm
        self.rule.on_pre_optimizer_step(*ANY, optimizer=self.optimizer)
        self.optimizer.step()
        after = contents(self.model, self.optimizer)
        return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_spike_leaves_weights_and_moments_as_they_are():
    step = Stepper()
    assert all(step(1.0) for _ in range(FIRST_NORMS))
    assert not step(2.01)
    assert step(1.99)
    assert step.skipped == [0.0] * FIRST_NORMS + [1.0, 0.0]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_skipped_from_the_first_step_on(norm):
    step = Stepper()
    assert not step(norm)
    assert not step.rule.norms


def test_before_there_is_a_median_nothing_finite_is_skipped():
    step = Stepper()
    assert step(1.0)
    assert all(step(100.0**power) for power in range(1, FIRST_NORMS))


def test_a_lasting_change_of_scale_is_not_skipped_for_ever():
    step = Stepper(window=6)
    for _ in range(6):
        step(1.0)
    verdicts = [step(10.0) for _ in range(6)]
    # Medians of 6: after three tens it is (1 + 10) / 2, and 10 < 2 × 5.5.
    assert verdicts == [False, False, False, True, True, True]


def test_the_window_forgets():
    step = Stepper(window=5)
    for norm in (50.0, 50.0, 50.0, 50.0, 50.0, 1.0, 1.0, 1.0):
        step(norm)
    assert not step(3.0)  # the median of 50, 50, 1, 1, 1 is 1


class Adapted:
    """A `KLAdaptive` of target 0.01, fed with shifts."""

    def __init__(self, lr: float, bounds: tuple[float, float] = (1e-6, 1.0)) -> None:
        _, self.optimizer = model_and_optimizer(lr)
        self.shift: float | None = None
        self.rule = KLAdaptive(0.01, bounds, lambda: self.shift)

    def __call__(self, shift: float | None, scheduled: float | None = None) -> float:
        """The learning rate of a step after one with this shift; the schedule's must come back."""
        self.shift = shift
        group = self.optimizer.param_groups[0]
        if scheduled is not None:
            group["lr"] = scheduled
        before = group["lr"]
        self.rule.on_pre_optimizer_step(*ANY, optimizer=self.optimizer)
        used = group["lr"]
        self.rule.restore(self.optimizer)
        assert group["lr"] == before
        return float(used)


def test_the_learning_rate_follows_the_shift_by_the_stated_factors():
    step = Adapted(0.1)
    assert step(None) == 0.1
    assert step(0.0201) == pytest.approx(0.1 / 1.5)
    assert step(0.0201) == pytest.approx(0.1 / 1.5**2)
    assert step(0.0199) == pytest.approx(0.1 / 1.5**2)
    assert step(0.0051) == pytest.approx(0.1 / 1.5**2)
    assert step(0.0049) == pytest.approx(0.1 / 1.5)
    assert step(math.nan) == pytest.approx(0.1 / 1.5**2)


def test_the_schedule_is_multiplied_not_replaced():
    step = Adapted(0.1)
    step(0.05)
    assert step(0.01, scheduled=0.06) == pytest.approx(0.04)


def test_the_bounds_hold_without_winding_up():
    step = Adapted(0.1, bounds=(0.05, 0.2))
    for _ in range(10):
        used = step(1e-9)
    assert used == pytest.approx(0.2)
    assert step(1.0) == pytest.approx(0.2 / 1.5)  # at once, however long it was at the bound
    for _ in range(10):
        used = step(1.0)
    assert used == pytest.approx(0.05)


def test_a_schedule_outside_the_bounds_is_left_alone():
    assert Adapted(0.1, bounds=(1e-6, 0.01))(None) == 0.1
    assert Adapted(1e-8, bounds=(1e-6, 0.01))(None) == 1e-8
    assert Adapted(0.0)(1e-9) == 0.0  # the first step of a warm-up


def test_kl_adaptive_needs_measured_steps():
    with pytest.raises(InputError, match=r"rival\.rule: 'kl_adaptive' needs measured steps"):
        load_config("small-aggressive", ["rival.rule=kl_adaptive"])
    load_config(
        "small-aggressive", ["rival.rule=kl_adaptive", "capo.trust_region.policy_shift=none"]
    )
    with pytest.raises(InputError, match=r"rival\.min_learning_rate: must not exceed"):
        load_config("small-aggressive", ["rival.min_learning_rate=0.1"])


@pytest.mark.slow
def test_in_the_trainer_the_rules_act_on_the_step_that_is_taken(tmp_path):
    from capo.lab.run import train
    from capo.lab.rundir import RunDirectory

    common = [*TINY, "training.schedule=constant", "training.warmup_ratio=0.0"]
    common += ["training.learning_rate=1e-4"]
    overrides = [
        *common,
        "rival.rule=kl_adaptive",
        "rival.target_shift=1.0",  # far too much: the learning rate grows at every step
        "capo.trust_region.policy_shift=none",
    ]
    run = train(load_config("small-aggressive", overrides), tmp_path / "adaptive")
    rows = RunDirectory(run).rows("metrics.jsonl")
    assert [row["rival/factor"] for row in rows] == pytest.approx([1.0, 1.5, 2.25, 3.375])
    assert [row["learning_rate"] for row in rows] == [1e-4] * 4  # the schedule's
    with pytest.raises(InputError, match="cannot be resumed"):
        train(load_config("small-aggressive", overrides), run, resume=True)

    # The first step has no factor yet; that the second has one changes the shift that is measured.
    plain = [*common, "capo.trust_region.policy_shift=none"]
    other = train(load_config("small-aggressive", plain), tmp_path / "plain")
    key = "capo/trust/measured_policy_shift"
    mine, theirs = (
        [row[key] for row in RunDirectory(each).rows("metrics.jsonl")] for each in (run, other)
    )
    assert mine[0] == theirs[0]
    assert mine[1] > 1.5 * theirs[1]

    skip = [*common, "rival.rule=skip_on_spike", "rival.spike_factor=1.01", "rival.spike_window=1"]
    run = train(load_config("small-aggressive", skip), tmp_path / "skip")
    rows = RunDirectory(run).rows("metrics.jsonl")
    limits = [math.inf] + [1.01 * row["grad_norm"] for row in rows[:-1]]
    expected = [float(row["grad_norm"] > limit) for row, limit in zip(rows, limits, strict=True)]
    assert [row["rival/skipped"] for row in rows] == expected
    assert 0 < sum(expected) < 4
