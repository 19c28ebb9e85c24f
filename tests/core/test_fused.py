"""The compiled loops are held to the oracle as the plain ones are, and a broken compiler is survived."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import capo
import oracle
from capo.core.statistics import fused, options
from core.cases import CASES, CONFIDENT, MODES, Case, Mode, verdicts
from core.subject import curvature
from core.test_curvature_oracle import assert_judged

COMPILED = [c for c in (*CASES, *CONFIDENT) if isinstance(c.batch.step, oracle.SGD | oracle.Adam)]


@pytest.fixture
def compiled() -> Iterator[None]:
    with options(compile=True):
        yield
    assert not fused._broken


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
@pytest.mark.parametrize("case", COMPILED, ids=lambda c: c.name)
def test_compiled_loops_equal_the_oracle(case: Case, mode: Mode) -> None:
    expected = verdicts(case, mode, arbiter=case in CONFIDENT)
    for fisher in ("sampled", "exact"):
        actual = curvature(case.batch, mode, fisher=fisher, impl="chunked")
        assert_judged(actual, expected, fisher, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_compiled_sums_in_float32_on_every_kind_of_row() -> None:
    """Flat, peaked, bimodal and surprised rows: the variance keeps its relative accuracy."""
    v = 1000
    rows = torch.zeros(6, v)
    rows[1] = torch.linspace(-60, 0, v)
    rows[2, ::2] = -0.5
    rows[3, 0] = 30.0
    rows[4, 0], rows[4, 1] = 80.0, 20.0
    rows[5] = torch.randn(v) * 4
    own = torch.tensor([-1, 5, 3, 7, 0, 11])
    for squares in (False, True):
        sums = fused.softmax_sums(rows.clone(), own, squares=squares)
        assert sums is not None
        exact = fused.square_sums_definition(rows.double(), own)
        for ours, reference in zip(sums, exact, strict=False):
            torch.testing.assert_close(ours.double(), reference, rtol=2e-5, atol=1e-5)


def test_a_broken_compiler_costs_speed_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def fail(*_: object) -> object:
            raise RuntimeError("no tool chain")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(fused, "_compiled", {})
    monkeypatch.setattr(fused, "_ready", set())
    monkeypatch.setattr(fused, "_broken", [])
    arguments = {
        "hidden": torch.randn(4, 3),
        "head_weight": torch.randn(5, 3),
        "token_ids": torch.tensor([0, 1, 2, 3]),
        "advantages": torch.ones(4),
        "step": capo.SGDStep(0.1),
        "impl": "chunked",
    }
    expected = capo.token_curvature(**arguments)
    with options(compile=True):
        with pytest.warns(RuntimeWarning, match="go on unfused"):
            first = capo.token_curvature(**arguments)
        second = capo.token_curvature(**arguments)  # said once, not at every step
    for result in (first, second):
        torch.testing.assert_close(result.policy_shift, expected.policy_shift)
