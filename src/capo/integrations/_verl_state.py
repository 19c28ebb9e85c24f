"""CAPO's part of a verl checkpoint: one file beside rank 0's shards, for all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from capo.core.errors import InputError
from capo.integrations._trl_state import STATE_FILE, load_state, save_state
from capo.integrations._trl_world import World


def save_once(folder: Path, state: dict[str, Any], world: World) -> None:
    """Write the state, which is the same in all processes, from the first of them."""
    if world.rank == 0:
        save_state(folder, state)
    dist.barrier()


def load_everywhere(
    folder: Path, world: World, device: torch.device, *, required: bool
) -> dict[str, Any]:
    """Read the state where the first process's shards are, and hand it to all.

    Args:
        folder: verl's checkpoint of the actor.
        world: the processes.
        device: where tensors travel.
        required: whether a checkpoint without moments is an error.

    Raises:
        InputError: in every process, where the first finds nothing that is required.
    """
    state: dict[str, Any] = {}
    if world.rank == 0:
        state = load_state(folder, required=False)
    if world.alone:
        return _checked(state, folder, required)
    values: list[Any] = [
        {k: (tuple(v.shape), v.dtype) if torch.is_tensor(v) else v for k, v in state.items()}
    ]
    tensors = [[name for name, v in state.items() if torch.is_tensor(v)]]
    dist.broadcast_object_list(values)
    dist.broadcast_object_list(tensors)
    for name, value in values[0].items():
        if name not in tensors[0]:
            state[name] = value
            continue
        shape, dtype = value
        tensor = (
            state[name].to(device)
            if world.rank == 0
            else torch.empty(shape, dtype=dtype, device=device)
        )
        dist.broadcast(tensor, 0)
        state[name] = tensor
    return _checked(state, folder, required)


def _checked(state: dict[str, Any], folder: Path, required: bool) -> dict[str, Any]:
    if required and "exp_avg" not in state and state.get("steps") != 0:
        raise InputError(
            "trainer.resume_from_path",
            f"{folder} holds no simulated moments ({STATE_FILE}); it must be a checkpoint of CAPO with "
            "moments='simulated', or set fsdp_config.capo.moments=optimizer.",
        )
    return state
