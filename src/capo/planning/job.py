"""A training job as the cost model sees it: devices, sharding, batch, and what of CAPO is on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from capo.core.errors import InputError

Sharding = Literal["ddp", "fsdp2", "zero2", "zero3"]
Precision = Literal["mixed", "bf16", "float32"]
Moments = Literal["simulated", "optimizer"]
_CHOICES = (("sharding", Sharding), ("precision", Precision), ("moments", Moments))


@dataclass(frozen=True)
class Job:
    """A training job.

    Args:
        gpus: processes, one a device.
        sharding: ``"ddp"``, ``"fsdp2"``, ``"zero2"`` or ``"zero3"``; one device shards nothing.
        precision: ``"mixed"``: float32 weights, bf16 passes (autocast, or the engine's own).
            ``"bf16"``: the weights are bf16 too. ``"float32"``.
        completions: completions of one optimizer step, on all devices.
        prompt, length: tokens of a prompt and of a completion, on average.
        group: completions of a prompt.
        micro_batch: completions of one forward pass on one device.
        iterations: optimizer steps on the same completions.
        checkpointing: whether activations are computed again in the backward pass.
        top_k: vocabulary rows that a token is judged by.
        selection: whether tokens are judged and masked.
        moments: ``"simulated"`` (the paper's) or ``"optimizer"``.
        trust_region: whether steps are kept within a policy shift (predictor ``"measured"``).
        sequences: completions on which a step is tried; None: as ``trust_region="auto"`` has it.
        monitor: whether a :class:`capo.CurvatureMonitor` looks at every step.

    Raises:
        InputError: a value is impossible, or the batch does not divide.
    """

    gpus: int = 1
    sharding: Sharding = "fsdp2"
    precision: Precision = "mixed"
    completions: int = 512
    prompt: int = 256
    length: int = 1024
    group: int = 8
    micro_batch: int = 4
    iterations: int = 4
    checkpointing: bool = True
    top_k: int = 50
    selection: bool = True
    moments: Moments = "simulated"
    trust_region: bool = True
    sequences: int | None = None
    monitor: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        counts = ("gpus", "completions", "length", "group", "micro_batch", "iterations", "top_k")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(option(name), f"must be at least 1, got {getattr(self, name)}.")
        if self.prompt < 0:
            raise InputError("--prompt", f"must be at least 0, got {self.prompt}.")
        if self.sequences is not None and self.sequences < 1:
            raise InputError("--sequences", f"must be at least 1, got {self.sequences}.")
        for name, allowed in _CHOICES:
            if getattr(self, name) not in get_args(allowed):
                choices = ", ".join(get_args(allowed))
                raise InputError(
                    option(name), f"must be one of {choices}, got {getattr(self, name)!r}."
                )
        if self.completions % self.group:
            raise InputError(
                "--completions", f"must be whole groups of {self.group}, got {self.completions}."
            )
        if self.completions % (self.gpus * self.micro_batch):
            raise InputError(
                "--completions",
                f"must be a multiple of --gpus × --micro-batch = {self.gpus * self.micro_batch}, "
                f"got {self.completions}.",
            )
        if self.monitor and self.gpus > 1:
            raise InputError("--monitor", "looks at one process; leave it out or give --gpus 1.")

    @property
    def alone(self) -> bool:
        """Whether there is one device."""
        return self.gpus == 1

    @property
    def micro_batches(self) -> int:
        """Forward passes of one optimizer step on one device."""
        return self.completions // (self.gpus * self.micro_batch)

    @property
    def tokens(self) -> int:
        """Completion tokens of one micro-batch on one device."""
        return self.micro_batch * self.length

    @property
    def exact_hidden(self) -> bool:
        """Whether a step can be measured in the next training pass (float32 passes only)."""
        return self.precision == "float32"

    @property
    def trial_sequences(self) -> int:
        """Completions on which one device tries a step: one of every micro-batch at least."""
        from capo.core.trust_region import auto_sequences

        prompts = math.ceil(self.completions / self.group)
        wanted = self.sequences or auto_sequences(prompts)
        each = max(1, wanted // self.micro_batches)
        return self.micro_batches * max(1, math.ceil(each / self.gpus))

    @property
    def pass_bytes(self) -> int:
        """Bytes of a number in a forward pass."""
        return 4 if self.precision == "float32" else 2

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as the model holds it where nothing is sharded."""
        if self.sharding in ("zero2", "zero3") and not self.alone:
            return self.pass_bytes  # beside the float32 weights of the optimizer
        return 2 if self.precision == "bf16" else 4

    def shard(self, parameters: int, *, of: Literal["weights", "optimizer"]) -> float:
        """Numbers of ``parameters`` that one device holds, of the weights or of what the optimizer has."""
        cut = {"ddp": (), "zero2": ("optimizer",)}.get(self.sharding, ("weights", "optimizer"))
        return parameters / self.gpus if of in cut else float(parameters)


def option(name: str) -> str:
    """A field as the command line calls it."""
    return f"--{name.replace('_', '-')}"
