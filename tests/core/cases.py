"""Test cases as data: small heads, few tokens, every switch of ``token_curvature`` once.

A case names its numbers; ``Case.batch`` builds the float64 tensors. The oracle's verdicts are
cached, so that every backend is held to the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor

import oracle
from oracle_mp import judge_token_mp

StepKind = Literal[
    "sgd",
    "sgd_decay",
    "momentum",
    "momentum_empty",
    "nesterov",
    "adam",
    "adam_empty",
    "adam_zeros",
    "adam_first",
    "adam_scaled",
    "adam_frozen",
    "adamw",
    "given",
]


@dataclass(frozen=True)
class Mode:
    """Which vocabulary rows take part."""

    name: str
    top_k: int | None = None
    renormalize: bool = True


FULL = Mode("full")
MODES = (FULL, Mode("top4", top_k=4), Mode("top4-of-full", top_k=4, renormalize=False))


@dataclass(frozen=True)
class Batch:
    """The tensors of a case, float64 (``token_ids`` int64)."""

    head: oracle.Head
    hidden: Tensor  # [N, d]
    token_ids: Tensor  # [N]
    advantages: Tensor  # [N]
    coefficients: Tensor | None  # [N]
    step: oracle.Step

    @property
    def effective(self) -> Tensor:
        """A_eff = advantage × coefficient, [N]."""
        return self.advantages if self.coefficients is None else self.advantages * self.coefficients


@dataclass(frozen=True)
class Case:
    """One row of the table below."""

    name: str
    step: StepKind = "sgd"
    advantages: tuple[float, ...] = (1.0, -0.7, 2.3)
    coefficients: tuple[float, ...] | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    bias: bool = False
    vocab: int = 9
    dim: int = 4
    spread: float = 1.0  # standard deviation of the logits, roughly
    lr: float = 0.3
    # 1 − π of the favourite token: the sampled one, or another one.
    doubt: tuple[float, ...] | None = None
    favourite: Literal["sampled", "other"] = "sampled"
    sampled_rank: int | None = None  # the sampled token's rank among the logits
    seed: int = 0

    @cached_property
    def batch(self) -> Batch:
        generator = torch.Generator().manual_seed(1000 + self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        V, d, N = self.vocab, self.dim, len(self.advantages)
        weight = normal(V, d) / d**0.5
        if self.doubt is not None:  # unit rows, far apart: every token can be a favourite
            weight = torch.nn.functional.normalize(
                torch.eye(V, d, dtype=torch.float64) + 0.2 * d**0.5 * weight, dim=1
            )
        head = oracle.Head(
            weight=weight,
            bias=0.5 * normal(V) if self.bias else None,
            temperature=self.temperature,
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
        )
        hidden = self.spread * normal(N, d)
        token_ids = torch.randint(V, (N,), generator=generator)
        if self.doubt is not None:
            favourites = token_ids if self.favourite == "sampled" else (token_ids + 1) % V
            hidden = torch.stack(
                [_confident(head, h, int(k), c) for h, k, c in _zip(hidden, favourites, self.doubt)]
            )
        if self.sampled_rank is not None:
            order = [head.log_policy(weight, h).argsort(descending=True) for h in hidden]
            token_ids = torch.stack([o[self.sampled_rank] for o in order])
        f64 = torch.float64
        return Batch(
            head=head,
            hidden=hidden,
            token_ids=token_ids,
            advantages=torch.tensor(self.advantages, dtype=f64),
            coefficients=None
            if self.coefficients is None
            else torch.tensor(self.coefficients, dtype=f64),
            step=_step(self.step, self.lr, 0.1 * normal(V, d), 0.2 * normal(V, d).square()),
        )


def _zip(*columns: Any) -> list[tuple[Any, ...]]:
    return list(zip(*columns, strict=True))


def _confident(head: oracle.Head, hidden: Tensor, token: int, doubt: float) -> Tensor:
    """``hidden`` moved along the token's (unit) row until 1 − π(token) is ``doubt``."""
    low, high = 0.0, 400.0 * head.temperature / head.logit_scale
    for _ in range(100):
        middle = (low + high) / 2
        moved = 0.1 * hidden + middle * head.weight[token]
        others = head.log_policy(head.weight, moved)
        others[token] = -torch.inf
        if others.exp().sum() > doubt:
            low = middle
        else:
            high = middle
    return 0.1 * hidden + high * head.weight[token]


