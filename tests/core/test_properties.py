"""What must hold of every head, batch and step, whatever the numbers are."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capo
import oracle
from core.cases import FULL, MODES, Batch, Case, Mode
from core.subject import FIELDS, IMPLEMENTATIONS, as_capo, assert_same, curvature

STEPS = ("sgd", "momentum", "adam", "adam_empty", "adamw", "given")

examples = settings(deadline=None, max_examples=25, derandomize=True)
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """A head, a few tokens and a step."""
    step = fixed.get("step") or draw(st.sampled_from(STEPS))
    drawn: dict[str, Any] = {
        "name": "drawn",
        "step": step,
        "lr": 0.2 if step in ("sgd", "momentum", "given") else 0.01,
        "advantages": tuple(
            draw(st.lists(st.sampled_from([0.0, 1.0, -1.0, 0.3, -2.5]), min_size=1, max_size=6))
        ),
        "temperature": draw(st.sampled_from([1.0, 0.7, 1.6])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "logit_softcap": draw(st.sampled_from([None, None, 2.0])),
        "bias": draw(st.booleans()),
        "vocab": draw(st.integers(5, 17)),
        "dim": draw(st.integers(1, 8)),
        "spread": draw(st.sampled_from([0.3, 1.0, 4.0])),
        "seed": draw(st.integers(0, 10_000)),
    }
    return Case(**(drawn | fixed))


modes = st.sampled_from(MODES)
fishers = st.sampled_from(["sampled", "exact"])


@each_impl
@examples
@given(case=cases(logit_softcap=None), mode=modes, fisher=fishers, shift=st.floats(-30, 30))
def test_a_constant_added_to_all_logits_changes_nothing(
    impl: str, case: Case, mode: Mode, fisher: str, shift: float
) -> None:
    batch = case.batch
    bias = torch.zeros(case.vocab).double() if batch.head.bias is None else batch.head.bias
    moved = curvature(batch, mode, fisher=fisher, impl=impl, head_bias=bias + shift)
    still = curvature(batch, mode, fisher=fisher, impl=impl)
    assert_same(moved, still, rtol=1e-9, atol=1e-13)


@each_impl
@examples
@given(case=cases(), mode=modes, fisher=fishers)
def test_permuted_tokens_give_permuted_results(
    impl: str, case: Case, mode: Mode, fisher: str
) -> None:
    batch = case.batch
    order = _permutation(len(case.advantages), case.seed)
    permuted = replace(
        batch,
        hidden=batch.hidden[order],
        token_ids=batch.token_ids[order],
        advantages=batch.advantages[order],
    )
    expected = curvature(batch, mode, fisher=fisher, impl=impl)
    actual = curvature(permuted, mode, fisher=fisher, impl=impl)
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name)[order], rtol=1e-10, atol=1e-15
        )


@each_impl
@examples
@given(case=cases(), mode=modes, fisher=fishers)
def test_the_numbering_of_the_vocabulary_does_not_matter(
    impl: str, case: Case, mode: Mode, fisher: str
) -> None:
    batch = case.batch
    order = _permutation(case.vocab, case.seed)
    renumbered = replace(
        batch,
        head=batch.head.rows(order),
        token_ids=order.argsort()[batch.token_ids],
        step=oracle.restrict(batch.step, order),
    )
    expected = curvature(batch, mode, fisher=fisher, impl=impl)
    actual = curvature(renumbered, mode, fisher=fisher, impl=impl)
    assert_same(actual, expected, rtol=1e-9, atol=1e-14)


@each_impl
@examples
@given(case=cases(), mode=modes, fisher=fishers, data=st.data())
def test_masked_inputs_are_never_read(
    impl: str, case: Case, mode: Mode, fisher: str, data: st.DataObject
) -> None:
    """Padding may hold anything, NaN and the label −100 included; there the outputs are 0."""
    batch, n = case.batch, len(case.advantages)
    padding = data.draw(st.integers(1, 3))
    where = torch.tensor(data.draw(st.permutations(range(n + padding))))
    nan = torch.full((padding,), torch.nan, dtype=torch.float64)
    mask = torch.cat([torch.ones(n), torch.zeros(padding)]).bool()[where]
    padded = curvature(
        batch,
        mode,
        fisher=fisher,
        impl=impl,
        hidden=torch.cat([batch.hidden, nan[:, None].expand(-1, case.dim)])[where],
        token_ids=torch.cat([batch.token_ids, torch.full((padding,), -100)])[where],
        advantages=torch.cat([batch.advantages, nan])[where],
        coefficients=torch.cat([torch.ones(n).double(), nan])[where],
        mask=mask,
    )
    plain = curvature(batch, mode, fisher=fisher, impl=impl)
    assert padded.mask.equal(mask)
    for name in FIELDS:
        values = getattr(padded, name)
        torch.testing.assert_close(
            values[mask], getattr(plain, name)[where[mask]], rtol=1e-10, atol=1e-15
        )
        assert (values[~mask] == 0).all()


@each_impl
@examples
@given(case=cases(), mode=modes)
def test_shapes_and_broadcast_advantages(impl: str, case: Case, mode: Mode) -> None:
    """[N] as [2, N] is twice the same; one advantage for each row of a batch is enough."""
    batch, n = case.batch, len(case.advantages)
    flat = curvature(batch, mode, impl=impl, advantages=torch.tensor(1.5).double())
    square = curvature(
        batch,
        mode,
        impl=impl,
        hidden=batch.hidden.expand(2, n, case.dim),
        token_ids=batch.token_ids.expand(2, n),
        advantages=torch.full((2, 1), 1.5).double(),
        coefficients=None,
    )
    for name in FIELDS:
        value = getattr(square, name)
        assert value.shape == (2, n)
        torch.testing.assert_close(value[1], getattr(flat, name), rtol=1e-10, atol=1e-15)


@each_impl
@examples
@given(case=cases(step="sgd"), mode=modes, factor=st.sampled_from([-1.0, 0.1, 7.0]))
def test_sgd_scales_with_learning_rate_and_advantage(
    impl: str, case: Case, mode: Mode, factor: float
) -> None:
    """Δ = α A w hᵀ: s is linear in αA, the policy shift quadratic, whichever of both moved."""
    batch = case.batch
    for fisher in ("sampled", "exact"):
        base = curvature(batch, mode, fisher=fisher, impl=impl)
        scaled = [
            curvature(batch, mode, fisher=fisher, impl=impl, advantages=factor * batch.advantages)
        ]
        if factor > 0:
            step = capo.SGDStep(factor * case.lr)
            scaled.append(curvature(batch, mode, fisher=fisher, impl=impl, step=step))
        for other in scaled:
            close(other.s, factor * base.s)
            close(other.variance, factor**2 * base.variance)
            close(other.policy_shift, factor**2 * base.policy_shift)


@each_impl
@examples
@given(case=cases(), mode=modes)
def test_coefficient_is_a_factor_of_the_advantage(impl: str, case: Case, mode: Mode) -> None:
    batch = case.batch
    c = torch.linspace(0, 2, len(case.advantages)).double()
    inside = curvature(batch, mode, impl=impl, advantages=batch.advantages * c)
    outside = curvature(batch, mode, impl=impl, coefficients=c)
    assert_same(outside, inside)


@each_impl
@examples
@given(case=cases(step="given", logit_softcap=None), mode=st.sampled_from(MODES[::2]))
def test_exact_fisher_is_the_expected_sampled_fisher(impl: str, case: Case, mode: Mode) -> None:
    """E_{a∼π}[½ s_a²] = ½ Var_π(u), for a step that does not depend on the sampled token."""
    batch, V = case.batch, case.vocab
    if mode is not FULL:  # the set of kept rows holds the sampled token: keep them all
        mode = Mode("all", V, renormalize=False)
    everyone = replace(
        batch,
        hidden=batch.hidden[:1].expand(V, -1),
        token_ids=torch.arange(V),
        advantages=torch.ones(V).double(),
    )
    sampled = curvature(everyone, mode, impl=impl)
    exact = curvature(everyone, mode, impl=impl, fisher="exact")
    expected = (sampled.log_prob.exp() * sampled.policy_shift).sum()
    close(exact.policy_shift, expected.expand(V))
    close(-(sampled.log_prob.exp() * sampled.log_prob).sum(), sampled.entropy[0])


@each_impl
@examples
@given(case=cases(spread=1.0, temperature=1.0), factor=st.floats(1.5, 4.0))
def test_the_renormalised_set_is_a_policy_of_its_own(impl: str, case: Case, factor: float) -> None:
    """Rows outside the top k are not looked at, beyond that they are outside."""
    batch = replace(case.batch, hidden=case.batch.hidden[:1], token_ids=case.batch.token_ids[:1])
    batch = replace(batch, advantages=batch.advantages[:1])
    kept = oracle.kept_rows(batch.head, batch.hidden[0], int(batch.token_ids), 4)
    outside = torch.ones(case.vocab, dtype=torch.bool)
    outside[kept] = False
    weight = batch.head.weight.clone()
    direction = batch.hidden[0] / batch.hidden[0].square().sum().sqrt()
    weight[outside] -= factor * direction  # lower logits, different rows
    changed = curvature(batch, MODES[1], impl=impl, head_weight=weight)
    plain = curvature(batch, MODES[1], impl=impl)
    for name in ("objective_shift", "policy_shift", "s", "variance"):
        close(getattr(changed, name), getattr(plain, name))


@each_impl
@examples
@given(
    case=cases(),
    mode=modes,
    fisher=fishers,
    granularity=st.sampled_from(["token", "batch"]),
    token_chunk=st.integers(1, 7),
    vocab_chunk=st.integers(1, 19),
)
def test_chunk_sizes_do_not_matter(
    impl: str,
    case: Case,
    mode: Mode,
    fisher: str,
    granularity: str,
    token_chunk: int,
    vocab_chunk: int,
) -> None:
    """Statistics of blocks of tokens and of vocabulary rows merge, however they are cut."""
    options = _options()
    if granularity != "token":
        mode = FULL
    asked: dict[str, Any] = {"fisher": fisher, "granularity": granularity, "impl": impl}
    plain = curvature(case.batch, mode, **asked)
    with ExitStack() as stack:
        stack.enter_context(options(token_chunk=token_chunk, vocab_chunk=vocab_chunk))
        cut = curvature(case.batch, mode, **asked)
    assert_same(cut, plain, rtol=1e-9, atol=1e-14)


@each_impl
@examples
@given(case=cases(), fisher=fishers, top_k=st.integers(1, 5))
def test_the_truncation_bound_is_never_exceeded(
    impl: str, case: Case, fisher: str, top_k: int
) -> None:
    """What the rows left out could have added, and nothing where none is left out."""
    batch = case.batch
    full = curvature(batch, fisher=fisher, impl=impl)
    assert full.truncation_bound is not None
    assert (full.truncation_bound.objective_shift == 0).all()
    assert curvature(batch, MODES[1], impl=impl).truncation_bound is None
    for k in (top_k, case.vocab):
        cut = curvature(batch, Mode("cut", k, renormalize=False), fisher=fisher, impl=impl)
        assert cut.truncation_bound is not None
        for name in ("s", "variance", "policy_shift", "objective_shift"):
            bound = getattr(cut.truncation_bound, name)
            error = (getattr(cut, name) - getattr(full, name)).abs()
            rounding = 1e-12 * (1 + getattr(full, name).abs())
            assert (error <= bound + rounding).all(), name
            assert torch.isfinite(bound).all()
            if k == case.vocab:
                assert (bound <= rounding).all(), name


@each_impl
@pytest.mark.parametrize("step", ["given", "sgd", "adam"])
def test_the_truncation_bound_covers_the_bend_of_a_soft_cap(impl: str, step: Any) -> None:
    """Near a sharp cap |φ″| ≫ φ′: the bend alone would break a bound that left it out."""
    for seed in range(40):
        lr = 0.2 if step == "adam" else 5.0
        case = Case("bent", step=step, lr=lr, dim=1, logit_softcap=0.02, spread=0.03, seed=seed)
        full = curvature(case.batch, impl=impl).objective_shift
        cut = curvature(case.batch, MODES[2], impl=impl)
        assert cut.truncation_bound is not None
        error = (cut.objective_shift - full).abs()
        assert (error <= cut.truncation_bound.objective_shift + 1e-12 * (1 + full.abs())).all()


def _options() -> Any:
    from capo.core import statistics

    options = getattr(statistics, "options", None)
    if not callable(options):
        pytest.skip("capo.core.statistics.options(token_chunk=, vocab_chunk=) does not exist")
    return options


@each_impl
@pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_accumulated_in_float32(
    dtype: torch.dtype, mode: Mode, impl: str
) -> None:
    """The result is that of the same numbers held in float32, up to float32's own rounding."""
    for step in ("sgd", "adam"):
        case = Case("half", step=step, lr=0.01, dim=64, vocab=33, spread=2.0, seed=5)
        low = curvature(case.batch, mode, dtype, impl=impl)
        rounded = replace(
            case.batch,
            head=replace(case.batch.head, weight=case.batch.head.weight.to(dtype)),
            hidden=case.batch.hidden.to(dtype),
            advantages=case.batch.advantages.to(dtype),
            step=_rounded(case.batch.step, dtype),
        )
        full = curvature(rounded, mode, torch.float32, impl=impl)
        assert low.objective_shift.dtype == torch.float32
        assert_same(low, full, rtol=2e-4, atol=1e-9)


def _permutation(n: int, seed: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _rounded(step: oracle.Step, dtype: torch.dtype) -> oracle.Step:
    if not isinstance(step, oracle.Adam) or step.exp_avg is None or step.exp_avg_sq is None:
        return step
    return replace(step, exp_avg=step.exp_avg.to(dtype), exp_avg_sq=step.exp_avg_sq.to(dtype))


@each_impl
def test_nothing_is_differentiated_and_nothing_is_written(impl: str) -> None:
    case = Case("inputs", step="adamw", lr=0.01)
    batch: Batch = case.batch
    inputs = [batch.hidden, batch.head.weight, batch.step.exp_avg, batch.step.exp_avg_sq]  # type: ignore[union-attr]
    before = [x.clone() for x in inputs if x is not None]
    result = curvature(batch, impl=impl, hidden=batch.hidden.clone().requires_grad_())
    assert not any(getattr(result, name).requires_grad for name in FIELDS)
    assert all(x.equal(y) for x, y in zip(inputs, before, strict=True) if x is not None)
    assert isinstance(as_capo(batch.step), capo.AdamStep)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)
