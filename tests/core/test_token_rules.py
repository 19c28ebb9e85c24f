"""Token rules of others, against cases worked out by hand in float64."""

from __future__ import annotations

import math

import pytest
import torch

import capo
from capo.core.errors import InputError
from capo.core.rules import make_rule
from capo.core.token_rules import (
    GTPO,
    STAPO,
    ClipCov,
    KLCov,
    Lopti,
    Reweight,
    SameRate,
    TokenContext,
    TokenRule,
    covariance,
)


def curvature(probability, entropy=None, policy_shift=None, objective_shift=None):
    """Curvature with these probabilities; what is not given is 0."""
    p = torch.tensor(probability, dtype=torch.float64)
    zero = torch.zeros_like(p)

    def values(given):
        return zero if given is None else torch.tensor(given, dtype=torch.float64)

    return capo.TokenCurvature(
        objective_shift=values(objective_shift),
        policy_shift=values(policy_shift),
        log_prob=p.log(),
        entropy=values(entropy),
        s=zero,
        variance=zero,
        truncation_bound=None,
        mask=torch.ones_like(p, dtype=torch.bool),
    )


def context(ids, advantage, *, old=None, acting=None, group=None, iteration=0, seed=0):
    ids = torch.tensor(ids)
    a = torch.tensor(advantage, dtype=torch.float64)
    a = a[:, None].expand(ids.shape) if a.ndim == 1 else a
    return TokenContext(
        token_ids=ids,
        advantage=a,
        old_log_prob=torch.tensor(old, dtype=torch.float64).log() if old else torch.zeros_like(a),
        acting=torch.ones_like(ids, dtype=torch.bool) if acting is None else torch.tensor(acting),
        group=torch.zeros(len(ids), dtype=torch.long) if group is None else torch.tensor(group),
        iteration=iteration,
        seed=seed,
    )


def everything(ids):
    return torch.ones_like(torch.tensor(ids), dtype=torch.bool)


def test_gtpo_skips_and_amplifies_conflicts_at_both_ends() -> None:
    # right      7 1 2 5 9        from the start 7 1 2, each with one of the others; from the end 9
    # wrong      7 3 2 9          from the start 7, since 3 ends the run; from the end 9
    # wrong      7 1 4 9          from the start 7 1; from the end 9
    ids = [[7, 1, 2, 5, 9], [7, 3, 2, 9, 0], [7, 1, 4, 9, 0]]
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]).bool()
    half = [[0.5] * 5] * 3
    weights = GTPO(bonus=2.0).within(curvature(half), mask, context(ids, [1.0, -0.5, -0.5])).weights
    assert weights.tolist() == [[2, 2, 2, 1, 2], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0]]


def test_gtpo_a_token_in_both_runs_is_amplified_twice() -> None:
    ids = [[4, 4], [4, 4]]
    got = GTPO(bonus=3.0).within(
        curvature([[0.5, 0.5]] * 2), everything(ids), context(ids, [1.0, -1.0])
    )
    assert got.weights.tolist() == [[9, 9], [0, 0]]
    assert got.denominator == "all"
    assert float(got.rejection_rate) == 0.5  # amplifying rejects nothing


def test_gtpo_groups_and_zero_advantages_are_no_conflict() -> None:
    ids = [[4], [4], [4], [4]]
    c = curvature([[0.5]] * 4)
    other = GTPO().within(
        c, everything(ids), context(ids, [1.0, 1.0, -1.0, -1.0], group=[0, 0, 1, 1])
    )
    assert other.weights.flatten().tolist() == [1, 1, 1, 1]
    none = GTPO().within(c, everything(ids), context(ids, [1.0, 0.0, 0.0, 1.0]))
    assert none.weights.flatten().tolist() == [1, 1, 1, 1]


def test_gtpo_leaves_out_completions_of_high_entropy() -> None:
    ids = [[1, 2], [3, 4]]
    c = curvature([[0.5] * 2] * 2, entropy=[[1.0, 0.5], [1.0, 0.3]])  # means 0.75 and 0.65
    got = GTPO(max_entropy=0.7).within(c, everything(ids), context(ids, [1.0, -1.0]))
    assert got.weights.tolist() == [[0, 0], [1, 1]]


