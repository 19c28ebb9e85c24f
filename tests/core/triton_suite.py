"""The fused backend against the plain one; run by ``test_triton.py`` in a process of its own.

On a machine with a GPU the kernels run there, otherwise in Triton's interpreter, which must be asked
for before triton is first imported. Every output buffer starts as NaN.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import capo
from capo.core.adam_move import moved_by_kernel
from capo.core.statistics.rest import ABSENT
from capo.core.statistics.triton_backend import largest
from capo.core.statistics.triton_kernels import activate
from capo.core.statistics.triton_launch import Keys, interpreted, tiling
from core.cases import CASES, CONFIDENT, FULL, MODES, Case, Mode, cast
from core.subject import FIELDS, arguments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DRAWS = 72 if DEVICE == "cuda" else 36  # the interpreter is slow
SMALL = {"tokens": 16, "rows": 16, "width": 16, "warps": 1, "stages": 1}

each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda m: m.name)


@pytest.fixture(autouse=True)
def _small_tiles_and_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plain = torch.Tensor.new_empty

    def poisoned(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        fresh = plain(self, *shape, **options)
        return fresh.fill_(math.nan) if fresh.is_floating_point() else fresh.fill_(-(2**31))

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    with tiling(**SMALL, splits=2, held=64):
        yield


def on_device(x: Any) -> Any:
    """Tensors, and the tensors of a step, on the device under test."""
    if isinstance(x, Tensor):
        return x.to(DEVICE)
    if hasattr(x, "of_gradient"):
        return replace(x, **{f.name: on_device(getattr(x, f.name)) for f in fields(x)})
    return x


def judge(given: dict[str, Any], impl: str) -> capo.TokenCurvature:
    moved = {name: on_device(value) for name, value in given.items()}
    first = [moved.pop(n) for n in ("hidden", "head_weight", "token_ids", "advantages")]
    return capo.token_curvature(*first, **moved, impl=impl)


def doubled(x: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if hasattr(x, "of_gradient"):
        return replace(x, **{f.name: doubled(getattr(x, f.name)) for f in fields(x)})
    return x


def assert_within_budget(given: dict[str, Any]) -> None:
    """No field is further from float64 than the plain float32 backend, times four."""
    reference = judge({name: doubled(value) for name, value in given.items()}, "eager")
    plain, fused = judge(given, "eager"), judge(given, "triton")
    pairs = [(n, getattr(reference, n), getattr(plain, n), getattr(fused, n)) for n in FIELDS]
    if reference.truncation_bound is not None:
        bounds = (reference.truncation_bound, plain.truncation_bound, fused.truncation_bound)
        pairs += zip(capo.TruncationBound._fields, *bounds, strict=True)
    for name, exact, theirs, ours in pairs:
        assert ours.dtype == torch.float32
        assert torch.isfinite(ours).all(), name
        allowed = 4.0 * (theirs.double() - exact).abs().max() + 2e-6 * exact.abs().max() + 1e-30
        off = (ours.double() - exact).abs().max()
        assert off <= allowed, f"{name}: off by {off:.3e}, allowed {allowed:.3e}"


def test_the_kernels_run_where_they_should() -> None:
    assert interpreted() == (DEVICE == "cpu")


@each_mode
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case(case: Case, mode: Mode) -> None:
    assert_within_budget(arguments(cast(case.batch, torch.float32), mode, torch.float32))


@each_mode
@pytest.mark.parametrize("case", CONFIDENT, ids=lambda c: c.name)
@pytest.mark.parametrize("library", [0, 1])
def test_confident_tokens_keep_relative_precision(case: Case, mode: Mode, library: int) -> None:
    """1 − π from 1e-2 to 1e-8, below float32's resolution of π itself; elementwise."""
    batch = cast(case.batch, torch.float32)
    expected = judge(arguments(batch, mode), "eager")
    with tiling(library=library):
        actual = judge(arguments(batch, mode, torch.float32), "triton")
    for name in FIELDS:
        nats = 1e-6 if name == "entropy" and case.favourite == "other" else 1e-36
        torch.testing.assert_close(
            getattr(actual, name).double(),
            getattr(expected, name),
            rtol=1e-4,
            atol=nats,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@dataclass(frozen=True)
class Draw:
    """A random problem: any step, shape, dtype, stride and switch."""

    seed: int

    def arguments(self) -> dict[str, Any]:
        pick = random.Random(self.seed)
        generator = torch.Generator().manual_seed(self.seed)
        n, v, d = pick.choice(
            [(1, 1, 1), (1, 2, 3), (9, 70, 20), (17, 33, 16), (3, 16, 5), (18, 40, 17), (2, 17, 33)]
        )
        dtype = pick.choice([torch.float32, torch.bfloat16, torch.float16])
        narrow = pick.choice([dtype, torch.float32])

        def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
            x = torch.randn(*shape, generator=generator)
            if pick.random() < 0.3:  # some other stride
                x = torch.stack([x, torch.full_like(x, math.nan)], dim=-1)[..., 0]
            elif x.ndim == 2 and pick.random() < 0.3:
                x = x.T.contiguous().T
            wide = torch.empty_like(x, dtype=to)  # empty_like keeps the strides of a dense tensor
            return x if to == torch.float32 else wide.copy_(x)

        m, square = 0.1 * normal(v, d, to=narrow), (0.2 * normal(v, d, to=narrow)).square() + 1e-4
        steps = {
            "sgd": capo.SGDStep(0.3),
            "decay": capo.SGDStep(0.3, 0.2),
            "momentum": capo.MomentumStep(0.3, 0.9, m, dampening=0.3, grad_scale=0.5),
            "nesterov": capo.MomentumStep(0.3, 0.8, m, nesterov=True, weight_decay=0.1),
            "given": capo.GivenStep(m),
            "adam": capo.AdamStep(0.01, (0.9, 0.99), 1e-6, m, square, 7, 0.1, grad_scale=0.5),
            "empty": capo.AdamStep(0.01, (0.9, 0.99), 1e-6, None, None, 0),
            "frozen": capo.AdamStep(
                0.01, (0.9, 0.99), 1e-6, m, square, 4, 0.1, preconditioner="frozen"
            ),
        }
        return {
            "hidden": normal(n, d),
            "head_weight": normal(v, d, to=narrow) / d**0.5,
            "token_ids": torch.randint(v, (n,), generator=generator),
            "advantages": torch.randn(n, generator=generator),
            "step": steps[pick.choice(list(steps))],
            "temperature": pick.choice([1.0, 0.7]),
            "logit_scale": pick.choice([1.0, 1.5, -0.8]),
            "logit_softcap": pick.choice([None, 2.0]),
            "head_bias": pick.choice([None, normal(v)]),
            "top_k": pick.choice([None, 1, min(v, 4), v]),
            # With V = 1 there is nothing to leave out, and its share of nothing is 0/0.
            "renormalize": v == 1 or pick.choice([True, False]),
            "fisher": pick.choice(["sampled", "exact"]),
        }


@pytest.mark.parametrize("seed", range(DRAWS))
def test_any_problem(seed: int) -> None:
    assert_within_budget(Draw(seed).arguments())


@pytest.mark.parametrize("seed", range(100, 100 + DRAWS // 2))
def test_the_vendors_product_gives_the_same(seed: int) -> None:
    """Logits held by a library's product and read once, in place of the fused pass."""
    given = Draw(seed).arguments()
    if given["top_k"] is None:
        given["top_k"] = min(3, given["head_weight"].shape[0])
    with tiling(rows=16 if seed % 2 else 64, held=1 << 12, library=1):
        assert_within_budget(given)


@pytest.mark.parametrize("splits", [1, 3, 5])
@pytest.mark.parametrize("rows", [16, 64])
def test_tiles_and_slices_change_rounding_only(splits: int, rows: int) -> None:
    given = next(a for a in map(_draw, range(1000)) if a["head_weight"].shape[0] == 70)
    for top_k in (None, 6):
        given = given | {"top_k": top_k, "step": capo.SGDStep(0.3)}
        with tiling(rows=rows, splits=splits, held=1 << 20):
            assert_within_budget(given)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["sgd", "given", "momentum", "frozen", "adam"])
def test_tiles_of_the_table(name: str, dtype: torch.dtype, softcap: float | None) -> None:
    """The sizes that are used outside this file; several tiles, slices and token blocks."""
    n, v, d = (300, 5000, 130) if DEVICE == "cuda" else (70, 140, 40)
    m, square = 0.1 * torch.randn(v, d), 0.04 * torch.rand(v, d) + 1e-4
    adam = capo.AdamStep(0.01, (0.9, 0.99), 1e-6, m, square, 7, 0.1)
    steps = {
        "sgd": capo.SGDStep(0.3),
        "given": capo.GivenStep(m.to(dtype)),
        "momentum": capo.MomentumStep(0.3, 0.9, m),
        "frozen": replace(adam, preconditioner="frozen"),
        "adam": adam,
    }
    with tiling(**dict.fromkeys([*SMALL, "splits", "held"])):
        assert_within_budget(
            {
                "hidden": torch.randn(n, d).to(dtype),
                "head_weight": (2.0 * torch.randn(v, d) / d**0.5).to(dtype),
                "token_ids": torch.randint(v, (n,)),
                "advantages": torch.randn(n),
                "step": steps[name],
                "logit_softcap": softcap,
                "top_k": 20 if name == "adam" else None,
            }
        )


def _draw(seed: int) -> dict[str, Any]:
    return Draw(seed).arguments()


@each_mode
@pytest.mark.parametrize("name", ["sgd", "given", "adam", "adam-frozen"])
def test_masked_tokens_are_not_read(name: str, mode: Mode) -> None:
    case = next(c for c in CASES if c.name == name)
    given = arguments(cast(case.batch, torch.float32), mode, torch.float32)
    mask = torch.tensor([True, False, True])
    spoilt = {k: given[k].clone() for k in ("hidden", "advantages")}
    for tensor in spoilt.values():
        tensor[1] = math.nan
    whole = judge(given, "triton")
    part = judge(given | spoilt | {"mask": mask}, "triton")
    for field in FIELDS:
        expected = torch.where(mask.to(DEVICE), getattr(whole, field), 0.0)
        torch.testing.assert_close(getattr(part, field), expected, rtol=1e-6, atol=1e-9)


@each_mode
def test_a_nan_is_reported_not_hidden(mode: Mode) -> None:
    given = arguments(cast(CASES[0].batch, torch.float32), mode, torch.float32)
    given["hidden"][1, 2] = math.nan
    with pytest.raises(capo.InputError, match="hidden"):
        judge(given, "triton")


@pytest.mark.parametrize(
    "mode", [m for m in MODES if m.top_k is None or m.renormalize], ids=lambda m: m.name
)
@pytest.mark.parametrize("granularity", ["sequence", "batch"])
@pytest.mark.parametrize("name", ["sgd", "given", "adam"])
def test_groups(name: str, granularity: str, mode: Mode) -> None:
    case = next(c for c in CASES if c.name == name)
    given = arguments(cast(case.batch, torch.float32), mode, torch.float32)
    given |= {"granularity": granularity, "sequence_ids": torch.tensor([4, 2, 4])}
    assert_within_budget(given)


def test_what_has_no_kernel_is_the_chunked_backend() -> None:
    case = next(c for c in CASES if c.name == "adam-softcap-all")
    for given in (
        arguments(case.batch, MODES[1]),  # float64
        arguments(cast(case.batch, torch.float32), FULL, torch.float32),  # exact Adam, every row
    ):
        ours, theirs = judge(given, "triton"), judge(given, "chunked")
        for name in FIELDS:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(x, Tensor) and x.dtype != torch.uint8
            ):  # bytes: the interpreter's storages
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize(
    ("kind", "top_k"), [("sgd", None), ("given", None), ("sgd", 5), ("given", 5), ("adam", 5)]
)
def test_no_tensor_of_tokens_by_vocabulary(kind: str, top_k: int | None) -> None:
    n, v, d = 64, 160, 4
    m = torch.randn(v, d)
    adam = capo.AdamStep(0.01, (0.9, 0.99), 1e-6, m, m.square(), 3)
    steps = {"sgd": capo.SGDStep(0.1), "given": capo.GivenStep(m), "adam": adam}
    given = {
        "hidden": torch.randn(n, d),
        "head_weight": torch.randn(v, d),
        "token_ids": torch.randint(v, (n,)),
        "advantages": torch.randn(n),
        "step": steps[kind],
        "top_k": top_k,
    }
    with tiling(held=16 * v), Largest() as seen:
        judge(given, "triton")
    # Held logits of 16 tokens, and the candidates sorted among them; h and W are the caller's.
    assert seen.elements <= 16 * v if top_k else seen.elements <= 16 * n


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize("k", [0, 1, 3, 9])
def test_largest_logits_of_grouped_maxima(groups: int, k: int) -> None:
    size, n = 16, 5
    keys = torch.randn(n, groups * size)
    keys[:, ::3] = ABSENT
    keys[1, size:] = ABSENT  # whole groups without an entry
    maxima = keys.view(n, groups, size).amax(dim=2)
    top, rows = largest(Keys(keys, maxima), k)
    assert torch.equal(top, keys.topk(k, dim=1).values)
    assert torch.equal(keys.gather(1, rows), top)


@triton.jit
def _softcap_kernel(x, z, slope, bend, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a, b, c = activate(tl.load(x + i), 1.0, 1.0, 1.0, -2.0, True)
    tl.store(z + i, a)
    tl.store(slope + i, b)
    tl.store(bend + i, c)


def test_softcap_is_relatively_exact_from_tiny_to_saturated_logits() -> None:
    magnitude = torch.logspace(-8, 1.6, 512)
    x = torch.cat([magnitude, -magnitude]).to(DEVICE)
    z, slope, bend = (torch.empty_like(x) for _ in range(3))
    _softcap_kernel[(1,)](x, z, slope, bend, COUNT=1024)
    exact = x.double().tanh()
    complement = 1.0 / x.double().cosh() ** 2
    torch.testing.assert_close(z.double(), exact, rtol=5e-7, atol=0)
    torch.testing.assert_close(slope.double(), complement, rtol=2e-6 * 40, atol=0)
    torch.testing.assert_close(bend.double(), -2 * exact * complement, rtol=2e-6 * 40, atol=0)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("numel", [1, 1023, 1024, 5000])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_parameter_moved_by_adam(narrow: torch.dtype, numel: int, decay: float) -> None:
    """Against the optimizer's own step in float64, from the same rounded numbers; nothing touched."""
    generator = torch.Generator().manual_seed(numel)
    drawn = [torch.randn(numel, generator=generator) for _ in range(3)]
    value, grad, first = (each.to(DEVICE, narrow) for each in drawn)
    second = torch.rand(numel, generator=generator).to(DEVICE, narrow) ** 2
    before = [each.clone() for each in (value, grad, first, second)]
    step = capo.AdamStep(0.01, (0.9, 0.999), 1e-8, first, second, 3, decay)
    moved = moved_by_kernel(step, value, grad, 0.5)
    assert moved.dtype == narrow
    for each, old in zip((value, grad, first, second), before, strict=True):
        assert torch.equal(each, old)

    twin = torch.nn.Parameter(value.double())
    optimizer = torch.optim.AdamW([twin], lr=0.005, weight_decay=decay)  # half of it: scale 0.5
    state = {"exp_avg": first.double(), "exp_avg_sq": second.double(), "step": torch.tensor(3.0)}
    optimizer.state[twin] = state
    twin.grad = grad.double()
    optimizer.step()
    precision = 2e-6 if narrow == torch.float32 else torch.finfo(narrow).eps
    torch.testing.assert_close(moved.double(), twin.detach(), rtol=precision, atol=precision * 0.1)
