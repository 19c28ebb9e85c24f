"""`GRPOConfig` and what CAPO adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from trl import GRPOConfig

import capo
from capo.core.errors import InputError
from capo.core.statistics import IMPLEMENTATIONS
from capo.core.token_rules import Lopti

if TYPE_CHECKING:
    from capo.core.selection import Rule
    from capo.core.token_rules import TokenRule

_CHOICES = {
    "step_model": ("adam", "sgd"),
    "moments": ("simulated", "optimizer"),
    "fisher": ("sampled", "exact"),
    "advantage_baseline": ("group", "none"),
    "impl": IMPLEMENTATIONS,
}

_GUARDED = {"learning_rate": 1e-4, "num_iterations": 4}
_PLAIN = {each.name: each.default for each in fields(GRPOConfig) if each.name in _GUARDED}


@dataclass
class CAPOConfig(GRPOConfig):  # type: ignore[misc]
    """`GRPOConfig` and what CAPO adds to it.

    The defaults are what our measurements support (results/trust_region): a trust region on every step
    whose budget sets itself, four passes over the same completions, no token selection. The paper's
    algorithm is ``selection="capo", trust_region=None``; plain GRPO is ``trust_region=None``. With the
    trust region ``learning_rate`` is an upper bound only, 1e-4 where none is given; without one (or one
    that only measures) both defaults are `GRPOConfig`'s own.
    Dr.CAPO is ``selection="dr_capo", loss_type="dr_grpo", scale_rewards="none"``; ReinCAPO is
    ``selection="reincapo", advantage_baseline="none"``.

    Args:
        selection: which tokens may act. ``"capo"``, ``"dr_capo"`` or ``"reincapo"``, the paper's
            thresholds; or a dict of `policy_shift` (nats), `objective_shift` ([low, high], either
            may be None) and `denominator` (``"kept"``: each sequence is renormalised over its kept
            tokens; ``"all"``: the loss's denominators stay), with `rule` ``"soft"``, ``"quantile"``
            or ``"nats"``, or a token rule of others (`capo.core.token_rules`), for another rule's
            arguments (`capo.make_rule`); or None, no selection.
        step_model: whose step is judged, ``"adam"`` (the paper's) or ``"sgd"``.
        moments: Adam's moments: ``"simulated"`` from the last-layer gradients of accepted tokens
            (the paper's), or the ``"optimizer"``'s own. The latter need no memory, but with tied
            embeddings they hold the input embedding's gradient as well.
        fisher: policy shift from the ``"sampled"`` (the paper's) or the ``"exact"`` Fisher.
        curvature_top_k: vocabulary rows per token in the curvature: the sampled token and the
            likeliest others; None for all. (`top_k` is GRPOConfig's, of sampling.)
        renormalize: renormalise the policy over those rows, as the paper does.
        grad_scale: factor on a token's own gradient where it meets Adam's moments.
        advantage_baseline: ``"group"``, TRL's advantages; ``"none"``, REINFORCE without a baseline:
            the advantage is the weighted sum of the rewards, neither centred nor scaled.
        impl: backend of the curvature, see `capo.token_curvature`.
        depth: what a token is judged by. None: by its own step of the last layer (the paper). ``"all"``
            or n: by what the whole micro-batch's step does to it, seen through all layers or the last n
            and the head (0: the head). Costs a second backward pass and a forward one with derivatives.
            Its policy shifts are of the exact Fisher, whatever `fisher` is.
        trust_region: keep every optimizer step within a policy shift. None: off. ``"auto"``: a budget
            that follows from entropy, batch and length. A number: the budget δ, mean KL in nats a token.
            A dict: `capo.TrustRegion`'s arguments, `policy_shift` None to measure without scaling.

    Raises:
        InputError: a value is not allowed; names the field and what is.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "selection",
        "trust_region",
    ]

    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "With a trust region an upper bound (1e-4): the budget sets the step's length. "
            "Without one as in GRPOConfig."
        },
    )
    num_iterations: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps on the same completions: 4 with a trust region, 1 without."
        },
    )
    selection: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Preset 'capo', 'dr_capo' or 'reincapo', or a dict of thresholds."},
    )
    step_model: str = field(default="adam", metadata={"help": "'adam' or 'sgd'."})
    moments: str = field(default="simulated", metadata={"help": "'simulated' or 'optimizer'."})
    fisher: str = field(default="sampled", metadata={"help": "'sampled' or 'exact'."})
    curvature_top_k: int | None = field(
        default=50, metadata={"help": "Vocabulary rows per token in the curvature; None: all."}
    )
    renormalize: bool = field(
        default=True, metadata={"help": "Renormalise the policy over the top-k rows."}
    )
    grad_scale: float = field(
        default=1.0, metadata={"help": "Factor on a token's gradient where it meets the moments."}
    )
    advantage_baseline: str = field(
        default="group", metadata={"help": "'group', or 'none' for REINFORCE."}
    )
    impl: str = field(default="auto", metadata={"help": "Backend of the curvature."})
    depth: int | str | None = field(
        default=None,
        metadata={"help": "Judge tokens by the real step: 'all' layers or the last n; None: own."},
    )
    trust_region: dict[str, Any] | str | float | None = field(
        default="auto",
        metadata={"help": "'auto', a budget in nats a token, or a dict of options; None: off."},
    )

    def __post_init__(self) -> None:
        """Check what CAPO adds, then let TRL check the rest."""
        if isinstance(self.trust_region, str):
            self.trust_region = _number(self.trust_region)
        region = self.region()
        own = _GUARDED if region is not None and region.scales else _PLAIN
        for name, value in own.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(repr(choice) for choice in allowed)
                raise InputError(name, f"must be {choices}, got {getattr(self, name)!r}.")
        top_k = self.curvature_top_k
        if top_k is not None and not (isinstance(top_k, int) and top_k >= 1):
            raise InputError("curvature_top_k", f"must be an integer ≥ 1 or None, got {top_k!r}.")
        if isinstance(self.depth, str) and self.depth.isdigit():
            self.depth = int(self.depth)  # from a command line
        whole = isinstance(self.depth, int) and not isinstance(self.depth, bool) and self.depth >= 0
        if not (whole or self.depth in (None, "all")):
            raise InputError("depth", f"must be None, 'all' or an integer ≥ 0, got {self.depth!r}.")
        if not self.grad_scale > 0:
            raise InputError("grad_scale", f"must be positive, got {self.grad_scale!r}.")
        if self.advantage_baseline == "none" and self.multi_objective_aggregation != (
            "sum_then_normalize"
        ):
            raise InputError(
                "advantage_baseline",
                "'none' needs multi_objective_aggregation='sum_then_normalize', since it does not "
                "normalise.",
            )
        if isinstance(self.rule(), Lopti) and (self.num_iterations or 0) % 2:
            raise InputError("num_iterations", "must be even with the rule 'lopti'.")

    def region(self) -> capo.TrustRegion | None:
        """The trust region that `trust_region` stands for, or None.

        Raises:
            InputError: `trust_region` is not possible.
        """
        return capo.make_trust_region(self.trust_region)

    def rule(self) -> Rule | TokenRule | None:
        """The selection rule that `selection` stands for, or None.

        Raises:
            InputError: `selection` names no preset or rule, or its arguments are impossible.
        """
        return capo.make_rule(self.selection)


def _number(text: str) -> str | float:
    """A number that a command line handed over as text."""
    try:
        return float(text)
    except ValueError:
        return text