def test_stapo_masks_rare_certain_rewarded_tokens() -> None:
    #        spurious   not rewarded   likely   uncertain   and the rest
    p = [[0.005, 0.5, 0.5, 0.005, 0.5], [0.005, 0.5, 0.5, 0.5, 0.5]]
    h = [[0.01, 0.5, 0.01, 0.9, 0.5], [0.01, 0.5, 0.5, 0.5, 0.5]]
    ids = [[1] * 5] * 2
    rule = STAPO(probability=0.01, entropy_quantile=0.5)
    got = rule.within(curvature(p, h), everything(ids), context(ids, [1.0, -1.0]))
    assert got.weights.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]
    assert got.denominator == "kept"
    assert got.rejection_rate_by_reason.keys() == {"rule"}


def test_lopti_updates_the_unlikely_first_and_the_others_after() -> None:
    ids = [[1, 2, 3]]
    old = [[0.3, 0.4, 0.5]]
    c = curvature([[0.9, 0.9, 0.9]])  # the probability that counts is that of sampling
    first, second = (
        Lopti(0.4 + 1e-12)
        .within(c, everything(ids), context(ids, [1.0], old=old, iteration=i))
        .weights
        for i in (0, 1)
    )
    assert first.tolist() == [[1, 1, 0]]
    assert (first + second).tolist() == [[1, 1, 1]]


def test_reweighting_is_linear_in_the_probability() -> None:
    ids = [[1, 2]]
    got = Reweight(alpha=0.3).within(
        curvature([[0.9, 0.9]]), everything(ids), context(ids, [1.0], old=[[0.1, 1.0]])
    )
    torch.testing.assert_close(got.weights, torch.tensor([[0.73, 1.0]], dtype=torch.float64))


P = [[0.5, 0.25, 0.125, 0.9]]  # the last is masked
A = [[1.0, -1.0, 3.0, 5.0]]
# ln p is −1, −2, −3 times ln 2, its mean −2 ln 2; A − 1 is 0, −2, 2: the product below by hand
COVARIANCE = [0.0, 0.0, -2 * math.log(2)]


def test_covariance_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False]])
    got = covariance(curvature(P), mask, context([[1, 2, 3, 4]], A))
    torch.testing.assert_close(got[0, :3], torch.tensor(COVARIANCE, dtype=torch.float64))
    assert got[0, 3] == -math.inf


def cov_case():
    """ln p = −1 … −4, mean −2.5; A − mean = −4, −1, 1, 4: covariances −6, −0.5, −0.5, −6; turned round."""
    p = [[math.exp(-k) for k in (4, 3, 2, 1)]]
    return curvature(p), context([[1, 2, 3, 4]], [[-3.0, 0.0, 2.0, 5.0]]), torch.ones(1, 4).bool()


def test_clip_cov_masks_within_its_bounds_and_draws_among_them() -> None:
    c, at, mask = cov_case()
    assert covariance(c, mask, at).tolist() == [pytest.approx([6.0, 0.5, 0.5, 6.0])]
    assert ClipCov(share=1.0, low=1, high=7).within(c, mask, at).weights.tolist() == [[0, 1, 1, 0]]
    assert ClipCov(share=1.0, low=1, high=5).within(c, mask, at).weights.tolist() == [[1, 1, 1, 1]]
    few = ClipCov(share=1e-9, low=1, high=7)  # at least one
    drawn = set()
    for seed in range(20):
        got = few.within(c, mask, TokenContext(**{**vars(at), "seed": seed})).weights
        assert got.sum() == 3
        drawn.add(int(got.argmin()))
    assert drawn == {0, 3}


def test_clip_cov_leaves_alone_what_is_clipped_already() -> None:
    c, at, mask = cov_case()
    acting = torch.tensor([[False, True, True, True]])
    got = ClipCov(share=1.0, low=1, high=7).within(
        c, mask, TokenContext(**{**vars(at), "acting": acting})
    )
    assert got.weights.tolist() == [[1, 1, 1, 0]]


