"""What CAPO is told through verl's own configuration, and what it cannot work with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import capo
from capo.core.errors import InputError
from capo.core.statistics import IMPLEMENTATIONS
from capo.core.token_rules import TokenRule

if TYPE_CHECKING:
    from capo.core.selection import Rule

_CHOICES = {
    "step_model": ("adam", "sgd"),
    "moments": ("simulated", "optimizer"),
    "fisher": ("sampled", "exact"),
    "impl": IMPLEMENTATIONS,
}


@dataclass(frozen=True)
class Monitored:
    """What a monitor looks at.

    Attributes:
        rule: whose rejections are counted.
        sequences: completions on which a step is measured; None for all.
    """

    rule: Rule
    sequences: int | str | None


@dataclass(frozen=True)
class Options:
    """The keys of ``actor_rollout_ref.actor.fsdp_config.capo``.

    Args:
        selection: which tokens may act: ``"capo"``, ``"dr_capo"`` or ``"reincapo"`` (the paper's
            thresholds), a mapping of a rule's arguments (:func:`capo.make_rule`), or None.
        trust_region: keep every optimizer step within a policy shift: ``"auto"``, a budget in nats a
            token, a mapping of :class:`capo.TrustRegion`'s arguments, or None.
        step_model: whose step is judged, ``"adam"`` or ``"sgd"``.
        moments: ``"simulated"`` (the paper's; two ``[V, d]`` float32 tensors in every process) or the
            ``"optimizer"``'s own.
        fisher: policy shift from the ``"sampled"`` or the ``"exact"`` Fisher.
        curvature_top_k: vocabulary rows per token in the curvature; None for all.
        renormalize: renormalise the policy over those rows, as the paper does.
        grad_scale: factor on a token's own gradient where it meets Adam's moments.
        impl: backend of the curvature, see :func:`capo.token_curvature`.
        monitor: only look: true, or a mapping of `thresholds` (whose rejections are counted, as
            `selection`; the paper's) and `sequences` (completions on which a step is measured: ``"auto"``,
            a number, or null for all). No bit of the training changes.

    Raises:
        InputError: a value is not allowed; names the key and what is.
    """

    selection: dict[str, Any] | str | None = None
    trust_region: dict[str, Any] | str | float | None = None
    step_model: str = "adam"
    moments: str = "simulated"
    fisher: str = "sampled"
    curvature_top_k: int | None = 50
    renormalize: bool = True
    grad_scale: float = 1.0
    impl: str = "auto"
    monitor: dict[str, Any] | bool | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = " or ".join(repr(choice) for choice in allowed)
                raise _error(name, f"must be {choices}, got {getattr(self, name)!r}.")
        top_k = self.curvature_top_k
        if top_k is not None and not (_is_number(top_k, int) and top_k >= 1):
            raise _error("curvature_top_k", f"must be an integer ≥ 1 or null, got {top_k!r}.")
        if not isinstance(self.renormalize, bool):
            raise _error("renormalize", f"must be true or false, got {self.renormalize!r}.")
        if not (_is_number(self.grad_scale, int | float) and self.grad_scale > 0):
            raise _error("grad_scale", f"must be a positive number, got {self.grad_scale!r}.")
        self.rule()
        if self.monitored() is not None and (self.selection, self.trust_region) != (None, None):
            raise _error("monitor", "only looks: leave out selection and trust_region, or monitor.")
        region = self.region()
        if region is not None and region.step_length == "quadratic":
            raise _error(
                "trust_region.step_length",
                "must be 'radius' in verl, where no gradient of a part of a batch is to be had.",
            )
        if region is not None and region.predictor == "deep":
            raise _error("trust_region.predictor", "must be 'measured' or 'head' in verl.")

    @property
    def on(self) -> bool:
        """Whether anything is to be done."""
        return self.monitored() is not None or (self.selection, self.trust_region) != (None, None)

    def monitored(self) -> Monitored | None:
        """What `monitor` stands for; None where nothing is only looked at."""
        given = self.monitor
        if given is None or given is False:
            return None
        if given is True:
            given = {}
        if not isinstance(given, Mapping):
            raise _error("monitor", f"must be true, false or a mapping, got {given!r}.")
        for key in given:
            if key not in ("thresholds", "sequences"):
                raise _error(f"monitor.{key}", "is not known; allowed are thresholds, sequences.")
        sequences = given.get("sequences", "auto")
        if not (sequences in ("auto", None) or (_is_number(sequences, int) and sequences >= 1)):
            raise _error(
                "monitor.sequences", f"must be 'auto', an integer ≥ 1 or null, got {sequences!r}."
            )
        try:
            rule = capo.make_rule(given.get("thresholds", "capo"))
        except InputError as error:
            raise _error(f"monitor.thresholds.{error.field}", error.message) from None
        if rule is None or isinstance(rule, TokenRule):
            raise _error("monitor.thresholds", "must be a rule of shifts.")
        return Monitored(rule, sequences)

    @property
    def curvature(self) -> dict[str, Any]:
        """The keyword arguments of :func:`capo.token_curvature`."""
        return {
            "fisher": self.fisher,
            "top_k": self.curvature_top_k,
            "renormalize": self.renormalize,
            "impl": self.impl,
        }

    def rule(self) -> Rule | None:
        """The selection rule that `selection` stands for."""
        try:
            rule = capo.make_rule(self.selection)
        except InputError as error:
            raise _error(error.field, error.message) from None
        if isinstance(rule, TokenRule):
            raise _error(
                "selection", f"must be a rule of shifts; {type(rule).__name__} is TRL's only."
            )
        return rule

    def region(self) -> capo.TrustRegion | None:
        """The trust region that `trust_region` stands for."""
        try:
            return capo.make_trust_region(self.trust_region)
        except InputError as error:
            raise _error(error.field, error.message) from None


def read_options(given: Mapping[str, Any]) -> Options:
    """The options that a configuration's mapping stands for.

    Raises:
        InputError: a key is not known or its value is not allowed.
    """
    known = [f.name for f in fields(Options)]
    for key in given:
        if key not in known:
            raise _error(str(key), f"is not known; allowed are {', '.join(known)}.")
    return Options(**given)


def check_layout(model_config: Any, engine_config: Any) -> None:
    """Refuse a layout that CAPO cannot see through.

    Args:
        model_config: verl's `HFModelConfig`.
        engine_config: verl's `FSDPEngineConfig`.

    Raises:
        InputError: FSDP1, Ulysses sequence parallelism, FSDP2's own offloading, or fused kernels with a
            head that is sharded by itself.
    """
    actor = "actor_rollout_ref.actor"
    off = "or leave selection, trust_region and monitor out of fsdp_config.capo."
    if engine_config.strategy != "fsdp2":
        raise InputError(
            f"{actor}.strategy",
            f"must be fsdp2 for CAPO, got {engine_config.strategy}; set it {off}",
        )
    if engine_config.ulysses_sequence_parallel_size > 1:
        raise InputError(
            f"{actor}.fsdp_config.ulysses_sequence_parallel_size",
            f"must be 1 for CAPO, which needs whole sequences; set it {off}",
        )
    if engine_config.offload_policy:
        raise InputError(
            f"{actor}.fsdp_config.offload_policy",
            f"must be false for CAPO; use param_offload and optimizer_offload, {off}",
        )
    if model_config.use_fused_kernels and not model_config.hf_config.tie_word_embeddings:
        raise InputError(
            "actor_rollout_ref.model.use_fused_kernels",
            f"must be false for CAPO: verl's fused head reads a weight that FSDP2 has sharded; set it {off}",
        )


def _error(key: str, message: str) -> InputError:
    return InputError(f"fsdp_config.capo.{key}", message)


def _is_number(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
