"""``[capo.trust_region]``: how far an optimizer step may move the policy."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, model_validator

from capo.core.errors import InputError
from capo.lab.sections import PositiveFloat, Section, infinite_is_open, validate

KEY = "capo.trust_region"


def _policy_shift(value: object) -> object:
    """A budget, ``"auto"``, or no budget: ``none``, or an infinite one."""
    value = None if value == "none" else infinite_is_open(value)
    if value in ("auto", None) or (_is_number(value) and math.isfinite(value) and value > 0):  # type: ignore[arg-type,operator]
        return value
    raise InputError(
        f"{KEY}.policy_shift",
        f"must be 'auto', 'none' or a number > 0 (nats a token), got {value!r}.",
    )


def depth_or_none(value: object) -> object:
    """``[capo] depth``: ``none``, ``"all"`` or a number of layers."""
    if value is None or value == "none" or _is_depth(value):
        return None if value == "none" else value
    raise InputError("capo.depth", f"must be 'none', 'all' or an integer ≥ 0, got {value!r}.")


def _is_depth(value: object) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return whole or value == "all"


def _depth(value: object) -> object:
    if _is_depth(value):
        return value
    raise InputError(f"{KEY}.depth", f"must be 'all' or an integer ≥ 0, got {value!r}.")


def _sequences(value: object) -> object:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value in ("auto", "all", None) or (whole and value > 0):  # type: ignore[operator]
        return None if value == "all" else value
    raise InputError(f"{KEY}.sequences", f"must be 'auto', 'all' or an integer ≥ 1, got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class TrustRegionTable(Section):
    """``[capo.trust_region]``, every key written out; see `capo.TrustRegion` for what they mean.

    ``policy_shift = "none"`` scales no step and only writes down what each one did (the ledger);
    ``sequences = "all"`` predicts and measures on every completion of the batch.
    """

    policy_shift: Annotated[float | Literal["auto"] | None, BeforeValidator(_policy_shift)]
    predictor: Literal["measured", "deep", "head"]
    sequences: Annotated[int | Literal["auto"] | None, BeforeValidator(_sequences)]
    depth: Annotated[int | Literal["all"], BeforeValidator(_depth)]
    step_length: Literal["radius", "quadratic"]
    cruise: PositiveFloat

    @model_validator(mode="after")
    def _usable(self) -> Self:
        from capo.core.trust_region import make_trust_region  # torch: not for `capo --help`

        try:
            make_trust_region(self.spec())
        except InputError as error:
            raise InputError(f"capo.{error.field}", error.message) from None
        return self

    def spec(self) -> dict[str, Any]:
        """As `CAPOConfig.trust_region` takes it."""
        return self.model_dump(mode="json")


def as_table(value: object) -> TrustRegionTable | None:
    """The table that a word, a number or a sparse table stands for; None for ``none``.

    Raises:
        InputError: none of those, or a key of the table is wrong.
    """
    if value is None or value == "none":
        return None
    if isinstance(value, TrustRegionTable):
        return value
    if value == "auto" or _is_number(value):
        try:
            value = {"policy_shift": _policy_shift(value)}
        except InputError as error:
            raise InputError(KEY, error.message) from None
    if not isinstance(value, dict):
        raise InputError(
            KEY,
            "must be 'none', 'auto', a policy shift > 0 in nats a token, or a table with "
            f"{', '.join(TrustRegionTable.model_fields)}, got {value!r}.",
        )
    from capo.core.trust_region import TrustRegion

    # What is left out is written out: a run's identity does not follow a default that changes.
    filled = dataclasses.asdict(TrustRegion()) | value
    return validate(TrustRegionTable, filled, prefix=tuple(KEY.split(".")))
