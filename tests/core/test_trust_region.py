"""The trust region's parts against independent computations in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import capo
from capo.core.errors import InputError
from capo.core.proposed import ProposedStep
from capo.core.statistics.problem import Head
from capo.core.trust_region import (
    Calibration,
    Followed,
    Probe,
    Reference,
    StepLength,
    StepTrial,
    auto_policy_shift,
    auto_sequences,
    choose_tokens,
    last_layers,
    make_trust_region,
)

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),  # no closed form here: on a copy
}


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner = nn.Linear(d, d)
        # Read by the block without a call of its own, as adapters do.
        self.extra = nn.ParameterDict({"gain": nn.Parameter(torch.ones(d))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x)) * self.extra["gain"]


class Backbone(nn.Module):
    def __init__(self, vocabulary: int = 11, d: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(layers))
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        out: torch.Tensor = self.norm(x)
        return out


class Policy:
    """A tied policy in float64 with a few optimizer steps behind it and a gradient at hand."""

    def __init__(self, optimizer: str = "adamw", dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.backbone = Backbone().to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.backbone.parameters())
        self.ids = torch.randint(0, 11, (7,))
        self.actions = torch.randint(0, 11, (7,))
        self.advantages = torch.randn(7, dtype=dtype)
        for _ in range(3):
            self.gradient()
            self.optimizer.step()
        self.gradient()

    @property
    def weight(self) -> nn.Parameter:
        return self.backbone.embed.weight

    def logits(self, backbone: Backbone | None = None) -> torch.Tensor:
        b = backbone or self.backbone
        return b(self.ids) @ b.embed.weight.T

    def gradient(self) -> None:
        self.optimizer.zero_grad()
        log_probs = F.log_softmax(self.logits(), -1).gather(1, self.actions[:, None])[:, 0]
        (-(self.advantages * log_probs).mean()).backward()

    def stepped(self, scale: float = 1.0) -> Backbone:
        """A copy after the optimizer's own step with its learning rate times `scale`."""
        twin, optimizer = copy.deepcopy((self.backbone, self.optimizer))
        for group in optimizer.param_groups:
            group["lr"] *= scale
        for mine, theirs in zip(self.backbone.parameters(), twin.parameters(), strict=True):
            assert mine.grad is not None
            theirs.grad = mine.grad.clone()
        optimizer.param_groups[0]["params"] = list(twin.parameters())
        optimizer.state = {
            t: copy.deepcopy(self.optimizer.state[p])
            for p, t in zip(self.backbone.parameters(), twin.parameters(), strict=True)
        }
        optimizer.step()
        return twin

    def probe(self) -> Probe:
        with torch.no_grad():
            hidden = self.backbone(self.ids)
            log_probs = F.log_softmax(hidden @ self.weight.T, -1)
        head = Head(self.weight.detach(), None, 1.0, 1.0, None, hidden.dtype)
        return Probe(
            self.backbone,
            lambda: self.backbone(self.ids),
            head,
            self.weight,
            ProposedStep(self.optimizer),
            Reference(log_probs, self.actions, self.advantages),
            hidden,
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_trial_is_the_model_after_the_step(optimizer: str, scale: float) -> None:
    policy = Policy(optimizer)
    before = copy.deepcopy(policy.backbone.state_dict())
    trial = StepTrial(policy.backbone, ProposedStep(policy.optimizer))
    with torch.no_grad():
        expected = policy.stepped(scale)(policy.ids)
    torch.testing.assert_close(
        trial.after(scale, lambda: policy.backbone(policy.ids)), expected, rtol=1e-9, atol=1e-12
    )
    after = policy.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(isinstance(p, nn.Parameter) for p in policy.backbone.parameters())


def test_a_failing_trial_leaves_the_model_as_it_was() -> None:
    policy = Policy()
    names = [name for name, _ in policy.backbone.named_parameters()]

    def fail() -> torch.Tensor:
        policy.backbone(policy.ids)
        policy.backbone.layers[0](torch.zeros(2, 5, dtype=torch.float64))
        raise AssertionError

    with pytest.raises(RuntimeError):
        StepTrial(policy.backbone, ProposedStep(policy.optimizer)).after(1.0, fail)
    assert [name for name, _ in policy.backbone.named_parameters()] == names
    assert all(not module._forward_hooks for module in policy.backbone.modules())
    assert all(not module._forward_pre_hooks for module in policy.backbone.modules())


def test_what_is_not_called_costs_one_pass_once() -> None:
    """An adapter that is not active: the first trial of all finds out, and later ones know."""
    policy = Policy()
    idle = nn.Linear(5, 6, bias=False, dtype=torch.float64)
    policy.backbone.add_module("idle", idle)
    used, calls = False, 0

    def call() -> torch.Tensor:
        nonlocal calls
        calls += 1
        hidden = policy.backbone(policy.ids)
        return hidden + idle(torch.ones(5, dtype=torch.float64)) if used else hidden

    def after() -> torch.Tensor:
        return StepTrial(policy.backbone, torch.ones_like).after(0.5, call)

    found = [after() for _ in range(3)]
    assert calls == 2 + 1 + 1
    assert all(torch.equal(each, found[0]) for each in found)
    used = True  # now it is active, and moves along
    moved = after() - found[0]
    expected = (idle.weight + 0.5) @ torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(moved, expected.detach().expand_as(moved))
    assert all(not module._forward_pre_hooks for module in policy.backbone.modules())


def test_measured_shift_is_the_exact_divergence_of_the_real_step() -> None:
    policy = Policy()
    with torch.no_grad():
        before = F.log_softmax(policy.logits(), -1)
        after = F.log_softmax(policy.logits(policy.stepped(0.7)), -1)
    expected = (before.exp() * (before - after)).sum(-1)
    found = policy.probe().after(0.7)
    torch.testing.assert_close(found.policy_shift, expected, rtol=1e-8, atol=1e-12)
    ratio = (after - before).gather(1, policy.actions[:, None])[:, 0]
    torch.testing.assert_close(found.log_ratio, ratio, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(
        found.objective_shift, policy.advantages * (ratio.exp() - 1), rtol=1e-8, atol=1e-12
    )


def test_the_tangent_is_the_limit_of_trials() -> None:
    policy = Policy()
    probe, tiny = policy.probe(), 1e-6
    with torch.no_grad():
        difference = (policy.logits(policy.stepped(tiny)) - policy.logits()) / tiny
    torch.testing.assert_close(probe.logit_tangent(), difference, rtol=1e-4, atol=1e-6)
    along, after = probe.along(), probe.after(1e-3)
    torch.testing.assert_close(along.policy_shift * 1e-6, after.policy_shift, rtol=2e-2, atol=1e-14)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0


def test_without_forward_mode_it_differences() -> None:
    policy = Policy()
    exact = policy.probe().logit_tangent()
    probe = policy.probe()
    probe.hidden = lambda: NoForwardMode.apply(policy.backbone(policy.ids))  # type: ignore[no-untyped-call,return-value]
    approximate = probe.logit_tangent()
    assert not probe.forward_mode
    assert (approximate - exact).abs().max() < 0.02 * exact.abs().max()


def test_depths_add_up() -> None:
    policy = Policy()
    probe = policy.probe()
    everything, head = probe.logit_tangent("all"), probe.logit_tangent(0)
    upper = probe.logit_tangent(1)
    inside = set(last_layers(policy.backbone, 1) or ())
    lower = StepTrial(
        policy.backbone,
        ProposedStep(policy.optimizer),
        [m for m in policy.backbone.modules() if m not in inside],
    )
    rest = lower.tangent(lambda: policy.backbone(policy.ids))[1] @ policy.weight.detach().T
    torch.testing.assert_close(upper + rest, everything, rtol=1e-9, atol=1e-12)
    expected = policy.probe().hidden_before @ _delta(policy).T
    torch.testing.assert_close(head, expected, rtol=1e-9, atol=1e-12)


def _delta(policy: Policy) -> torch.Tensor:
    return (policy.stepped().embed.weight - policy.weight).detach()


def test_the_head_alone_agrees_with_token_curvature() -> None:
    policy = Policy()
    found = policy.probe().along(0)
    curvature = capo.token_curvature(
        policy.probe().hidden_before,
        policy.weight.detach(),
        policy.actions,
        policy.advantages,
        step=capo.GivenStep(_delta(policy)),
        fisher="exact",
    )
    torch.testing.assert_close(found.policy_shift, curvature.policy_shift, rtol=1e-7, atol=1e-13)
    torch.testing.assert_close(
        found.objective_shift, curvature.objective_shift, rtol=1e-7, atol=1e-13
    )


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_small_divergences_survive_float32(size: float) -> None:
    torch.manual_seed(0)
    z, u = 8 * torch.randn(64, 50, dtype=torch.float64), torch.randn(64, 50, dtype=torch.float64)
    before, after = F.log_softmax(z, -1), F.log_softmax(z + size * u, -1)
    exact = (before.exp() * (before - after)).sum(-1)
    a, one = torch.zeros(64, dtype=torch.long), torch.ones(64)
    got = Reference(F.log_softmax(z.float(), -1), a, one).to((z + size * u).float())
    assert (got.policy_shift >= 0).all()
    error = (got.policy_shift.double() - exact).abs()
    # A logit near 30 is known to 2e-6 in float32, so that u is: the shift to about u's relative error.
    assert (error <= exact * 2e-5 / size + 1e-11).all()


def test_choose_tokens_bounds_the_reference() -> None:
    mask = torch.rand(40, 30) < 0.5
    few = choose_tokens(mask, 1000, entries=64_000)
    assert few.numel() == 64
    assert mask.flatten()[few].all()
    assert few.unique().numel() == 64
    everything = choose_tokens(mask, 1000)
    assert torch.equal(everything, mask.flatten().nonzero()[:, 0])


@settings(max_examples=200, deadline=None)
@given(
    curvature=st.floats(1e-6, 1e8),
    saturation=st.floats(1e-3, 1e2),
    budget=st.floats(1e-6, 1.0),
    lr=st.floats(1e-6, 1.0),
    history=st.none() | st.floats(-30, 30),
)
def test_no_trial_function_gets_past_the_budget(
    curvature: float, saturation: float, budget: float, lr: float, history: float | None
) -> None:
    length = StepLength()
    length.log_curvature = history

    def trial(scale: float) -> float:  # quadratic, then saturating, as a divergence is
        return saturation * -math.expm1(-curvature * (scale * lr) ** 2 / saturation)

    choice = length.choose(trial, budget, lr)
    assert 0 <= choice.scale <= 1
    assert trial(choice.scale) <= budget * (1 + 1e-9)


def test_the_pace_does_not_depend_on_the_learning_rate() -> None:
    curvatures = [50 * math.exp(2 * math.sin(7 * i)) for i in range(40)]
    taken = []
    for lr in (1e-2, 1.0):
        length = StepLength()
        taken.append(
            [
                lr * length.choose(lambda s, c=c, lr=lr: c * (s * lr) ** 2, 1e-5, lr).scale  # type: ignore[misc]
                for c in curvatures
            ]
        )
    assert taken[0] == pytest.approx(taken[1], rel=1e-9)
    assert max(taken[0]) < 1e-2  # the learning rate bound nothing


def test_typical_steps_cruise_and_only_outliers_are_capped() -> None:
    length = StepLength(cruise=0.25)
    choices = [length.choose(lambda s: 100.0 * s**2, 1e-2, 1.0) for _ in range(5)]
    assert all(c.predicted == pytest.approx(2.5e-3, rel=0.05) for c in choices)
    assert not any(c.capped for c in choices)
    outlier = length.choose(lambda s: 1e4 * s**2, 1e-2, 1.0)
    assert outlier.capped
    assert 5e-3 <= outlier.predicted <= 1e-2


def test_a_small_learning_rate_is_left_alone() -> None:
    choice = StepLength().choose(lambda s: 1e-9 * s**2, 1e-3, 1e-5)
    assert (choice.scale, choice.trials, choice.capped) == (1.0, 1, False)
    nothing = StepLength().choose(lambda s: 0.0, 1e-3, 1e-5)
    assert nothing.scale == 1.0


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_what_never_is_finite_is_not_taken(lost: float) -> None:
    length = StepLength()
    choice = length.choose(lambda s: lost, 1e-3, 1.0)
    assert choice.scale == 0.0
    assert length.log_curvature is None
    part = length.choose(lambda s: lost if s > 1e-3 else s**2, 1e-3, 1.0)
    assert 0 < part.scale <= 1e-3


def test_the_pace_continues_from_its_state() -> None:
    first, second = StepLength(), StepLength()
    first.choose(lambda s: 3.0 * s**2, 1e-3, 1.0)
    second.load_state_dict(first.state_dict())
    assert second.choose(lambda s: 5.0 * s**2, 1e-3, 1.0) == first.choose(
        lambda s: 5.0 * s**2, 1e-3, 1.0
    )


def test_calibration_follows_but_is_not_thrown() -> None:
    calibration = Calibration()
    assert calibration.factor is None
    for _ in range(20):
        calibration.observe(1e-6, 1e-3)
    assert calibration.factor == pytest.approx(1e3)
    for strange in ((1e-6, 1e3), (1e-6, 0.0), (0.0, 1e-3), (math.nan, 1.0), (1e-6, math.inf)):
        calibration.observe(*strange)
    assert calibration.factor == pytest.approx(1e3, rel=0.5)  # six decades off, once
    for _ in range(60):
        calibration.observe(1e-6, 1e-2)
    assert calibration.factor == pytest.approx(1e4, rel=0.1)
    again = Calibration()
    again.load_state_dict(calibration.state_dict())
    assert (again.factor, again.deviation) == (calibration.factor, calibration.deviation)


@given(st.floats(0, 5), st.integers(1, 10_000), st.integers(1, 16), st.floats(1, 10_000))
def test_no_automatic_budget_risks_more_than_a_quarter(
    entropy: float, completions: int, iterations: int, length: float
) -> None:
    budget = auto_policy_shift(entropy, completions, iterations, length)
    assert math.sqrt(length * budget / 2) <= 0.25 + 1e-9  # Pinsker
    assert budget <= auto_policy_shift(entropy, 2 * completions, iterations, length)
    assert budget >= auto_policy_shift(entropy, completions, iterations + 1, length)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ("always", "trust_region"),
        (-1.0, "trust_region"),
        (True, "trust_region"),
        ({"radius": 1}, "trust_region.radius"),
        ({"policy_shift": 0}, "trust_region.policy_shift"),
        ({"policy_shift": math.nan}, "trust_region.policy_shift"),
        ({"predictor": "crystal"}, "trust_region.predictor"),
        ({"sequences": 0}, "trust_region.sequences"),
        ({"depth": -1}, "trust_region.depth"),
        ({"cruise": 1.5}, "trust_region.cruise"),
    ],
)
def test_bad_options_are_named(spec: Any, field: str) -> None:
    with pytest.raises(InputError) as error:
        make_trust_region(spec)
    assert error.value.field == field


