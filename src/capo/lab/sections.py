"""The ground of every configuration section: field types, and errors in one sentence."""

from __future__ import annotations

import difflib
import math
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from capo.core.errors import InputError

Seed = Annotated[int, Field(ge=0, lt=2**31)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]


def infinite_is_open(bound: object) -> object:
    """TOML has no null: an infinite bound is how a file says "no bound on this side"."""
    return None if isinstance(bound, float) and math.isinf(bound) else bound


def none_word(value: object) -> object:
    """TOML has no null: the word ``none`` switches an inherited value off."""
    return None if value == "none" else value


def sequence(value: object) -> object:
    """TOML and JSON have arrays where we keep tuples."""
    return tuple(value) if isinstance(value, list) else value


OpenBound = Annotated[float | None, BeforeValidator(infinite_is_open)]
Interval = Annotated[tuple[OpenBound, OpenBound], BeforeValidator(sequence)]


class Section(BaseModel):
    """A part of the configuration: unknown keys and coerced types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SectionT = TypeVar("SectionT", bound=Section)


def validate(
    section: type[SectionT], document: dict[str, Any], prefix: tuple[str, ...] = ()
) -> SectionT:
    """``document`` as a section.

    Raises:
        InputError: the first thing wrong with it, named by its dotted key.
    """
    try:
        return section.model_validate(document)
    except ValidationError as error:
        # An unknown key first: it explains a value that is "missing" elsewhere.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise _input_error(section, details[0], prefix) from None


def _input_error(
    section: type[Section], detail: ErrorDetails, prefix: tuple[str, ...]
) -> InputError:
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    location = (*prefix, *(str(part) for part in detail["loc"]))
    field = ".".join(location)
    if detail["type"] == "extra_forbidden":
        allowed = list(_section_at(section, detail["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(allowed)}."
        return InputError(field, f"unknown key, {hint}")
    if detail["type"] == "missing":
        return InputError(field, "is missing.")
    message = detail["msg"].removeprefix("Input ").removeprefix("should ").removeprefix("be ")
    return InputError(field, f"must be {message}, got {detail['input']!r}.")


def _section_at(section: type[Section], location: tuple[int | str, ...]) -> type[Section]:
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, Section)
        section = annotation
    return section


def quoted(names: tuple[str, ...]) -> str:
    """Names for a message: ``'a', 'b'``."""
    return ", ".join(repr(name) for name in names)
