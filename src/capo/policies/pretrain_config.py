"""The recipe's knobs, validated: what `capo pretrain --config FILE` may say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from capo.core.errors import InputError
from capo.core.tables import laid_over
from capo.policies.architectures import GROUPED, Architecture
from capo.policies.lessons import strategies_of
from capo.policies.recipes import recipe_names, recipe_settings
from capo.policies.tokenizer import SMALLEST_BPE

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class PretrainTask(BaseModel):
    """``[task]``: what is learned; ``params`` as in a run's ``[task]``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["sums", "reasoning_gym"] = "sums"
    params: dict[str, Any] = Field(default_factory=dict)


class PretrainConfig(BaseModel):
    """Every figure that the weights depend on. The defaults are the shipped checkpoint's recipe.

    Attributes:
        seed: of the initial weights and of the data.
        strategies: probability of each strategy of the task (`capo.policies.strategies`,
            `capo.policies.worked`); they sum to 1.
        layers, hidden_size, intermediate_size, heads: the shape of the model.
        steps, batch_size: optimizer steps, and problems in each.
        learning_rate: AdamW's peak; linear warm-up over ``warmup_steps``, then cosine to zero.
        threads: CPU threads; another number gives slightly other weights.
        eval_problems, eval_k, eval_seed: the measurement that ends up in ``recipe.json``.
        task: what is learned.
        architecture: the family; see `capo.policies.architectures`.
        vocabulary: entries of a byte-level BPE tokenizer, trained on the task's own texts first;
            None: the 64 characters of `capo.policies.tokenizer`.
        sorted_batches: batches drawn at once and sorted by length, so that they hold less padding.
        positions: the longest prompt with its completion that the model is made for, tokens.
        kv_heads: key and value heads of the attention; None: as the architecture has it (`qwen2` and
            `llama` alone can be asked for fewer).
        device: where the model is trained, ``"cpu"`` or ``"cuda"``.
        bf16: multiply in bfloat16; weights and optimizer stay in float32.
        workers: processes that make the lessons beside the training; 0: the training's own. The lessons
            are others than without, and the same for every number of workers.
        max_seconds: of training, from the first step on; None: no limit. The schedule goes to its end
            within it, so that ``steps`` is an upper bound.
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
    task: PretrainTask = PretrainTask()
    architecture: Architecture = "qwen2"
    vocabulary: Annotated[int | None, Field(ge=SMALLEST_BPE)] = None
    positions: Positive = 128
    sorted_batches: Positive = 1
    kv_heads: Positive | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    bf16: bool = False
    workers: Annotated[int, Field(ge=0)] = 0
    max_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _known_mixture(self) -> Self:
        allowed = strategies_of(self.task.name, self.task.params)
        unknown = sorted(set(self.strategies) - set(allowed))
        if unknown:
            raise InputError(
                "strategies", f"{unknown[0]!r} is unknown; allowed: {', '.join(allowed)}."
            )
        total = sum(self.strategies.values())
        if abs(total - 1) > 1e-6:
            raise InputError("strategies", f"the probabilities must sum to 1, got {total:g}.")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % (2 * self.heads):  # rotary embeddings need an even head size
            raise ValueError(f"hidden_size must be a multiple of 2 × heads, got {self.hidden_size}")
        if self.kv_heads is not None:
            if self.architecture not in GROUPED:
                allowed = " or ".join(GROUPED)
                raise InputError("kv_heads", f"must be left out, or architecture be {allowed}.")
            if self.heads % self.kv_heads:
                raise InputError(
                    "kv_heads", f"must divide heads ({self.heads}), got {self.kv_heads}."
                )
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
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, InputError):
                raise cause from error
            field = ".".join(str(part) for part in first["loc"]) or "config"
            if first["type"] == "extra_forbidden":
                allowed = ", ".join(cls.model_fields)
                raise InputError(field, f"is not a known key; allowed: {allowed}.") from error
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(field, f"{message} (got {first['input']!r}).") from error

    @classmethod
    def from_toml(cls, path: str | Path, overrides: dict[str, Any] | None = None) -> Self:
        """Read a sparse TOML file, or a recipe by name; ``overrides`` are laid over it, table by table.

        Raises:
            InputError: the file is missing or is not TOML, or see `from_dict`.
        """
        if str(path) in recipe_names():
            return cls.from_dict(laid_over(recipe_settings(str(path)), overrides or {}))
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                "config",
                f"'{path}' cannot be read: {error.strerror}; recipes by name are "
                f"{', '.join(recipe_names())}.",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError("config", f"'{path}' is not valid TOML: {error}.") from error
        return cls.from_dict(laid_over(values, overrides or {}))

    def command(self) -> str:
        """The command line that repeats this recipe, overrides included."""
        changed = self.model_dump(exclude_defaults=True)
        flags = [f"--set {key}={_toml_value(value)}" for key, value in changed.items()]
        return " ".join(["capo", "pretrain", "--output", "DIR", *flags])


def _toml_value(value: object) -> str:
    if isinstance(value, dict):
        return f"'{_toml_table(value)}'"
    if isinstance(value, tuple):
        return f"'{list(value)}'"
    return str(value)


def _toml_table(value: object) -> str:
    if isinstance(value, dict):
        pairs = ", ".join(f"{key} = {_toml_table(item)}" for key, item in value.items())
        return f"{{{pairs}}}"
    return json.dumps(value)  # numbers, lists and basic strings look the same in TOML
