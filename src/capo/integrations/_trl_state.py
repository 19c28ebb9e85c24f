"""CAPO's part of a checkpoint, the simulated moments and the trust region: one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from capo.core.errors import InputError

STATE_FILE = "capo_state.safetensors"


def save_state(directory: Path, state: dict[str, Any] | None) -> None:
    """Write `state` (tensors and JSON values) into a checkpoint directory; None writes nothing."""
    if state is None:
        return
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items() if torch.is_tensor(v)}
    values = {k: v for k, v in state.items() if not torch.is_tensor(v)}
    save_file(tensors, directory / STATE_FILE, metadata={"values": json.dumps(values)})


def load_state(directory: Path, *, required: bool) -> dict[str, Any]:
    """Read what :func:`save_state` wrote; empty where there is nothing.

    Args:
        directory: the checkpoint.
        required: whether one without simulated moments is an error.

    Raises:
        InputError: they are required and not there.
    """
    path, state = directory / STATE_FILE, {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            state = {**tensors, **json.loads(file.metadata()["values"])}
    if required and "exp_avg" not in state:
        raise InputError(
            "resume_from_checkpoint",
            f"{directory} holds no simulated moments ({STATE_FILE}); it must be a checkpoint of "
            "CAPOTrainer with moments='simulated', or set moments='optimizer'.",
        )
    return state
