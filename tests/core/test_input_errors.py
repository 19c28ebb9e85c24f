"""Bad input: one clear sentence that names the field; empty input: nothing to say, no error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import capo
from core.cases import Case
from core.subject import FIELDS, IMPLEMENTATIONS, curvature

CASE = Case("plain", step="adam", lr=0.01, vocab=6, dim=3)
V, D, N = 6, 3, 3
NAN, INF = math.nan, math.inf


def floats(*shape: int, **at: float) -> torch.Tensor:
    """Zeros, with one value written into the first entry."""
    tensor = torch.zeros(*shape, dtype=torch.float64)
    if at:
        tensor.view(-1)[0] = at["first"]
    return tensor


def adam(**changes: Any) -> Callable[[], capo.AdamStep]:
    """A valid Adam step, some arguments changed; made late, so that its own errors count too."""
    valid = {
        "lr": 0.1,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "exp_avg": floats(V, D),
        "exp_avg_sq": floats(V, D),
        "step": 1,
    }
    return lambda: capo.AdamStep(**(valid | changes))


BAD: list[tuple[str, dict[str, Any]]] = [
    # shapes: where two tensors disagree, either may be named
    ("hidden|head_weight", {"hidden": floats(N, D + 1)}),
    ("hidden|token_ids", {"hidden": floats(N + 1, D)}),
    ("hidden|token_ids", {"token_ids": torch.zeros(N + 1, dtype=torch.int64)}),
    ("head_weight", {"head_weight": floats(V)}),
    ("advantages", {"advantages": floats(N + 1)}),
    ("coefficients", {"coefficients": floats(N + 1)}),
    ("mask", {"mask": torch.ones(N + 1, dtype=torch.bool)}),
    ("head_bias", {"head_bias": floats(V + 1)}),
    ("sequence_ids", {"granularity": "sequence", "sequence_ids": torch.zeros(N + 1).long()}),
    ("sequence_ids", {"granularity": "sequence"}),
    ("renormalize", {"granularity": "batch", "top_k": 2, "renormalize": False}),
    # values
    ("hidden", {"hidden": floats(N, D, first=NAN)}),
    ("hidden", {"hidden": floats(N, D, first=INF)}),
    ("advantages", {"advantages": floats(N, first=NAN)}),
    ("advantages", {"advantages": floats(N, first=-INF)}),
    ("coefficients", {"coefficients": floats(N, first=NAN)}),
    ("token_ids", {"token_ids": torch.tensor([0, 1, V])}),
    ("token_ids", {"token_ids": torch.tensor([0, -1, 2])}),
    ("token_ids", {"token_ids": floats(N)}),
    ("top_k", {"top_k": 0}),
    ("top_k", {"top_k": -3}),
    ("top_k", {"top_k": V + 1}),
    ("temperature", {"temperature": 0.0}),
    ("temperature", {"temperature": -1.0}),
    ("temperature", {"temperature": NAN}),
    ("temperature", {"temperature": INF}),
    ("logit_softcap", {"logit_softcap": 0.0}),
    ("logit_softcap", {"logit_softcap": -30.0}),
    ("logit_scale", {"logit_scale": NAN}),
    # choices
    ("fisher", {"fisher": "empirical"}),
    ("granularity", {"granularity": "word"}),
    ("impl", {"impl": "cuda"}),
    # steps
    ("step", {"step": 0.1}),
    ("lr", {"step": lambda: capo.SGDStep(NAN)}),
    ("lr", {"step": lambda: capo.SGDStep(-1.0)}),
    ("lr", {"step": adam(lr=INF)}),
    ("betas", {"step": adam(betas=(0.9, 1.0))}),
    ("betas", {"step": adam(betas=(-0.1, 0.9))}),
    ("eps", {"step": adam(eps=-1e-8)}),
    ("step", {"step": adam(step=-1)}),
    ("weight_decay", {"step": adam(weight_decay=NAN)}),
    ("grad_scale", {"step": adam(grad_scale=NAN)}),
    ("preconditioner", {"step": adam(preconditioner="thawed")}),
    ("exp_avg|exp_avg_sq", {"step": adam(exp_avg=floats(V, D + 1))}),
    ("exp_avg|exp_avg_sq", {"step": adam(exp_avg_sq=floats(V + 1, D))}),
    ("exp_avg|exp_avg_sq", {"step": adam(exp_avg_sq=None)}),
    ("exp_avg|exp_avg_sq|step", {"step": adam(exp_avg=None, exp_avg_sq=None)}),
    ("step|preconditioner", {"step": adam(step=0, preconditioner="frozen")}),
    ("exp_avg", {"step": adam(exp_avg=floats(V, D, first=NAN))}),
    ("momentum", {"step": lambda: capo.MomentumStep(0.1, 1.0)}),
    ("momentum_buffer", {"step": lambda: capo.MomentumStep(0.1, 0.9, floats(V, D + 1))}),
    ("delta", {"step": lambda: capo.GivenStep(floats(V, D + 1))}),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("field", "changes"), BAD, ids=[f"{field}-{number}" for number, (field, _) in enumerate(BAD)]
)
def test_bad_arguments(field: str, changes: dict[str, Any], impl: str) -> None:
    with pytest.raises(capo.InputError) as caught:
        judge({"impl": impl} | changes)
    names_the_field(caught.value, field)


def judge(changes: dict[str, Any]) -> None:
    """The valid case with some arguments changed, steps made on the way."""
    curvature(CASE.batch, **{k: v() if callable(v) else v for k, v in changes.items()})


def names_the_field(error: capo.InputError, field: str) -> None:
    """One sentence, that begins with the field's name (``step.exp_avg`` for a step's tensor)."""
    assert error.field.removeprefix("step.") in field.split("|")
    assert str(error).startswith(error.field)
    assert "\n" not in str(error)
    assert len(error.message.split()) >= 4


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("policy_shift", {"policy_shift": -1e-9}),
        ("policy_shift", {"policy_shift": NAN}),
        ("objective_shift", {"objective_shift": (1.0, -1.0)}),
        ("objective_shift", {"objective_shift": (NAN, 1.0)}),
        ("denominator", {"denominator": "some"}),
    ],
)
def test_bad_thresholds(field: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(capo.InputError) as caught:
        capo.Thresholds(**arguments)
    names_the_field(caught.value, field)


def test_bad_mask_of_a_selection() -> None:
    with pytest.raises(capo.InputError) as caught:
        capo.select(curvature(CASE.batch), capo.Thresholds(), mask=torch.ones(N + 1).bool())
    names_the_field(caught.value, "mask")


def test_errors_are_value_errors_and_survive_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(capo.InputError("top_k", "is 0, at least 1 is allowed")))
    assert isinstance(error, ValueError)
    assert (error.field, error.message) == ("top_k", "is 0, at least 1 is allowed")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("granularity", ["token", "sequence", "batch"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("n", [0, N])
def test_nothing_unmasked_is_no_error(
    n: int, top_k: int | None, granularity: str, impl: str
) -> None:
    """An empty mask, or no token at all: zeros, and a rejection rate of 0."""
    if granularity != "token":
        top_k = None
    result = curvature(
        CASE.batch,
        hidden=torch.full((n, D), NAN).double(),
        token_ids=torch.full((n,), -100),
        advantages=torch.full((n,), NAN).double(),
        mask=torch.zeros(n, dtype=torch.bool),
        sequence_ids=torch.zeros(n, dtype=torch.int64),
        top_k=top_k,
        granularity=granularity,
        impl=impl,
    )
    for name in FIELDS:
        assert getattr(result, name).equal(torch.zeros(n).double())
    selection = capo.select(result, capo.Thresholds(policy_shift=0.0))
    assert selection.weights.sum() == 0
    assert selection.rejection_rate == 0
    assert all(rate == 0 for rate in selection.rejection_rate_by_reason.values())


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("temperature", {"temperature": "1"}),
        ("top_k", {"top_k": True}),
        ("hidden", {"hidden": [[0.0, 1.0]]}),
        ("mask", {"mask": [True]}),
    ],
)
def test_values_of_another_type_are_named(field: str, change: dict[str, object]) -> None:
    good = {
        "hidden": torch.zeros(1, 2),
        "head_weight": torch.eye(3, 2),
        "token_ids": torch.tensor([1]),
        "advantages": torch.ones(1),
        "step": capo.SGDStep(0.1),
    }
    capo.token_curvature(**good)  # type: ignore[arg-type]
    with pytest.raises(capo.InputError) as error:
        capo.token_curvature(**{**good, **change})  # type: ignore[arg-type]
    assert error.value.field == field


def test_nesterov_needs_what_torch_needs() -> None:
    with pytest.raises(capo.InputError, match="nesterov"):
        capo.MomentumStep(0.1, 0.9, dampening=0.1, nesterov=True)
