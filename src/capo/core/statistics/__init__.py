"""The one seam for backends: they differ only in how per-token statistics are produced."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from capo.core.errors import InputError
from capo.core.statistics import chunked, eager, groups, triton_backend
from capo.core.statistics.options import Options, options
from capo.core.steps import GivenStep

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor

    from capo.core.statistics.problem import Problem
    from capo.core.statistics.result import Statistics

IMPLEMENTATIONS = ("auto", "eager", "chunked", "triton")

__all__ = ["IMPLEMENTATIONS", "Options", "compute_statistics", "options"]


def compute_statistics(
    problem: Problem, impl: str, group_ids: Int[Tensor, "N"] | None = None
) -> Statistics:
    """Per-token statistics of a validated problem.

    Args:
        problem: the tokens, the head and the step.
        impl: ``"eager"`` (whole logits), ``"chunked"`` (streaming), ``"triton"`` (fused), or ``"auto"``:
            fused on a GPU where triton is installed, streaming otherwise.
        group_ids: ``[N]`` groups that share a step, or None where each token has its own.

    Raises:
        InputError: ``impl`` is unknown or cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise InputError("impl", f"must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}.")
    if impl == "triton":
        triton_backend.require(problem)
    wanted = impl == "triton" or (impl == "auto" and triton_backend.preferred(problem))
    # A given step is the same for every group: nothing to build.
    if group_ids is not None and not isinstance(problem.step, GivenStep):
        plain = partial(groups.compute, problem, group_ids)
        fused = partial(plain, fused=True)
        if impl == "auto" and wanted:
            return triton_backend.or_plain(fused, plain)
        return fused() if wanted else plain()
    match impl:
        case "eager":
            return eager.compute(problem)
        case "triton":
            return triton_backend.compute(problem)
        case "auto" if wanted:
            return triton_backend.compute_or_chunked(problem)
        case _:
            return chunked.compute(problem)