def test_options() -> None:
    assert make_trust_region(None) is None
    assert make_trust_region("none") is None
    assert make_trust_region("auto") == capo.TrustRegion()
    assert make_trust_region(1e-3) == capo.TrustRegion(policy_shift=1e-3)
    assert not capo.TrustRegion(policy_shift=None).scales
    with pytest.raises(InputError, match="depth"):
        last_layers(Backbone(layers=2), 3)


def test_a_step_of_mere_momentum_does_not_set_the_pace():
    length = StepLength()
    length.choose(lambda s: 0.1 * s**2, 1e-3, 1e-2)
    pace = length.log_curvature
    length.learns = False
    for _ in range(50):
        length.choose(lambda s: 1e-6 * s**2, 1e-3, 1e-2)
    assert length.log_curvature == pace
    length.learns = True
    length.choose(lambda s: 1e-6 * s**2, 1e-3, 1e-2)
    assert length.log_curvature < pace


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=30),
    st.floats(0, 0.99),
)
def test_followed_completions_are_weighted_as_adam_weighs_gradients(numbers, momentum):
    """Against the first moment that torch's Adam itself keeps, of gradients that are the numbers."""
    followed = Followed()
    parameter = nn.Parameter(torch.zeros((), dtype=torch.float64))
    adam = torch.optim.Adam([parameter], lr=0.0, betas=(momentum, 0.999))
    for index, number in enumerate(numbers, start=1):
        parameter.grad = torch.tensor(float(number), dtype=torch.float64)
        adam.step()
        moment = float(adam.state[parameter]["exp_avg"]) / (1 - momentum**index)
        assert followed.step(number, momentum) == pytest.approx(max(moment, 1e-3), rel=1e-9)
    again = Followed()
    again.load_state_dict(followed.state_dict())
    assert again.step(7, momentum) == followed.step(7, momentum)


def test_two_completions_of_every_prompt_are_tried():
    assert [auto_sequences(n) for n in (1, 3, 4, 5, 12, 16, 200)] == [8, 8, 8, 10, 24, 32, 32]
