"""``[capo.selection]``: the tables that it may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator

from capo.core.errors import InputError
from capo.lab.sections import OpenBound, Section, quoted, sequence, validate


class ThresholdsTable(Section):
    """``[capo.selection]`` written out: keep iff low ≤ m_H ≤ high and m_F ≤ policy_shift."""

    policy_shift: Annotated[OpenBound, Field(ge=0)] = None
    objective_shift: Annotated[tuple[OpenBound, OpenBound], BeforeValidator(sequence)] = (
        None,
        None,
    )
    denominator: Literal["kept", "all"] = "kept"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, high = self.objective_shift
        if low is not None and high is not None and low > high:
            raise InputError(
                "capo.selection.objective_shift",
                f"the low bound must not exceed the high bound, got [{low}, {high}].",
            )
        return self


class RuleTable(Section):
    """``[capo.selection]`` with a rule other than hard thresholds; see ``capo.make_rule``."""

    rule: Literal["soft", "quantile", "nats"]
    policy_shift: OpenBound = None
    objective_shift: Annotated[tuple[OpenBound, OpenBound] | None, BeforeValidator(sequence)] = None
    sharpness: float | None = None
    budget: float | None = None
    denominator: Literal["kept", "all"] | None = None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        from capo.core.rules import make_rule  # torch: not for `capo --help`

        try:
            make_rule(self.model_dump(exclude_none=True))
        except InputError as error:
            raise InputError(f"capo.{error.field}", error.message) from None
        return self


class TokenRuleTable(Section):
    """``[capo.selection]`` with a token rule of others; see `capo.core.token_rules`.

    The rule's arguments may stand beside its name; every one of them is written out.
    """

    rule: Literal["gtpo", "stapo", "lopti", "reweight", "clip_cov", "kl_cov", "same_rate"]
    arguments: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        from capo.core.token_rules import filled  # torch: not for `capo --help`

        flat = {key: item for key, item in value.items() if key not in ("rule", "arguments")}
        try:
            arguments = filled(value["rule"], flat | value.get("arguments", {}))
        except InputError as error:
            raise InputError(f"capo.selection.{error.field}", error.message) from None
        return {"rule": value["rule"], "arguments": arguments}

    def spec(self) -> dict[str, Any]:
        """As `CAPOConfig.selection` takes it."""
        return {"rule": self.rule, **self.arguments}


SELECTION_NAMES = ("capo", "dr_capo", "reincapo")
TOKEN_RULE_NAMES: tuple[str, ...] = get_args(TokenRuleTable.model_fields["rule"].annotation)


def as_selection(value: object) -> object:
    """A name, a table in words, or a table: checked.

    Raises:
        InputError: it is none of these.
    """
    # A union would report an error once per branch; the value's own type says which one is meant.
    if isinstance(value, dict):
        table: type[Section] = ThresholdsTable
        if value.get("rule") in TOKEN_RULE_NAMES:
            table = TokenRuleTable
        elif value.get("rule", "thresholds") != "thresholds":
            table = RuleTable
        else:
            value = {key: item for key, item in value.items() if key != "rule"}
        return validate(table, value, prefix=("capo", "selection"))
    if value is None or value == "none":
        return None
    if isinstance(value, ThresholdsTable | RuleTable | TokenRuleTable) or value in SELECTION_NAMES:
        return value
    raise InputError(
        "capo.selection",
        f"must be 'none', one of {quoted(SELECTION_NAMES)}, or a table with policy_shift, "
        f"objective_shift and denominator (or a rule and its arguments), got {value!r}.",
    )