def test_kl_cov_penalises_the_largest_covariances_in_the_direction_they_moved() -> None:
    c, at, mask = cov_case()
    old = c.log_prob + torch.tensor([[0.1, 0.0, 0.0, -0.1]])  # the first fell, the last rose
    moved = TokenContext(**{**vars(at), "old_log_prob": old})
    got = KLCov(share=0.5, coefficient=0.7).within(c, mask, moved)
    assert got.weights.tolist() == [[1, 1, 1, 1]]
    assert got.penalty is not None
    assert got.penalty.tolist() == [[-0.7, 0, 0, 0.7]]
    still = KLCov(share=0.5).within(
        c, mask, TokenContext(**{**vars(at), "old_log_prob": c.log_prob})
    )
    assert still.penalty is not None
    assert not still.penalty.any()


LIKE = {"policy_shift": 0.5, "denominator": "all"}
SHIFTS = [[0.1, 0.9, 0.2, 0.8, 0.3, 9.0]]  # two of five tokens are rejected, the sixth is masked
PROB = [[0.9, 0.8, 0.01, 0.7, 0.02, 0.001]]
ENTROPY = [[3.0, 0.1, 2.0, 0.1, 0.2, 9.0]]


@pytest.mark.parametrize(
    ("by", "rejected"),
    [("surprise", {2, 4}), ("entropy", {0, 2}), ("last_layer", {1, 3}), ("gap", {3, 4})],
)
def test_the_same_rate_by_another_score(by: str, rejected: set[int]) -> None:
    mask = torch.tensor([[True] * 5 + [False]])
    # |A|(1 − π): 0.1, 0.2, 0.099, 0.3, 0.98, so 4 and 3 go first
    at = context([[1] * 6], [[1.0, 1.0, 0.1, 1.0, 1.0, 1.0]])
    got = SameRate(by=by, like=LIKE).within(curvature(PROB, ENTROPY, SHIFTS), mask, at)  # type: ignore[arg-type]
    assert set((got.weights[0, :5] == 0).nonzero().flatten().tolist()) == rejected
    assert float(got.rejection_rate) == pytest.approx(0.4)
    assert got.denominator == "all"


def test_random_masks_have_the_rate_and_no_preference() -> None:
    mask = torch.tensor([[True] * 5 + [False]])
    hits = torch.zeros(6)
    for seed in range(400):
        at = context([[1] * 6], [1.0], seed=seed)
        got = SameRate(by="random", like=LIKE).within(curvature(PROB, ENTROPY, SHIFTS), mask, at)
        again = SameRate(by="random", like=LIKE).within(curvature(PROB, ENTROPY, SHIFTS), mask, at)
        assert torch.equal(got.weights, again.weights)
        rejected = (got.weights == 0) & mask
        assert rejected.sum() == 2
        hits += rejected[0]
    assert hits[5] == 0
    assert (hits[:5] / 400 - 0.4).abs().max() < 0.1


def test_rules_by_name() -> None:
    for name in ("gtpo", "stapo", "lopti", "reweight", "clip_cov", "kl_cov", "same_rate"):
        assert isinstance(make_rule({"rule": name}), TokenRule)
    assert make_rule({"rule": "same_rate", "by": "surprise", "like": "dr_capo"}) == SameRate(
        "surprise", "dr_capo"
    )


@pytest.mark.parametrize(
    ("selection", "field"),
    [
        ({"rule": "stapo", "probability": 2}, "selection.probability"),
        ({"rule": "clip_cov", "low": 3, "high": 2}, "selection.high"),
        ({"rule": "gtpo", "bonus": 0.5}, "selection.bonus"),
        ({"rule": "same_rate", "by": "luck"}, "selection.by"),
        ({"rule": "same_rate", "like": {"rule": "stapo"}}, "selection.like"),
        ({"rule": "lopti", "eta": 0.5}, "selection"),
    ],
)
def test_impossible_arguments_are_named(selection: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as error:
        make_rule(selection)
    assert error.value.field == field
