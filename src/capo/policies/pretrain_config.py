"""The recipe's knobs, validated: what `capo pretrain --config FILE` may say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from capo.core.errors import InputError
from capo.policies.strategies import STRATEGIES

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class PretrainConfig(BaseModel):
    """Every figure that the weights depend on. The defaults are the shipped checkpoint's recipe.

    Attributes:
        seed: of the initial weights and of the data.
        strategies: probability of each strategy of `capo.policies.strategies`; they sum to 1.
        layers, hidden_size, intermediate_size, heads: the shape of the Qwen2.
        steps, batch_size: optimizer steps, and sums in each.
        learning_rate: AdamW's peak; linear warm-up over ``warmup_steps``, then cosine to zero.
        threads: CPU threads; another number gives slightly other weights.
        eval_problems, eval_k, eval_seed: the measurement that ends up in ``recipe.json``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0)] = 0
    strategies: dict[str, Annotated[float, Field(ge=0, le=1)]] = {
        "careful": 0.43,
        "stop_early": 0.19,
        "repeat_second": 0.19,
        "guess": 0.19,
    }
    layers: Positive = 4
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    heads: Positive = 4
    steps: Positive = 2400
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 6e-4
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    adam_betas: tuple[Fraction, Fraction] = (0.9, 0.98)
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    threads: Positive = 1
    eval_problems: Positive = 1024
    eval_k: Positive = 16
    eval_seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("strategies")
    @classmethod
    def _known_mixture(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(STRATEGIES))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is unknown; allowed: {', '.join(STRATEGIES)}")
        if abs(sum(value.values()) - 1) > 1e-6:
            raise ValueError(f"the probabilities must sum to 1, got {sum(value.values()):g}")
        return value

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):  # rotary embeddings need an even head size
            raise ValueError(f"hidden_size must be a multiple of 2 × heads, got {self.hidden_size}")
        return self

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Validate ``values``.

        Raises:
            InputError: names the first field that is unknown, ill-typed or out of its range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "config"
            if first["type"] == "extra_forbidden":
                allowed = ", ".join(cls.model_fields)
                raise InputError(field, f"is not a known key; allowed: {allowed}.") from error
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(field, f"{message} (got {first['input']!r}).") from error

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a sparse TOML file; ``overrides`` win over it.

        Raises:
            InputError: the file is missing or is not TOML, or see `from_dict`.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError("config", f"'{path}' cannot be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError("config", f"'{path}' is not valid TOML: {error}.") from error
        return cls.from_dict(values | overrides)

    def command(self) -> str:
        """The command line that repeats this recipe, overrides included."""
        changed = self.model_dump(exclude_defaults=True)
        flags = [f"--set {key}={_toml_value(value)}" for key, value in changed.items()]
        return " ".join(["capo", "pretrain", "--output", "DIR", *flags])


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {item}" for key, item in value.items())
        return f"'{{{pairs}}}'"
    if isinstance(value, tuple):
        return f"'{list(value)}'"
    return str(value)