def _step(kind: StepKind, lr: float, exp_avg: Tensor, exp_avg_sq: Tensor) -> oracle.Step:
    if kind == "sgd":
        return oracle.SGD(lr)
    if kind == "given":
        return oracle.Given(lr * exp_avg)
    others: dict[str, oracle.Step] = {
        "sgd_decay": oracle.SGD(lr, weight_decay=0.2),
        "momentum": oracle.Momentum(lr, 0.9, exp_avg, dampening=0.3, grad_scale=0.5),
        "momentum_empty": oracle.Momentum(lr, 0.9, None, dampening=0.3, weight_decay=0.1),
        "nesterov": oracle.Momentum(lr, 0.8, exp_avg, nesterov=True, weight_decay=0.1),
    }
    if kind in others:
        return others[kind]
    zeros = torch.zeros_like(exp_avg)
    sparse = exp_avg.clone()
    sparse[::2] = 0  # rows that no gradient has reached yet: v = 0 there
    settings: dict[str, Any] = {
        "adam_empty": {"eps": 1e-8},
        "adam_zeros": {"eps": 1e-8, "exp_avg": zeros, "exp_avg_sq": zeros},
        "adam_first": {"exp_avg": 0.1 * sparse, "exp_avg_sq": 0.01 * sparse**2, "step": 1},
        "adam": {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": 7},
        "adam_frozen": {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": 4, "frozen": True},
        "adamw": {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": 30, "weight_decay": 0.1},
        "adam_scaled": {
            "exp_avg": exp_avg,
            "exp_avg_sq": exp_avg_sq,
            "step": 3,
            "grad_scale": 0.02,
        },
    }[kind]
    return oracle.Adam(lr, (0.9, 0.99), **{"eps": 1e-6, **settings})


DOUBTS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
ALTERNATING = (1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0)

CASES = (
    Case("sgd"),
    Case("sgd-hot", temperature=1.7, seed=1),
    Case("sgd-cold", temperature=0.6, seed=2),
    Case("sgd-scaled-logits", logit_scale=0.4, temperature=1.3, spread=2.0, seed=3),
    Case("sgd-softcap", logit_softcap=2.0, spread=2.0, seed=4),
    Case("sgd-softcap-all", logit_softcap=3.0, logit_scale=1.5, temperature=0.8, bias=True, seed=5),
    Case("sgd-bias", bias=True, seed=6),
    Case("sgd-clipped", coefficients=(0.0, 1.0, 1.4), seed=7),
    Case("sgd-no-advantage", advantages=(0.0, 0.0, 1.0), seed=8),
    Case("sgd-outside-top", sampled_rank=7, seed=9),
    Case("sgd-tiny-step", lr=1e-7, seed=10),
    Case("sgd-dominant-decay", spread=6.0, seed=11),
    Case("sgd-decay", step="sgd_decay", seed=28),
    Case("momentum", step="momentum", seed=29),
    Case("momentum-empty", step="momentum_empty", temperature=1.4, seed=30),
    Case("nesterov", step="nesterov", logit_softcap=2.0, spread=2.0, seed=31),
    Case("adam", step="adam", lr=0.01, seed=12),
    Case("adam-empty", step="adam_empty", lr=0.01, seed=13),
    Case("adam-zeros", step="adam_zeros", lr=0.01, seed=13),
    Case("adam-first", step="adam_first", lr=0.01, seed=14),
    Case("adam-hot", step="adam", lr=0.01, temperature=1.7, seed=15),
    Case("adam-softcap", step="adam", lr=0.01, logit_softcap=2.0, spread=2.0, seed=16),
    Case(
        "adam-softcap-all",
        step="adam",
        lr=0.01,
        logit_softcap=3.0,
        logit_scale=1.5,
        temperature=0.8,
        bias=True,
        seed=17,
    ),
    Case("adam-clipped", step="adam", lr=0.01, coefficients=(0.0, 1.0, 1.4), seed=18),
    Case("adam-no-advantage", step="adam", lr=0.01, advantages=(0.0, 0.0, 1.0), seed=19),
    Case("adam-empty-no-advantage", step="adam_empty", advantages=(0.0, 1.0), seed=20),
    Case("adam-outside-top", step="adam", lr=0.01, sampled_rank=8, seed=21),
    Case("adam-huge-advantage", step="adam", lr=0.01, advantages=(1e4, -1e4), seed=22),
    Case("adam-scaled", step="adam_scaled", lr=0.01, seed=23),
    Case("adam-frozen", step="adam_frozen", lr=0.01, seed=32),
    Case("adam-frozen-softcap", step="adam_frozen", lr=0.01, logit_softcap=2.0, seed=33),
    Case("adamw", step="adamw", lr=0.01, seed=24),
    Case("adamw-bias-softcap", step="adamw", lr=0.01, bias=True, logit_softcap=2.5, seed=25),
    Case("given", step="given", seed=26),
    Case("given-softcap", step="given", logit_softcap=2.0, temperature=0.7, spread=2.0, seed=27),
)

# Judged by the arbiter: 1 − π(sampled) down to 1e-8, and the reverse, a sampled token that the
# policy all but excludes because it is sure of another one.
CONFIDENT = tuple(
    Case(
        f"{step}-{'sure' if favourite == 'sampled' else 'surprised'}{suffix}",
        step=step,
        lr=0.01,
        advantages=ALTERNATING,
        doubt=DOUBTS,
        favourite=favourite,
        vocab=6,
        dim=6,
        seed=40 + seed,
        **extra,
    )
    for seed, (step, favourite, suffix, extra) in enumerate(
        [
            ("sgd", "sampled", "", {}),
            ("sgd", "sampled", "-hot", {"temperature": 1.5, "bias": True}),
            ("sgd", "sampled", "-softcap", {"logit_softcap": 60.0}),
            ("adam", "sampled", "", {}),
            ("adam", "sampled", "-hot", {"temperature": 1.5, "bias": True}),
            ("adam_empty", "sampled", "", {}),
            ("adamw", "sampled", "", {}),
            ("adam_frozen", "sampled", "", {}),
            ("momentum", "sampled", "", {}),
            ("given", "sampled", "", {}),
            ("sgd", "other", "", {}),
            ("adam", "other", "", {}),
            ("given", "other", "", {}),
        ]
    )
)


@cache
def verdicts(
    case: Case, mode: Mode, arbiter: bool = False, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """The oracle's fields for every token of the case, rounded to ``dtype``: each [N] float64."""
    return judge(cast(case.batch, dtype), mode, arbiter)


def judge(batch: Batch, mode: Mode, arbiter: bool = False) -> dict[str, Tensor]:
    """Every token of a batch under its own step."""
    judge_one = judge_token_mp if arbiter else oracle.judge_token
    judged = [
        judge_one(
            batch.head,
            h,
            int(a),
            float(A),
            batch.step,
            top_k=mode.top_k,
            renormalize=mode.renormalize,
        )
        for h, a, A in _zip(batch.hidden, batch.token_ids, batch.effective)
    ]
    return {name: torch.stack([getattr(j, name) for j in judged]) for name in oracle.FIELDS}


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The same batch rounded to ``dtype`` and held in float64: exactly what a caller would pass."""

    def rounded(x: Any) -> Any:
        return x.to(dtype).double() if isinstance(x, Tensor) and x.is_floating_point() else x

    def rounded_fields(x: Any) -> Any:
        return type(x)(**{name: rounded(getattr(x, name)) for name in x.__dataclass_fields__})

    return Batch(
        head=rounded_fields(batch.head),
        hidden=rounded(batch.hidden),
        token_ids=batch.token_ids,
        advantages=rounded(batch.advantages),
        coefficients=rounded(batch.coefficients),
        step=rounded_fields(batch.step),
    )
