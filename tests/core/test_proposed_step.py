"""``proposed_step`` says beforehand what ``optimizer.step()`` then does."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import capo
from capo.core.proposed import ProposedStep
from core.cases import Case
from core.subject import curvature

Make = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "sgd-maximize": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6),
    "adam-decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3),
    "adam-decoupled": lambda p: torch.optim.Adam(
        p, lr=0.01, weight_decay=0.3, decoupled_weight_decay=True
    ),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.6), amsgrad=True),
    "adam-maximize": lambda p: torch.optim.Adam(p, lr=0.01, maximize=True),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01).double(), foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.6), amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon(p, lr=0.02),
}


def _snapshot(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> Any:
    return deepcopy((optimizer.state_dict(), [(p.detach(), p.grad) for p in parameters]))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_what_the_optimizer_then_does(
    name: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """From the first step (empty state) on, among other parameters, nothing touched."""

    def normal() -> Tensor:
        return torch.randn(6, 4, generator=generator, dtype=dtype)

    head, other = torch.nn.Parameter(normal()), torch.nn.Parameter(normal())
    optimizer = OPTIMIZERS[name]([other, head])
    for step in range(4):
        # gradients that shrink: amsgrad's maximum is then not the current second moment
        head.grad, other.grad = normal() * 0.1**step, normal()
        before = _snapshot(optimizer, [head, other])
        proposed = capo.proposed_step(optimizer, head)
        moved = ProposedStep(optimizer).moved(head, head, 0.5)
        assert moved is not None
        assert moved.dtype == dtype
        assert _same(before, _snapshot(optimizer, [head, other]))
        assert not proposed.requires_grad
        start = head.detach().clone()
        optimizer.step()
        precision = 1e-12 if dtype == torch.float64 else 2e-6
        if name == "muon":  # orthogonalised in bfloat16 by torch itself
            precision = 1e-3
        torch.testing.assert_close(
            proposed, head.detach() - start, rtol=precision, atol=precision * 0.1
        )
        halfway = (start + head.detach()) / 2
        torch.testing.assert_close(moved, halfway, rtol=precision, atol=precision * 0.1)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_parameter_is_moved_as_its_wide_twin_and_rounded(narrow: torch.dtype) -> None:
    """With moments in the parameter's dtype, as AdamW keeps them there."""
    drawn = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0)).to(narrow)
    head = torch.nn.Parameter(drawn[0])
    optimizer = torch.optim.AdamW([head], lr=0.01, weight_decay=0.3)
    head.grad = drawn[1]
    optimizer.state[head] = {
        "exp_avg": drawn[2],
        "exp_avg_sq": drawn[3].square(),
        "step": torch.tensor(3.0),
    }
    moved = ProposedStep(optimizer).moved(head, head, 0.5)
    wide = torch.nn.Parameter(head.detach().double())
    twin = torch.optim.AdamW([wide], lr=0.01, weight_decay=0.3)
    wide.grad = drawn[1].double()
    twin.state[wide] = {
        key: each.double() if each.dim() else each for key, each in optimizer.state[head].items()
    }
    expected = ProposedStep(twin).moved(wide, wide, 0.5)
    assert moved is not None
    assert expected is not None
    assert moved.dtype == narrow
    precision = torch.finfo(narrow).eps
    torch.testing.assert_close(moved.double(), expected, rtol=precision, atol=precision * 0.1)


def test_another_gradient_and_another_group() -> None:
    """``grad`` replaces ``parameter.grad``; hyper-parameters are those of the head's own group."""
    head, other = (torch.nn.Parameter(torch.randn(5, 3).double()) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [other]}, {"params": [head], "lr": 0.5}], lr=0.1)
    grad = torch.randn(5, 3).double()
    torch.testing.assert_close(capo.proposed_step(optimizer, head, grad), -0.5 * grad)


def test_the_batch_level_shift_of_the_step_that_is_taken() -> None:
    """The policy shift of the proposed step approximates the KL that the step then causes."""
    batch = Case("batch", vocab=9, dim=4, advantages=(1.0, -1.0, 0.5, 2.0)).batch
    head = torch.nn.Parameter(batch.head.weight.clone())
    optimizer = torch.optim.AdamW([head], lr=1e-4, weight_decay=0.1)

    def log_policy() -> Tensor:
        return torch.log_softmax(batch.hidden @ head.T, dim=-1)

    old = log_policy().detach()
    picked = log_policy().gather(1, batch.token_ids[:, None]).squeeze(1)
    (-(batch.advantages * picked).mean()).backward()
    step = capo.GivenStep(capo.proposed_step(optimizer, head))
    shift = curvature(batch, step=step, granularity="batch", fisher="exact").policy_shift
    optimizer.step()
    kl = (old.exp() * (old - log_policy().detach())).sum(-1).mean()
    torch.testing.assert_close(shift, kl.expand(4), rtol=1e-3, atol=0)


def test_bad_input_names_the_field() -> None:
    head, stranger = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2))
    optimizer = torch.optim.AdamW([head], lr=0.1)
    with pytest.raises(capo.InputError) as caught:
        capo.proposed_step(optimizer, stranger, torch.zeros(3, 2))
    assert caught.value.field in ("parameter", "optimizer")
    with pytest.raises(capo.InputError) as caught:
        capo.proposed_step(optimizer, head)
    assert caught.value.field in ("grad", "parameter")
    with pytest.raises(capo.InputError) as caught:
        capo.proposed_step(optimizer, head, torch.zeros(2, 2))
    assert caught.value.field == "grad"
